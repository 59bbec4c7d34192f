"""The preference store: prompts, completions, comparisons and what raters said of them, in one SQLite file. No torch.

    prompts       id (the hash of the content), messages, meta
    completions   id (the hash of prompt, text and reason for stopping), text, stop
    comparisons   a pair of completions in the order shown, and `origin`: which stage or batch asked for it
    preferences   one rater's verdict: p that the first is better, strength, tie, both bad, rater, kind, time, and the
                  row that it supersedes

Nothing is edited or deleted, and the database refuses both: a correction is a new row that names the old one, which
from then on is history and no label. `append` is one transaction; verdicts that are there already (the same origin,
comparison, rater and round of asking) are not added again, so that a stage that was cut off can be run again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sa

from trueup.records import Comparison, Completion, Message, Prompt, UserError

Kind = Literal["human", "ai", "gold", "simulated"]
SCHEMA = 1
"""Of the tables; a file of another number is refused."""
APPEND_ONLY = ("prompts", "completions", "comparisons", "preferences")

_meta = sa.MetaData()
_about = sa.Table("about", _meta, sa.Column("schema", sa.Integer, nullable=False))
_prompts = sa.Table(
    "prompts",
    _meta,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("meta", sa.JSON, nullable=False),
)
_completions = sa.Table(
    "completions",
    _meta,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("prompt", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("stop", sa.String(8), nullable=False),
)
_comparisons = sa.Table(
    "comparisons",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("prompt", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("first", sa.ForeignKey("completions.id"), nullable=False),
    sa.Column("second", sa.ForeignKey("completions.id"), nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.UniqueConstraint("first", "second", "origin"),
)
_preferences = sa.Table(
    "preferences",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("comparison", sa.ForeignKey("comparisons.id"), nullable=False, index=True),
    sa.Column("p", sa.Float, nullable=False),
    sa.Column("strength", sa.Float),
    sa.Column("tie", sa.Boolean, nullable=False),
    sa.Column("both_bad", sa.Boolean, nullable=False),
    sa.Column("rater", sa.Text, nullable=False),
    sa.Column("kind", sa.String(10), nullable=False),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("meta", sa.JSON, nullable=False),
    sa.Column("supersedes", sa.ForeignKey("preferences.id"), unique=True),
)


@dataclass(frozen=True)
class Judged:
    """A verdict on a comparison. `p`: probability that the first completion is better; `strength` in [0, 1], how much
    better, where the rater said; `id` is the store's own, 0 before it is stored."""

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
    id: int = 0


