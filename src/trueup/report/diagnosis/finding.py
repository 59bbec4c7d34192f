"""A finding, and what the rules share: severities, the stage's name before a key, how far a curve has moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trueup.named import CALLABLE
from trueup.report.figures import num
from trueup.report.read import RunData, Stage, number, pair

ERROR, WARNING, NOTE = "error", "warning", "note"
ORDER = {ERROR: 0, WARNING: 1, NOTE: 2}
ENDS = 0.9  # of the answers should end by themselves
LN2 = math.log(2)


@dataclass(frozen=True)
class Finding:
    """`name` is its heading in docs/diagnose.md; `change` names keys as the command line takes them."""

    name: str
    severity: str
    stage: str
    what: str
    figure: str
    why: str
    change: str


class Say:
    """Makes a stage's findings: keys in `change` are written under the stage's name."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, severity: str, name: str, what: str, figure: str, why: str, change: str) -> Finding:
        return Finding(name, severity, self.stage.name, what, figure, why, change.replace("~", f"{self.stage.name}."))


def samples(stage: Stage) -> float:
    return number(stage.results, "samples") or float(len(stage.samples))


def moved(values: Sequence[float], parts: int = 10) -> tuple[float, float, float]:
    """The means of the first and of the last of so many parts, and the s.d. of their difference by the scatter between
    neighbours."""
    x, k = np.asarray(values, dtype=np.float64), max(1, len(values) // parts)
    scatter = float(np.std(np.diff(x))) / math.sqrt(2) if len(x) > 2 else 0.0
    return float(x[:k].mean()), float(x[-k:].mean()), scatter * math.sqrt(2 / k)


def too_long(stage: Stage) -> Iterator[Finding]:
    lost, rows = number(stage.results, "too_long") or 0.0, number(stage.results, "rows") or 0.0
    if lost > 0.1 * (lost + rows):
        yield Say(stage)(
            WARNING,
            "too-long",
            "many rows were dropped for their length",
            f"{num(lost, 0)} of {num(lost + rows, 0)} rows",
            "What is long is not learned, and the rest is not the data that you meant.",
            "a higher ~max_length, as far as the model’s context goes",
        )


def same_judge(run: RunData, stage: Stage, key: str) -> str:
    """Why the scorer under `key` (a PPO's audit, an evaluation's judge) is no second opinion on what was optimized; ""
    where it is one. The gold score as both is a control, and says so elsewhere."""
    opinion = stage.config.get(key)
    if opinion is None or (isinstance(opinion, str) and CALLABLE.fullmatch(opinion)):
        return ""
    for ppo in run.of("ppo") if key == "judge" else [stage]:
        scorer = ppo.config.get("scorer")
        for part in scorer if isinstance(scorer, Mapping) else [scorer]:
            if part == opinion:
                return "it is the very scorer that PPO optimized"
            one, other = run.stage_of(part), run.stage_of(opinion)
            if one is None or other is None or one.phase != "reward" or other.phase != "reward":
                continue
            a, b = (pair(s.config, "part") or (0.0, 1.0) for s in (one, other))
            if one.config.get("data") == other.config.get("data") and a[0] < b[1] and b[0] < a[1]:
                return (
                    f"the reward models of {one.name} and {other.name} learned from the same comparisons "
                    f"({one.name}.part [{a[0]:g}, {a[1]:g}], {other.name}.part [{b[0]:g}, {b[1]:g}])"
                )
    return ""
