"""Verdicts that a file holds, as a judge; and a file's pairs with the votes of those who judged them.

A file has the ecosystem's columns, `prompt, chosen, rejected`, with `label` (the probability that chosen is better, 1
where it is not given, 1/2 a tie) and `rater`; a pair that several have judged stands in several rows, either way round.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trueup.data.completions import pairs_of
from trueup.data.files import raw_rows
from trueup.data.readers import read_preferences
from trueup.records import Comparison, Completion, Verdict


@dataclass
class Judged:
    """A pair in an order that says nothing of who won; `votes` [R]: p that the first is better, of each rater."""

    comparison: Comparison
    votes: list[float] = field(default_factory=list)


Key = tuple[str, frozenset[tuple[str, str]]]


def key_of(comparison: Comparison) -> Key:
    """What a pair is known by, in either order."""
    return comparison.prompt.id, frozenset((c.text, c.stop) for c in comparison.completions)


def read_judged(path: str) -> tuple[list[Judged], Counter[str]]:
    """The different pairs of a file, in the order of their appearance; of a `completions.jsonl`, without votes. And
    what is left out, with the reason."""
    first = next(iter(raw_rows(path)), None)
    if first is not None and "completions" in first[1]:
        pairs, dropped = pairs_of(path)
        return [Judged(c) for c in pairs], dropped
    found: dict[Key, Judged] = {}
    rows = read_preferences(path)
    for one in rows.records:
        answers = tuple(sorted((one.chosen, one.rejected), key=_place))
        comparison = Comparison(one.prompt, answers)
        judged = found.setdefault(key_of(comparison), Judged(comparison))
        judged.votes.append(one.label if _same(answers[0], one.chosen) else 1 - one.label)
    return list(found.values()), rows.dropped


def _place(completion: Completion) -> str:
    """By the hash of the content: neither alphabet nor length may decide who is shown first."""
    return hashlib.sha256(f"{completion.stop}\x1f{completion.text}".encode()).hexdigest()


def _same(a: Completion, b: Completion) -> bool:
    return (a.text, a.stop) == (b.text, b.stop)


class Recorded:
    """What a file says; it abstains on a pair that is not in it. Of several rows on a pair the mean."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.known = {key_of(j.comparison): j for j in read_judged(path)[0]}

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [self._verdict(c) for c in comparisons]

    def _verdict(self, comparison: Comparison) -> Verdict:
        judged = self.known.get(key_of(comparison))
        if judged is None or not judged.votes:
            return Verdict(None, self.name, "not in the file")
        p = sum(judged.votes) / len(judged.votes)
        return Verdict(p if _same(comparison.completions[0], judged.comparison.completions[0]) else 1 - p, self.name)
