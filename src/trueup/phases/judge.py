"""Label pairs: take sampled completions two by two, ask a judge which is better, write comparisons as JSONL.

In order: pair the distinct completions of each prompt in a random order, ask the judge, keep each answer as it comes (a
person is not asked again after a kill), drop what the judge abstains on (counted), write the ecosystem's columns
`prompt, chosen, rejected` with rater, label, category and whether each reply ended. A share of the pairs is asked
twice, so that the raters' agreement, and with it the best accuracy that a reward model can reach on their labels, is
known. Not in it: where the judge's opinion comes from (`judges`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.completions import read_completions
from trueup.engine.mesh import Mesh
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.records import Comparison, Completion, Judge, UserError, Verdict, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "asks raters which of two answers is better: people compare more easily than they write"
VERSION = 2


class JudgeConfig(Config):
    """Label pairs of sampled completions."""

    completions: str
    """A `completions.jsonl` of phase `generate`, with two or more completions a prompt."""
    judge: JudgeSpec
    """Who decides: `module:function`, {use: module:function, ...}, or a reward model's folder."""
    audit: Spec | None = None
    """A known gold score: its margin (chosen minus rejected) is written beside the label, only to measure with."""
    overlap: float = Field(0.1, ge=0, le=1)
    """Share of the pairs that are asked twice, the second time of a judge with another seed."""
    limit: int = Field(0, ge=0)
    """Ask about so many pairs at most; 0 for all. What is asked twice comes on top."""
    seed: Seed = 0
    chunk: int = display(32, gt=0)
    """Comparisons asked at once: no more than these answers are lost to a kill."""


def run_phase(config: JudgeConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    rng = np.random.default_rng(config.seed)
    comparisons, dropped = pair_up(config.completions, config.limit, rng)
    if not comparisons:
        raise UserError(f"{config.completions}: no prompt has two different completions")
    judge = make_judge(config.judge, mesh, seed=config.seed)
    others = make_judge(config.judge, mesh, seed=config.seed + 1)  # simulated raters: other people
    again = [c for c in comparisons if rng.random() < config.overlap]
    second = [Comparison(c.prompt, c.completions[::-1]) for c in again]
    first = run.journaled("verdicts", len(comparisons), config.chunk, partial(ask, judge, comparisons))
    other = run.journaled("second-verdicts", len(second), config.chunk, partial(ask, others, second))
    verdicts = [*(Verdict(**v) for v in first), *(_second(Verdict(**v)) for v in other)]
    kept: list[tuple[Comparison, Verdict]] = []
    for comparison, verdict in zip([*comparisons, *second], verdicts, strict=True):
        if verdict.p is None:
            dropped["the judge abstained"] += 1
        else:
            kept.append((comparison, verdict))
    if not kept:
        raise UserError(f"judge '{judge.name}' abstained on all {len(verdicts)} comparisons")
    gold = make_scorer(config.audit, mesh) if config.audit else None
    flat = [(c.prompt, completion) for c, _ in kept for completion in c.completions]
    values = gold.score([p for p, _ in flat], [c for _, c in flat]).value.reshape(-1, 2) if gold else [None] * len(kept)
    rows = [as_row(c, v, g) for (c, v), g in zip(kept, values, strict=True)]
    if mesh.is_main:
        write_jsonl(run.folder / "comparisons.jsonl", rows)
        run.show(
            0,
            [
                {
                    "prompt": r["prompt"][-1]["content"],
                    "category": r["category"],
                    "completion": r[side],
                    "side": side,
                    "pair": i,
                    "rater": r["rater"],
                }
                for i, r in enumerate(rows[:25])
                for side in ("chosen", "rejected")
            ],
        )
    mesh.barrier()
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    run.say(f"{len(rows)} comparisons by {judge.name}; dropped: {why}")
    results: dict[str, Any] = {
        "comparisons": len(rows),
        "asked": len(comparisons),
        "asked_twice": len(second),
        "dropped": dict(dropped),
        "judge": judge.name,
    }
    if gold:
        margins = np.array([r["gold_margin"] for r in rows])
        results["label_accuracy"] = float(np.mean(margins[margins != 0] > 0))
    return results


def ask(judge: Judge, comparisons: list[Comparison], index: range) -> list[dict[str, Any]]:
    return [asdict(verdict) for verdict in verdicts_of(judge, [comparisons[i] for i in index])]


def _second(verdict: Verdict) -> Verdict:
    """Marked, so that agreement is counted between two askings and never within one."""
    return replace(verdict, rater=f"{verdict.rater}, asked second")


def pair_up(path: str, limit: int, rng: np.random.Generator) -> tuple[list[Comparison], Counter[str]]:
    """Pairs of each prompt's completions, (1, 2), (3, 4), ..., the order of showing random; and what is left out."""
    out: list[Comparison] = []
    dropped: Counter[str] = Counter()
    for _, prompt, said in read_completions(path):
        answers = [Completion(c["text"], c["stop"]) for c in said]
        if len(answers) % 2:
            dropped["answers without a partner"] += 1
        for a, b in zip(answers[::2], answers[1::2], strict=False):
            if a.text == b.text:
                dropped["both answers the same"] += 1
            elif limit and len(out) == limit:
                dropped["over the limit"] += 1
            else:
                out.append(Comparison(prompt, (a, b) if rng.random() < 0.5 else (b, a)))
    return out, dropped


def as_row(comparison: Comparison, verdict: Verdict, gold: np.ndarray | None) -> dict[str, Any]:
    first, second = comparison.completions
    assert verdict.p is not None
    swap = verdict.p < 0.5
    chosen, rejected = (second, first) if swap else (first, second)
    row = {
        "prompt": [dict(m) for m in comparison.prompt.messages],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "label": 1 - verdict.p if swap else verdict.p,
        "rater": verdict.rater,
        "category": comparison.prompt.category,
        "chosen_ended": chosen.ended,
        "rejected_ended": rejected.ended,
    }
    if gold is not None:
        row["gold_margin"] = float(gold[1] - gold[0] if swap else gold[0] - gold[1])
    return row
