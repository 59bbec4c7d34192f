"""Comparisons for people, and a clock that stands still unless it is told."""

from __future__ import annotations

from dataclasses import dataclass

from trueup.label.accounts import Accounts
from trueup.label.queue import Queue, Rules
from trueup.records import Comparison, Completion, Prompt
from trueup.store import Asked, Store

PLAIN = Rules(onboarding=0, gold_every=0, repeat_every=0)


def pair(i: int, **more) -> Asked:
    texts = (Completion(f"good answer {i}"), Completion(f"bad answer {i}"))
    return Asked(Comparison(Prompt.of(f"question {i}"), texts), **more)


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def queue(store: Store, rules: Rules = PLAIN, raters=("ann", "bob", "cid")) -> Queue:
    clock = Clock()
    for name in raters:
        Accounts(store).add(name)
    return Queue(store, rules, clock)


def grade(task, better: str = "good") -> int:
    """The grade as the rater sees it, for the side that begins so."""
    return 2 if task.left.startswith(better) else -2
