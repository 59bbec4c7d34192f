"""What a judge is worth: against the people who judged the same pairs, and what it looks at besides the content.

A verdict or a vote is `first`, `tie` (p = 1/2) or `second`. Accuracy is against the people's majority, over the pairs
that have one and on which the judge says something that can be read; beside it on pairs where the people are unanimous,
and where they are split. The line that a judge should reach is **one person**: each of those who judged a pair against
the majority of the others, and the judge against the same majorities. Calibration is of max(p, 1 - p) against the share
of people who say the same, before and after temperature scaling; the temperature for one half of the pairs is fitted on
the other. Biases: how often swapping the order turns the verdict and how often the one shown first wins (both from
verdicts that have readings in two orders), and how often the longer one wins, for the people too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from trueup.agreement import cohen_kappa
from trueup.judges.recorded import Judged
from trueup.math import at_temperature, bootstrap_interval, expected_calibration_error, fit_temperature
from trueup.records import Verdict

FIRST, TIE, SECOND = 0, 1, 2


def side(p: float) -> int:
    return FIRST if p > 0.5 else SECOND if p < 0.5 else TIE


def majority(votes: Sequence[float]) -> int | None:
    """The side that most are for; None where two sides have as many."""
    counts = Counter(map(side, votes)).most_common(2)
    return None if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]) else counts[0][0]


def measure(verdicts: Sequence[Verdict], judged: Sequence[Judged]) -> dict[str, Any]:
    """See the head of the file. Figures without a pair to rest on are None, as is `accepted` without several people."""
    said = [(v.p, j) for v, j in zip(verdicts, judged, strict=True) if v.p is not None]
    held = [(v.p, j) for v, j in zip(verdicts, judged, strict=True) if v.p is not None or not v.readable]
    known = [(side(p), p, m, j) for p, j in said if (m := majority(j.votes)) is not None]
    split = [len(set(map(side, j.votes))) > 1 for *_, j in known]
    right = [s == m for s, _, m, _ in known]
    one = one_person(held)
    return {
        "pairs": len(judged),
        "abstained": sum(v.p is None and v.readable for v in verdicts),
        "unreadable": sum(v.p is None and not v.readable for v in verdicts),
        "no_majority": len(said) - len(known),
        "cost": sum(v.cost for v in verdicts),
        "judged": len(known),
        "accuracy": _mean(right),
        "accuracy_interval": _interval(right),
        "unanimous": {
            "pairs": len(split) - sum(split),
            "accuracy": _mean([r for r, s in zip(right, split, strict=True) if not s]),
        },
        "split": {"pairs": sum(split), "accuracy": _mean([r for r, s in zip(right, split, strict=True) if s])},
        "by_category": by_category(right, [j for *_, j in known]),
        "kappa": _kappa([s for s, *_ in known], [m for _, _, m, _ in known]),
        "one_person": one,
        "accepted": None if one["pairs"] == 0 else bool(one["judge"] >= one["person"]),
        **calibration(said),
        "longer_right": _mean([side(_longer(j)) == m for _, _, m, j in known]),
        "people_prefer_longer": _prefers_longer([(p, j) for _, j in said for p in j.votes]),
        **biases(verdicts, judged),
    }


def by_category(right: Sequence[bool], judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Category of the prompt -> pairs and accuracy; none where no prompt has a category."""
    found: dict[str, list[bool]] = {}
    for r, j in zip(right, judged, strict=True):
        if j.comparison.prompt.category is not None:
            found.setdefault(j.comparison.prompt.category, []).append(r)
    return {name: {"pairs": len(rows), "accuracy": float(np.mean(rows))} for name, rows in sorted(found.items())}


def biases(verdicts: Sequence[Verdict], judged: Sequence[Judged]) -> dict[str, Any]:
    """What needs no people."""
    orders = [v.orders for v in verdicts if len(v.orders) == 2]
    flips = [side(o[False]) != side(o[True]) for o in orders]
    shown_first = [p for o in orders for p in (o[False], 1 - o[True])]
    spreads = [v.spread for v in verdicts if v.spread is not None]
    said = [(v.p, j) for v, j in zip(verdicts, judged, strict=True) if v.p is not None]
    return {
        "in_both_orders": len(orders),
        "flip_rate": _mean(flips),
        "first_shown_wins": _mean([1 - side(p) / 2 for p in shown_first]),
        "prefers_longer": _prefers_longer(said),
        "spread": _mean(spreads),
    }


