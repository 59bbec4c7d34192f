"""Send the hard comparisons to people and leave the rest to a judge: few human labels, spent where they are worth most.

In order: pair the completions; draw the audit, a random share of the pairs that people label whatever the judge says of
them; let the judge say its verdict on every pair (kept as it comes); take the signals of doubt (an order flip, p near
one half, spread over principles, reward models that disagree or are against the judge, the category); ask people about
the audit, and about sensitive categories, which no judge decides; learn from the audit how probable it is that the
judge's label is not a person's; ask people, as far as the budget goes, about the pairs where it is more probable than
that another person's would not be; write comparisons: people's labels where people were asked, else the judge's, each
as sure as its risk allows. A verdict that could not be read never becomes a label. What the judge is worth
is measured on the audit alone, since the pairs that it doubts are no fair sample.

Not in it: where the judge's opinion comes from (`judges`), the signals and the risk themselves (`judges.routing`), the
page on which people answer (`trueup label`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from trueup.config import Config, Seed, display, named
from trueup.data.completions import pairs_to_judge
from trueup.data.files import raw_rows
from trueup.engine.mesh import Mesh
from trueup.judges import RECORDED, JudgeSpec, make_judge, pair_scores
from trueup.judges.asked import PEOPLE, as_judged, ask, on_page, people_say, write_labels
from trueup.judges.priced import is_server, priced
from trueup.judges.routing import (
    ASKED,
    NO_LABEL,
    UNREACHED,
    Pair,
    Risk,
    Vote,
    against_gold,
    agreement,
    by_signal,
    margins,
    people_differ,
    row_of,
    signals_of,
    unseen_risk,
)
from trueup.records import Comparison, Judge, UserError, Verdict, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer
from trueup.store import Asked, Kind, as_row

WHAT = "sends the hard comparisons to people and leaves the rest to the judge: people's time is what is scarce"
VERSION = 1


class RouteConfig(Config):
    """Comparisons, labelled by people or by a judge."""

    completions: str
    """A `completions.jsonl` of phase `generate`, with two or more completions a prompt."""
    judge: JudgeSpec
    """Whose verdicts need no person: {constitution: ..., model: ...}, or any other judge."""
    people: JudgeSpec
    """`people`, for whom the run waits: with `store` they answer on the page of `trueup label`, without it in a file.
    Or a judge in their place: simulated raters, a file of verdicts."""
    kind: Kind = "simulated"
    """What a judge in the place of people is: simulated, or human where a file holds what people said. On the page an
    account says it."""
    budget: int | None = Field(None, ge=1)
    """Labels of people, the audit's included."""
    money: float | None = Field(None, gt=0)
    """Instead of `budget`: what people's labels may cost in all, at the `price` of one."""
    price: float | None = Field(None, gt=0)
    how: Literal["routed", "random"] = "routed"
    """routed: by risk. random: the control, which spends the whole budget on pairs drawn at random."""
    audit: float = Field(0.1, gt=0, le=1)
    """Share of the pairs that people label at random, drawn before anything is known of them."""
    overlap: float = Field(0.1, ge=0, le=1)
    """Share of the audit that two people label: how often people differ is how often the judge may. Of a file of
    verdicts nobody is asked twice."""
    person_error: float = Field(0.2, ge=0, le=0.5)
    """How often one person is wrong, as far as nothing is known: it counts as 10 pairs that two people labelled."""
    sensitive: tuple[str, ...] = named(())
    """Categories of prompts that no judge decides: people label them first, and what the budget does not reach is
    dropped. In the queue they are for raters who agreed to see such content."""
    scorers: tuple[Spec, ...] = ()
    """Reward models: where they disagree, or are against the judge, a person should look."""
    history: tuple[str, ...] = ()
    """`routed.jsonl` of earlier rounds, whose audits join in."""
    gold: Spec | None = None
    """A known gold score: its margin (chosen minus rejected) is written beside the label, only to measure with."""
    store: str | None = display(None)
    """A preference store (SQLite, or a PostgreSQL URL) to which the verdicts are appended, made where there is none."""
    limit: int = Field(0, ge=0)
    """So many pairs at most; 0 for all."""
    seed: Seed = 0
    chunk: int = display(32, gt=0)
    """Comparisons asked at once: no more than these answers are lost to a kill."""


@dataclass(frozen=True)
class First:
    """What is drawn before anything is known but the categories. Numbers of pairs; `left`: labels left after them."""

    audit: list[int]
    twice: list[int]
    sensitive: list[int]
    unreached: list[int]
    random: list[int]
    left: int


