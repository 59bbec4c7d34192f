"""Which comparison a rater is asked next, and what becomes of the answer. No HTTP here.

A rater is lent an item for a while (an assignment with a lease); who has not answered by then loses it to the next one
who asks. So each item gets as many answers as it wants, and no two raters the same slot. In order, a rater is asked:
what is lent already; items with a known answer while being shown how (onboarding, with feedback); now and then such an
item in silence, or one of the rater's own again; else what is needed most: the higher priority, the fewer answers, the
more disputed. Every change is one transaction of the store's single writer, so that an answer that was acknowledged is
there once, whatever happens to the server.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from trueup.config import Config
from trueup.records import Comparison, Completion, UserError
from trueup.store import ADJUDICATION, Judged, Store, as_prompt, live
from trueup.store.tables import assignments, comparisons, completions, demonstrations, items, preferences, prompts
from trueup.store.tables import raters as raters_table

GRADES = 3
"""How much better one answer is: slightly 1, better 2, much better 3."""
Purpose = Literal["label", "onboarding", "gold", "repeat"]
TEST = ("onboarding", "gold")
"""Purposes whose answer is known."""
DAY = 86400.0
_first, _second, _others = completions.alias("a"), completions.alias("b"), assignments.alias("others")


class Rules(Config):
    """How comparisons are handed out."""

    lease: float = Field(900, gt=0)
    """Seconds for which an item is a rater's own; after them another may get it."""
    onboarding: int = Field(5, ge=0)
    """A new rater's first items have known answers and are explained; as many as there are, up to this."""
    gold_every: int = Field(20, ge=0)
    """After so many items another one with a known answer, in silence; 0 for never."""
    gold_bar: float = Field(0.7, ge=0, le=1)
    """A rater who gets fewer of the known answers right is paused; counted over the last 20, from the fifth on."""
    agreement_bar: float = Field(0.0, ge=0, le=1)
    """A rater who agrees less with the other raters of the same items is paused, from 20 shared answers on; 0 for
    never."""
    repeat_every: int = Field(50, ge=0)
    """After so many items one of the rater's own again, to see how steady the rater is; 0 for never."""
    repeat_gap: int = Field(20, ge=1)
    """An item comes again only when so many others came in between."""
    cap: int = Field(0, ge=0)
    """Answers that one rater may give; 0 for any number."""
    sensitive_cap: int = Field(20, ge=0)
    """Sensitive items that a rater who opted in is shown a day (UTC)."""


@dataclass(frozen=True)
class Task:
    """What a rater sees: `left` and `right` in the order shown. `previous` and `own`: the rater's verdict and better
    answer, where this is asked again to be corrected."""

    assignment: int
    item: int
    comparison: Comparison
    swapped: bool
    purpose: Purpose
    sensitive: bool
    previous: Judged | None = None
    own: str = ""

    @property
    def left(self) -> str:
        return self.comparison.completions[self.swapped].text

    @property
    def right(self) -> str:
        return self.comparison.completions[not self.swapped].text


@dataclass(frozen=True)
class Nothing:
    """There is nothing to ask this rater now."""

    why: Literal["done", "paused", "cap"]
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """A rater's, of the sides as shown: grade in [-3, 3], above 0 where the left one is better, 0 for a tie; or
    `both_bad`. `flags`: what is wrong with each side. `own`: a better answer, written by the rater."""

    grade: int = 0
    both_bad: bool = False
    flags: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    note: str = ""
    own: str = ""
    seconds: float | None = None


Outcome = Literal["kept", "corrected", "again", "late"]
"""again: it was answered before, and nothing has changed. late: the lease was over and another has the item."""