def one_person(said: Sequence[tuple[float | None, Judged]]) -> dict[str, Any]:
    """Each person, and the judge, against the majority of the other people: shares right, over the same majorities. A
    majority counts once for each person who is held against it: a pair on which two of three agree has one, and there
    the third is wrong by definition. A verdict that cannot be read (None) is not right."""
    rows = []
    for p, j in said:
        others = [(vote, majority([*j.votes[:i], *j.votes[i + 1 :]])) for i, vote in enumerate(j.votes)]
        known = [(side(vote) == m, p is not None and side(p) == m) for vote, m in others if m is not None]
        if known:
            rows.append((len(known), sum(k[0] for k in known), sum(k[1] for k in known)))
    if not rows:
        return {"pairs": 0, "held": 0, "person": None, "judge": None, "judge_ahead_interval": None}
    held, person, judge = (sum(column) for column in zip(*rows, strict=True))
    each = held / len(rows)
    return {
        "pairs": len(rows),
        "held": held,
        "person": person / held,
        "judge": judge / held,
        "judge_ahead_interval": _interval([(b - a) / each for _, a, b in rows]),
    }


def calibration(said: Sequence[tuple[float, Judged]]) -> dict[str, Any]:
    """ECE before and after scaling, and the temperature fitted on all. On pairs that somebody judged. What N pairs say
    is sure to (N + 1) / (N + 2): three right ones make no judge certain (Platt 1999, section 2.2)."""
    rows = [(p, float(np.mean(j.votes))) for p, j in said if j.votes]
    if len(rows) < 2:
        return {"ece": None, "ece_scaled": None, "temperature": None}
    p, share = (np.array(column) for column in zip(*rows, strict=True))
    scaled = np.empty_like(p)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        scaled[half] = at_temperature(p[half].tolist(), _fitted(p[other], share[other]))
    return {
        "ece": _ece(p, share),
        "ece_scaled": _ece(scaled, share),
        "temperature": _fitted(p, share),
    }


def _fitted(p: np.ndarray, share: np.ndarray) -> float:
    n = len(p)
    return fit_temperature(p.tolist(), ((n * share + 1) / (n + 2)).tolist())


def compare(a: Sequence[Verdict], b: Sequence[Verdict]) -> dict[str, Any]:
    """Two judges on the same pairs: over those on which both say something."""
    both = [(side(x.p), side(y.p)) for x, y in zip(a, b, strict=True) if x.p is not None and y.p is not None]
    return {
        "pairs": len(both),
        "agreement": _mean([x == y for x, y in both]),
        "kappa": _kappa([x for x, _ in both], [y for _, y in both]),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """The figures in one line."""
    one = found["one_person"]
    parts = (
        f"{found['judged']} of {found['pairs']} pairs",
        f"{found['unreadable']} unreadable, {found['abstained']} abstained",
        f"accuracy {_p(found['accuracy'])} against the majority, kappa {_f(found['kappa'])}",
        f"where one person has {_p(one['person'])} the judge has {_p(one['judge'])}",
        f"the longer one is right on {_p(found['longer_right'])} and wins {_p(found['prefers_longer'])}",
        f"swapping flips {_p(found['flip_rate'])} of {found['in_both_orders']}",
        f"ECE {_f(found['ece'])}, scaled (T = {_f(found['temperature'])}) {_f(found['ece_scaled'])}",
    )
    return f"{name}: {'; '.join(parts)}"


def refusal(name: str, found: dict[str, Any]) -> str:
    """Why a judge is not taken."""
    one = found["one_person"]
    if found["accepted"] is None:
        return (
            f"judge '{name}': no pair of the file was judged by several people, so that nobody knows what one is worth"
        )
    return (
        f"judge '{name}' is worse than one person: {_p(one['judge'])} against {_p(one['person'])} with the majority "
        f"of the others, on {one['pairs']} pairs"
    )


def _p(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def _kappa(a: Sequence[int], b: Sequence[int]) -> float | None:
    """None where it is undefined: without pairs, or where both say one and the same of all."""
    found = cohen_kappa(a, b)
    return None if math.isnan(found) else found


def _f(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _interval(values: Sequence[float]) -> list[float] | None:
    if not len(values):
        return None
    low, high = bootstrap_interval([float(v) for v in values], seed=0, samples=2000)
    return [float(low), float(high)]


def _ece(p: np.ndarray, share: np.ndarray) -> float:
    """Of how sure the judge is, against how many agree: the side of a pair has no meaning."""
    sure, agree = np.where(p >= 0.5, p, 1 - p), np.where(p >= 0.5, share, 1 - share)
    return expected_calibration_error(sure.tolist(), agree.tolist())[0]


def _longer(judged: Judged) -> float:
    a, b = (len(c.text) for c in judged.comparison.completions)
    return 1.0 if a > b else 0.0 if a < b else 0.5


def _prefers_longer(said: Sequence[tuple[float, Judged]]) -> float | None:
    """The share of decided verdicts, on pairs of different lengths, that go to the longer one."""
    return _mean([side(p) == side(_longer(j)) for p, j in said if p != 0.5 and _longer(j) != 0.5])
