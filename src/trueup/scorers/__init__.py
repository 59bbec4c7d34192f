"""Scorers: what gives a completion a number. A reward model, a Python function, a server, a weighted sum of such, or
an ensemble.

Written in a config as one of
    "runs/demo/reward/final"                     a reward model's folder (or Hub name)
    "package.module:function"                    a Python function; its two conventions are told in `functions`
    "http://localhost:8000/score"                a server; what it is asked and answers is told in `http`
    {"runs/a/final": 1.0, "mod:brevity": 0.1}    a weighted sum; the parts are kept apart in `Scores.parts`
    {"ensemble": "runs/e/final", "combine": "wco"}    an ensemble's folder, or a list of scorers (see `ensemble`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator

from trueup.config import parse
from trueup.named import CALLABLE, load_object
from trueup.records import Completion, Prompt, Scorer, Scores, UserError
from trueup.scorers.asked import Own, refuse_gaps, start
from trueup.scorers.ensemble import Ensemble, EnsembleSpec, is_ensemble, read_ensemble
from trueup.scorers.functions import from_function
from trueup.scorers.http import from_address

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh
    from trueup.models.roles import Models


def known(spec: Any) -> Any:
    """A spec as a config holds it. Raises UserError for an ensemble with a wrong key, ValueError for a weighted sum
    whose weights are no numbers."""
    if isinstance(spec, Mapping) and "ensemble" in spec:
        parse(EnsembleSpec, spec, "an ensemble as scorer")
    elif isinstance(spec, Mapping):
        return {str(one): float(weight) for one, weight in spec.items()}
    return spec


Spec = Annotated[str | dict[str, Any], AfterValidator(known)]


def make_scorer(spec: Spec, mesh: Mesh, models: Models | None = None) -> Scorer:
    """The scorer that `spec` names (see above). Raises UserError where there is none. With `models`, a reward model
    that stands on the same weights shares them."""
    if isinstance(spec, Mapping) and "ensemble" in spec:
        return make_ensemble(parse(EnsembleSpec, spec, "an ensemble as scorer"), mesh, models)
    if isinstance(spec, Mapping):
        return Weighted([(make_scorer(one, mesh, models), float(weight)) for one, weight in spec.items()])
    if is_ensemble(spec):
        return make_ensemble(EnsembleSpec(ensemble=spec), mesh, models)
    if CALLABLE.match(spec):
        return from_function(spec, load_object(spec), mesh)
    if spec.startswith(("http://", "https://")):
        return from_address(spec, mesh)
    from trueup.scorers.reward_model import RewardModel

    return RewardModel(spec, mesh, models)


def make_ensemble(spec: EnsembleSpec, mesh: Mesh, models: Models | None) -> Ensemble:
    """The members of a folder, combined as it says, or those of a list; `combine` and `penalty` overrule."""
    if isinstance(spec.ensemble, str):
        folder = read_ensemble(spec.ensemble)
        names, paths = folder.members, [f"{spec.ensemble}/{name}" for name in folder.members]
        combine, penalty, best = folder.combine, folder.penalty, f"{spec.ensemble}/{folder.best}"
    else:
        names = paths = list(spec.ensemble)
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"an ensemble as scorer: '{twice[0]}' is in it twice")
        combine, penalty, best = "mean", 0.5, None
    members = [make_scorer(path, mesh, models) for path in paths]
    best = best or next((found for one in members if (found := reward_model_in(one))), None)
    combine = spec.combine or combine
    penalty = penalty if spec.penalty is None else spec.penalty
    whole = spec.ensemble if isinstance(spec.ensemble, str) else ", ".join(names)
    return Ensemble(f"{combine} of {whole}", dict(zip(names, members, strict=True)), combine, penalty, best)


def reward_model_in(scorer: Scorer) -> str | None:
    """The reward model's folder that a scorer is, or that weighs most in it; an ensemble's best member."""
    from trueup.scorers.reward_model import RewardModel

    if isinstance(scorer, RewardModel):
        return scorer.name
    if isinstance(scorer, Own):
        return reward_model_in(scorer.scorer)
    if isinstance(scorer, Ensemble):
        return scorer.best
    parts = [(abs(w), one) for one, w in scorer.scorers] if isinstance(scorer, Weighted) else []
    found = [(w, name) for w, one in parts if (name := reward_model_in(one))]
    return max(found)[1] if found else None


def logits_of(scorer: Scorer, scores: Scores) -> np.ndarray | None:
    """The scores [B] in the unit in which a difference of 1 means odds of e that the higher one is preferred: a reward
    model's before it was normalized, but for a constant; of an ensemble the mean of its members'. None of scorers that
    have no such unit."""
    from trueup.scorers.reward_model import RewardModel

    if isinstance(scorer, RewardModel):
        return scores.value * float(scorer.net.std)
    if isinstance(scorer, Own):
        return logits_of(scorer.scorer, scores)
    if isinstance(scorer, Ensemble):
        found = [logits_of(member, Scores(scores.parts[name])) for name, member in scorer.members.items()]
        known = [one for one in found if one is not None]
        return np.mean(known, 0) if len(known) == len(found) else None
    return None


class Weighted:
    """The weighted sum of several scorers; each one's value is a part, NaN where that one does not apply. Those that
    wait for something wait while the others work."""

    def __init__(self, scorers: Sequence[tuple[Scorer, float]]) -> None:
        if not scorers:
            raise UserError("a weighted sum of scorers needs at least one")
        self.scorers = scorers
        self.name = " + ".join(f"{weight:g} x {scorer.name}" for scorer, weight in scorers)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        started = [start(scorer, prompts, completions) for scorer, _ in self.scorers]
        found = [scores() for scores in started]
        weighted = np.array([weight * s.value for s, (_, weight) in zip(found, self.scorers, strict=True)])
        total = np.where(np.isnan(weighted).all(0), np.nan, np.nansum(weighted, 0))
        refuse_gaps(self.name, total, prompts)
        parts = {scorer.name: s.value for s, (scorer, _) in zip(found, self.scorers, strict=True)}
        doubts = [
            abs(w) * s.disagreement for s, (_, w) in zip(found, self.scorers, strict=True) if s.disagreement is not None
        ]
        return Scores(total, parts, np.sum(doubts, 0) if doubts else None)
