"""Who may sign in, and who is signed in. Passwords are kept as argon2 hashes, sessions as hashes of random tokens.

There is no secret to set and none to leak: a session's token is 256 random bits that the browser has and the store has
not; a token against forged requests (CSRF) is drawn with each session. Failed sign-ins are in the store's log, and are
counted there, so that a restart does not forget them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from trueup.records import UserError
from trueup.store import Kind, Store
from trueup.store.tables import log, raters, sessions

Role = Literal["rater", "manager"]
NAME = re.compile(r"[\w.@-]{1,64}")
SHORTEST, LONGEST = 12, 256
DAY = 86400.0
WINDOW, BY_NAME, BY_ADDRESS = 900.0, 5, 20
"""So many failed sign-ins within WINDOW seconds, with one name or from one address, and the next ones are not tried."""


@dataclass(frozen=True)
class Session:
    """Who is signed in. `csrf` must come with every request that changes something."""

    rater: str
    role: Role
    kind: Kind
    csrf: str
    id: str

    def allows(self, token: str) -> bool:
        return hmac.compare_digest(self.csrf.encode(), token.encode())


class TooMany(Exception):
    """Too many failed sign-ins: wait so many seconds."""


@dataclass
class Accounts:
    store: Store
    clock: Callable[[], float] = time.time
    days: float = 14

    def __post_init__(self) -> None:
        self._hasher, self._signing = PasswordHasher(), threading.Lock()
        self._nobody = self._hasher.hash(secrets.token_hex())

    def add(
        self,
        name: str,
        *,
        role: str = "rater",
        kind: str = "human",
        password: str | None = None,
        sensitive: bool = False,
        by: str = "trueup",
    ) -> None:
        """A new rater, or another role, password or readiness for sensitive items of one that is there.

        Without a password only the link that `trueup label` prints signs in. A new password, and another role, end
        the rater's sessions."""
        if not NAME.fullmatch(name):
            raise UserError(f"rater '{name}': a name has 1 to 64 letters, digits, and . _ - @")
        if role not in get_args(Role):
            raise UserError(f"rater '{name}': role must be {' or '.join(get_args(Role))}, not {role!r}")
        if kind not in ("human", "simulated"):
            raise UserError(f"rater '{name}': kind must be human or simulated, not {kind!r}")
        if password is not None and len(password) < SHORTEST:
            raise UserError(f"rater '{name}': a password has {SHORTEST} characters or more")
        if password is not None and len(password) > LONGEST:
            raise UserError(f"rater '{name}': a password has at most {LONGEST} characters")
        values = {"role": role, "kind": kind, "sensitive": sensitive}
        if password is not None:
            values["password"] = self._hasher.hash(password)
        with self.store.writing() as db:
            old = db.execute(sa.select(raters).where(raters.c.name == name)).first()
            if old is None:
                db.execute(raters.insert().values(name=name, **values))
            else:
                if old.kind != kind:
                    raise UserError(f"rater '{name}' is {old.kind}, and stays so: its answers say so")
                db.execute(raters.update().where(raters.c.name == name).values(**values))
                if password is not None or old.role != role:
                    db.execute(sessions.delete().where(sessions.c.rater == name))
            self.store.note(db, by, "account", rater=name, role=role, kind=kind, sensitive=sensitive)

    def all(self) -> list[sa.Row]:
        with self.store.reading() as db:
            return list(db.execute(sa.select(raters).order_by(raters.c.name)).all())

    def sign_in(self, name: str, password: str, address: str) -> str | None:
        """The new session's token; None where name and password do not go together. Raises TooMany.

        One at a time: guesses sent together would each be tried before any of them was counted."""
        with self._signing:
            return self._sign_in(name, password, address)

    def _sign_in(self, name: str, password: str, address: str) -> str | None:
        now, password = self.clock(), password[: LONGEST + 1]  # hashing takes longer, the longer it is
        with self.store.reading() as db:
            failed = sa.select(log.c.who, log.c.details).where(
                log.c.what == "sign-in failed", log.c.time > now - WINDOW
            )
            rows = db.execute(failed).all()
            known = db.execute(sa.select(raters.c.password).where(raters.c.name == name)).scalar()
        of_name = sum(r.who == name[:64] for r in rows)
        of_address = sum(r.details.get("address") == address for r in rows)
        if of_name >= BY_NAME or of_address >= BY_ADDRESS:
            raise TooMany
        try:
            good = self._hasher.verify(known or self._nobody, password) and known is not None
        except (Argon2Error, InvalidHashError):
            good = False
        if not good:
            with self.store.writing() as db:
                db.execute(
                    log.insert().values(time=now, who=name[:64], what="sign-in failed", details={"address": address})
                )
            return None
        return self.open(name)

    def open(self, name: str) -> str:
        """A session for a rater who has been found to be who they say; returns its token."""
        token, now = secrets.token_urlsafe(32), self.clock()
        with self.store.writing() as db:
            db.execute(sessions.delete().where(sessions.c.expires < now))
            values = {"csrf": secrets.token_urlsafe(32), "expires": now + self.days * DAY}
            db.execute(sessions.insert().values(id=_hash(token), rater=name, **values))
            self.store.note(db, name, "signed in")
        return token

    def session(self, token: str | None) -> Session | None:
        if not token:
            return None
        query = sa.select(sessions, raters.c.role, raters.c.kind).join(raters, raters.c.name == sessions.c.rater)
        query = query.where(sessions.c.id == _hash(token), sessions.c.expires > self.clock())
        with self.store.reading() as db:
            row = db.execute(query).first()
        return Session(row.rater, row.role, row.kind, row.csrf, row.id) if row else None

    def end(self, session: Session) -> None:
        with self.store.writing() as db:
            db.execute(sessions.delete().where(sessions.c.id == session.id))
            self.store.note(db, session.rater, "signed out")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
