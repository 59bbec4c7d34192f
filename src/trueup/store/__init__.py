"""The preference store: prompts, completions, comparisons, what raters are asked and what they said. No torch.

    prompts         id (the hash of the content), messages, meta
    completions     id (the hash of prompt, text and reason for stopping), text, stop
    comparisons     a pair of completions in the order shown, and `origin`: which stage or batch asked for it
    preferences     one rater's verdict: p that the first is better, strength, tie, both bad, rater, kind, time, and the
                    row that it supersedes
    demonstrations  a reply that a rater wrote, or holds to be ideal, and the row that it supersedes
    items           comparisons that people are asked, how often, how soon; known answers
    assignments     who was lent which item until when, which side was shown first, and how it ended
    raters          who may label: role, what they are, password's hash; sessions: who is signed in
    log             what happened, by whom, when

One SQLite file (WAL), or a PostgreSQL database where the store's name is its URL. What was said (prompts, completions,
comparisons, preferences, demonstrations, log) is never edited or deleted, and the database refuses both: a correction
is a new row that names the old one, which from then on is history and no label; a row may also withdraw one. `append`
is one transaction; verdicts that are there already (the same origin, comparison, rater and round of asking) are not
added again, so that a stage that was cut off can be run again. One writer writes at a time, in both databases.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from trueup.records import Comparison, Completion, Demonstration, Message, Prompt, UserError
from trueup.store.tables import (
    APPEND_ONLY,
    LONGEST_TIME,
    SCHEMA,
    about,
    comparisons,
    completions,
    demonstrations,
    items,
    log,
    make,
    meta,
    migrate,
    preferences,
    prompts,
)

Kind = Literal["human", "ai", "gold", "simulated"]
ADJUDICATION = "adjudication"
"""The purpose of a manager's verdict on what raters dispute."""
BATCH = 1000
"""Rows that one statement adds."""
WRITER = 0x7275_6575
"""The advisory lock that a writer to PostgreSQL holds; any number that other programs do not use."""


@dataclass(frozen=True)
class Judged:
    """A verdict on a comparison. `p`: probability that the first completion is better; `strength` in [0, 1], how much
    better, where the rater said; `assignment` is the asking that it answers, where the queue asked; `withdrawn` takes
    back the verdict that it supersedes and puts none in its place; `id` is the store's own, 0 before it is stored."""

    comparison: Comparison
    p: float
    rater: str
    kind: Kind
    origin: str
    time: str
    strength: float | None = None
    tie: bool = False
    both_bad: bool = False
    note: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    supersedes: int | None = None
    assignment: int | None = None
    withdrawn: bool = False
    id: int = 0


@dataclass(frozen=True)
class Asked:
    """A comparison that people are to be asked: `wanted` raters (0: it is only kept), the higher priority the sooner.
    `gold`: the known answer, as p that the first is better, with what a rater is told of it; `sensitive`: only for who
    opted in. `meta` (which models answered, what an AI thinks) is never shown to a rater."""

    comparison: Comparison
    wanted: int = 1
    priority: float = 0.0
    gold: float | None = None
    explanation: str = ""
    sensitive: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)


