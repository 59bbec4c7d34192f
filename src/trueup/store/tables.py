"""The store's tables as they are now, and the steps that bring older files here. Append-only where it says so.

A change of the tables is a new step at the end of `STEPS`, and the same change in the tables: a new store is made from
the tables at once, an old one walks the steps, and a test holds the two to be the same.
"""

from __future__ import annotations

import sqlalchemy as sa

APPEND_ONLY = ("prompts", "completions", "comparisons", "preferences", "demonstrations", "log")

LONGEST_TIME = 32

meta = sa.MetaData()
about = sa.Table("about", meta, sa.Column("schema", sa.Integer, nullable=False))
prompts = sa.Table(
    "prompts",
    meta,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("meta", sa.JSON, nullable=False),
)
completions = sa.Table(
    "completions",
    meta,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("prompt", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("stop", sa.String(8), nullable=False),
)
comparisons = sa.Table(
    "comparisons",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("prompt", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("first", sa.ForeignKey("completions.id"), nullable=False),
    sa.Column("second", sa.ForeignKey("completions.id"), nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.UniqueConstraint("first", "second", "origin"),
)
preferences = sa.Table(
    "preferences",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("comparison", sa.ForeignKey("comparisons.id"), nullable=False, index=True),
    sa.Column("p", sa.Float, nullable=False),
    sa.Column("strength", sa.Float),
    sa.Column("tie", sa.Boolean, nullable=False),
    sa.Column("both_bad", sa.Boolean, nullable=False),
    sa.Column("rater", sa.Text, nullable=False),
    sa.Column("kind", sa.String(10), nullable=False),
    sa.Column("time", sa.String(LONGEST_TIME), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("meta", sa.JSON, nullable=False),
    sa.Column("supersedes", sa.ForeignKey("preferences.id"), unique=True),
    sa.Column("assignment", sa.Integer, index=True),
    sa.Column("withdrawn", sa.Boolean, nullable=False, server_default=sa.false()),
)
ONE_VERDICT = sa.Index(
    "one_verdict_an_assignment",
    preferences.c.assignment,
    unique=True,
    sqlite_where=preferences.c.supersedes.is_(None),
    postgresql_where=preferences.c.supersedes.is_(None),
)
"""The database itself refuses a second first answer to one assignment."""

# What people are asked. Rows of items, assignments, raters and sessions change; what they changed to is in the log.
items = sa.Table(
    "items",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("comparison", sa.ForeignKey("comparisons.id"), nullable=False, unique=True),
    sa.Column("wanted", sa.Integer, nullable=False),
    sa.Column("done", sa.Integer, nullable=False, server_default="0"),
    sa.Column("open", sa.Boolean, nullable=False),
    sa.Column("priority", sa.Float, nullable=False, server_default="0"),
    sa.Column("dispute", sa.Float, nullable=False, server_default="0"),
    sa.Column("gold", sa.Float),
    sa.Column("explanation", sa.Text, nullable=False, server_default=""),
    sa.Column("sensitive", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("meta", sa.JSON, nullable=False),
)
NEED = sa.Index(
    "items_by_need", items.c.open, items.c.priority.desc(), items.c.done, items.c.dispute.desc(), items.c.id
)
GOLD = sa.Index("items_gold", items.c.gold)
assignments = sa.Table(
    "assignments",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("item", sa.ForeignKey("items.id"), nullable=False),
    sa.Column("rater", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("purpose", sa.String(10), nullable=False),
    sa.Column("swapped", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("leased", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.UniqueConstraint("item", "rater", "round"),
    sa.Index("assignments_of_rater", "rater", "state", "purpose", "finished"),
)
demonstrations = sa.Table(
    "demonstrations",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("prompt", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("rater", sa.Text, nullable=False),
    sa.Column("kind", sa.String(10), nullable=False),
    sa.Column("time", sa.String(LONGEST_TIME), nullable=False),
    sa.Column("assignment", sa.ForeignKey("assignments.id")),
    sa.Column("supersedes", sa.ForeignKey("demonstrations.id")),
    sa.Column("withdrawn", sa.Boolean, nullable=False, server_default=sa.false()),
)
ONE_CORRECTION = sa.Index("one_correction_a_demonstration", demonstrations.c.supersedes, unique=True)
raters = sa.Table(
    "raters",
    meta,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("role", sa.String(8), nullable=False),
    sa.Column("kind", sa.String(10), nullable=False),
    sa.Column("password", sa.Text),
    sa.Column("sensitive", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("paused", sa.Text, nullable=False, server_default=""),
)
sessions = sa.Table(
    "sessions",
    meta,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("rater", sa.ForeignKey("raters.name"), nullable=False),
    sa.Column("csrf", sa.String(64), nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)
log = sa.Table(
    "log",
    meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("what", sa.String(32), nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index("log_what", "what", "time"),
)


def make(db: sa.Connection) -> None:
    """All tables of the present schema, in an empty database."""
    meta.create_all(db)
    _guard(db, APPEND_ONLY)
    db.execute(about.insert().values(schema=SCHEMA))


def migrate(db: sa.Connection, found: int) -> None:
    """Walks the steps from schema `found` to the present one, within the caller's transaction."""
    for step in STEPS[found - 1 :]:
        step(db)
    db.execute(about.update().values(schema=SCHEMA))


def _people(db: sa.Connection) -> None:
    """1 -> 2: what people are asked and say, their accounts, and the log."""
    db.exec_driver_sql("ALTER TABLE preferences ADD COLUMN assignment INTEGER")
    db.exec_driver_sql("ALTER TABLE preferences ADD COLUMN withdrawn BOOLEAN NOT NULL DEFAULT (0)")
    for index in preferences.indexes:
        index.create(db, checkfirst=True)
    meta.create_all(db, tables=[items, assignments, demonstrations, raters, sessions, log])
    _guard(db, ("demonstrations", "log"))


def _corrected(db: sa.Connection) -> None:
    """2 -> 3: a demonstration may supersede or withdraw another. A store of schema 1 has the columns by now."""
    if "supersedes" not in {column["name"] for column in sa.inspect(db).get_columns("demonstrations")}:
        column = "ALTER TABLE demonstrations ADD COLUMN"
        db.exec_driver_sql(f"{column} supersedes INTEGER REFERENCES demonstrations (id)")
        no = "0" if db.dialect.name == "sqlite" else "false"
        db.exec_driver_sql(f"{column} withdrawn BOOLEAN NOT NULL DEFAULT {no}")
        ONE_CORRECTION.create(db)


STEPS = (_people, _corrected)
"""Step k leads from schema k to k + 1. Schema 1 knew SQLite alone."""
SCHEMA = len(STEPS) + 1


def _guard(db: sa.Connection, tables: tuple[str, ...]) -> None:
    """Triggers that refuse to edit or delete a row, or, in PostgreSQL, to empty the table."""
    for table in tables:
        if db.dialect.name == "sqlite":
            for verb in ("UPDATE", "DELETE"):
                db.exec_driver_sql(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} are appended, never edited'); END"
                )
        else:
            db.exec_driver_sql(
                f"CREATE FUNCTION {table}_appended() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION '{table} are appended, never edited'; END $$"
            )
            db.exec_driver_sql(
                f"CREATE TRIGGER {table}_appended BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_appended()"
            )
