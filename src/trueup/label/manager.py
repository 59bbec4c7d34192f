"""What the manager sees: progress, how fast, how far raters agree, who leans to a side or to length, what is disputed.

Everything is computed from the store when it is looked at; verdicts that came from files count as much as those given
here. Simulated raters are marked wherever they stand.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from trueup.agreement import alpha, by_rater, pair_kappas, wilson
from trueup.label.queue import Queue, side
from trueup.store import ADJUDICATION, SETTLED, Store, live
from trueup.store.tables import assignments, comparisons, completions, items, log, preferences, raters

DISPUTED, FLAGGED, PAIRS, LOG_ROWS = 20, 20, 15, 100
"""How many of each are shown."""


@dataclass
class Of:
    """One rater's figures; a share is None where there is nothing to take it of."""

    name: str
    kind: str = "human"
    answers: int = 0
    last_hour: int = 0
    seconds: list[float] = field(default_factory=list)
    left: list[bool] = field(default_factory=list)
    longer: list[bool] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)
    paused: str = ""
    account: bool = False

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def share(values: list[bool]) -> tuple[float, float, float, int] | None:
    """(share of True, low, high, n): Wilson's 95% interval. None of nothing."""
    n = len(values)
    return (sum(values) / n, *wilson(sum(values) / n, n), n) if n else None


def manager_view(store: Store, now: float) -> dict[str, Any]:
    """Everything that the page shows, by name."""
    with store.reading() as db:
        rows = _verdicts(db)
        people = {r.name: r for r in db.execute(sa.select(raters)).all()}
        progress = _progress(db, now)
        flagged = _flagged(db)
        disputed = _disputed(db, Queue(store))
    of = figures(rows, now)
    for name, row in people.items():
        one = of.setdefault(name, Of(name, row.kind))
        one.paused, one.account = row.paused, True
    ratings = by_rater((r.rater, r.comparison, side(r.p)) for r in rows if _is_opinion(r))
    return {
        "progress": progress,
        "raters": sorted(of.values(), key=lambda o: (-o.answers, o.name)),
        "share": share,
        "alpha": alpha(ratings),
        "kappas": pair_kappas(ratings, least=5)[:PAIRS],
        "disputed": disputed,
        "flagged": flagged,
        "simulated": {r.rater for r in rows if r.kind == "simulated"},
    }


def _verdicts(db: sa.Connection) -> list[Any]:
    """Every verdict of people, or of what stands for them, that stands: the oldest first."""
    p, c, a, b = preferences, comparisons, completions.alias(), completions.alias()
    columns = (p.c.rater, p.c.kind, p.c.comparison, p.c.p, p.c.meta, p.c.time, items.c.gold)
    lengths = (sa.func.length(a.c.text).label("length_a"), sa.func.length(b.c.text).label("length_b"))
    query = sa.select(*columns, *lengths).select_from(
        p.join(c, c.c.id == p.c.comparison)
        .join(a, a.c.id == c.c.first)
        .join(b, b.c.id == c.c.second)
        .outerjoin(items, items.c.comparison == c.c.id)
    )
    return list(db.execute(query.where(p.c.kind.in_(("human", "simulated")), *live()).order_by(p.c.id)).all())


def _is_opinion(row: Any) -> bool:
    """Not an answer to what is known, not a second asking of the same rater, not the last word on a dispute."""
    return row.meta.get("purpose", "label") == "label"


def figures(rows: list[Any], now: float) -> dict[str, Of]:
    """Each rater's, from verdicts with rater, kind, comparison, p, meta, time, gold, length_a and length_b."""
    of: dict[str, Of] = {}
    first: dict[tuple[str, int], float] = {}
    for r in rows:
        one = of.setdefault(r.rater, Of(r.rater, r.kind))
        purpose = r.meta.get("purpose", "label")
        if purpose == ADJUDICATION:
            continue
        one.answers += 1
        one.last_hour += _time(r.time) > now - 3600
        if (seconds := r.meta.get("seconds")) is not None:
            one.seconds.append(seconds)
        if r.p != 0.5:
            if "swapped" in r.meta:
                one.left.append((r.p > 0.5) != r.meta["swapped"])
            if r.length_a != r.length_b:
                one.longer.append((r.p > 0.5) == (r.length_a > r.length_b))
        if r.gold is not None:
            one.known.append(side(r.p) == side(r.gold))
        if purpose == "repeat":
            before = first.get((r.rater, r.comparison))
            if before is not None:
                one.again.append(side(before) == side(r.p))
        else:
            first[r.rater, r.comparison] = r.p
    return of


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # a file's own way of writing it
        return 0.0


