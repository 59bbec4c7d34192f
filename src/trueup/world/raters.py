"""Simulated people: Judges who know the gold score more or less, and have tastes of their own.

    oracle                                   the better gold score; abstains on ties
    flip(p)                                  the oracle, wrong with probability p
    bt(tau)                                  Bradley-Terry: P = sigmoid(gold difference / tau)
    biased(length, flattery, certainty)      one person with these tastes
    pool(n)                                  n people with their own noise and tastes; each comparison goes to one

A person's utility of an answer:

    4 x core (misperceived as 1 - core with probability .04) + tastes x (words / 10, flattery, certainty) - 1 if cut off

A person skips a near tie (|difference| below `skip`, 0.35) and else prefers the first with probability
sigmoid(difference / tau). Tastes are what more labels cannot mend: they make the reward model a flawed proxy. Every
draw is fixed by (seed, rater, content of the comparison), not by when or in which order it is asked, so that a
resumed run replays the same labels, and a pair shown the other way round gets the same choice.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trueup.records import Comparison, Completion, Preference, Prompt, UserError, Verdict
from trueup.world.gold import certainty_count, flattery_count, gold_of

CORE_WEIGHT = 4.0
MAX_WORDS = 40


def _draw(*parts: object) -> float:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _key(completion: Completion) -> str:
    return f"{completion.text}\x1e{completion.ended}"


@dataclass(frozen=True)
class Person:
    """One rater's noise and tastes, in units of utility."""

    name: str
    tau: float = 1.2
    length: float = 0.0
    flattery: float = 0.0
    certainty: float = 0.0
    misperceives: float = 0.04
    skip: float = 0.35

    def utility(self, prompt: Prompt, completion: Completion, seed: int) -> float:
        core = gold_of(prompt.text, completion.text, completion.ended).core
        if _draw(seed, self.name, "sees", prompt.text, _key(completion)) < self.misperceives:
            core = 1.0 - core
        words = min(len(completion.text.split()), MAX_WORDS)
        taste = self.length * words / 10 + self.flattery * min(flattery_count(completion.text), 2)
        taste += self.certainty * min(certainty_count(completion.text), 2)
        return CORE_WEIGHT * core + taste - (0.0 if completion.ended else 1.0)

    def choose(self, comparison: Comparison, seed: int) -> Verdict:
        first, second = comparison.completions
        gap = self.utility(comparison.prompt, first, seed) - self.utility(comparison.prompt, second, seed)
        if abs(gap) < self.skip:
            return Verdict(None, self.name, "near tie")
        return Verdict(_toss(_sigmoid(gap / self.tau), comparison, seed, self.name), self.name)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, x))))


def _toss(p_first: float, comparison: Comparison, seed: int, rater: str) -> float:
    """1.0 or 0.0: whether the first is chosen; the draw does not depend on the order shown."""
    keys = [_key(c) for c in comparison.completions]
    swapped = keys[0] > keys[1]
    draw = _draw(seed, rater, "choice", comparison.prompt.text, *sorted(keys))
    p = 1.0 - p_first if swapped else p_first
    return float((draw < p) != swapped)


def _pair(comparison: Comparison) -> None:
    if len(comparison.completions) != 2:
        raise UserError(f"simulated raters compare two answers, not {len(comparison.completions)}")


@dataclass(frozen=True)
class Rater:
    """A Judge by a rule from comparison to verdict."""

    name: str
    rule: Callable[[Comparison], Verdict]

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        for comparison in comparisons:
            _pair(comparison)
        return [self.rule(comparison) for comparison in comparisons]


def _gap(comparison: Comparison) -> float:
    a, b = (gold_of(comparison.prompt.text, c.text, c.ended).value for c in comparison.completions)
    return a - b


def oracle(seed: int = 0) -> Rater:
    def rule(comparison: Comparison) -> Verdict:
        gap = _gap(comparison)
        return Verdict(None, "oracle", "tie") if gap == 0 else Verdict(float(gap > 0), "oracle")

    return Rater("oracle", rule)


def flip(p: float = 0.25, seed: int = 0) -> Rater:
    name = f"flip({p:g})"

    def rule(comparison: Comparison) -> Verdict:
        gap = _gap(comparison)
        if gap == 0:
            return Verdict(None, name, "tie")
        return Verdict(_toss(1.0 - p if gap > 0 else p, comparison, seed, name), name)

    return Rater(name, rule)


def bt(tau: float = 0.45, seed: int = 0) -> Rater:
    name = f"bt({tau:g})"
    return Rater(name, lambda c: Verdict(_toss(_sigmoid(_gap(c) / tau), c, seed, name), name))