class Store:
    """The store at `place`: a path, or postgresql://[user[:password]@]host/database; made where there is none.

    Raises UserError where the place is something else, or newer than this version. An older one is brought up to date.
    """

    def __init__(self, place: str | Path) -> None:
        self.url = _url(place)
        self.name = self.url.render_as_string() if self.remote else str(place)
        self.path = None if self.remote else Path(place)
        self._lock = threading.Lock()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._engine = sa.create_engine(self.url, pool_size=16, max_overflow=64)
        except ModuleNotFoundError:
            raise UserError(f"{self.name}: PostgreSQL needs its driver: pip install 'trueup[label]'") from None
        if not self.remote:
            sa.event.listen(self._engine, "connect", _pragmas)
            sa.event.listen(self._engine, "begin", _begin)
        try:
            self._prepare()
        except sa.exc.DBAPIError as error:
            why = str(error.orig).strip().splitlines()[0]
            raise UserError(f"{self.name}: not a preference store: {why}") from None

    @property
    def remote(self) -> bool:
        return self.url.get_backend_name() != "sqlite"

    def _prepare(self) -> None:
        with self.writing() as db:
            tables = sa.inspect(db).get_table_names()
            if tables and "about" not in tables:
                raise UserError(f"{self.name}: not a preference store: another program's tables ({', '.join(tables)})")
            if not tables:
                make(db)
            found = db.execute(sa.select(about.c.schema)).scalar_one()
            if found > SCHEMA:
                raise UserError(f"{self.name}: a store of schema {found}; this version reads up to {SCHEMA}")
            if found < SCHEMA:
                migrate(db, found)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that no other writer can come between, neither of this process nor of another. All or none."""
        with self._lock, self._engine.connect().execution_options(writes=True) as db, db.begin():
            if self.remote:
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITER)))
            yield db

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as db:
            yield db

    def close(self) -> None:
        self._engine.dispose()

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that leaves a row alone that is there."""
        made = postgresql.insert(table) if self.remote else sqlite.insert(table)
        return made.on_conflict_do_nothing()

    def append(self, judged: Iterable[Judged]) -> int:
        """Adds verdicts, all or none, and returns how many were new. Raises UserError on one that makes no sense."""
        rows = list(judged)
        for row in rows:
            _check(row)
        with self.writing() as db:
            return sum(self.add_verdict(db, row) for row in rows)

    def ask(self, asked: Iterable[Asked], origin: str) -> int:
        """Puts comparisons into the queue for people, all or none; returns how many were not there yet.

        A comparison that is there already (the same pair, from the same origin) stays as it was asked first, but that
        it is asked of more raters where more are wanted now."""
        rows = list(asked)
        for row in rows:
            if row.wanted < 0 or not math.isfinite(row.priority):
                raise UserError(f"a comparison for people: wanted {row.wanted}, priority {row.priority}")
            if row.gold is not None and not 0 <= row.gold <= 1:
                raise UserError(f"a comparison with a known answer: p must be in [0, 1], not {row.gold!r}")
        with self.writing() as db:
            count = sa.select(sa.func.count()).select_from(items)
            before = db.execute(count).scalar_one()
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                numbers = self._add_comparisons(db, [row.comparison for row in part], origin)
                values = [
                    {
                        "comparison": number,
                        "open": row.gold is None and row.wanted > 0,
                        **{n: getattr(row, n) for n in ("wanted", "priority", "gold", "explanation", "sensitive")},
                        "meta": dict(row.meta),
                    }
                    for number, row in zip(numbers, part, strict=True)
                ]
                db.execute(self.insert(items), values)
                more = [{"at": v["comparison"], "raters": v["wanted"]} for v in values if v["wanted"]]
                if more:
                    db.execute(_WANT_MORE, more)
            new: int = db.execute(count).scalar_one() - before
            self.note(db, "trueup", "asked", origin=origin, new=new)
        return new

    def _add_comparisons(self, db: sa.Connection, asked: Sequence[Comparison], origin: str) -> list[int]:
        """The ids of comparisons, new or old, in their order."""
        if not asked:
            return []
        texts, pairs = [], []
        for comparison in asked:
            if len(comparison.completions) != 2:
                raise UserError(f"a comparison of {len(comparison.completions)} completions; people compare two")
            ids = [completion_id(comparison.prompt, c) for c in comparison.completions]
            pairs.append({"prompt": comparison.prompt.id, "first": ids[0], "second": ids[1], "origin": origin})
            texts += [
                {"id": i, "prompt": comparison.prompt.id, "text": self._text(c.text), "stop": c.stop}
                for i, c in zip(ids, comparison.completions, strict=True)
            ]
        db.execute(self.insert(prompts), [self._prompt(c.prompt) for c in asked])
        db.execute(self.insert(completions), texts)
        db.execute(self.insert(comparisons), pairs)
        c = comparisons.c
        found = sa.select(c.id, c.first, c.second).where(c.origin == origin, c.first.in_({p["first"] for p in pairs}))
        numbers = {(row.first, row.second): row.id for row in db.execute(found)}
        return [numbers[p["first"], p["second"]] for p in pairs]

    def pairs(self, origins: Iterable[str]) -> set[tuple[str, ...]]:
        """The comparisons of some origins: origin, and the ids of the first and the second completion."""
        c = comparisons.c
        with self.reading() as db:
            found = db.execute(sa.select(c.origin, c.first, c.second).where(c.origin.in_(set(origins))))
            return {tuple(row) for row in found}

    def add_prompt(self, db: sa.Connection, prompt: Prompt) -> str:
        """Within a caller's transaction: the prompt's id, new or old."""
        db.execute(self.insert(prompts), [self._prompt(prompt)])
        return prompt.id

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        messages = [{"role": m["role"], "content": self._text(m["content"])} for m in prompt.messages]
        return {"id": prompt.id, "messages": messages, "meta": dict(prompt.meta)}

    def _text(self, text: str) -> str:
        if self.remote and "\0" in text:
            raise UserError(f"{self.name}: PostgreSQL cannot hold the character U+0000, which a text here has")
        return text

    def add_verdict(self, db: sa.Connection, row: Judged, comparison: int | None = None) -> bool:
        """Within a caller's transaction; False where it is there already. `comparison`: its id, where it is known."""
        if comparison is None:
            [comparison] = self._add_comparisons(db, [row.comparison], row.origin)
        p = preferences
        said = {"rater": self._text(row.rater), "supersedes": row.supersedes, "assignment": row.assignment}
        same = [p.c.comparison == comparison, *(p.c[name].is_not_distinct_from(v) for name, v in said.items())]
        if row.assignment is None:  # a rater's own opinion and the same person's last word on a dispute are two
            last = p.c.meta["purpose"].as_string() == ADJUDICATION
            same.append(sa.func.coalesce(last, sa.false()) == (row.meta.get("purpose") == ADJUDICATION))
        if db.execute(sa.select(p.c.id).where(*same)).first():
            return False
        if row.supersedes is not None:
            old = db.execute(sa.select(p.c.comparison).where(p.c.id == row.supersedes)).scalar()
            if old != comparison:
                raise UserError(
                    f"{self.name}: preference {row.supersedes} is of another comparison, or not there: "
                    "a correction names the verdict that it replaces"
                )
            if db.execute(sa.select(p.c.id).where(p.c.supersedes == row.supersedes)).first():
                raise UserError(f"{self.name}: preference {row.supersedes} has been corrected before")
        elif row.withdrawn:
            raise UserError(f"rater '{row.rater}': what is withdrawn must be named")
        names = ("p", "strength", "tie", "both_bad", "kind", "time", "withdrawn")
        values = {**said, **{name: getattr(row, name) for name in names}, "note": self._text(row.note)}
        db.execute(p.insert().values(comparison=comparison, **values, meta=dict(row.meta)))
        return True

    def note(self, db: sa.Connection, who: str, what: str, **details: Any) -> None:
        """A line of the log, within a caller's transaction."""
        db.execute(log.insert().values(time=time.time(), who=who, what=what, details=details))

    def preferences(
        self, *, history: bool = False, origins: Sequence[str] | None = None, ids: Sequence[int] | None = None
    ) -> list[Judged]:
        """Verdicts in the order of appending; those that a later row supersedes or withdraws only with `history`."""
        c, p, first, second = comparisons, preferences, completions.alias("a"), completions.alias("b")
        columns = [
            *(p.c[n] for n in SAID),
            c.c.origin,
            prompts.c.messages,
            prompts.c.meta.label("prompt_meta"),
            *(side.c[n].label(f"{n}_{k}") for k, side in enumerate((first, second)) for n in ("text", "stop")),
        ]
        query = (
            sa.select(*columns)
            .join(c, p.c.comparison == c.c.id)
            .join(prompts, c.c.prompt == prompts.c.id)
            .join(first, c.c.first == first.c.id)
            .join(second, c.c.second == second.c.id)
            .order_by(p.c.id)
        )
        if not history:
            query = query.where(*live())
        if origins is not None:
            query = query.where(c.c.origin.in_(origins))
        if ids is not None:
            query = query.where(p.c.id.in_(ids))
        with self.reading() as db:
            return [_judged(row) for row in db.execute(query).mappings()]

    def open_items(self, origin: str) -> int:
        """How many comparisons of an origin still wait for people."""
        query = sa.select(sa.func.count()).select_from(items.join(comparisons, comparisons.c.id == items.c.comparison))
        with self.reading() as db:
            return db.execute(query.where(items.c.open, comparisons.c.origin == origin)).scalar_one()

    def demonstrations(self) -> list[tuple[Demonstration, str, Kind]]:
        """What raters wrote and did not correct or take back since, with who wrote it and what that rater is, in the
        order of appending."""
        d = demonstrations
        query = sa.select(d.c.text, d.c.rater, d.c.kind, prompts.c.messages, prompts.c.meta)
        query = query.join(prompts, d.c.prompt == prompts.c.id).where(*live(d, _later_own)).order_by(d.c.id)
        with self.reading() as db:
            rows = db.execute(query).all()
        return [(Demonstration(as_prompt(r.messages, r.meta), r.text), r.rater, r.kind) for r in rows]

    def count(self) -> dict[str, int]:
        """Rows of each table of what was asked and said."""
        with self.reading() as db:
            return {
                name: db.execute(sa.select(sa.func.count()).select_from(meta.tables[name])).scalar_one()
                for name in APPEND_ONLY
                if name != "log"
            }


