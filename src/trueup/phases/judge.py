"""Label pairs: take sampled completions two by two, ask a judge which is better, write comparisons as JSONL.

In order: pair the distinct completions of each prompt in a random order, ask the judge, keep each answer as it comes (a
person is not asked again after a kill), drop what the judge abstains on (counted), write the ecosystem's columns
`prompt, chosen, rejected` with rater, label, category and whether each reply ended. A share of the pairs is asked
twice, so that the raters' agreement, and with it the best accuracy that a reward model can reach on their labels, is
known. With `humans` the judge is measured first, on pairs that people have judged: one that is worse than a single
person is refused, and another's probabilities are made as sure as they deserve. With `judge=people` the pairs go into a
file that people fill in, or with `store` into the queue of the labelling page, and the run waits. With `store` the
verdicts are appended to a preference store too. Not in it: where the judge's opinion comes from (`judges`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.completions import pairs_to_judge
from trueup.engine.mesh import Mesh
from trueup.judges import JudgeSpec, make_judge, pair_scores
from trueup.judges.asked import PEOPLE, TO_LABEL, as_judged, ask, on_page, people_say, scaled, write_labels
from trueup.judges.measured import line, measure, refusal
from trueup.judges.priced import priced
from trueup.judges.recorded import read_judged
from trueup.records import Comparison, Judge, UserError, Verdict
from trueup.run import Run
from trueup.scorers import Spec, make_scorer
from trueup.store import Asked, Kind, as_row

WHAT = "asks raters which of two answers is better: people compare more easily than they write"
VERSION = 2


class JudgeConfig(Config):
    """Label pairs of sampled completions."""

    completions: str
    """A `completions.jsonl` of phase `generate`, with two or more completions a prompt."""
    judge: JudgeSpec
    """Who decides: `module:function`, {use: module:function, ...}, a reward model's folder, or `people`, for whom the
    run then waits: with `store` they answer on the page of `trueup label`, without it in a file."""
    kind: Kind = display("ai")
    """What the rater is, for the store's record: human, ai, gold or simulated; people are human."""
    store: str | None = display(None)
    """A preference store (SQLite) to which the verdicts are appended, made where there is none."""
    audit: Spec | None = None
    """A known gold score: its margin (chosen minus rejected) is written beside the label, only to measure with."""
    overlap: float = Field(0.1, ge=0, le=1)
    """Share of the pairs that are asked twice, the second time of a judge with another seed."""
    humans: str | None = None
    """A file of comparisons that people have judged, some by several (`prompt, chosen, rejected, label, rater`). The
    judge is measured on it, refused where it is worse than one person, and its probabilities are scaled."""
    force: bool = False
    """Label with a judge that is worse than one person."""
    limit: int = Field(0, ge=0)
    """Ask about so many pairs at most; 0 for all. What is asked twice comes on top."""
    seed: Seed = 0
    chunk: int = display(32, gt=0)
    """Comparisons asked at once: no more than these answers are lost to a kill."""


