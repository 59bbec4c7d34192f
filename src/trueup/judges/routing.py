"""Which of a judge's verdicts a person should look at: signals of doubt, a risk that is learned from an audit, and what
the audit says of the judge.

A signal is a number in [0, 1] for each pair, 0 where nothing speaks against the judge. The risk is the probability that
the judge's label is not a person's: a logistic regression on the signals, small enough for a few dozen audited pairs
(ridge 1: a weight is the change in log-odds as a signal goes from 0 to 1, and has a standard normal prior). An audited
pair's own risk comes from a model that has not seen it, or the judge would look too good where it is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trueup.agreement import wilson
from trueup.judges.measured import side
from trueup.math import fit_logistic
from trueup.records import Comparison, Scorer, Scores, Verdict
from trueup.scorers import logits_of
from trueup.scorers.ensemble import Ensemble
from trueup.store import Kind

RIDGE, RIDGE_OF_MEAN = 1.0, 0.1
FOLDS = 10
NO_LABEL = 0.5
"""The risk where the judge gives no label: that of a coin."""
PRIOR_PAIRS = 10
"""So many pairs is the stated error of a person worth beside those that two people judged."""

Signals = Mapping[str, float]


def margins(scorer: Scorer, comparisons: Sequence[Comparison]) -> np.ndarray:
    """How far the first completion is ahead, [N, K]: of each member of an ensemble, else of the scorer; in log-odds
    where the scorer has that unit."""
    flat = [(c.prompt, completion) for c in comparisons for completion in c.completions]
    scores = scorer.score([p for p, _ in flat], [c for _, c in flat])
    several = [(scorer, scores)]
    if isinstance(scorer, Ensemble):
        several = [(member, Scores(scores.parts[name])) for name, member in scorer.members.items()]
    values = [logits if (logits := logits_of(one, s)) is not None else s.value for one, s in several]
    return np.stack([np.asarray(v, np.float64).reshape(-1, 2) @ [1.0, -1.0] for v in values], axis=1)


def signals_of(comparison: Comparison, verdict: Verdict, ahead: Sequence[float]) -> dict[str, float]:
    """`ahead` [K]: the reward models' margins. Names -> [0, 1]."""
    p = 0.5 if verdict.p is None else verdict.p
    orders = verdict.orders
    out = {
        "order flip": float(len(orders) == 2 and side(orders[False]) != side(orders[True])),
        "near one half": 1 - abs(2 * p - 1),
        "spread over principles": 2 * (verdict.spread or 0.0),
        "partly unreadable": float(not verdict.readable),
    }
    if len(ahead):
        theirs = 1 / (1 + np.exp(-np.clip(ahead, -50, 50)))
        out["reward models disagree"] = 2 * float(theirs.std())
        out["against the reward model"] = abs(p - float(theirs.mean()))
    if comparison.prompt.category is not None:
        out[f"category {comparison.prompt.category}"] = 1.0
    return out


def apart(p: float, votes: Sequence[float]) -> float:
    """How often a label is not the people's, in [0, 1]; where one of both is a tie, by half."""
    return float(np.mean([abs(side(p) - side(vote)) / 2 for vote in votes]))


ASKED = ("audit", "sensitive", "random", "risk")
"""Why people are asked about a pair."""
UNREACHED = "sensitive, beyond the budget"


@dataclass(frozen=True)
class Vote:
    """One person's verdict: p that the first is better, None where the person could not say."""

    p: float | None
    rater: str
    kind: Kind
    note: str = ""
    stored: bool = False


@dataclass
class Pair:
    """What is known of a pair, and where it goes. `why`: one of ASKED; `left` to the judge; or UNREACHED."""

    comparison: Comparison
    verdict: Verdict
    signals: Signals
    risk: float = NO_LABEL
    why: str = "left"
    votes: list[Vote] = field(default_factory=list)

    @property
    def said(self) -> list[float]:
        return [v.p for v in self.votes if v.p is not None]

    @property
    def wrong(self) -> float | None:
        """How far the judge's label is from the people's; None where one of them is missing."""
        return apart(self.verdict.p, self.said) if self.verdict.p is not None and self.said else None

    @property
    def machine(self) -> Verdict:
        """The judge's label, as sure as its risk allows: 1 - risk, at least one half, for the side that it takes."""
        p = self.verdict.p
        if p is None or p == 0.5:
            return self.verdict
        sure = max(0.5, 1 - self.risk)
        return replace(self.verdict, p=sure if p > 0.5 else 1 - sure)

    @property
    def people(self) -> Verdict:
        """What people say together."""
        said = [v for v in self.votes if v.p is not None]
        p = float(np.mean(self.said)) if said else None
        return Verdict(p, ", ".join(v.rater for v in said), "; ".join(v.note for v in said if v.note))

    @property
    def by(self) -> Kind:
        """Whose the label is. Where one of several voters is a human, it is theirs."""
        kinds: list[Kind] = [v.kind for v in self.votes if v.p is not None] or ["ai"]
        return "human" if "human" in kinds else kinds[0]

    @property
    def dropped(self) -> str:
        """Why there is no label."""
        if self.why == UNREACHED:
            return UNREACHED
        if self.why != "left":
            return "" if self.said else "people could not judge"
        if self.verdict.p is None:
            return "the judge abstained" if self.verdict.readable else "the judge could not be read"
        return ""


