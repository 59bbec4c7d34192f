"""A judge that asks a model under a constitution: the questions of each comparison, and what the answers come to.

In order: the principles (one drawn by weight, or all that apply); each put in both orders, so that a liking for a place
cancels out, or once where it weighs how likely the replies are; each answer a probability, or unreadable; the mean over
orders and, by weight, over principles. A principle one of whose orders could not be read does not count; a comparison
without any that counts gets no verdict. Labels that follow a chain of thought are clamped, since such a model is too
sure of itself. Who answers is the business of `local` and `endpoint`. Source: Bai et al. 2022 (Constitutional AI),
section 4.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trueup.config import Config, Seed
from trueup.judges.constitution import Constitution
from trueup.records import Comparison, Reading, Verdict


class Manner(Config):
    """How a constitution is put to a model."""

    principles: Literal["sample", "all"] = "sample"
    """One principle a pair, drawn by weight; or all that apply, whose spread is the verdict's uncertainty."""
    orders: Literal[1, 2] = 2
    """Both orders of the two replies, averaged; or one, as the pair comes."""
    thought: bool = False
    """Let the model think aloud before its verdict."""
    clamp: tuple[float, float] | None = None
    """Verdicts are cut to these; (0.4, 0.6) with `thought`, and none without, where not said."""
    examples: bool = True
    """Show the constitution's examples first."""
    seed: Seed = 0

    def limits(self) -> tuple[float, float]:
        return self.clamp or ((0.4, 0.6) if self.thought else (0.0, 1.0))


@dataclass(frozen=True)
class Question:
    """`text` ends where the answer begins; after it come `think` and the thoughts, where wanted, then `verdict` and a
    letter. With `replies`: where a reply begins; after it comes `verdict`, and p says how much more likely the first
    of them is there."""

    text: str
    think: str
    verdict: str
    principle: str
    swapped: bool
    replies: tuple[str, str] | None = None
    temperature: float = 1.0
    """Of `replies`: nats."""

    @property
    def hash(self) -> str:
        parts = (self.text, self.think, self.verdict, *(self.replies or ()))
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """`p`: that the reply shown as (A) is better; None where what came back could not be read."""

    p: float | None
    raw: str
    cost: float = 0.0


@dataclass(frozen=True)
class Written:
    """What followed a text. `ended`: by itself or at a stop string, and not cut by length. `fits`: the text leaves room
    in the model's context."""

    text: str
    ended: bool
    cost: float = 0.0
    fits: bool = True


class Answerer(Protocol):
    name: str

    def answer(self, questions: Sequence[Question]) -> list[Answer]: ...

    def write(
        self, texts: Sequence[str], *, max_tokens: int, stop: tuple[str, ...], seed: int, index: Sequence[int]
    ) -> list[Written]:
        """What follows each text. A draw depends on its text, the seed and its `index`, not on the others."""
        ...


class Asking:
    """A constitution put to a model, as a Judge."""

    def __init__(self, constitution: Constitution, answerer: Answerer, manner: Manner) -> None:
        self.constitution, self.answerer, self.manner = constitution, answerer, manner
        self.name = f"{constitution.name} by {answerer.name}"

    def questions(self, comparison: Comparison) -> list[Question]:
        """Those that the comparison is judged by; none where no principle is for its category."""
        told, manner = self.constitution, self.manner
        principles = (
            told.applying(comparison.prompt.category)
            if manner.principles == "all"
            else told.drawn(comparison, manner.seed)
        )
        shown = told.shown(thought=manner.thought) if manner.examples else ""
        out = []
        for p in principles:
            if p.likely:
                first, second = (c.text for c in comparison.completions)
                before, after = told.weighed(comparison, p)
                out.append(Question(before, "", after, p.name, False, (first, second), p.temperature))
                continue
            for swapped in (False, True)[: manner.orders]:
                asked = shown + told.question(comparison, p, swapped=swapped, seed=manner.seed)
                out.append(Question(asked, told.think if manner.thought else "", told.verdict, p.name, swapped))
        return out

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        asked = [self.questions(c) for c in comparisons]
        answers = iter(self.answerer.answer([q for some in asked for q in some]))
        return [
            self._verdict(c, [(q, next(answers)) for q in some]) for c, some in zip(comparisons, asked, strict=True)
        ]

    def _verdict(self, comparison: Comparison, said: Sequence[tuple[Question, Answer]]) -> Verdict:
        if not said:
            return Verdict(None, self.name, f"no principle for category {comparison.prompt.category}")
        readings = tuple(
            Reading(q.principle, q.swapped, _of_first(a.p, q.swapped), a.raw, q.hash, a.cost) for q, a in said
        )
        verdict = Verdict(None, self.name, "", readings)
        weight = {p.name: p.weight for p in self.constitution.principles}
        counted = {name: p for name, p in verdict.principles.items() if p is not None}
        if not counted:
            return Verdict(None, self.name, "unreadable", readings)
        low, high = self.manner.limits()
        mean = sum(weight[name] * p for name, p in counted.items()) / sum(weight[name] for name in counted)
        return Verdict(min(high, max(low, mean)), self.name, ", ".join(counted), readings)


def _of_first(p: float | None, swapped: bool) -> float | None:
    return p if p is None or not swapped else 1 - p