class Store:
    """A store in `path`, made where there is none. Raises UserError where the file is something else."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(f"sqlite:///{self.path}")
        sa.event.listen(self._engine, "connect", _pragmas)
        try:
            self._prepare()
        except sa.exc.DatabaseError as error:
            raise UserError(f"{self.path}: not a preference store: {error.orig}") from None

    def _prepare(self) -> None:
        with self._engine.begin() as db:
            tables = sa.inspect(db).get_table_names()
            if tables and "about" not in tables:
                raise UserError(f"{self.path}: not a preference store: another program's tables ({', '.join(tables)})")
            _meta.create_all(db)
            if not tables:
                db.execute(_about.insert().values(schema=SCHEMA))
                for table in APPEND_ONLY:
                    for verb in ("UPDATE", "DELETE"):
                        db.execute(
                            sa.text(
                                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                                f"BEGIN SELECT RAISE(ABORT, '{table} are appended, never edited'); END"
                            )
                        )
            found = db.execute(sa.select(_about.c.schema)).scalar_one()
        if found != SCHEMA:
            raise UserError(f"{self.path}: a store of schema {found}; this version reads {SCHEMA}")

    def close(self) -> None:
        self._engine.dispose()

    def append(self, judged: Iterable[Judged]) -> int:
        """Adds verdicts, all or none, and returns how many were new. Raises UserError on one that makes no sense."""
        rows = list(judged)
        for row in rows:
            _check(row)
        with self._engine.begin() as db:
            return sum(self._add(db, row) for row in rows)

    def _add(self, db: sa.Connection, row: Judged) -> bool:
        first, second = row.comparison.completions
        prompt = row.comparison.prompt
        ignore = "OR IGNORE"
        db.execute(
            _prompts.insert().prefix_with(ignore),
            {"id": prompt.id, "messages": [dict(m) for m in prompt.messages], "meta": dict(prompt.meta)},
        )
        ids = [completion_id(prompt, c) for c in (first, second)]
        db.execute(
            _completions.insert().prefix_with(ignore),
            [
                {"id": i, "prompt": prompt.id, "text": c.text, "stop": c.stop}
                for i, c in zip(ids, (first, second), strict=True)
            ],
        )
        pair = {"first": ids[0], "second": ids[1], "origin": row.origin}
        db.execute(_comparisons.insert().prefix_with(ignore), {"prompt": prompt.id, **pair})
        same = [_comparisons.c[name] == value for name, value in pair.items()]
        comparison = db.execute(sa.select(_comparisons.c.id).where(*same)).scalar_one()
        p, said = _preferences, {"rater": row.rater, "supersedes": row.supersedes}
        same = [p.c.comparison == comparison, *(p.c[name].is_not_distinct_from(v) for name, v in said.items())]
        there = sa.select(p.c.id).where(*same)
        if db.execute(there).first():
            return False
        if row.supersedes is not None:
            old = db.execute(sa.select(p.c.comparison).where(p.c.id == row.supersedes)).scalar()
            if old != comparison:
                raise UserError(
                    f"{self.path}: preference {row.supersedes} is of another comparison, or not there: "
                    "a correction names the verdict that it replaces"
                )
            if db.execute(sa.select(p.c.id).where(p.c.supersedes == row.supersedes)).first():
                raise UserError(f"{self.path}: preference {row.supersedes} has been corrected before")
        values = {name: getattr(row, name) for name in ("p", "strength", "tie", "both_bad", "kind", "time", "note")}
        db.execute(p.insert(), {"comparison": comparison, **said, **values, "meta": dict(row.meta)})
        return True

    def preferences(self, *, history: bool = False, origins: Sequence[str] | None = None) -> list[Judged]:
        """Verdicts in the order of appending; those that a later row supersedes only with `history`."""
        c, p, first, second = _comparisons, _preferences, _completions.alias("a"), _completions.alias("b")
        columns = [
            *(p.c[n] for n in ("id", "p", "strength", "tie", "both_bad", "rater", "kind", "time", "note", "meta")),
            p.c.supersedes,
            c.c.origin,
            _prompts.c.messages,
            _prompts.c.meta.label("prompt_meta"),
            *(side.c[n].label(f"{n}_{k}") for k, side in enumerate((first, second)) for n in ("text", "stop")),
        ]
        query = (
            sa.select(*columns)
            .join(c, p.c.comparison == c.c.id)
            .join(_prompts, c.c.prompt == _prompts.c.id)
            .join(first, c.c.first == first.c.id)
            .join(second, c.c.second == second.c.id)
            .order_by(p.c.id)
        )
        if not history:
            query = query.where(p.c.id.not_in(sa.select(p.c.supersedes).where(p.c.supersedes.is_not(None))))
        if origins is not None:
            query = query.where(c.c.origin.in_(origins))
        with self._engine.connect() as db:
            return [_judged(row) for row in db.execute(query).mappings()]

    def count(self) -> dict[str, int]:
        """Rows of each table."""
        with self._engine.connect() as db:
            return {
                name: db.execute(sa.select(sa.func.count()).select_from(_meta.tables[name])).scalar_one()
                for name in APPEND_ONLY
            }


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
    if row.tie and row.p != 0.5:
        raise UserError(f"rater '{row.rater}': a tie has p = 1/2, not {row.p!r}")


def _judged(row: sa.RowMapping) -> Judged:
    prompt = Prompt(tuple(Message(role=m["role"], content=m["content"]) for m in row["messages"]), row["prompt_meta"])
    answers = tuple(Completion(row[f"text_{k}"], row[f"stop_{k}"]) for k in (0, 1))
    same = ("id", "p", "strength", "tie", "both_bad", "rater", "kind", "time", "note", "meta", "supersedes", "origin")
    return Judged(comparison=Comparison(prompt, answers), **{name: row[name] for name in same})


def _pragmas(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
