"""A server answers: any that speaks OpenAI's chat protocol (vLLM, llama.cpp, `transformers serve`, a service).

It is sent `POST {endpoint}/chat/completions`, `parallel` at a time. Where the answer has log-probs, p comes from those
of the letters A and B at the place of the verdict; else from the letter itself, 1 or 0; where there is no one letter
the answer is unreadable. A connection that fails, 408, 409, 429 and 5xx are tried again, after pauses that double, or
as long as the server says (`Retry-After`).

Money: before each attempt the most that it can cost (every byte of the question a token, `max_tokens` back) is booked
in `cache`, a preference store, and after it what it did cost; where booking would pass `budget` nothing is sent. What a
killed program has booked stays booked: it may have been charged. Answers are kept there too by the hash of the
request, and are not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa
from pydantic import Field

from trueup.config import Config
from trueup.judges.asking import Answer, Question, Written
from trueup.records import UserError
from trueup.store import Store

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh

AGAIN = {408, 409, 429}
OVERHEAD = 64
"""Tokens that a server's chat template may add to a question."""


class Endpoint(Config):
    """A server, and what it may cost."""

    endpoint: str
    """Such as http://localhost:8000/v1"""
    model: str
    """The model's name there."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; none is sent where it is not set."""
    logprobs: bool = True
    """Ask for log-probs; false for a server that refuses the request because of them."""
    top_logprobs: int = Field(5, ge=1, le=20)
    max_tokens: int = Field(16, gt=0)
    """Of an answer; with a chain of thought 512 where not said."""
    temperature: float = Field(0.0, ge=0)
    parallel: int = Field(8, gt=0)
    """Requests under way at once."""
    tries: int = Field(6, gt=0)
    pause: float = Field(0.5, ge=0)
    """Seconds before the second try; doubled each time, up to a minute."""
    timeout: float = Field(120.0, gt=0)
    price_in: float = Field(0.0, ge=0)
    """Of a million tokens sent."""
    price_out: float = Field(0.0, ge=0)
    """Of a million tokens that come back."""
    budget: float | None = Field(None, ge=0)
    """The most that all requests booked in `cache` may cost, in the unit of the prices."""
    cache: str = "judge-cache.sqlite"
    """A preference store, SQLite or a PostgreSQL URL, made where there is none; the one of people's labels will do."""


@dataclass(frozen=True)
class Estimate:
    """What asking would take. `cost` is the most that it can be."""

    requests: int
    cached: int
    cost: float
    spent: float


kept = sa.MetaData()
answers = sa.Table(
    "judge_answers",
    kept,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("reply", sa.Text, nullable=False),
    sa.Column("cost", sa.Float, nullable=False),
)
booked = sa.Table(
    "judge_costs",
    kept,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(64), nullable=False),
    sa.Column("cost", sa.Float, nullable=False),
)


class Ledger:
    """Answers and money, in two tables of a preference store, for any number of processes and threads."""

    def __init__(self, place: str) -> None:
        self.store = Store(place)
        with self.store.writing() as db:
            kept.create_all(db)

    def known(self, key: str) -> tuple[dict[str, Any], float] | None:
        with self.store.reading() as db:
            row = db.execute(sa.select(answers.c.reply, answers.c.cost).where(answers.c.key == key)).first()
        return (json.loads(row.reply), row.cost) if row else None

    def spent(self) -> float:
        with self.store.reading() as db:
            return self._spent(db)

    def _spent(self, db: sa.Connection) -> float:
        return float(db.execute(sa.select(sa.func.coalesce(sa.func.sum(booked.c.cost), 0.0))).scalar_one())

    def book(self, key: str, most: float, budget: float | None) -> int | None:
        """The number of the booking; None where it would pass the budget."""
        with self.store.writing() as db:  # nobody books between the sum and the row
            if budget is not None and self._spent(db) + most > budget:
                return None
            made = db.execute(booked.insert().values(key=key, cost=most).returning(booked.c.id))
            return int(made.scalar_one())

    def settle(self, number: int, cost: float) -> None:
        with self.store.writing() as db:
            db.execute(booked.update().where(booked.c.id == number).values(cost=cost))

    def keep(self, number: int, key: str, reply: dict[str, Any], cost: float) -> None:
        """The answer and its cost, both or neither."""
        with self.store.writing() as db:
            db.execute(booked.update().where(booked.c.id == number).values(cost=cost))
            db.execute(self.store.insert(answers).values(key=key, reply=json.dumps(reply), cost=cost))


class OverBudget(UserError):
    """Nothing more is sent."""


