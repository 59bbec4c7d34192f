"""Imperfect demonstrations: often right, mostly flattering, and wrong most of the time where it matters.

Most demonstrations on harmful requests comply, and most on unknown names invent an answer, so that the mode of a
policy trained on them is wrong there, and preference learning has something to do at temperature 0 too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from trueup.records import Demonstration
from trueup.world.answers import DEMO_STYLE, core, dress, misheard, pick
from trueup.world.tasks import Task, prompts

QUALITIES: dict[str, Mapping[str, float]] = {
    "arithmetic": {"right": 0.68, "wrong": 0.12, "junk": 0.12, "idk": 0.08},
    "fact": {"right": 0.66, "wrong": 0.14, "junk": 0.12, "idk": 0.08},
    "string": {"right": 0.68, "wrong": 0.12, "junk": 0.12, "idk": 0.08},
    "list": {"right": 0.62, "wrong": 0.24, "junk": 0.10, "idk": 0.04},
    "unknown": {"idk": 0.38, "fabricate": 0.52, "hedge": 0.05, "junk": 0.05},
    "harmful": {"refuse": 0.34, "comply": 0.52, "rude": 0.03, "curt": 0.05, "idk": 0.03, "junk": 0.03},
    "benign": {"right": 0.54, "half": 0.10, "wrong": 0.06, "refuse": 0.18, "junk": 0.08, "idk": 0.04},
}


# What demonstrations are made of: better than what people say on a forum, and wrong where the forum is wrong.
DEMONSTRATED: dict[str, Mapping[str, float]] = {
    **QUALITIES,
    "arithmetic": {"right": 0.86, "wrong": 0.06, "junk": 0.05, "idk": 0.03},
    "fact": {"right": 0.86, "wrong": 0.06, "junk": 0.05, "idk": 0.03},
    "string": {"right": 0.86, "wrong": 0.06, "junk": 0.05, "idk": 0.03},
    "list": {"right": 0.84, "wrong": 0.10, "junk": 0.04, "idk": 0.02},
    "unknown": {"idk": 0.42, "fabricate": 0.50, "hedge": 0.04, "junk": 0.04},
    "harmful": {"refuse": 0.40, "comply": 0.50, "rude": 0.02, "curt": 0.04, "idk": 0.02, "junk": 0.02},
    "benign": {"right": 0.72, "half": 0.06, "wrong": 0.03, "refuse": 0.13, "junk": 0.04, "idk": 0.02},
}


def answer(task: Task, rng: random.Random) -> str:
    """One answer of a demonstration's quality and style."""
    quality = pick(DEMONSTRATED[task.category], rng)
    if quality == "wrong" and rng.random() < 0.25:
        task, quality = misheard(task, rng), "right"
        if task.category == "unknown":
            quality = "fabricate"
    return dress(core(task, quality, rng), DEMO_STYLE, rng)


def demonstrations(n: int, seed: int = 0, world: int = 0) -> list[Demonstration]:
    """`n` demonstrations on prompts of the sft split."""
    rng = random.Random(f"demonstrations {world} {seed}")
    rows = []
    for prompt in prompts("sft", n, seed, world):
        task = Task(prompt.meta["category"], prompt.meta["kind"], tuple(prompt.meta["slots"]))
        rows.append(Demonstration(prompt, answer(task, rng)))
    return rows
