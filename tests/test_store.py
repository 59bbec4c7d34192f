"""The preference store: what goes in comes out, nothing is edited, a correction names what it replaces."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.store import Judged, Store, as_row

PAIR = Comparison(Prompt.of("2 + 2?", category="sums"), (Completion("four"), Completion("five or so", "length")))
ROW = Judged(PAIR, 0.8, "ann", "human", "batch 1", "2026-01-02T03:04:05+00:00", strength=0.5, note="sure")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "deep" / "preferences.sqlite")
    yield store
    store.close()


def test_what_goes_in_comes_out(store):
    other = replace(ROW, rater="model", kind="ai", p=0.5, tie=True, strength=None, meta={"gold_margin": -0.25})
    assert store.append([ROW, other]) == 2
    one, two = store.preferences()
    assert replace(one, id=0) == ROW and one.comparison.prompt.category == "sums"
    assert one.comparison.completions[1].stop == "length"
    assert replace(two, id=0) == other and two.meta == {"gold_margin": -0.25}
    assert store.count() == {"prompts": 1, "completions": 2, "comparisons": 1, "preferences": 2}


def test_the_same_verdict_again_is_not_added(store):
    assert store.append([ROW]) == 1
    assert store.append([ROW, replace(ROW, rater="bob")]) == 1
    assert store.append([replace(ROW, origin="batch 2")]) == 1
    turned = replace(ROW, comparison=Comparison(PAIR.prompt, PAIR.completions[::-1]))
    assert store.append([turned]) == 1
    assert [j.rater for j in store.preferences()] == ["ann", "bob", "ann", "ann"]
    assert [j.rater for j in store.preferences(origins=["batch 2"])] == ["ann"]


def test_a_correction_is_a_new_row_that_names_the_old_one(store):
    store.append([ROW, replace(ROW, rater="bob")])
    old = store.preferences()[0]
    assert store.append([replace(ROW, p=0.1, supersedes=old.id)]) == 1
    assert [(j.rater, j.p) for j in store.preferences()] == [("bob", 0.8), ("ann", 0.1)]
    assert [j.p for j in store.preferences(history=True)] == [0.8, 0.8, 0.1]
    with pytest.raises(UserError, match="has been corrected before"):
        store.append([replace(ROW, p=0.2, supersedes=old.id, rater="bob")])
    elsewhere = Comparison(Prompt.of("3 + 3?"), PAIR.completions)
    with pytest.raises(UserError, match="of another comparison"):
        store.append([replace(ROW, comparison=elsewhere, supersedes=store.preferences()[0].id)])


def test_all_or_none(store):
    with pytest.raises(UserError, match="of another comparison"):
        store.append([ROW, replace(ROW, rater="bob", supersedes=77)])
    assert store.count() == dict.fromkeys(("prompts", "completions", "comparisons", "preferences"), 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p": 1.2}, "p must be in"),
        ({"p": float("nan")}, "p must be in"),
        ({"kind": "robot"}, "kind must be one of human, ai, gold, simulated"),
        ({"tie": True}, "a tie has p = 1/2"),
        ({"comparison": Comparison(PAIR.prompt, (*PAIR.completions, Completion("six")))}, "on two completions, not 3"),
    ],
)
def test_what_makes_no_sense_is_refused(store, change, said):
    with pytest.raises(UserError, match=said):
        store.append([replace(ROW, **change)])


@pytest.mark.parametrize("table", ["prompts", "completions", "comparisons", "preferences"])
def test_the_database_itself_refuses_to_edit(store, table):
    store.append([ROW])
    with sqlite3.connect(store.path) as db:
        for command in (f"UPDATE {table} SET id = id", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table} are appended, never edited"):
                db.execute(command)


def test_another_file_is_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be looked at " * 9)
    with pytest.raises(UserError, match=r"notes\.txt: not a preference store"):
        Store(tmp_path / "notes.txt")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE cakes (id INTEGER)")
    with pytest.raises(UserError, match=r"other\.db: not a preference store.*cakes"):
        Store(tmp_path / "other.db")


def test_rows_in_the_ecosystem_s_columns():
    row = as_row(replace(ROW, p=0.2, meta={"gold_margin": 0.5}))
    assert (row["chosen"], row["rejected"], row["label"]) == ("five or so", "four", 0.8)
    assert (row["chosen_ended"], row["rejected_ended"], row["gold_margin"]) == (False, True, -0.5)
    assert row["category"] == "sums" and row["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    assert as_row(ROW)["chosen"] == "four"


def test_two_writers_lose_nothing(tmp_path):
    """Two processes append at the same time; each verdict is there once."""
    code = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from tests.test_store import ROW
from trueup.store import Store
store = Store(sys.argv[1])
for i in range(40):
    store.append([replace(ROW, rater=f"{sys.argv[2]} {i}")])
"""
    from pathlib import Path

    root = str(Path(__file__).parents[1])
    Store(tmp_path / "s.sqlite").close()
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s.sqlite"), name, root]) for name in ("a", "b")
    ]
    assert [w.wait(60) for w in writers] == [0, 0]
    store = Store(tmp_path / "s.sqlite")
    assert sorted(j.rater for j in store.preferences()) == sorted(f"{n} {i}" for n in "ab" for i in range(40))
