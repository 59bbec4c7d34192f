"""The queue: who is asked what, and what becomes of the answer."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from tests.label.ask import PLAIN, grade, pair, queue
from trueup.label.accounts import Accounts
from trueup.label.queue import Answer, Nothing, Rules
from trueup.records import UserError
from trueup.store import Store
from trueup.store.tables import items, log, raters


@pytest.fixture
def store(place):
    store = Store(place)
    yield store
    store.close()


def answer(q, rater, better="good", **more):
    task = q.next(rater)
    return task, q.submit(task.assignment, rater, Answer(grade(task, better), **more))


def test_an_answer_is_of_the_comparison_however_it_was_shown(store):
    store.ask([pair(i) for i in range(12)], "batch")
    q = queue(store)
    shown = set()
    for _ in range(12):
        task = q.next("ann")
        shown.add(task.swapped)
        assert (task.left, task.right)[task.swapped].startswith("good")
        flags = (("wrong",), ()) if task.left.startswith("bad") else ((), ("wrong",))
        assert q.submit(task.assignment, "ann", Answer(grade(task), flags=flags, note="so")) == "kept"
    assert shown == {True, False}
    assert q.next("ann") == Nothing("done")
    kept = store.preferences()
    assert len(kept) == 12 and {j.comparison.completions[0].text[:4] for j in kept} == {"good"}
    assert {(j.p, j.strength, j.tie, j.both_bad, j.rater, j.kind, j.note) for j in kept} == {
        (1.0, 2 / 3, False, False, "ann", "human", "so")
    }
    assert {str(j.meta["flags"]) for j in kept} == {"[[], ['wrong']]"}
    assert {j.meta["swapped"] for j in kept} == {True, False}


def test_a_tie_is_not_both_bad(store):
    store.ask([pair(0), pair(1)], "batch")
    q = queue(store)
    q.submit(q.next("ann").assignment, "ann", Answer(0))
    q.submit(q.next("ann").assignment, "ann", Answer(both_bad=True))
    assert [(j.p, j.tie, j.both_bad, j.strength) for j in store.preferences()] == [
        (0.5, True, False, 0.0),
        (0.5, False, True, None),
    ]
    with pytest.raises(UserError, match="or both bad"):
        q.submit(1, "ann", Answer(1, both_bad=True))


def test_no_two_raters_get_the_same_slot(store):
    store.ask([pair(0), pair(1, wanted=2)], "batch")
    q = queue(store)
    assert [q.next(n).item for n in ("ann", "bob", "cid")] == [1, 2, 2]
    assert q.next("ann").item == 1  # the same again: a reload loses nothing
    assert queue(store, raters=("dan",)).next("dan") == Nothing("done")


def test_a_lease_that_ran_out_goes_to_another(store):
    store.ask([pair(0)], "batch")
    q = queue(store)
    task = q.next("ann")
    assert q.next("bob") == Nothing("done")
    q.clock.now += PLAIN.lease + 1
    other = q.next("bob")
    assert other.item == task.item and other.assignment != task.assignment
    assert q.submit(task.assignment, "ann", Answer(1)) == "late"  # bob has it
    assert q.submit(other.assignment, "bob", Answer(1)) == "kept"
    assert q.submit(task.assignment, "ann", Answer(1)) == "late"
    assert [j.rater for j in store.preferences()] == ["bob"]
    with store.reading() as db:
        assert db.execute(sa.select(log.c.who).where(log.c.what == "late")).scalars().all() == ["ann", "ann"]


def test_a_late_answer_counts_where_nobody_else_took_the_item(store):
    store.ask([pair(0)], "batch")
    q = queue(store)
    task = q.next("ann")
    q.clock.now += 10 * PLAIN.lease
    assert q.submit(task.assignment, "ann", Answer(1)) == "kept"


def test_the_same_answer_twice_is_kept_once(store):
    store.ask([pair(0, wanted=2)], "batch")
    q = queue(store)
    task = q.next("ann")
    assert [q.submit(task.assignment, "ann", Answer(g)) for g in (1, 1, -3)] == ["kept", "again", "again"]
    assert len(store.preferences()) == 1
    with store.reading() as db:
        assert db.execute(sa.select(items.c.done, items.c.open)).one() == (1, True)
    with pytest.raises(UserError, match="assignment 1 is not bob's"):
        q.submit(task.assignment, "bob", Answer(1))
    with pytest.raises(UserError, match="assignment 99 is not bob's"):
        q.skip(99, "bob", "?")


def test_undo_asks_the_last_again_and_the_correction_names_it(store):
    store.ask([pair(0), pair(1)], "batch")
    q = queue(store)
    assert q.undo("ann") is None
    first, _ = answer(q, "ann", note="hasty")
    q.next("ann")
    again = q.undo("ann")
    assert again.assignment == first.assignment and again.previous.note == "hasty"
    assert len(store.preferences()) == 1  # what was said stands until it is said anew
    old = again.previous.id
    assert q.submit(first.assignment, "ann", Answer(-grade(again)), corrects=old) == "corrected"
    assert q.submit(first.assignment, "ann", Answer(grade(again)), corrects=old) == "again"
    assert [(j.p, j.supersedes) for j in store.preferences()] == [(0.0, old)]
    assert len(store.preferences(history=True)) == 2
    # taken back, and answered after all
    assert q.skip(first.assignment, "ann", "unsure", corrects=q.undo("ann").previous.id) == "kept"
    assert store.preferences() == []
    with store.reading() as db:
        assert db.execute(sa.select(items.c.done, items.c.open).where(items.c.id == 1)).one() == (0, True)
    again = q.undo("ann")
    assert again.previous is None
    assert q.submit(again.assignment, "ann", Answer(grade(again))) == "kept"
    assert [j.p for j in store.preferences()] == [1.0]


def test_what_is_skipped_goes_to_the_others(store):
    store.ask([pair(0)], "batch")
    q = queue(store)
    task = q.next("ann")
    assert q.skip(task.assignment, "ann", "not my field", flag=True) == "kept"
    assert q.next("ann") == Nothing("done")
    assert q.next("bob").item == task.item
    with store.reading() as db:
        row = db.execute(sa.select(log).where(log.c.what == "flagged")).one()
    assert row.who == "ann" and row.details == {"assignment": task.assignment, "reason": "not my field"}


def test_what_is_needed_most_comes_first(store):
    store.ask([pair(0, wanted=3), pair(1, wanted=3), pair(2, wanted=3, priority=1.0)], "batch")
    q = queue(store, raters=("ann", "bob", "cid", "dan"))
    assert [answer(q, "ann", "good")[0].item for _ in range(3)] == [3, 1, 2]
    assert [answer(q, "bob", "bad" if k == 2 else "good")[0].item for k in range(3)] == [3, 1, 2]
    # item 3 by its priority, then of two that have two answers each the one that is disputed
    assert [answer(q, "cid")[0].item for _ in range(3)] == [3, 2, 1]
    assert q.next("dan") == Nothing("done")
    with store.reading() as db:
        assert db.execute(sa.select(items.c.dispute).order_by(items.c.id)).scalars().all() == [0, 1, 0]


def test_fewer_answers_come_first(store):
    store.ask([pair(0, wanted=2), pair(1, wanted=2)], "batch")
    q = queue(store)
    answer(q, "ann")
    assert q.next("bob").item == 2
    store.ask([pair(2, wanted=2, priority=1.0)], "batch")
    assert answer(q, "ann")[0].item == 3
    assert q.next("cid").item == 3  # priority counts for more than how few answers there are


def test_what_was_adjudicated_is_asked_no_more(store):
    store.ask([pair(0, wanted=3)], "batch")
    q = queue(store)
    answer(q, "ann"), answer(q, "bob", "bad")
    late = q.next("cid")
    q.adjudicate(1, "bob", Answer(3, note="looked up"))
    Accounts(store).add("dan")
    assert q.next("dan") == Nothing("done")
    assert q.submit(late.assignment, "cid", Answer(grade(late))) == "kept"
    q.adjudicate(1, "bob", Answer(-1))
    settled = [j for j in store.preferences() if j.meta["purpose"] == "adjudication"]
    assert [(j.p, j.rater, j.strength) for j in settled] == [(0.0, "bob", 1 / 3)]
    assert len(store.preferences()) == 4
    with store.reading() as db:
        assert db.execute(sa.select(items.c.open, items.c.done)).one() == (False, 3)
    with pytest.raises(UserError, match="no item 9"):
        q.adjudicate(9, "bob", Answer(1))


def test_onboarding_explains_and_then_known_answers_come_in_silence(store):
    store.ask([pair(i, gold=1.0, explanation=f"because {i}") for i in range(4)], "gold")
    store.ask([pair(i) for i in range(10, 30)], "batch")
    q = queue(store, Rules(onboarding=2, gold_every=3, repeat_every=0))
    said = [answer(q, "ann") for _ in range(12)]
    assert [task.purpose for task, _ in said] == [
        *("onboarding", "onboarding", "label", "label", "label", "gold"),
        *("label", "label", "label", "gold", "label", "label"),
    ]
    task, p, gold, why = q.feedback(said[1][0].assignment, "ann")
    assert (task.item, p, gold, why) == (2, 1.0, 1.0, "because 1")
    assert q.feedback(said[5][0].assignment, "ann") is None and q.feedback(said[2][0].assignment, "ann") is None
    one, _ = answer(queue(store, Rules(onboarding=1)), "bob")
    assert one.purpose == "onboarding" and q.undo("bob") is None


def test_a_known_answer_may_be_left_but_no_onboarding(store):
    store.ask([pair(i, gold=1.0) for i in range(4)], "gold")
    store.ask([pair(i) for i in range(10, 20)], "batch")
    q = queue(store, Rules(onboarding=1, gold_every=2, repeat_every=0))
    first = q.next("ann")
    with pytest.raises(UserError, match="practice: it cannot be skipped"):
        q.skip(first.assignment, "ann", "?")
    assert answer(q, "ann", "bad")[1] == "kept"
    said = store.preferences()[0]
    with pytest.raises(UserError, match="practice: it cannot be skipped"):
        q.skip(first.assignment, "ann", "?", corrects=said.id)
    assert q.submit(first.assignment, "ann", Answer(grade(first)), corrects=said.id) == "again"  # after its feedback
    assert [j.id for j in store.preferences()] == [said.id]
    answer(q, "ann"), answer(q, "ann")
    silent = q.next("ann")
    assert silent.purpose == "gold" and q.skip(silent.assignment, "ann", "?") == "kept"
    assert [answer(q, "ann")[0].purpose for _ in range(3)] == ["label", "label", "gold"]  # no other in its place


def test_known_answers_are_found_by_their_index(store):
    """Of a hundred thousand items without one, none is looked at."""
    q = queue(store)
    with store.reading() as db:
        query = q._golds("ann").compile(db, compile_kwargs={"literal_binds": True})
        if store.remote:  # so small a table it reads whole, unless it is told not to
            db.exec_driver_sql("SET LOCAL enable_seqscan = off")
        explain = "EXPLAIN" if store.remote else "EXPLAIN QUERY PLAN"
        plan = "\n".join(str(row) for row in db.exec_driver_sql(f"{explain} {query}"))
    assert "items_gold" in plan


def test_who_misses_known_answers_is_paused(store):
    store.ask([pair(i, gold=1.0) for i in range(6)] + [pair(9)], "gold")
    q = queue(store, Rules(onboarding=6, gold_bar=0.7))
    for k in range(5):
        answer(q, "ann", "good" if k < 3 else "bad")
        answer(q, "bob", "good" if k < 4 else "bad")
    assert q.next("ann") == Nothing("paused", "3 of the last 5 known answers were met")
    assert q.next("bob").purpose == "onboarding"
    with store.writing() as db:
        q.pause(db, "boss", "ann", "")
    assert q.next("ann").purpose == "onboarding"
    with store.reading() as db:
        found = db.execute(sa.select(log.c.who, log.c.what).where(log.c.what.in_(("paused", "resumed")))).all()
    assert found == [("trueup", "paused"), ("boss", "resumed")]


def test_who_agrees_too_little_is_paused(store):
    store.ask([pair(i, wanted=3) for i in range(12)], "batch")
    q = queue(store, Rules(onboarding=0, gold_every=0, repeat_every=0, agreement_bar=0.6))
    for name, better in (("ann", "good"), ("bob", "good")):
        for _ in range(12):
            answer(q, name, better)
    for _ in range(10):
        assert not isinstance(q.next("cid"), Nothing)
        answer(q, "cid", "bad")
    assert q.next("cid") == Nothing("paused", "0 of 20 answers are those of the other raters")
    with store.reading() as db:
        assert db.execute(sa.select(raters.c.name).where(raters.c.paused != "")).scalars().all() == ["cid"]


def test_one_s_own_items_come_again(store):
    store.ask([pair(i) for i in range(12)], "batch")
    q = queue(store, Rules(onboarding=0, gold_every=0, repeat_every=4, repeat_gap=2))
    said = [answer(q, "ann")[0] for _ in range(10)]
    assert [t.purpose for t in said].index("repeat") == 4 and said[4].item == said[0].item
    assert [t.purpose for t in said].count("repeat") == 2 and said[9].item == said[1].item
    assert len(store.preferences()) == 10
    with store.reading() as db:  # asked again, it counts once
        assert db.execute(sa.select(items.c.done).where(items.c.id == said[0].item)).scalar_one() == 1


def test_one_s_own_items_come_again_only_after_others(store):
    store.ask([pair(i) for i in range(12)], "batch")
    q = queue(store, Rules(onboarding=0, gold_every=0, repeat_every=2, repeat_gap=3))
    assert [answer(q, "ann")[0].item for _ in range(6)] == [1, 2, 3, 4, 1, 5]


def test_a_repeat_that_lapsed_is_asked_again(store):
    store.ask([pair(i) for i in range(8)], "batch")
    q = queue(store, Rules(onboarding=0, gold_every=0, repeat_every=2, repeat_gap=1))
    answer(q, "ann"), answer(q, "ann")
    repeat = q.next("ann")
    q.clock.now += 2000
    again = q.next("ann")
    assert repeat.purpose == again.purpose == "repeat" and again.assignment == repeat.assignment
    answer(q, "ann")
    assert q.next("ann").purpose == "label"


def test_a_cap_holds(store):
    store.ask([pair(i) for i in range(4)], "batch")
    q = queue(store, PLAIN.model_copy(update={"cap": 2}))
    answer(q, "ann"), answer(q, "ann")
    assert q.next("ann") == Nothing("cap") and not isinstance(q.next("bob"), Nothing)


def test_sensitive_items_are_for_who_opted_in_and_so_many_a_day(store):
    store.ask([pair(i, sensitive=True) for i in range(3)], "batch")
    q = queue(store, PLAIN.model_copy(update={"sensitive_cap": 2}))
    assert q.next("bob") == Nothing("done")
    Accounts(store).add("ann", sensitive=True)
    assert answer(q, "ann")[0].sensitive
    answer(q, "ann")
    assert q.next("ann") == Nothing("done")
    q.clock.now += 86400
    assert q.next("ann").sensitive


def test_a_sensitive_item_that_was_left_or_let_lapse_was_shown_too(store):
    store.ask([pair(i, sensitive=True) for i in range(4)], "batch")
    q = queue(store, PLAIN.model_copy(update={"sensitive_cap": 2}), raters=())
    Accounts(store).add("ann", sensitive=True)
    q.skip(q.next("ann").assignment, "ann", "too much")
    assert q.next("ann").sensitive
    q.clock.now += PLAIN.lease + 1
    assert q.next("ann") == Nothing("done")
    q.clock.now += 86400
    assert q.next("ann").sensitive


def test_an_own_answer_is_a_demonstration(store):
    store.ask([pair(0)], "batch")
    q = queue(store)
    task, _ = answer(q, "ann", own="  a better answer ")
    assert [(d.prompt.text, d.reply, who, kind) for d, who, kind in store.demonstrations()] == [
        ("question 0", "a better answer", "ann", "human")
    ]
    q.submit(task.assignment, "ann", Answer(1, own="a better answer"), corrects=q.undo("ann").previous.id)
    assert len(store.demonstrations()) == 1 and q.undo("ann").own == "a better answer"
    q.submit(task.assignment, "ann", Answer(1, own="the best answer"), corrects=q.undo("ann").previous.id)
    assert [d.reply for d, _, _ in store.demonstrations()] == ["the best answer"]  # the last stands alone
    q.skip(task.assignment, "ann", "after all", corrects=q.undo("ann").previous.id)
    assert store.demonstrations() == [] and q.undo("ann").own == ""
    q.submit(task.assignment, "ann", Answer(1, own="once more"), corrects=-1)
    q.submit(task.assignment, "ann", Answer(1), corrects=q.undo("ann").previous.id)
    assert store.demonstrations() == [] and store.count()["demonstrations"] == 5  # each is a row, none is edited


def test_many_at_once_get_each_slot_once(store):
    """Six raters, eighteen slots, all at the same time: none is left, none taken twice."""
    names = [f"r{i}" for i in range(6)]
    store.ask([pair(i, wanted=2) for i in range(9)], "batch")
    q = queue(store, raters=names)
    troubles = []

    def work(name):
        try:
            while not isinstance(task := q.next(name), Nothing):
                q.submit(task.assignment, name, Answer(grade(task)))
        except Exception as error:
            troubles.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in names]
    [t.start() for t in threads], [t.join(60) for t in threads]
    assert troubles == []
    kept = store.preferences()
    assert len(kept) == 18 and len({(j.comparison, j.rater) for j in kept}) == 18
    with store.reading() as db:
        assert set(db.execute(sa.select(items.c.done, items.c.open)).all()) == {(2, False)}