SAID = (
    *("id", "p", "strength", "tie", "both_bad", "rater", "kind", "time", "note", "meta"),
    *("supersedes", "assignment", "withdrawn"),
)
"""Columns of `preferences` that are fields of `Judged` under the same name."""


_raters, _said = sa.bindparam("raters", type_=sa.Integer), preferences.alias("said")
SETTLED = sa.exists().where(
    _said.c.comparison == items.c.comparison, _said.c.meta["purpose"].as_string() == ADJUDICATION
)
"""What holds of an item on which a manager has had the last word."""
_WANT_MORE = (
    items.update()
    .where(items.c.comparison == sa.bindparam("at"), items.c.wanted < _raters)
    .values(wanted=_raters, open=sa.and_(items.c.gold.is_(None), items.c.done < _raters, ~SETTLED))
)


_later, _later_own = preferences.alias("later"), demonstrations.alias("later_own")


def live(p: Any = preferences, later: Any = _later) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """What holds of a verdict, or with `_later_own` of a demonstration, that is no history."""
    return ~p.c.withdrawn, ~sa.exists().where(later.c.supersedes == p.c.id)


def as_row(judged: Judged) -> dict[str, Any]:
    """A verdict in the ecosystem's columns, `chosen` and `rejected`; a tie has label 1/2."""
    first, second = judged.comparison.completions
    swap = judged.p < 0.5
    chosen, rejected = (second, first) if swap else (first, second)
    gold = judged.meta.get("gold_margin")
    return {
        "prompt": [dict(m) for m in judged.comparison.prompt.messages],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "label": 1 - judged.p if swap else judged.p,
        "rater": judged.rater,
        "category": judged.comparison.prompt.category,
        "chosen_ended": chosen.ended,
        "rejected_ended": rejected.ended,
        **({} if gold is None else {"gold_margin": -gold if swap else gold}),
    }