class Risk:
    """The model, from audited pairs: their signals, and how far the judge was from the people, [n] in [0, 1]."""

    def __init__(self, signals: Sequence[Signals], wrong: Sequence[float]) -> None:
        self.names = sorted({name for one in signals for name in one})
        # What is not known of a pair (an earlier round had no reward model) is taken as the mean; a category that is
        # not its own is 0.
        known = {name: [one[name] for one in signals if name in one] for name in self.names}
        self.missing = {n: 0.0 if n.startswith("category ") else float(np.mean(known[n])) for n in self.names}
        ridge = [RIDGE] * len(self.names) + [RIDGE_OF_MEAN]
        self.weights = fit_logistic(self._table(signals), list(wrong), ridge).numpy()

    def _table(self, signals: Sequence[Signals]) -> torch.Tensor:
        rows = [[*(one.get(n, self.missing[n]) for n in self.names), 1.0] for one in signals]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.names) + 1)

    def of(self, signals: Sequence[Signals]) -> np.ndarray:
        """[N] in [0, 1]."""
        return 1 / (1 + np.exp(-(self._table(signals).numpy() @ self.weights)))

    def weight(self) -> dict[str, float]:
        return dict(zip(self.names, self.weights[:-1].tolist(), strict=True))


def unseen_risk(signals: Sequence[Signals], wrong: Sequence[float]) -> np.ndarray:
    """[n]: the risk of each audited pair by a model of the others, of which a tenth is left out in turn."""
    n = len(signals)
    out = np.full(n, NO_LABEL)
    for fold in range(min(FOLDS, n)):
        rest = [i for i in range(n) if i % FOLDS != fold]
        mine = [i for i in range(n) if i % FOLDS == fold]
        if rest:
            out[mine] = Risk([signals[i] for i in rest], [wrong[i] for i in rest]).of([signals[i] for i in mine])
    return out


def people_differ(votes: Sequence[Sequence[float]], person_error: float) -> float:
    """How often two people differ about a pair: 2 e (1 - e) for people who each err with probability e, as PRIOR_PAIRS
    pairs, and the pairs that two people judged beside it."""
    seen = [apart(v[0], [v[1]]) for v in votes if len(v) > 1]
    prior = 2 * person_error * (1 - person_error)
    return (PRIOR_PAIRS * prior + sum(seen)) / (PRIOR_PAIRS + len(seen))


def row_of(pair: Pair) -> dict[str, Any]:
    """A line of routed.jsonl. `p` and `votes`: that the first is better."""
    first, second = (c.text for c in pair.comparison.completions)
    return {
        "prompt": [dict(m) for m in pair.comparison.prompt.messages],
        "first": first,
        "second": second,
        "category": pair.comparison.prompt.category,
        "signals": dict(pair.signals),
        "risk": pair.risk,
        "why": pair.why,
        "by": None if pair.dropped else pair.by,
        "dropped": pair.dropped,
        "p": pair.verdict.p,
        "votes": pair.said,
        "raters": [v.rater for v in pair.votes],
        "wrong": pair.wrong,
    }


def agreement(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How often the judge's label is the people's, with Wilson's 95% interval; a tie of one of both counts half."""
    wrong = [p.wrong for p in pairs if p.wrong is not None]
    if not wrong:
        return {"pairs": 0, "accuracy": None, "interval": None}
    share = 1 - float(np.mean(wrong))
    return {"pairs": len(wrong), "accuracy": share, "interval": list(wilson(share, len(wrong)))}


def by_signal(pairs: Sequence[Pair], audit: Sequence[Pair], weights: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each signal's weight, and how often the judge is right where it is above its mean over all pairs (`with`) and
    elsewhere; signals that are the same for all pairs say nothing, and are left out."""
    out = {}
    for name in sorted({name for p in pairs for name in p.signals}):
        values = [p.signals.get(name, 0.0) for p in pairs]
        if max(values) - min(values) > 1e-9:
            mean = float(np.mean(values))
            parts = {True: [p for p in audit if p.signals.get(name, 0.0) > mean]}
            parts[False] = [p for p in audit if p.signals.get(name, 0.0) <= mean]
            out[name] = {
                "weight": weights.get(name),
                "with": agreement(parts[True]),
                "without": agreement(parts[False]),
            }
    return out


def against_gold(pairs: Sequence[Pair], gaps: Sequence[float | None]) -> dict[str, float | None]:
    """Shares of labels in the gold score's order: of the judge on all pairs, of the judge where it was left alone, of
    people, and of the labels as they are. A tie counts half."""

    def share(some: Sequence[tuple[float | None, float | None]]) -> float | None:
        right = [1 - apart(p, [0.5 + 0.5 * np.sign(gap)]) for p, gap in some if p is not None and gap]
        return float(np.mean(right)) if right else None

    both = list(zip(pairs, gaps, strict=True))
    kept = [(p, gap) for p, gap in both if not p.dropped]
    return {
        "judge": share([(p.verdict.p, gap) for p, gap in both]),
        "left": share([(p.verdict.p, gap) for p, gap in kept if not p.said]),
        "people": share([(p.people.p, gap) for p, gap in kept if p.said]),
        "labels": share([(p.people.p if p.said else p.verdict.p, gap) for p, gap in kept]),
    }
