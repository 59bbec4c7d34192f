"""Scorers: what gives a completion a number. A reward model, a Python callable, or a weighted sum of such.

Written in a config as one of
    "runs/demo/reward/final"                     a reward model's folder (or Hub name)
    "package.module:function"                    a callable of (prompts, completions), or one without required
                                                 arguments that returns a Scorer
    {"runs/a/final": 1.0, "mod:brevity": 0.1}    a weighted sum; the parts are kept apart in `Scores.parts`
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.records import Completion, Prompt, Scorer, Scores, UserError

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh

CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
Spec = str | dict[str, float]


def make_scorer(spec: Spec, mesh: Mesh) -> Scorer:
    """The scorer that `spec` names (see above). Raises UserError where there is none."""
    if isinstance(spec, Mapping):
        return Weighted([(make_scorer(one, mesh), float(weight)) for one, weight in spec.items()])
    if CALLABLE.match(spec):
        return from_callable(spec)
    from trueup.scorers.reward_model import RewardModel

    return RewardModel(spec, mesh)


def load_object(spec: str) -> Any:
    """`package.module:name`, looked for beside the current folder too."""
    module, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"'{spec}': no module named '{error.name}' (looked in {Path.cwd()} too)") from None
    except AttributeError:
        raise UserError(f"'{spec}': module '{module}' has no '{name}'") from None


def from_callable(spec: str) -> Scorer:
    """A function of (prompts, completions) as a scorer, or the Scorer that a function without arguments returns."""
    function = load_object(spec)
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        return Callable_(spec, function)
    scorer = function()
    if not isinstance(scorer, Scorer):
        raise UserError(f"'{spec}' takes no arguments, so it must return a scorer; it returned {type(scorer).__name__}")
    return scorer


def reward_model_in(scorer: Scorer) -> str | None:
    """The reward model's folder that a scorer is, or that weighs most in it."""
    from trueup.scorers.reward_model import RewardModel

    if isinstance(scorer, RewardModel):
        return scorer.name
    parts = [(abs(w), one) for one, w in scorer.scorers] if isinstance(scorer, Weighted) else []
    found = [(w, name) for w, one in parts if (name := reward_model_in(one))]
    return max(found)[1] if found else None


class Callable_:
    """A Python function of (prompts, completions) -> B numbers."""

    def __init__(
        self, name: str, function: Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float]]
    ) -> None:
        self.name, self.function = name, function

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        value = np.asarray(self.function(prompts, completions), dtype=np.float64)
        if value.shape != (len(completions),) or not np.isfinite(value).all():
            raise UserError(f"'{self.name}' must return {len(completions)} finite numbers, got shape {value.shape}")
        return Scores(value)


class Weighted:
    """The weighted sum of several scorers; each one's value is a part."""

    def __init__(self, scorers: Sequence[tuple[Scorer, float]]) -> None:
        if not scorers:
            raise UserError("a weighted sum of scorers needs at least one")
        self.scorers = scorers
        self.name = " + ".join(f"{weight:g} x {scorer.name}" for scorer, weight in scorers)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        values = [scorer.score(prompts, completions).value for scorer, _ in self.scorers]
        total = sum(weight * value for value, (_, weight) in zip(values, self.scorers, strict=True))
        parts = {scorer.name: value for value, (scorer, _) in zip(values, self.scorers, strict=True)}
        return Scores(np.asarray(total), parts)