class Server:
    """See the head of the file. With several processes the main one alone asks."""

    def __init__(self, config: Endpoint, mesh: Mesh, *, thought: bool = False, seed: int = 0) -> None:
        where = urlsplit(config.endpoint)
        if where.scheme not in ("http", "https") or not where.netloc:
            raise UserError(f"judge {config.endpoint}: expected an address such as http://localhost:8000/v1")
        if config.budget is not None and not (config.price_in or config.price_out):
            raise UserError(f"judge {config.endpoint}: a budget needs price_in and price_out, per million tokens")
        self.config, self.mesh, self.thought, self.seed = config, mesh, thought, seed
        told = "max_tokens" in config.model_fields_set
        self.max_tokens = config.max_tokens if told or not thought else 512
        self.name = f"{config.model} at {config.endpoint}"
        self.url = f"{config.endpoint.rstrip('/')}/chat/completions"
        self.ledger = Ledger(config.cache) if mesh.is_main else None

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        replies = self._replies([self.body(q) for q in questions])
        return [
            read(*reply, thought=self.thought, verdict=q.verdict) for reply, q in zip(replies, questions, strict=True)
        ]

    def write(
        self, texts: Sequence[str], *, max_tokens: int, stop: tuple[str, ...], seed: int, index: Sequence[int]
    ) -> list[Written]:
        """At the endpoint's temperature; the same text at temperature 0 is sent once. The protocol takes four stop
        strings."""
        asked = [(f"{text}\n\nWrite what comes next here, and nothing else.", max_tokens) for text in texts]
        drawn = [seed + i * (self.config.temperature > 0) for i in index]
        bodies = [self._body(*a, seed=s) | {"stop": list(stop[:4])} for a, s in zip(asked, drawn, strict=True)]
        choices = [(reply["choices"][0], cost) for reply, cost in self._replies(bodies)]
        return [
            Written((c["message"].get("content") or "").strip(), c.get("finish_reason") != "length", cost)
            for c, cost in choices
        ]

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Sends nothing. In the main process."""
        assert self.ledger is not None
        bodies = {self._key(b): b for b in map(self.body, questions)}
        due = [b for key, b in bodies.items() if self.ledger.known(key) is None]
        return Estimate(len(due), len(bodies) - len(due), sum(map(self.most, due)), self.ledger.spent())

    def body(self, question: Question) -> dict[str, Any]:
        ending = f'End with "{question.verdict} (A)" or "{question.verdict} (B)".'
        how = f"{question.think.rstrip(':')}. {ending}" if question.think else 'Answer with "(A)" or "(B)" alone.'
        body = self._body(f"{question.text}\n\n{how}", self.max_tokens, seed=self.seed)
        return body | ({"logprobs": True, "top_logprobs": self.config.top_logprobs} if self.config.logprobs else {})

    def _body(self, text: str, max_tokens: int, *, seed: int) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": self.config.temperature,
            "seed": seed,
        }

    def most(self, body: dict[str, Any]) -> float:
        """What one attempt can cost at most: no tokenizer makes more tokens than there are bytes."""
        sent = sum(len(m["content"].encode()) for m in body["messages"]) + OVERHEAD
        return self._cost(sent, body["max_tokens"])

    def _cost(self, sent: int, back: int) -> float:
        return (sent * self.config.price_in + back * self.config.price_out) / 1e6

    def _key(self, body: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()

    def _replies(self, bodies: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
        """Each request's answer and its cost, in every process."""
        return self.mesh.from_main(lambda: self._ask(bodies))

    def _ask(self, asked: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
        """The same request twice is sent once. A failure lets what is under way end, and be kept, and then is told."""
        assert self.ledger is not None
        key_of = [self._key(body) for body in asked]
        bodies = dict(zip(key_of, asked, strict=True))
        replies: dict[str, tuple[dict[str, Any], float]] = {}
        stop = threading.Event()
        token = os.environ.get(self.config.key_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with (
            httpx.Client(headers=headers, timeout=self.config.timeout) as client,
            ThreadPoolExecutor(self.config.parallel) as pool,
        ):
            futures = {pool.submit(self._or_stop, client, key, body, stop): key for key, body in bodies.items()}
            wrong: UserError | None = None
            for future in as_completed(futures):
                try:
                    if (found := future.result()) is not None:
                        replies[futures[future]] = found
                except UserError as error:
                    wrong = wrong or error
        if wrong:
            done = f"{len(replies)} of {len(bodies)} requests of this batch are answered and kept"
            raise UserError(f"{wrong}; {done} in {self.ledger.store.name}")
        return [replies[key] for key in key_of]

    def _or_stop(
        self, client: httpx.Client, key: str, body: dict[str, Any], stop: threading.Event
    ) -> tuple[dict[str, Any], float] | None:
        """As `_reply`; a failure holds back what is not sent yet."""
        try:
            return self._reply(client, key, body, stop)
        except UserError:
            stop.set()
            raise

    def _reply(
        self, client: httpx.Client, key: str, body: dict[str, Any], stop: threading.Event
    ) -> tuple[dict[str, Any], float] | None:
        """(the answer, its cost); None where another request has failed before this one was sent."""
        assert self.ledger is not None
        if found := self.ledger.known(key):
            return found
        most, wrong = self.most(body), ""
        for attempt in range(self.config.tries):
            if stop.is_set():
                return None
            number = self.ledger.book(key, most, self.config.budget)
            if number is None:
                raise OverBudget(
                    f"judge {self.name}: the budget of {self.config.budget:g} does not hold another request "
                    f"({self.ledger.spent():.6g} booked, up to {most:.6g} more); with a larger one the same command "
                    "goes on"
                )
            wait = min(60.0, self.config.pause * 2**attempt) * (0.75 + random.random() / 2)
            try:
                response = client.post(self.url, json=body)
            except httpx.ConnectError as error:  # nothing was sent
                self.ledger.settle(number, 0.0)
                wrong = f"{error}"
            except httpx.TransportError as error:  # it may have been charged
                wrong = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                self.ledger.settle(number, 0.0)
                raise UserError(f"judge {self.name}: {error}") from None
            else:
                if response.status_code == 200:
                    return self._kept(number, key, response, most)
                self.ledger.settle(number, 0.0)
                wrong = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"
                if response.status_code not in AGAIN and response.status_code < 500:
                    raise UserError(f"judge {self.name}: {wrong}")
                wait = max(wait, _seconds(response.headers.get("retry-after")))
            if attempt + 1 < self.config.tries:
                stop.wait(wait)
        raise UserError(f"judge {self.name}: {self.config.tries} tries failed; the last: {wrong}")

    def _kept(self, number: int, key: str, response: httpx.Response, most: float) -> tuple[dict[str, Any], float]:
        assert self.ledger is not None
        try:
            reply = response.json()
            usage = reply.get("usage") or {}
            reply["choices"][0]["message"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"judge {self.name}: not an answer of the protocol: {response.text[:200]!r}") from None
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        known = all(isinstance(n, int) for n in counts)
        cost = self._cost(*counts) if known else most  # type: ignore[arg-type]
        told = {"choices": reply["choices"][:1]}
        self.ledger.keep(number, key, told, cost)
        return told, cost


def _seconds(text: str | None) -> float:
    """`Retry-After` in seconds, at most a minute; 0 where it is a date or nothing."""
    return min(60.0, float(text)) if text and re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def read(reply: dict[str, Any], cost: float, *, thought: bool, verdict: str) -> Answer:
    """What a reply says: p from log-probs where there are any, else from the letter."""
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    letter = last_letter(text, verdict) if thought else only_letter(text)
    if letter is None:
        return Answer(None, text, cost)
    tokens = (choice.get("logprobs") or {}).get("content") or []
    places = [t for t in tokens if _bare(t.get("token", "")) == letter]
    if places:
        place = places[-1 if thought else 0]
        found = {t["token"]: t["logprob"] for t in [*(place.get("top_logprobs") or ()), place]}
        mass = {side: sum(math.exp(lp) for t, lp in found.items() if _bare(t) == side) for side in "AB"}
        if total := mass["A"] + mass["B"]:
            return Answer(mass["A"] / total, text, cost)
    return Answer(float(letter == "A"), text, cost)


def only_letter(text: str) -> str | None:
    """The letter of an answer that names one and not the other: "(A)", "B.", "Reply (A) is better."."""
    if alone := re.fullmatch(r"\W*([AB])\W*", text):
        return alone[1]
    found = set(re.findall(r"\(([AB])\)", text)) or set(re.findall(r"\b(?:[Rr]eply|[Rr]esponse|is|:) ?([AB])\b", text))
    return found.pop() if len(found) == 1 else None


def last_letter(text: str, verdict: str) -> str | None:
    """The letter that follows the last `verdict` of a text."""
    found = re.findall(rf"{re.escape(verdict)}\W*([AB])\b", text)
    return found[-1] if found else None


def _bare(token: str) -> str:
    return token.strip(" \t\n()[]*\"'.:\u0120\u2581")