@dataclass
class Queue:
    """Hands out the store's items by the rules. `clock` gives seconds since 1970."""

    store: Store
    rules: Rules = field(default_factory=Rules)
    clock: Callable[[], float] = time.time

    def next(self, rater: str) -> Task | Nothing:
        """The rater's next item, lent from now on; the same one again as long as it is not answered."""
        with self.store.writing() as db:
            return self._next(db, rater, self.clock())

    def _next(self, db: sa.Connection, rater: str, now: float) -> Task | Nothing:
        who = self._rater(db, rater)
        if who.paused:
            return Nothing("paused", who.paused)
        a = assignments
        lent = sa.select(a.c.id).where(a.c.rater == rater, a.c.state == "open", a.c.expires > now)
        if (own := db.execute(lent.limit(1)).scalar()) is not None:
            return self._task(db, own)
        done, left = self._ended(db, rater, "done"), self._ended(db, rater, "skipped")
        if self.rules.cap and done.total() >= self.rules.cap:
            return Nothing("cap")
        usual = done["label"] + done["repeat"]
        # What was left counts, too: another test in its place would tell that it was one.
        golds, repeats = (done[purpose] + left[purpose] for purpose in ("gold", "repeat"))
        practice = done["onboarding"] < self.rules.onboarding
        gold_due = self.rules.gold_every and usual >= self.rules.gold_every * (golds + 1)
        if (practice or gold_due) and (item := db.execute(self._golds(rater)).scalar()) is not None:
            return self._lend(db, item, who, "onboarding" if practice else "gold", now)
        repeat_due = self.rules.repeat_every and done["label"] >= self.rules.repeat_every * (repeats + 1)
        if repeat_due and (item := self._seen_long_ago(db, rater)) is not None:
            return self._lend(db, item, who, "repeat", now)
        if (item := self._needed(db, who, now)) is not None:
            return self._lend(db, item, who, "label", now)
        return Nothing("done")

    def _rater(self, db: sa.Connection, name: str) -> sa.Row[Any]:
        row = db.execute(sa.select(raters_table).where(raters_table.c.name == name)).first()
        if row is None:
            raise UserError(f"{self.store.name}: no rater '{name}'")
        return row

    def _ended(self, db: sa.Connection, rater: str, state: str) -> Counter[str]:
        """The rater's assignments that ended so, by purpose."""
        a = assignments
        query = sa.select(a.c.purpose, sa.func.count()).where(a.c.rater == rater, a.c.state == state)
        return Counter({purpose: n for purpose, n in db.execute(query.group_by(a.c.purpose))})

    def _golds(self, rater: str) -> sa.Select[Any]:
        """One with a known answer that the rater has not met. Sensitive ones are none: they must be asked of all.

        In the order of the sum, which is no index's: in that of the ids the database would read all items where few or
        none of them have a known answer."""
        a = assignments
        met = sa.exists().where(a.c.item == items.c.id, a.c.rater == rater, a.c.state != "open")
        query = sa.select(items.c.id).where(items.c.gold >= 0, ~items.c.sensitive, ~met)
        return query.order_by(items.c.id + 0).limit(1)

    def _seen_long_ago(self, db: sa.Connection, rater: str) -> int | None:
        """The rater's oldest item that was asked once, with others in between."""
        a, again = assignments, assignments.alias()
        mine = (a.c.rater == rater, a.c.state == "done", a.c.purpose == "label")
        recent = sa.select(a.c.id).where(*mine).order_by(a.c.finished.desc()).limit(self.rules.repeat_gap)
        twice = sa.exists().where(again.c.item == a.c.item, again.c.rater == rater, again.c.round > 1)
        twice = twice.where(again.c.state != "open")
        query = sa.select(a.c.item).join(items, items.c.id == a.c.item)
        query = query.where(*mine, ~twice, ~items.c.sensitive, a.c.id.not_in(recent))
        return db.execute(query.order_by(a.c.finished).limit(1)).scalar()

    def _needed(self, db: sa.Connection, who: sa.Row[Any], now: float) -> int | None:
        a, i = assignments, items
        met = sa.exists().where(a.c.item == i.c.id, a.c.rater == who.name, a.c.state != "open")
        query = sa.select(i.c.id).where(i.c.open, ~met, i.c.done + _lent(now, who.name) < i.c.wanted)
        if not who.sensitive or self._sensitive_today(db, who.name, now) >= self.rules.sensitive_cap:
            query = query.where(~i.c.sensitive)
        query = query.order_by(i.c.priority.desc(), i.c.done, i.c.dispute.desc(), i.c.id)
        return db.execute(query.limit(1)).scalar()

    def _sensitive_today(self, db: sa.Connection, rater: str, now: float) -> int:
        """How many the rater was shown: those left or let lapse, too."""
        a = assignments
        query = sa.select(sa.func.count()).select_from(a.join(items, items.c.id == a.c.item))
        query = query.where(a.c.rater == rater, a.c.leased >= now - now % DAY, items.c.sensitive)
        return db.execute(query).scalar_one()

    def _lend(self, db: sa.Connection, item: int, who: sa.Row[Any], purpose: Purpose, now: float) -> Task:
        a, lease = assignments, {"leased": now, "expires": now + self.rules.lease}
        round_ = 2 if purpose == "repeat" else 1
        of = (a.c.item == item, a.c.rater == who.name, a.c.round == round_)
        found = db.execute(sa.select(a.c.id).where(*of)).scalar()
        if found is None:
            coin = hashlib.sha256(f"{who.name} {item} {round_}".encode()).digest()[0] & 1
            values = {"item": item, "rater": who.name, "round": round_, "purpose": purpose, "swapped": bool(coin)}
            new = a.insert().values(**values, state="open", **lease).returning(a.c.id)
            found = db.execute(new).scalar_one()
        else:  # lent before, and let lapse
            db.execute(a.update().where(a.c.id == found).values(purpose=purpose, **lease))
        return self._task(db, found)

    def _task(self, db: sa.Connection, assignment: int, previous: Judged | None = None) -> Task:
        a = assignments
        columns = (a.c.item, a.c.swapped, a.c.purpose, items.c.sensitive, items.c.comparison)
        query = sa.select(*columns).join(items, items.c.id == a.c.item).where(a.c.id == assignment)
        row = db.execute(query).one()
        asked = self.comparison(db, row.comparison)
        return Task(assignment, row.item, asked, row.swapped, row.purpose, row.sensitive, previous)

    def comparison(self, db: sa.Connection, number: int) -> Comparison:
        c, first, second = comparisons, _first, _second
        texts = [side.c[n].label(f"{n}_{k}") for k, side in enumerate((first, second)) for n in ("text", "stop")]
        query = sa.select(prompts.c.messages, prompts.c.meta, *texts).select_from(
            c.join(prompts, prompts.c.id == c.c.prompt)
            .join(first, first.c.id == c.c.first)
            .join(second, second.c.id == c.c.second)
        )
        row = db.execute(query.where(c.c.id == number)).mappings().one()
        sides = tuple(Completion(row[f"text_{k}"], row[f"stop_{k}"]) for k in (0, 1))
        return Comparison(as_prompt(row["messages"], row["meta"]), sides)

    def submit(self, assignment: int, rater: str, answer: Answer, *, corrects: int | None = None) -> Outcome:
        """Keeps an answer. `corrects`: the verdict that it replaces, where `undo` gave one. Raises UserError where
        the item was never lent to this rater, or the answer makes no sense."""
        if not -GRADES <= answer.grade <= GRADES or (answer.both_bad and answer.grade):
            raise UserError(f"a grade is one of {-GRADES} to {GRADES}, or both bad; got {answer.grade}")
        now = self.clock()
        with self.store.writing() as db:
            lent = self._lent_to(db, assignment, rater)
            old = self._verdict_of(db, assignment)
            if lent.state == "done" and (old is None or corrects != old or lent.purpose == "onboarding"):
                return "again"  # also of an onboarding item: the known answer has been shown
            if lent.state != "done" and not self._still_free(db, lent, now):
                self.store.note(db, rater, "late", assignment=assignment, grade=answer.grade, both_bad=answer.both_bad)
                return "late"
            who, task = self._rater(db, rater), self._task(db, assignment)
            number, origin = self._comparison_of(db, lent.item)
            self.store.add_verdict(db, _judged(task, answer, who, origin, now, supersedes=old), number)
            self._keep_own(db, task, answer.own, who, now)
            values = {"state": "done", "finished": lent.finished or now, "reason": ""}
            db.execute(assignments.update().where(assignments.c.id == assignment).values(**values))
            self._count(db, lent, +1 if lent.state != "done" else 0)
            outcome: Outcome = "corrected" if corrects is not None else "kept"
            self.store.note(db, rater, outcome, assignment=assignment)
            self._hold_to_bars(db, who, lent.purpose)
        return outcome

    def skip(
        self, assignment: int, rater: str, reason: str, *, flag: bool = False, corrects: int | None = None
    ) -> Outcome:
        """Leaves an item to others, and says why; with `flag` the manager is told that the item itself is amiss. Takes
        back the verdict that `corrects` names. An item with a known answer may be left like any other, since nobody can
        tell which they are. Raises UserError for an onboarding item, which may not."""
        now = self.clock()
        with self.store.writing() as db:
            lent = self._lent_to(db, assignment, rater)
            if lent.purpose == "onboarding":
                raise UserError("this comparison is practice: it cannot be skipped")
            if lent.state == "skipped":
                return "again"
            old = self._verdict_of(db, assignment)
            if lent.state == "done":
                if old is None or corrects != old:
                    return "again"
                (number, origin), who = self._comparison_of(db, lent.item), self._rater(db, rater)
                task = self._task(db, assignment)
                gone = _judged(task, Answer(), who, origin, now, old)
                self.store.add_verdict(db, replace(gone, withdrawn=True), number)
                self._keep_own(db, task, "", who, now)
            values = {"state": "skipped", "finished": lent.finished or now, "reason": reason}
            db.execute(assignments.update().where(assignments.c.id == assignment).values(**values))
            self._count(db, lent, -1 if lent.state == "done" else 0)
            self.store.note(db, rater, "flagged" if flag else "skipped", assignment=assignment, reason=reason)
        return "kept"

    def undo(self, rater: str) -> Task | None:
        """The item that the rater answered or left last, to be answered anew. What was said stands until it is."""
        with self.store.reading() as db:
            a = assignments
            mine = (a.c.rater == rater, a.c.state.in_(("done", "skipped")))
            last = db.execute(sa.select(a).where(*mine).order_by(a.c.finished.desc(), a.c.id.desc()).limit(1)).first()
            if last is None or last.purpose == "onboarding":  # its answer has been shown
                return None
            verdict = self._verdict_of(db, last.id) if last.state == "done" else None
            previous = None
        if verdict is not None:
            previous = next((j for j in self.store.preferences(ids=[verdict])), None)
        with self.store.reading() as db:
            own = self._own(db, last.id)
            task = self._task(db, last.id, previous)
        return task if own is None or own.withdrawn else replace(task, own=own.text)

    def progress(self, rater: str) -> dict[str, int]:
        """How many items this rater answered, today and in all, and how many wait for somebody."""
        now, a = self.clock(), assignments
        mine = (a.c.rater == rater, a.c.state == "done")
        with self.store.reading() as db:
            count = sa.select(sa.func.count())
            return {
                "today": db.execute(count.select_from(a).where(*mine, a.c.finished >= now - now % DAY)).scalar_one(),
                "done": db.execute(count.select_from(a).where(*mine)).scalar_one(),
                "waiting": db.execute(count.select_from(items).where(items.c.open)).scalar_one(),
            }

    def feedback(self, assignment: int, rater: str) -> tuple[Task, float, float, str] | None:
        """Of an onboarding item that the rater has answered: the item, the rater's p, the known one, and why."""
        with self.store.reading() as db:
            lent = self._lent_to(db, assignment, rater)
            if lent.purpose != "onboarding" or lent.state != "done":
                return None
            said = db.execute(sa.select(preferences.c.p).where(preferences.c.assignment == assignment)).scalars().all()
            known = db.execute(sa.select(items.c.gold, items.c.explanation).where(items.c.id == lent.item)).one()
            return self._task(db, assignment), said[-1], known.gold, known.explanation

    def _lent_to(self, db: sa.Connection, assignment: int, rater: str) -> sa.Row[Any]:
        row = db.execute(sa.select(assignments).where(assignments.c.id == assignment)).first()
        if row is None or row.rater != rater:
            raise UserError(f"assignment {assignment} is not {rater}'s")
        return row

    def _verdict_of(self, db: sa.Connection, assignment: int) -> int | None:
        """The last row of an assignment's verdict, which may withdraw it."""
        p = preferences
        return db.execute(sa.select(sa.func.max(p.c.id)).where(p.c.assignment == assignment)).scalar()

    def _still_free(self, db: sa.Connection, lent: sa.Row[Any], now: float) -> bool:
        if lent.purpose != "label" or (lent.state == "open" and lent.expires > now):
            return True
        query = sa.select(items.c.done + _lent(now, lent.rater) < items.c.wanted).where(items.c.id == lent.item)
        return bool(db.execute(query).scalar_one())

    def _comparison_of(self, db: sa.Connection, item: int) -> tuple[int, str]:
        """An item's comparison and its origin. Raises UserError where there is no such item."""
        query = sa.select(comparisons.c.id, comparisons.c.origin).join(items, items.c.comparison == comparisons.c.id)
        row = db.execute(query.where(items.c.id == item)).first()
        if row is None:
            raise UserError(f"{self.store.name}: no item {item}")
        return row.id, row.origin

    def _count(self, db: sa.Connection, lent: sa.Row[Any], more: int) -> None:
        """Brings an item's figures up to date: answers, whether it wants more, how far they are apart (0 to 1)."""
        if lent.purpose != "label":
            return
        p = preferences
        said = sa.select(p.c.p, p.c.meta).join(items, items.c.comparison == p.c.comparison)
        rows = db.execute(said.where(items.c.id == lent.item, *live())).all()
        values, purposes = [r.p for r in rows], [r.meta.get("purpose") for r in rows]
        apart = max(values) - min(values) if values else 0.0
        done = items.c.done + more
        settled = ADJUDICATION in purposes
        change = {"done": done, "open": sa.false() if settled else done < items.c.wanted, "dispute": apart}
        db.execute(items.update().where(items.c.id == lent.item).values(**change))

    def _keep_own(self, db: sa.Connection, task: Task, own: str, who: sa.Row[Any], now: float) -> None:
        """The rater's better answer in the place of an earlier one; an empty one takes that back."""
        own, old = own.strip(), self._own(db, task.assignment)
        if own == ("" if old is None or old.withdrawn else old.text):
            return
        prompt = self.store.add_prompt(db, task.comparison.prompt)
        values = {"prompt": prompt, "text": own, "rater": who.name, "kind": who.kind, "time": _iso(now)}
        values |= {"assignment": task.assignment, "supersedes": old.id if old else None, "withdrawn": not own}
        db.execute(demonstrations.insert().values(**values))

    def _own(self, db: sa.Connection, assignment: int) -> sa.Row[Any] | None:
        """The last row of an assignment's better answer, which may withdraw it."""
        d = demonstrations
        query = sa.select(d).where(d.c.assignment == assignment)
        return db.execute(query.order_by(d.c.id.desc()).limit(1)).first()

    def _hold_to_bars(self, db: sa.Connection, who: sa.Row[Any], purpose: str) -> None:
        """Pauses a rater who is too often wrong where the answer is known, or too seldom of the others' opinion."""
        if purpose in TEST:
            right = known_answers(db, who.name, last=20)
            if len(right) >= 5 and sum(right) / len(right) < self.rules.gold_bar:
                self.pause(db, "trueup", who.name, f"{sum(right)} of the last {len(right)} known answers were met")
        elif self.rules.agreement_bar:
            same, shared = shared_answers(db, who.name)
            if shared >= 20 and same / shared < self.rules.agreement_bar:
                self.pause(db, "trueup", who.name, f"{same} of {shared} answers are those of the other raters")

    def adjudicate(self, item: int, manager: str, answer: Answer) -> None:
        """Settles an item: the sides as they are stored. It is asked no more; what the raters said stays beside it."""
        now = self.clock()
        with self.store.writing() as db:
            who = self._rater(db, manager)
            number, origin = self._comparison_of(db, item)
            p = preferences
            mine = (p.c.comparison == number, p.c.rater == manager, p.c.assignment.is_(None), *live())
            before = db.execute(sa.select(p.c.id).where(*mine)).scalar()
            task = Task(0, item, self.comparison(db, number), False, "label", False)
            judged = _judged(task, answer, who, origin, now, before)
            self.store.add_verdict(db, replace(judged, assignment=None, meta={"purpose": ADJUDICATION}), number)
            db.execute(items.update().where(items.c.id == item).values(open=False))
            self.store.note(db, manager, "adjudicated", item=item, p=judged.p)

    def onboarding(self, rater: str) -> tuple[int, int]:
        """Which item of the onboarding this rater is at, and of how many."""
        known = sa.select(sa.func.count()).select_from(items).where(items.c.gold.is_not(None), ~items.c.sensitive)
        with self.store.reading() as db:
            of = min(self.rules.onboarding, db.execute(known).scalar_one())
            return self._ended(db, rater, "done")["onboarding"] + 1, of

    def pause(self, db: sa.Connection, by: str, rater: str, why: str) -> None:
        """Gives a rater nothing more; with an empty reason the rater goes on."""
        db.execute(raters_table.update().where(raters_table.c.name == rater).values(paused=why))
        self.store.note(db, by, "paused" if why else "resumed", rater=rater, why=why)


