"""Reads a run's folders into plain data. Tolerant: what is missing or unreadable is said, never fatal.

In order: `recipe.json` names the stages; each stage's config, manifest, results, metrics and samples are read where
they are there. Not in it: any judgement of the figures (`headline`), any drawing (`charts`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.named import CALLABLE
from trueup.records import UserError

DONE, UNFINISHED, ABSENT = "done", "unfinished", "not started"


@dataclass
class Stage:
    """One stage of the run, as far as it got."""

    name: str
    phase: str
    folder: Path
    status: str  # DONE, UNFINISHED or ABSENT
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        points = [(row["step"], row[name]) for row in self.metrics if finite(row.get(name)) and finite(row.get("step"))]
        return [float(s) for s, _ in points], [float(v) for _, v in points]

    def data(self, key: str) -> list[tuple[str, str]]:
        """(path, the part of it) of each data set that a key names: one path, or several with their weights."""
        value = self.config.get(key)
        listed = value if isinstance(value, list) else [value] if value else []
        return [
            (str(d.get("path")), " ".join(str(d.get(k) or "") for k in ("name", "data_dir", "split")))
            if isinstance(d, Mapping)
            else (str(d), "  train")
            for d in listed
        ]

    def names(self) -> list[str]:
        """The metrics that have at least one finite value, in the order of their first appearance."""
        seen = {k: None for row in self.metrics for k, v in row.items() if k != "step" and finite(v)}
        return list(seen)

    @property
    def gold_audit(self) -> bool:
        """Whether PPO's audit is a gold score: a callable that the user names. A reward model is another opinion."""
        audit = self.config.get("audit")
        return isinstance(audit, str) and CALLABLE.fullmatch(audit) is not None

    @property
    def control(self) -> bool:
        """Whether PPO optimized the gold score itself: it tells the optimizer's faults from a reward model's."""
        return self.gold_audit and self.config.get("scorer") == self.config.get("audit")

    @property
    def score_axis(self) -> str:
        """A reward model's score is in s.d. of SFT samples; another scorer's in a unit of its own."""
        scorer = self.config.get("scorer")
        asked = scorer.get("ensemble") if isinstance(scorer, Mapping) else scorer
        names = [asked] if isinstance(asked, str) else asked or []
        models = names and not any(CALLABLE.fullmatch(name) for name in names)
        return "proxy score, s.d." if models else "proxy score"

    @property
    def audit_name(self) -> str:
        return "gold score" if self.gold_audit else "audit score"

    def holds(self, path: Any) -> bool:
        """Whether `path` (a model's folder in some stage's config) lies in this stage's folder."""
        return isinstance(path, str) and self.folder.name in Path(path).parts


@dataclass
class RunData:
    """A whole run."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    stages: list[Stage]
    problems: list[str]

    def of(self, phase: str) -> list[Stage]:
        return [s for s in self.stages if s.phase == phase]

    def stage_of(self, path: Any) -> Stage | None:
        """The stage that made the model at `path`."""
        return next((s for s in self.stages if s.holds(path)), None)


def finite(value: Any) -> bool:
    """A number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(data: Any, *keys: str) -> float | None:
    """`data[keys[0]][keys[1]]...` where that is a finite number, else None."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return float(data) if finite(data) else None


def pair(data: Any, *keys: str) -> tuple[float, float] | None:
    """An interval [low, high], else None."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    if isinstance(data, list) and len(data) == 2 and finite(data[0]) and finite(data[1]):
        return float(data[0]), float(data[1])
    return None


def read_run(folder: Path) -> RunData:
    """Raises UserError where `folder` holds no run."""
    path = folder / "recipe.json"
    problems: list[str] = []
    if not path.is_file():
        raise UserError(f"{folder}: not a run (no recipe.json here)")
    top = _object(path, problems)
    found = top.get("recipe")
    recipe: dict[str, Any] = found if isinstance(found, dict) else {}
    folders = top.get("stages")
    if not isinstance(folders, dict):
        raise UserError(f"{path}: expected {{recipe, stages: {{name: folder}}}}")
    stages = [_stage(folder, str(name), str(where), recipe, problems) for name, where in folders.items()]
    return RunData(folder, str(recipe.get("name") or folder.resolve().name), recipe, stages, problems)


def _stage(run: Path, name: str, where: str, recipe: Mapping[str, Any], problems: list[str]) -> Stage:
    folder = run / Path(where).name  # a stage lies in its run, whatever recipe.json says
    config = _object(folder / "config.json", problems)
    manifest = _object(folder / "manifest.json", problems)
    raw = recipe.get("stages")
    keys = raw.get(name) if isinstance(raw, Mapping) else None
    phase = config.get("phase") or manifest.get("phase") or (keys or {}).get("phase") or name
    status = DONE if manifest.get("status") == "done" else UNFINISHED if manifest or config else ABSENT
    inner = config.get("config")
    return Stage(
        name,
        str(phase),
        folder,
        status,
        inner if isinstance(inner, dict) else {},
        manifest,
        _object(folder / "results.json", problems),
        list(_rows(folder / "metrics.jsonl", problems)),
        list(_rows(folder / "samples.jsonl", problems)),
    )


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        data = None
    if not isinstance(data, dict):
        problems.append(f"{path.parent.name}/{path.name} is not a JSON object, so it was left out")
        return {}
    return data


def _rows(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Lines end at a line feed alone: a text may hold other characters that Python takes
    for line ends."""
    if not path.is_file():
        return
    bad = 0
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                bad += 1
    if bad:
        lines = "1 line is" if bad == 1 else f"{bad} lines are"
        problems.append(f"{path.parent.name}/{path.name}: {lines} not a whole JSON object, and left out")
