"""An ensemble as a Scorer: what its members say, each normalized as itself says, as one number.

A folder that `trueup ensemble` made,

    ensemble.json                                {members: [member-0, ...], combine, penalty, best}
    member-0/ member-1/ ...                      reward models, each whole

or a list of any scorers. In a config:

    runs/e/final                                 combined as the folder says
    {ensemble: runs/e/final, combine: wco}       overruled
    {ensemble: [runs/a/final, runs/b/final, mod:rule], combine: uwo, penalty: 0.1}

Members are scored one after another: a pass over a stack of their weights was built and measured and is slower on a
CPU (benchmarks/ensemble.py, docs/ensembles.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from trueup.config import Config, parse
from trueup.math import disagreement, ensemble_score
from trueup.math.ensemble import Combine
from trueup.records import Completion, Prompt, Scorer, Scores, UserError
from trueup.scorers.asked import start

FILE = "ensemble.json"


class EnsembleSpec(Config):
    """An ensemble in a config."""

    ensemble: str | list[str] = Field(min_length=1)
    """An ensemble's folder, or scorers."""
    combine: Combine | None = None
    """mean, median, wco (worst case) or uwo (mean less variance); by default the folder's, of a list the mean."""
    penalty: float | None = Field(None, ge=0)
    """Of uwo: what a unit of variance takes off."""


class Folder(Config):
    """ensemble.json."""

    members: list[str] = Field(min_length=1)
    """Folders beside this file."""
    combine: Combine = "mean"
    penalty: float = Field(0.5, ge=0)
    best: str
    """The member that orders held-out pairs best: where a critic starts."""


def is_ensemble(path: str) -> bool:
    return (Path(path) / FILE).is_file()


def read_ensemble(path: str) -> Folder:
    """Raises UserError where `path` holds none."""
    file = Path(path) / FILE
    if not file.is_file():
        what = f"no {FILE} in this folder" if Path(path).is_dir() else "no such folder"
        raise UserError(f"{path}: {what}; an ensemble is what trueup ensemble makes")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: expected an object, found {type(found).__name__}")
    folder = parse(Folder, found, str(file))
    for name in {*folder.members, folder.best}:
        if name not in folder.members or not (Path(path) / name).is_dir():
            raise UserError(f"{file}: '{name}' is no member beside it")
    return folder


class Ensemble:
    """`members` by name; their values are the parts. `best`: the reward model that a critic starts from."""

    def __init__(
        self, name: str, members: Mapping[str, Scorer], combine: Combine, penalty: float, best: str | None
    ) -> None:
        self.name, self.members, self.combine, self.penalty, self.best = name, members, combine, penalty, best

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        started = [start(scorer, prompts, completions) for scorer in self.members.values()]
        parts = {name: scores().value for name, scores in zip(self.members, started, strict=True)}
        gaps = {name: int(np.isnan(value).sum()) for name, value in parts.items()}
        for name, count in gaps.items():
            if count:
                raise UserError(f"'{name}' does not apply to {count} of {len(completions)} completions; a member must")
        scores = torch.from_numpy(np.stack([value.astype(np.float64) for value in parts.values()]))
        value = ensemble_score(scores, kind=self.combine, penalty=self.penalty)
        return Scores(value.numpy(), parts, disagreement(scores).numpy())