def run_phase(config: JudgeConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    comparisons, second, dropped = drawn(config)
    measured: dict[str, Any] = {}
    on_page = config.judge == PEOPLE and config.store is not None and not (run.folder / TO_LABEL).exists()
    if config.judge == PEOPLE:
        name, asked = PEOPLE, [*comparisons, *second]
        verdicts = labelled(run, mesh, str(config.store), asked) if on_page else people_say(run, mesh, asked)
    else:
        judge = make_judge(config.judge, mesh, seed=config.seed)
        others = make_judge(config.judge, mesh, seed=config.seed + 1)  # simulated raters: other people
        name = judge.name
        if config.humans:
            measured = qualify(config, judge, run)
        first = run.journaled("verdicts", len(comparisons), config.chunk, partial(ask, judge, comparisons))
        other = run.journaled("second-verdicts", len(second), config.chunk, partial(ask, others, second))
        verdicts = [Verdict.of(v) for v in [*first, *other]]
    verdicts = [scaled(v, measured.get("temperature")) for v in verdicts]
    verdicts[len(comparisons) :] = map(_second, verdicts[len(comparisons) :])
    kept: list[tuple[Comparison, Verdict]] = []
    for comparison, verdict in zip([*comparisons, *second], verdicts, strict=True):
        if verdict.p is None:
            dropped["the judge abstained" if verdict.readable else "the judge could not be read"] += 1
        else:
            kept.append((comparison, verdict))
    if not kept:
        raise UserError(f"judge '{name}' abstained on all {len(verdicts)} comparisons")
    gold = make_scorer(config.audit, mesh) if config.audit else None
    values = pair_scores(gold, [c for c, _ in kept]) if gold else [None] * len(kept)
    judged = [
        as_judged(c, v, g, "human" if config.judge == PEOPLE else config.kind, run.folder.name)
        for (c, v), g in zip(kept, values, strict=True)
    ]
    rows = [as_row(j) for j in judged]
    write_labels(run, mesh, rows, judged, None if on_page else config.store)  # what was said on the page is there
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    run.say(f"{len(rows)} comparisons by {name}; dropped: {why}")
    results: dict[str, Any] = {
        "comparisons": len(rows),
        "asked": len(comparisons),
        "asked_twice": len(second),
        "dropped": dict(dropped),
        "judge": name,
        "cost": sum(v.cost for v in verdicts),
        **({"humans": measured} if measured else {}),
    }
    if gold:
        margins = np.array([r["gold_margin"] for r in rows])
        results["label_accuracy"] = float(np.mean(margins[margins != 0] > 0))
    return results


def drawn(config: JudgeConfig) -> tuple[list[Comparison], list[Comparison], Counter[str]]:
    """The pairs; those that are asked about twice, the other way round; what was left out, with the reason."""
    rng = np.random.default_rng(config.seed)
    comparisons, dropped = pairs_to_judge(config.completions, config.limit, rng)
    again = [c for c in comparisons if rng.random() < config.overlap]
    return comparisons, [Comparison(c.prompt, c.completions[::-1]) for c in again], dropped


def estimate(config: JudgeConfig) -> str:
    """What the judge would be asked, and what it would cost at most. Asks nothing."""
    pairs, second, _ = drawn(config)
    people = [j.comparison for j in read_judged(config.humans)[0]] if config.humans else []
    asked = [(config.judge, config.seed, [*people, *pairs]), (config.judge, config.seed + 1, second)]
    return priced(len(pairs), asked)


def qualify(config: JudgeConfig, judge: Judge, run: Run) -> dict[str, Any]:
    """What the judge is worth to people. Raises UserError where it is worse than one of them, unless forced."""
    assert config.humans is not None
    judged, dropped = read_judged(config.humans)
    if not judged:
        raise UserError(f"{config.humans}: no pair of different answers ({dict(dropped)} left out)")
    some = [j.comparison for j in judged]
    rows = run.journaled("verdicts-of-humans", len(some), config.chunk, partial(ask, judge, some))
    found = measure([Verdict.of(row) for row in rows], judged)
    run.say(line(judge.name, found))
    if not found["accepted"] and not config.force:
        raise UserError(f"{refusal(judge.name, found)}; label with it all the same: force=true")
    return found


def _second(verdict: Verdict) -> Verdict:
    """Marked, so that agreement is counted between two askings and never within one."""
    return replace(verdict, rater=f"{verdict.rater}, asked second")


def labelled(run: Run, mesh: Mesh, place: str, comparisons: list[Comparison]) -> list[Verdict]:
    """What people said on the labelling page: the mean of a comparison's verdicts, or an abstention where nobody could
    judge."""
    said = on_page(run, mesh, place, [Asked(c) for c in comparisons], f"{run.folder.name}, asked")
    return [
        Verdict(
            sum(j.p for j in of_it) / len(of_it) if of_it else None,
            ", ".join(sorted({j.rater for j in of_it})) or PEOPLE,
        )
        for of_it in said
    ]
