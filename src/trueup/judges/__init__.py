"""Judges: what says which of two completions is better. A constitution, a scorer, a rule, or a callable's.

Written in a config as
    "package.module:function"                          returns a Judge when called without arguments
    {"use": "package.module:function", "name": "x"}    called with the other keys as arguments
    "runs/demo/reward/final"                           a reward model: the higher score wins, ties count one half
    {"runs/a/final": 1.0, "mod:brevity": 0.1}          or any other scorer
    "length"                                           the longer one wins: the baseline that a judge should beat
    "verdicts.jsonl"                                   what that file says (see `recorded`)
    {"constitution": "default", "model": "MODEL"}      principles put to a model on this machine, or behind an endpoint:
                                                       `constitution`, `asking`, `local`, `endpoint` tell the keys
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.config import parse
from trueup.faults import told
from trueup.named import CALLABLE, load_object
from trueup.records import Comparison, Judge, Scorer, UserError, Verdict
from trueup.scorers import make_scorer
from trueup.scorers.asked import Own

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh
    from trueup.judges.asking import Answerer

JudgeSpec = str | dict[str, Any]
RECORDED = (".jsonl", ".json", ".jsonl.gz")
"""How the name of a file of verdicts ends."""


def make_judge(spec: JudgeSpec, mesh: Mesh, *, seed: int = 0) -> Judge:
    """The judge that `spec` names. A callable that takes `seed` gets the stage's where the spec gives none."""
    if isinstance(spec, Mapping) and "constitution" in spec:
        return make_asking(dict(spec), mesh, seed)
    if spec == "length":
        return Longer()
    if isinstance(spec, str) and spec.endswith(RECORDED):
        from trueup.judges.recorded import Recorded

        return Recorded(spec)
    weights = isinstance(spec, Mapping) and bool(spec) and all(isinstance(w, int | float) for w in spec.values())
    if isinstance(spec, Mapping) and (weights or "ensemble" in spec):
        return ScorerJudge(make_scorer(dict(spec), mesh))
    use, arguments = (
        (spec.get("use", ""), {k: v for k, v in spec.items() if k != "use"})
        if isinstance(spec, Mapping)
        else (spec, {})
    )
    if not isinstance(use, str) or not use:
        raise UserError(f"judge {spec!r}: key 'use' must name a function (module:function) or a reward model's folder")
    if not CALLABLE.match(use):
        return ScorerJudge(make_scorer(use, mesh))
    made = load_object(use)
    with told(f"judge '{use}'"):
        made = made(**{**({"seed": seed} if _takes_seed(made) else {}), **arguments}) if callable(made) else made
    if isinstance(made, Judge):
        return made
    if isinstance(made, Scorer):
        return ScorerJudge(Own(use, made))
    raise UserError(f"judge '{use}' returned {type(made).__name__}, neither a judge nor a scorer")


def make_asking(spec: dict[str, Any], mesh: Mesh, seed: int) -> Judge:
    """A constitution put to a model. Raises UserError for a key that is not one of `Manner`, `Local` or `Endpoint`."""
    from trueup.judges.asking import Asking, Manner
    from trueup.judges.constitution import read_constitution
    from trueup.judges.endpoint import Endpoint
    from trueup.judges.local import Local

    known = {"constitution", *Manner.model_fields, *(Endpoint if "endpoint" in spec else Local).model_fields}
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"judge: unknown key '{key}'; {hint}")
    told = read_constitution(str(spec.pop("constitution")))
    if "endpoint" in spec and (weighs := next((p.name for p in told.principles if p.likely), None)):
        raise UserError(
            f"judge: principle '{weighs}' of constitution '{told.name}' weighs how likely a reply is, which a server "
            "does not tell; give it a question, or a model on this machine"
        )
    manner = parse(Manner, {"seed": seed} | {k: spec.pop(k) for k in Manner.model_fields if k in spec}, "judge")
    return Asking(told, make_answerer(spec, mesh, manner.seed, thought=manner.thought), manner)


def make_answerer(spec: Mapping[str, Any], mesh: Mesh, seed: int, *, thought: bool = False) -> Answerer:
    """A model on this machine, {model: ...}, or behind an endpoint, {endpoint: ..., model: ...}."""
    if "endpoint" in spec:
        from trueup.judges.endpoint import Endpoint, Server

        return Server(parse(Endpoint, spec, "judge"), mesh, thought=thought, seed=seed)
    from trueup.judges.local import Local, LocalModel

    return LocalModel(parse(Local, spec, "judge"), mesh, seed)


def verdicts_of(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The judge's verdicts. Raises UserError where they are not one probability, or an abstention, a comparison."""
    with told(f"judge '{judge.name}'"):
        found = judge.judge(comparisons)
    if not isinstance(found, Iterable):
        raise UserError(f"judge '{judge.name}' must give a list of Verdicts, got {type(found).__name__}")
    verdicts = list(found)
    if len(verdicts) != len(comparisons):
        raise UserError(f"judge '{judge.name}' gave {len(verdicts)} verdicts to {len(comparisons)} comparisons")
    for verdict in verdicts:
        known = isinstance(verdict, Verdict)
        number = known and isinstance(verdict.p, int | float)
        if not known or not (verdict.p is None or (number and 0 <= verdict.p <= 1)):
            got = verdict.p if known else verdict
            raise UserError(
                f"judge '{judge.name}' must give Verdicts with p in [0, 1], or None to abstain; got {got!r}"
            )
    return verdicts


def _takes_seed(function: Any) -> bool:
    import inspect

    try:
        return "seed" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def pair_scores(scorer: Scorer, comparisons: Sequence[Comparison]) -> np.ndarray:
    """Scores of both completions of each comparison, [N, 2]."""
    flat = [(c.prompt, completion) for c in comparisons for completion in c.completions]
    return scorer.score([p for p, _ in flat], [c for _, c in flat]).value.reshape(-1, 2)


class ScorerJudge:
    """Prefers the completion with the higher score; equal scores are a tie, p = 1/2."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.name = scorer, scorer.name

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        values = pair_scores(self.scorer, comparisons)
        return [Verdict(1.0 if a > b else 0.5 if a == b else 0.0, self.name) for a, b in values]


class Longer:
    """Prefers the longer completion, by characters; equal lengths are a tie."""

    name = "length"

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        lengths = [[len(c.text) for c in comparison.completions] for comparison in comparisons]
        return [Verdict(1.0 if a > b else 0.5 if a == b else 0.0, self.name) for a, b in lengths]