def known_answers(db: sa.Connection, rater: str, last: int | None = None) -> list[bool]:
    """Whether the rater met the known answers, the newest first."""
    p, a = preferences, assignments
    query = sa.select(p.c.p, items.c.gold).select_from(
        p.join(a, a.c.id == p.c.assignment).join(items, items.c.id == a.c.item)
    )
    query = query.where(a.c.rater == rater, a.c.state == "done", a.c.purpose.in_(TEST), *live())
    query = query.order_by(p.c.id.desc()).limit(last)
    return [side(said) == side(gold) for said, gold in db.execute(query)]


def shared_answers(db: sa.Connection, rater: str) -> tuple[int, int]:
    """How often the rater and another one preferred the same of a pair, and of how many pairs of answers; the last 500
    of these."""
    p, q = preferences, preferences.alias()
    query = sa.select(p.c.p, q.c.p).join(q, q.c.comparison == p.c.comparison)
    query = query.where(
        p.c.rater == rater, q.c.rater != rater, p.c.assignment.is_not(None), q.c.assignment.is_not(None)
    )
    query = query.where(*live(p), *live(q)).order_by(p.c.id.desc()).limit(500)
    pairs = db.execute(query).all()
    return sum(side(a) == side(b) for a, b in pairs), len(pairs)