def biased(
    length: float = 0.5, flattery: float = 0.35, certainty: float = 0.35, tau: float = 1.2, seed: int = 0
) -> Rater:
    person = Person(f"biased({length:g},{flattery:g},{certainty:g})", tau, length, flattery, certainty)
    return Rater(person.name, lambda c: person.choose(c, seed))


def people(n: int = 13, seed: int = 0) -> list[Person]:
    """The pool's people, the same for the same (n, seed): careful and careless ones, with tastes of many sizes."""
    rng = random.Random(f"pool {n} {seed}")
    return [
        Person(
            f"pool-{i:02d}",
            tau=math.exp(rng.uniform(math.log(0.6), math.log(1.6))),
            length=rng.uniform(0.15, 0.7),
            flattery=rng.uniform(0.0, 0.35),
            certainty=rng.uniform(0.0, 0.35),
        )
        for i in range(n)
    ]


def pool(n: int = 13, seed: int = 0) -> Rater:
    crowd = people(int(n), seed)

    def rule(comparison: Comparison) -> Verdict:
        keys = sorted(_key(c) for c in comparison.completions)
        who = int(_draw(seed, "who", comparison.prompt.text, *keys) * len(crowd))
        return crowd[who].choose(comparison, seed)

    return Rater(f"pool({int(n)})", rule)


RATERS: dict[str, Callable[..., Rater]] = {"oracle": oracle, "flip": flip, "bt": bt, "biased": biased, "pool": pool}


def raters(name: str, seed: int = 0) -> Rater:
    """A rater by name, with numbers in brackets where wanted: `pool`, `pool(13)`, `flip(0.16)`, `biased(1,0,0)`."""
    found = re.fullmatch(r"(\w+)(?:\(([^)]*)\))?", name.strip())
    if not found or found[1] not in RATERS:
        raise UserError(f"unknown rater {name!r}; choose from {', '.join(RATERS)}, as in pool(13) or flip(0.25)")
    try:
        numbers = [float(x) for x in (found[2] or "").split(",") if x.strip()]
        return RATERS[found[1]](*numbers, seed=seed)
    except (TypeError, ValueError) as error:
        raise UserError(f"rater {name!r}: {error}") from None


def reliability(judge: Rater, other: Rater, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """What is known of labellers: `kept` (share not abstained), `accuracy` against gold (pairs whose gold differs),
    `agreement` with another judge on pairs that both kept, `prefers_longer` where lengths differ by 5 words or more."""
    mine, theirs = judge.judge(comparisons), other.judge(comparisons)
    right, same, longer = [], [], []
    for comparison, a, b in zip(comparisons, mine, theirs, strict=True):
        if a.p is None:
            continue
        gap = _gap(comparison)
        if gap:
            right.append((a.p > 0.5) == (gap > 0))
        if b.p is not None:
            same.append((a.p > 0.5) == (b.p > 0.5))
        words = [len(c.text.split()) for c in comparison.completions]
        if abs(words[0] - words[1]) >= 5:
            longer.append((a.p > 0.5) == (words[0] > words[1]))
    kept = float(np.mean([v.p is not None for v in mine]))
    return {
        "kept": kept,
        "accuracy": float(np.mean(right)),
        "agreement": float(np.mean(same)),
        "prefers_longer": float(np.mean(longer)),
    }


def demo_comparisons(n: int, seed: int = 0) -> list[Comparison]:
    """Pairs of answers of a demonstration's quality on preference prompts: a stand-in for pairs sampled from SFT."""
    from trueup.world.demos import answer
    from trueup.world.tasks import Task, prompts

    rng = random.Random(f"demo comparisons {seed}")
    out = []
    for prompt in prompts("preference", n, seed):
        task = Task(prompt.meta["category"], prompt.meta["kind"], tuple(prompt.meta["slots"]))
        out.append(Comparison(prompt, (Completion(answer(task, rng)), Completion(answer(task, rng)))))
    return out


def demo_preferences(n: int, seed: int = 0) -> list[Preference]:
    """What the pool says of `n` such pairs; those on which it abstains are left out."""
    comparisons = [c for c in demo_comparisons(n, seed) if c.completions[0].text != c.completions[1].text]
    out = []
    for comparison, verdict in zip(comparisons, pool(13, seed).judge(comparisons), strict=True):
        if verdict.p is not None:
            chosen, rejected = comparison.completions if verdict.p > 0.5 else comparison.completions[::-1]
            out.append(Preference(comparison.prompt, chosen, rejected, rater=verdict.rater))
    return out
