"""People who label nothing that is trained on: they audit what was."""

from __future__ import annotations

from dataclasses import replace

from trueup.records import Comparison, Verdict
from trueup.world.raters import Rater, pool

OTHERS = 1_000_000
"""Added to the seed: no draw of theirs is one of the raters'."""


def auditors(n: int = 13, seed: int = 0) -> Rater:
    """`n` people of the raters' kind, with noise and tastes drawn anew; each comparison goes to one of them."""
    others = pool(n, seed + OTHERS)

    def rule(comparison: Comparison) -> Verdict:
        verdict = others.rule(comparison)
        return replace(verdict, rater=verdict.rater.replace("pool", "auditor"))

    return Rater(f"auditors({int(n)})", rule)