def completion_id(prompt: Prompt, completion: Completion) -> str:
    """Sixteen hex digits of the SHA-256 of what was asked and answered."""
    content = json.dumps([prompt.id, completion.text, completion.stop], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check(row: Judged) -> None:
    if not (math.isfinite(row.p) and 0 <= row.p <= 1):
        raise UserError(f"rater '{row.rater}': p must be in [0, 1], not {row.p!r}")
    if row.kind not in get_args(Kind):
        raise UserError(f"rater '{row.rater}': kind must be one of {', '.join(get_args(Kind))}, not {row.kind!r}")
    if len(row.comparison.completions) != 2:
        raise UserError(f"rater '{row.rater}': a verdict is on two completions, not {len(row.comparison.completions)}")
    if len(row.time) > LONGEST_TIME:
        raise UserError(f"rater '{row.rater}': a time has at most {LONGEST_TIME} characters, not {row.time!r}")
    if row.tie and row.p != 0.5:
        raise UserError(f"rater '{row.rater}': a tie has p = 1/2, not {row.p!r}")


def as_prompt(messages: Iterable[Mapping[str, Any]], meta: Mapping[str, Any]) -> Prompt:
    return Prompt(tuple(Message(role=m["role"], content=m["content"]) for m in messages), meta)


def _judged(row: sa.RowMapping) -> Judged:
    prompt = as_prompt(row["messages"], row["prompt_meta"])
    answers = tuple(Completion(row[f"text_{k}"], row[f"stop_{k}"]) for k in (0, 1))
    return Judged(comparison=Comparison(prompt, answers), **{name: row[name] for name in (*SAID, "origin")})


def _url(place: str | Path) -> sa.URL:
    text = str(place)
    if "://" not in text:
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        raise UserError(f"{text.split('://')[0]}://...: not a URL of a database") from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise UserError(f"{url.render_as_string()}: a store is a file's path, or postgresql://host/database")
    return url.set(drivername="postgresql+psycopg")


def _pragmas(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    """A writer takes its turn at once: two who read first and write then could not both go on."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
