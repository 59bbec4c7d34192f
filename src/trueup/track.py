"""What a run logs, sent to a tracker too: TensorBoard, trackio or wandb, one of them by the recipe's key `track`.

Figures go under their own names at their steps; samples as a table. Nothing is sent anywhere but by the tracker that
was asked for, whose own telemetry is switched off. Not in it: anything that a run needs; `metrics.jsonl` is the record.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from trueup.records import UserError

Kind = Literal["tensorboard", "trackio", "wandb"]
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_ERROR_REPORTING": "false"}
MOST_TEXT = 500


class Tracker(Protocol):
    """What a run tells. Steps that a resumed run does again are told again."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


def check(kind: Kind) -> None:
    """Raises UserError where the tracker's package is not here."""
    if importlib.util.find_spec(kind) is None:
        raise UserError(f"track: {kind} is not installed; pip install {kind}, or 'trueup[track]' for all three")


def start(kind: Kind, folder: Path, *, stage: str, config: Mapping[str, Any], first: int = 0) -> Tracker:
    """The tracker of a stage that works in `folder` and does `first` as its next step. Files go below `folder`, but for
    trackio, which keeps its own."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if kind == "tensorboard":
        return TensorBoard(folder, config, first)
    return Hosted(kind, folder, stage, config)


class TensorBoard:
    """Event files in `folder/tensorboard`; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        rows = [{"key": key, "value": value} for key, value in flat(config).items()]
        self.writer.add_text("config", markdown(rows), first)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.writer.add_text("samples", markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which speaks as wandb does: a project for the run, in it the stage by its folder's name."""

    def __init__(self, kind: Kind, folder: Path, stage: str, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module(kind)
        project, name = folder.parent.name, folder.name
        if kind == "wandb":
            settings = self.module.Settings(console="off", silent=True)
            where = {"dir": str(folder), "id": name, "resume": "allow", "settings": settings}
        else:
            where = {"resume": "allow", "embed": False}
        self.run = self.module.init(project=project, name=name, group=stage, config=dict(config), **where)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[plain(row.get(c)) for c in columns] for row in rows]
        self.run.log({"samples": self.module.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self.run.finish()


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row of metrics: NaN, infinities and what is no number left out."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else str(value)[:MOST_TEXT]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; a text cannot leave its cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)[:MOST_TEXT]
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