def run_phase(config: RouteConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    budget = budget_of(config)
    history = [row for path in config.history for row in read_audit(path)]
    comparisons, dropped = paired(config)
    first = draw(config, comparisons, budget)

    judge = make_judge(config.judge, mesh, seed=config.seed)
    verdicts = run.journaled("verdicts", len(comparisons), config.chunk, partial(ask, judge, comparisons))
    scorers = [make_scorer(one, mesh) for one in config.scorers]
    unscored: list[dict[str, Any]] = [{"ahead": []}] * len(comparisons)
    scored = (
        run.journaled("scores", len(comparisons), config.chunk, partial(ahead, scorers, comparisons))
        if scorers
        else unscored
    )
    pairs = [
        Pair(c, verdict := Verdict.of(v), signals_of(c, verdict, s["ahead"]))
        for c, v, s in zip(comparisons, verdicts, scored, strict=True)
    ]
    for why in ("audit", "sensitive", "random"):
        for i in getattr(first, why):
            pairs[i].why = why
    for i in first.unreached:
        pairs[i].why = UNREACHED

    people = People(config, run, mesh)
    people.ask("first", pairs, [*first.audit, *first.sensitive, *first.random], first.twice)
    [decided] = run.journaled("decision", 1, 1, lambda _: [decide(config, pairs, first, history)])
    for pair, risk in zip(pairs, decided["risk"], strict=True):
        pair.risk = risk
    for i in decided["chosen"]:
        pairs[i].why = "risk"
    people.ask("second", pairs, decided["chosen"], [])

    audit = [p for p in pairs if p.why == "audit" and p.wrong is not None]
    trusted = [p for p in audit if p.risk <= decided["bar"] and p.comparison.prompt.category not in config.sensitive]
    rows, gaps = write(config, run, mesh, pairs)
    dropped.update(p.dropped for p in pairs if p.dropped)
    went = Counter(p.why for p in pairs)
    labels = sum(went[name] for name in ASKED) + len(first.twice)
    left = [p for p in pairs if p.why == "left" and not p.dropped]
    results = {
        "comparisons": len(rows),
        "pairs": len(pairs),
        "judge": judge.name,
        "how": config.how,
        "budget": budget,
        "labels": labels,
        "asked": {**{name: went[name] for name in ASKED}, "asked twice": len(first.twice)},
        "kinds": dict(Counter(v.kind for p in pairs for v in p.votes)),
        "left": len(left),
        "confidence": float(np.mean([max(1 - p.risk, 0.5) for p in left])) if left else None,
        "dropped": dict(dropped),
        "audit": agreement(audit),
        "trusted": agreement(trusted),
        "learned_from": decided["learned_from"],
        "threshold": decided["threshold"],
        "bar": decided["bar"],
        "beyond": decided["beyond"],
        "signals": by_signal(pairs, audit, decided["weights"]),
        "cost": sum(p.verdict.cost for p in pairs),
        "spent": None if config.price is None else config.price * labels,
        **({"gold": against_gold(pairs, gaps)} if config.gold else {}),
    }
    for text in lines(results):
        run.say(text)
    return results


def estimate(config: RouteConfig) -> str:
    """What people would be asked, what the judge would be, and what either would cost at most. Asks nothing."""
    budget = budget_of(config)
    comparisons, _ = paired(config)
    first = draw(config, comparisons, budget)
    due = {"audit": first.audit, "asked twice": first.twice, "sensitive": first.sensitive, "random": first.random}
    asked = ", ".join(f"{len(pairs)} {name}" for name, pairs in due.items() if pairs)
    if config.how == "routed" and first.left:
        asked += f", hard ones with the {first.left} left"
    spent = f", {config.price * budget:.6g} at the price given" if config.price else ""
    lost = f"; dropped: {len(first.unreached)} {UNREACHED}" if first.unreached else ""
    judge = "not a server"
    if is_server(config.judge):
        judge = priced(len(comparisons), [(config.judge, config.seed, comparisons)])
    return f"people: at most {budget} labels for {len(comparisons)} pairs{spent} ({asked}){lost}\njudge: {judge}"


def paired(config: RouteConfig) -> tuple[list[Comparison], Counter[str]]:
    return pairs_to_judge(config.completions, config.limit, np.random.default_rng(config.seed))


def budget_of(config: RouteConfig) -> int:
    """In labels. Raises UserError unless it is told in one way."""
    if config.budget is not None and config.money is None and config.price is None:
        return config.budget
    if config.budget is None and config.money is not None and config.price is not None:
        labels = math.floor(config.money / config.price + 1e-9)
        if not labels:
            raise UserError(f"money={config.money:g} pays for no label at price={config.price:g}")
        return labels
    raise UserError("people's labels need a limit: budget=LABELS, or money=SUM with the price=OF ONE, and not both")


def draw(config: RouteConfig, comparisons: Sequence[Comparison], budget: int) -> First:
    """By the seed alone: neither verdict nor signal has a say."""
    order = np.random.default_rng([config.seed, 1]).permutation(len(comparisons)).tolist()
    audit, rest = order[: round(config.audit * len(order))], order[round(config.audit * len(order)) :]
    if not audit:
        raise UserError(f"audit={config.audit:g} of {len(order)} pairs is none: what the judge is worth stays unknown")
    second = not isinstance(config.people, str) or not config.people.endswith(RECORDED)  # a file says the same again
    twice = audit[: round(config.overlap * len(audit))] if second else []
    left = budget - len(audit) - len(twice)
    if left < 0:
        raise UserError(
            f"audit={config.audit:g} of {len(order)} pairs takes {len(audit) + len(twice)} labels ({len(twice)} pairs "
            f"twice), the budget is {budget}"
        )
    mine = [i for i in rest if comparisons[i].prompt.category in config.sensitive]
    others = [i for i in rest if comparisons[i].prompt.category not in config.sensitive]
    sensitive, unreached = mine[:left], mine[left:]
    left -= len(sensitive)
    chosen = others[:left] if config.how == "random" else []
    return First(audit, twice, sensitive, unreached, chosen, left - len(chosen))


def ahead(scorers: Sequence[Any], comparisons: Sequence[Comparison], index: range) -> list[dict[str, Any]]:
    some = [comparisons[i] for i in index]
    found = [margins(scorer, some) for scorer in scorers]
    return [{"ahead": [x for one in found for x in one[k].tolist()]} for k in range(len(some))]


def read_audit(path: str) -> list[dict[str, Any]]:
    """The audited pairs of an earlier round on which judge and people said something."""
    out = []
    for place, row in raw_rows(path):
        if not {"why", "signals", "p", "votes", "wrong"} <= row.keys():
            raise UserError(
                f"{path}, {place}: expected a routed.jsonl of `trueup route` (why, signals, p, votes, wrong)"
            )
        if row["why"] == "audit" and row["wrong"] is not None:
            out.append(row)
    return out


class People:
    """Who is asked where the judge is not enough."""

    def __init__(self, config: RouteConfig, run: Run, mesh: Mesh) -> None:
        self.config, self.run, self.mesh = config, run, mesh
        self.judges: list[Judge] = []
        if config.people != PEOPLE:  # the second of two people is another one
            self.judges = [make_judge(config.people, mesh, seed=config.seed + k) for k in (0, 1)]

    def ask(self, wave: str, pairs: Sequence[Pair], which: Sequence[int], twice: Sequence[int]) -> None:
        """Adds people's votes to the pairs `which`, those in `twice` by two people. Raises Waiting until they are
        there."""
        if not which:
            return
        config, file = self.config, f"to-label-{wave}.jsonl"
        if not self.judges and config.store and not (self.run.folder / file).exists():
            asked = [self._asked(pairs[i], 2 if i in set(twice) else 1) for i in which]
            said = on_page(self.run, self.mesh, config.store, asked, f"{self.run.folder.name}, {wave}")
            for i, votes in zip(which, said, strict=True):
                pairs[i].votes = [Vote(v.p, v.rater, v.kind, v.note, stored=True) for v in votes]
            return
        again = [Comparison(pairs[i].comparison.prompt, pairs[i].comparison.completions[::-1]) for i in twice]
        once = [pairs[i].comparison for i in which]
        if self.judges:
            verdicts = self._verdicts(wave, self.judges[0], once) + self._verdicts(
                f"{wave}-again", self.judges[1], again
            )
        else:
            verdicts = people_say(self.run, self.mesh, [*once, *again], file)
        kind = config.kind if self.judges else "human"
        for k, (i, v) in enumerate(zip([*which, *twice], verdicts, strict=True)):
            if k < len(which):
                pairs[i].votes.append(Vote(v.p, v.rater, kind, v.note))
            else:
                p = None if v.p is None else 1 - v.p
                pairs[i].votes.append(Vote(p, f"{v.rater}, asked second", kind, v.note))

    def _verdicts(self, name: str, judge: Judge, comparisons: list[Comparison]) -> list[Verdict]:
        rows = self.run.journaled(name, len(comparisons), self.config.chunk, partial(ask, judge, comparisons))
        return [Verdict.of(row) for row in rows]

    def _asked(self, pair: Pair, wanted: int) -> Asked:
        sensitive = pair.comparison.prompt.category in self.config.sensitive
        return Asked(pair.comparison, wanted, priority=pair.risk, sensitive=sensitive)


def decide(
    config: RouteConfig, pairs: Sequence[Pair], first: First, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the audit teaches: each pair's risk; the threshold, above which another person would differ from the judge
    more often than from a person; and the pairs that people are asked of. `bar`: what is left to the judge has no
    higher risk."""
    audit = [i for i in first.audit if pairs[i].wrong is not None]
    signals = [*(pairs[i].signals for i in audit), *(row["signals"] for row in history)]
    wrong = [*(pairs[i].wrong or 0.0 for i in audit), *(row["wrong"] for row in history)]
    if not wrong:
        raise UserError(f"of the {len(first.audit)} audited pairs none has a label of people and one of the judge")
    model = Risk(signals, wrong)
    risk = np.where([p.verdict.p is None for p in pairs], NO_LABEL, model.of([p.signals for p in pairs]))
    risk[audit] = unseen_risk(signals, wrong)[: len(audit)]
    labelled = [*(pairs[i].said for i in first.audit), *(row["votes"] for row in history)]
    threshold = people_differ(labelled, config.person_error)
    order = np.random.default_rng([config.seed, 2]).permutation(len(pairs)).tolist()  # of equal risks
    hard = sorted((i for i in order if pairs[i].why == "left" and risk[i] > threshold), key=lambda i: -risk[i])
    chosen = hard[: first.left] if config.how == "routed" else []
    bar = threshold if len(chosen) == len(hard) else float(risk[chosen[-1]]) if chosen else 1.0
    if config.how == "random":
        bar = 1.0
    return {
        "risk": risk.tolist(),
        "threshold": threshold,
        "bar": bar,
        "chosen": chosen,
        "beyond": len(hard) - len(chosen),
        "weights": model.weight(),
        "learned_from": len(wrong),
    }


def write(
    config: RouteConfig, run: Run, mesh: Mesh, pairs: Sequence[Pair]
) -> tuple[list[dict[str, Any]], list[float | None]]:
    """comparisons.jsonl, routed.jsonl, and the store's rows. The comparisons, and each pair's gold margin."""
    origin = run.folder.name
    gold = make_scorer(config.gold, mesh) if config.gold else None
    values = pair_scores(gold, [p.comparison for p in pairs]) if gold else [None] * len(pairs)
    rows, verdicts = [], []
    for pair, value in zip(pairs, values, strict=True):
        machine = pair.machine
        if machine.p is not None and pair.comparison.prompt.category not in config.sensitive:
            verdicts.append(as_judged(pair.comparison, machine, value, "ai", origin))
        for vote in pair.votes:
            if vote.p is not None and not vote.stored:
                said = Verdict(vote.p, vote.rater, vote.note)
                verdicts.append(as_judged(pair.comparison, said, value, vote.kind, f"{origin}, people"))
        if not pair.dropped:
            label = as_judged(pair.comparison, pair.people if pair.said else machine, value, pair.by, origin)
            rows.append({**as_row(label), "by": pair.by})
    if not rows:
        raise UserError(f"no pair of {config.completions} has a label")
    if mesh.is_main:
        write_jsonl(run.folder / "routed.jsonl", [row_of(pair) for pair in pairs])
    write_labels(run, mesh, rows, verdicts, config.store)
    return rows, [None if value is None else float(value[0] - value[1]) for value in values]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The results for the person who watches."""

    def share(one: Mapping[str, Any]) -> str:
        if one["accuracy"] is None:
            return "unknown (no pair)"
        low, high = one["interval"]
        return f"{one['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, {one['pairs']} pairs)"

    asked = found["asked"]
    who = "simulated raters, not people," if set(found["kinds"]) == {"simulated"} else "people"
    why = ", ".join(f"{n} {name}" for name, n in asked.items() if n)
    left = "; ".join(f"{n} {reason}" for reason, n in found["dropped"].items()) or "none"
    sure = "" if found["confidence"] is None else f"; its labels say {found['confidence']:.1%} on average"
    return [
        f"{found['pairs']} pairs: {who} were asked {found['labels']} of {found['budget']} labels ({why}); "
        f"{found['left']} left to {found['judge']}, {found['beyond']} hard ones not asked; dropped: {left}",
        f"the judge agrees with them on {share(found['audit'])} of the random audit, on "
        f"{share(found['trusted'])} of what is left to it{sure}; hard: a risk above {found['threshold']:.3f}",
    ]