def side(p: float) -> int:
    """1 for the first, -1 for the second, 0 for neither."""
    return (p > 0.5) - (p < 0.5)


def _lent(now: float, but: str) -> sa.ScalarSelect[int]:
    """Leases on an item that have not run out, but for one rater's."""
    a = _others
    query = sa.select(sa.func.count()).where(a.c.item == items.c.id, a.c.state == "open", a.c.expires > now)
    return query.where(a.c.purpose == "label", a.c.rater != but).correlate(items).scalar_subquery()


def _judged(task: Task, answer: Answer, who: Any, origin: str, now: float, supersedes: int | None) -> Judged:
    """The verdict on the comparison as it is stored, whichever side was shown left."""
    shown = 0.5 + 0.5 * side(0.5 + answer.grade)
    flags = answer.flags[::-1] if task.swapped else answer.flags
    meta: Mapping[str, Any] = {
        "swapped": task.swapped,
        "purpose": task.purpose,
        **({"flags": [list(f) for f in flags]} if any(flags) else {}),
        **({"seconds": answer.seconds} if answer.seconds is not None else {}),
    }
    return Judged(
        task.comparison,
        1 - shown if task.swapped else shown,
        who.name,
        who.kind,
        origin,
        _iso(now),
        strength=None if answer.both_bad else abs(answer.grade) / GRADES,
        tie=answer.grade == 0 and not answer.both_bad,
        both_bad=answer.both_bad,
        note=answer.note,
        meta=meta,
        supersedes=supersedes,
        assignment=task.assignment,
    )


def _iso(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