def _progress(db: sa.Connection, now: float) -> dict[str, Any]:
    i, a = items, assignments
    count = sa.func.count()
    usual = i.c.gold.is_(None)
    total, open_, wanted, done = db.execute(
        sa.select(
            count,
            sa.func.coalesce(sa.func.sum(sa.case((i.c.open, 1), else_=0)), 0),
            sa.func.coalesce(sa.func.sum(i.c.wanted), 0),
            sa.func.coalesce(sa.func.sum(i.c.done), 0),
        ).where(usual, i.c.wanted > 0)
    ).one()
    lent = sa.select(count).select_from(a).where(a.c.state == "open", a.c.expires > now)
    hour = sa.select(count).select_from(a).where(a.c.state == "done", a.c.finished > now - 3600)
    per_hour = db.execute(hour).scalar_one()
    return {
        "total": total,
        "open": open_,
        "wanted": wanted,
        "done": done,
        "gold": db.execute(sa.select(count).select_from(i).where(~usual)).scalar_one(),
        "lent": db.execute(lent).scalar_one(),
        "per_hour": per_hour,
        "hours_left": (wanted - done) / per_hour if per_hour else None,
    }


def _disputed(db: sa.Connection, queue: Queue) -> list[dict[str, Any]]:
    """Items on which raters differ, or which wait because a rater left them, and on which nobody has had the last word;
    the widest apart first."""
    p, i, a = preferences, items, assignments
    left = i.c.open & i.c.id.in_(sa.select(a.c.item).where(a.c.state == "skipped"))
    query = sa.select(i.c.id, i.c.comparison, i.c.sensitive)
    query = query.where((i.c.dispute > 0) | left, i.c.gold.is_(None), ~SETTLED)
    out = []
    for row in db.execute(query.order_by(i.c.dispute.desc(), i.c.id).limit(DISPUTED)).all():
        said = sa.select(p.c.rater, p.c.kind, p.c.p, p.c.strength, p.c.both_bad, p.c.note)
        votes = db.execute(said.where(p.c.comparison == row.comparison, *live()).order_by(p.c.id)).all()
        skipped = sa.select(a.c.rater, a.c.reason).where(a.c.item == row.id, a.c.state == "skipped")
        out.append(
            {
                "item": row.id,
                "comparison": queue.comparison(db, row.comparison),
                "sensitive": row.sensitive,
                "votes": votes,
                "left": db.execute(skipped.order_by(a.c.id)).all(),
            }
        )
    return out


def _flagged(db: sa.Connection) -> list[dict[str, Any]]:
    query = sa.select(log).where(log.c.what == "flagged").order_by(log.c.id.desc()).limit(FLAGGED)
    out: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in db.execute(query).all():
        item = sa.select(assignments.c.item).where(assignments.c.id == row.details["assignment"])
        out[row.id] = {"who": row.who, "item": db.execute(item).scalar_one(), "why": row.details["reason"]}
    return list(out.values())


def recent_log(store: Store, before: int = 0) -> list[dict[str, Any]]:
    """The newest lines of the log, or those before a line."""
    query = sa.select(log).order_by(log.c.id.desc()).limit(LOG_ROWS)
    if before:
        query = query.where(log.c.id < before)
    with store.reading() as db:
        return [
            {
                "id": r.id,
                "time": datetime.fromtimestamp(r.time).isoformat(sep=" ", timespec="seconds"),
                "who": r.who,
                "what": r.what,
                "details": ", ".join(f"{k} {v}" for k, v in r.details.items()),
            }
            for r in db.execute(query).all()
        ]
