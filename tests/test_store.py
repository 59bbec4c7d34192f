"""The preference store: what goes in comes out, nothing is edited, a correction names what it replaces."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.postgres import new_database
from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.store import Asked, Judged, Store, as_row, tables
from trueup.store.tables import demonstrations, items

DATA = Path(__file__).parent / "data"

PAIR = Comparison(Prompt.of("2 + 2?", category="sums"), (Completion("four"), Completion("five or so", "length")))
ROW = Judged(PAIR, 0.8, "ann", "human", "batch 1", "2026-01-02T03:04:05+00:00", strength=0.5, note="sure")


EMPTY = dict.fromkeys(("prompts", "completions", "comparisons", "preferences", "demonstrations"), 0)


@pytest.fixture
def store(place):
    store = Store(place)
    yield store
    store.close()


def test_what_goes_in_comes_out(store):
    other = replace(ROW, rater="model", kind="ai", p=0.5, tie=True, strength=None, meta={"gold_margin": -0.25})
    assert store.append([ROW, other]) == 2
    one, two = store.preferences()
    assert replace(one, id=0) == ROW and one.comparison.prompt.category == "sums"
    assert one.comparison.completions[1].stop == "length"
    assert replace(two, id=0) == other and two.meta == {"gold_margin": -0.25}
    assert store.count() == {**EMPTY, "prompts": 1, "completions": 2, "comparisons": 1, "preferences": 2}


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
    assert store.count() == EMPTY


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


def test_a_verdict_can_be_withdrawn(store):
    store.append([ROW])
    gone = replace(ROW, supersedes=store.preferences()[0].id, withdrawn=True)
    assert store.append([gone]) == 1
    assert store.preferences() == [] and [j.withdrawn for j in store.preferences(history=True)] == [False, True]
    with pytest.raises(UserError, match="what is withdrawn must be named"):
        store.append([replace(ROW, withdrawn=True, rater="bob")])


@pytest.mark.parametrize("table", ["prompts", "completions", "comparisons", "preferences", "demonstrations", "log"])
def test_the_database_itself_refuses_to_edit(store, table):
    store.append([ROW])
    with store.writing() as db:
        store.note(db, "ann", "looked")
        values = {"prompt": PAIR.prompt.id, "text": "4", "rater": "ann", "kind": "human", "time": "now"}
        db.execute(demonstrations.insert().values(**values))
    commands = [f"UPDATE {table} SET id = id", f"DELETE FROM {table}"]
    for command in [*commands, *([f"TRUNCATE {table} CASCADE"] if store.remote else [])]:
        with pytest.raises(sa.exc.DBAPIError, match="are appended, never edited"), store.writing() as db:
            db.exec_driver_sql(command)


def test_people_are_asked_a_comparison_once(store):
    more = Asked(
        Comparison(Prompt.of("3 + 3?"), PAIR.completions), gold=1.0, sensitive=True, meta={"models": ["a", "b"]}
    )
    assert store.ask([Asked(PAIR, wanted=3), more], "batch 1") == 2
    assert store.ask([Asked(PAIR, wanted=2), more], "batch 1") == 0
    assert store.ask([Asked(PAIR)], "batch 2") == 1
    with store.reading() as db:
        rows = db.execute(sa.select(items).order_by(items.c.id)).all()
    assert [(r.wanted, r.open, r.gold, r.sensitive) for r in rows] == [
        (3, True, None, False),
        (1, False, 1.0, True),
        (1, True, None, False),
    ]
    assert rows[1].meta == {"models": ["a", "b"]}
    with pytest.raises(UserError, match="wanted -1"):
        store.ask([Asked(PAIR), Asked(PAIR, wanted=-1)], "batch 3")
    assert store.count()["comparisons"] == 3
    assert store.ask([Asked(PAIR, wanted=0)], "kept alone") == 1 and store.open_items("kept alone") == 0


def test_more_raters_may_be_asked_later(store):
    known = Asked(Comparison(Prompt.of("3 + 3?"), PAIR.completions), gold=1.0)
    settled = Asked(Comparison(Prompt.of("4 + 4?"), PAIR.completions))
    store.ask([Asked(PAIR, wanted=0), known, settled], "batch 1")
    store.append([replace(ROW, comparison=settled.comparison, meta={"purpose": "adjudication"})])
    more = [replace(one, wanted=2) for one in (Asked(PAIR), known, settled)]
    assert store.ask(more, "batch 1") == 0
    assert store.ask([Asked(PAIR)], "batch 1") == 0
    with store.reading() as db:
        rows = db.execute(sa.select(items.c.wanted, items.c.open).order_by(items.c.id)).all()
    assert rows == [(2, True), (2, False), (2, False)]


def test_a_store_of_schema_1_is_brought_up_to_date(tmp_path):
    """As users have it on their disks; its verdicts are there still, and its tables are those of a new store."""
    old, new = tmp_path / "old.sqlite", tmp_path / "new.sqlite"
    with sqlite3.connect(old) as db:
        db.executescript((DATA / "store-schema-1.sql").read_text())
    Store(new).close()
    store = Store(old)
    assert [(j.rater, j.p) for j in store.preferences()] == [("ann", 0.1), ("bob", 0.5)]
    assert store.append([replace(ROW, rater="cid")]) == 1 and store.append([replace(ROW, rater="cid")]) == 0
    assert store.ask([Asked(PAIR)], "batch 1") == 1
    store.close()
    assert shape(old) == shape(new)


def test_a_store_of_schema_2_is_brought_up_to_date(tmp_path):
    """It knew no corrections of demonstrations."""
    old, new = tmp_path / "old.sqlite", tmp_path / "new.sqlite"
    for path in (old, new):
        Store(path).close()
    with sqlite3.connect(old) as db:
        of = "FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'demonstrations'"
        triggers = [sql for (sql,) in db.execute(f"SELECT sql {of}")]
        db.executescript(
            "DROP TABLE demonstrations; CREATE TABLE demonstrations (id INTEGER NOT NULL PRIMARY KEY, "
            "prompt VARCHAR(16) NOT NULL REFERENCES prompts (id), text TEXT NOT NULL, rater TEXT NOT NULL, "
            "kind VARCHAR(10) NOT NULL, time VARCHAR(32) NOT NULL, assignment INTEGER REFERENCES assignments (id)); "
            'INSERT INTO prompts VALUES (\'p\', \'[{"role": "user", "content": "2 + 2?"}]\', \'{}\'); '
            "INSERT INTO demonstrations VALUES (1, 'p', '4', 'ann', 'human', 'now', NULL); UPDATE about SET schema = 2;"
            + "; ".join(triggers)
        )
    assert shape(old) != shape(new)
    store = Store(old)
    assert [d.reply for d, _, _ in store.demonstrations()] == ["4"]
    store.close()
    assert shape(old) == shape(new)


def shape(path):
    """Every table's columns, every index and every trigger."""
    with sqlite3.connect(path) as db:
        names = [n for (n,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {
            n: db.execute(f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{n}')").fetchall() for n in names
        }
        others = db.execute("SELECT type, name, tbl_name FROM sqlite_master WHERE type != 'table'").fetchall()
    return columns, sorted(others)


def test_a_step_that_fails_leaves_the_old_store(tmp_path, monkeypatch):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript((DATA / "store-schema-1.sql").read_text())
    before = shape(path)

    def fails(db, step=tables.STEPS[0]):
        step(db)
        raise RuntimeError("cut off")

    monkeypatch.setattr(tables, "STEPS", (fails,))
    with pytest.raises(RuntimeError, match="cut off"):
        Store(path)
    assert shape(path) == before
    monkeypatch.undo()
    assert len(Store(path).preferences()) == 2


def test_a_newer_store_is_refused(store, place):
    with store.writing() as db:
        db.execute(tables.about.update().values(schema=99))
    with pytest.raises(UserError, match=f"a store of schema 99; this version reads up to {tables.SCHEMA}"):
        Store(place)


def test_a_url_that_is_no_store(postgres):
    with pytest.raises(UserError, match=r"sqlite\+x://h/d: a store is a file's path, or postgresql://host/database"):
        Store("sqlite+x://h/d")
    with pytest.raises(UserError, match=r"postgresql\+psycopg://me:\*\*\*@127\.0\.0\.1:1/d: not a preference store"):
        Store("postgresql://me:secret@127.0.0.1:1/d")
    url = new_database(postgres)
    store = Store(url)
    with pytest.raises(UserError, match=r"cannot hold the character U\+0000"):
        store.append([replace(ROW, note="a\0b")])
    store.close()


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


def test_two_writers_lose_nothing(place):
    """Two processes append at the same time; each verdict is there once."""
    code = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from tests.test_store import ROW
from trueup.store import Store
store = Store(sys.argv[1])
for i in range(10):
    store.append([replace(ROW, rater=f"{sys.argv[2]} {i}")])
    store.append([replace(ROW, rater=f"both {i}")])
"""
    root = str(Path(__file__).parents[1])
    writers = [subprocess.Popen([sys.executable, "-c", code, str(place), name, root]) for name in ("a", "b")]
    assert [w.wait(60) for w in writers] == [0, 0]
    store = Store(place)
    assert sorted(j.rater for j in store.preferences()) == sorted(
        f"{n} {i}" for n in ("a", "b", "both") for i in range(10)
    )
    store.close()
