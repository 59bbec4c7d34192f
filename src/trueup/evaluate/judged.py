"""Any judge on a file: what it says of each pair, what it is worth to the people who judged them, how far it agrees
with another judge. `trueup judge FILE judge=...`

In order: read the file's different pairs (comparisons with the votes of their raters, or sampled completions, which
have none), ask the judge and journal each verdict, ask the other one, measure. Not in it: labels to train on, which are
phase `judge`'s; what the figures mean, which `judges.measured` tells.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.engine.mesh import Mesh
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.judges.measured import biases, compare, line, measure, refusal
from trueup.judges.priced import priced
from trueup.judges.recorded import Judged, read_judged
from trueup.records import Judge, UserError, Verdict, write_jsonl
from trueup.run import Run

WHAT = "measures a judge on pairs that people have judged: an opinion is worth what it agrees with"
VERSION = 1


class JudgedConfig(Config):
    """A judge on a file."""

    data: str
    """Comparisons (`prompt, chosen, rejected, label, rater`), several raters a pair where there are; or the
    `completions.jsonl` of phase `generate`."""
    judge: JudgeSpec
    against: JudgeSpec | None = None
    """Another judge, asked about the same pairs."""
    limit: int = Field(0, ge=0)
    """So many pairs at most; 0 for all."""
    seed: Seed = 0
    chunk: int = display(32, gt=0)
    """Comparisons asked at once: no more than these answers are lost to a kill."""


def run_phase(config: JudgedConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    judged, dropped = read_judged(config.data)
    judged = judged[: config.limit or None]
    if not judged:
        raise UserError(f"{config.data}: no pair of different answers")
    why = ", ".join(f"{n} rows: {reason}" for reason, n in dropped.items()) or "nothing"
    run.say(f"{len(judged)} pairs; left out: {why}")
    judge = make_judge(config.judge, mesh, seed=config.seed)
    verdicts = asked(judge, judged, "verdicts", config, run)
    people = any(j.votes for j in judged)
    found = measure(verdicts, judged) if people else biases(verdicts, judged)
    results: dict[str, Any] = {"judge": judge.name, "pairs": len(judged), "dropped": dict(dropped), **found}
    if people:
        run.say(line(judge.name, found))
        if not found["accepted"]:
            run.say(refusal(judge.name, found))
    if config.against is not None:
        other = make_judge(config.against, mesh, seed=config.seed)
        theirs = asked(other, judged, "other-verdicts", config, run)
        shared = compare(verdicts, theirs)
        results["against"] = {"judge": other.name, **(measure if people else biases)(theirs, judged), "both": shared}
        if people:
            run.say(line(other.name, results["against"]))
        kappa = "" if shared["kappa"] is None else f", kappa {shared['kappa']:.3f}"
        alike = "-" if shared["pairs"] == 0 else f"{shared['agreement']:.1%}{kappa}"
        run.say(f"{judge.name} and {other.name} agree on {alike} of {shared['pairs']} pairs")
    if mesh.is_main:
        both = list(zip(verdicts, judged, strict=True))
        write_jsonl(run.folder / "verdicts.jsonl", [row(v, j, v.p) for v, j in both if v.p is not None])
        write_jsonl(run.folder / "no-verdict.jsonl", [unjudged(v, j) for v, j in both if v.p is None])
    mesh.barrier()
    return results


def asked(judge: Judge, judged: list[Judged], name: str, config: JudgedConfig, run: Run) -> list[Verdict]:
    rows = run.journaled(name, len(judged), config.chunk, partial(ask, judge, judged))
    return [Verdict.of(row) for row in rows]


def ask(judge: Judge, judged: list[Judged], index: range) -> list[dict[str, Any]]:
    return [asdict(v) for v in verdicts_of(judge, [judged[i].comparison for i in index])]


def row(verdict: Verdict, judged: Judged, p: float) -> dict[str, Any]:
    """A verdict with its pair, as a comparison that `trueup reward` reads."""
    a, b = judged.comparison.completions
    chosen, rejected = (b, a) if p < 0.5 else (a, b)
    return {
        "prompt": [dict(m) for m in judged.comparison.prompt.messages],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "label": max(p, 1 - p),
        "category": judged.comparison.prompt.category,
        "chosen_ended": chosen.ended,
        "rejected_ended": rejected.ended,
        "votes": [v if chosen is a else 1 - v for v in judged.votes],
        **about(verdict),
    }


def unjudged(verdict: Verdict, judged: Judged) -> dict[str, Any]:
    """A pair without a verdict: no comparison, lest a label be read out of it."""
    first, second = (c.text for c in judged.comparison.completions)
    prompt = [dict(m) for m in judged.comparison.prompt.messages]
    return {"prompt": prompt, "first": first, "second": second, "votes": judged.votes, **about(verdict)}


def about(verdict: Verdict) -> dict[str, Any]:
    """`readings` have p that the first is better: of the pair in the order in which it was judged."""
    readings = [asdict(r) for r in verdict.readings]
    return {"rater": verdict.rater, "note": verdict.note, "cost": verdict.cost, "readings": readings}


def estimate(config: JudgedConfig) -> str:
    """What the judges would be asked, and what it would cost at most. Asks nothing."""
    pairs = [j.comparison for j in read_judged(config.data)[0][: config.limit or None]]
    return priced(len(pairs), [(one, config.seed, pairs) for one in (config.judge, config.against) if one])
