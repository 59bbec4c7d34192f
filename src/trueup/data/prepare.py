"""From files to what a phase works on: read, turned into tokens, too long dropped, held out by prompt, mixed by weight.

Phases and `trueup data check` call the same three functions, so that what the check shows is what a phase sees. Nothing
is cut: a row that does not fit is left out whole, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from trueup.data.chat import Chat, Encoded
from trueup.data.files import Data, Source, sources
from trueup.data.readers import (
    Rows,
    read_demonstrations,
    read_preferences,
    read_prompts,
    select_by_prompt,
    split_by_prompt,
)
from trueup.records import Demonstration, Preference, Prompt, UserError

R = TypeVar("R")
T = TypeVar("T")


@dataclass
class Example(Encoded):
    """A demonstration as tokens."""

    demonstration: Demonstration


@dataclass
class Pair:
    """A preference as tokens: prompt + reply (+ end token unless cut), chosen and rejected."""

    chosen: list[int]
    rejected: list[int]
    preference: Preference
    prompt: int = 0
    """How many tokens of both are the prompt's."""


@dataclass
class Prepared(Generic[R, T]):
    """What is left to work on, and what became of the rest."""

    names: str
    """The data sets, as an error calls them."""
    limit: int
    train: list[T] = field(default_factory=list)
    """An epoch's rows: of several data sets, so that any stretch from the first row holds them in their shares."""
    held: list[T] = field(default_factory=list)
    """Of prompts that `train` has none of; each row once, whatever its data set's weight."""
    held_of: dict[str, int] = field(default_factory=dict)
    """Data set -> how many of `held` are its own; they stand one data set after another."""
    found: Rows[R] = field(default_factory=lambda: Rows([]))
    """Every record that could be read, and how many rows were dropped and why."""
    records: list[R] = field(default_factory=list)
    """Those of the part of the prompts that was asked for, each prompt once where that was asked for."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each of `records`."""
    mix: dict[str, int] = field(default_factory=dict)
    """Data set -> its rows in an epoch, where there are several or weights."""

    @property
    def too_long(self) -> int:
        return sum(length > self.limit for length in self.lengths)

    def counted(self) -> str:
        """'12 held out, 3 over 512 tokens; an epoch: a.jsonl 100 rows (50%), b.jsonl 100 rows (50%)'."""
        total = sum(self.mix.values())
        shares = ", ".join(f"{name} {n} rows ({n / total:.0%})" for name, n in self.mix.items())
        return f"{len(self.held)} held out, {self.too_long} over {self.limit} tokens" + (
            f"; an epoch: {shares}" if shares else ""
        )

    def results(self) -> dict[str, Any]:
        """What stands in results.json."""
        mix = {"mix": self.mix} if self.mix else {}
        return {"dropped": dict(self.found.dropped), "too_long": self.too_long, **mix}


def demonstrations(
    chat: Chat, data: Data, limit: int, *, seed: int = 0, held_out: float = 0.0
) -> Prepared[Demonstration, Example]:
    """SFT's rows of at most `limit` tokens."""

    def encode(record: Demonstration) -> Example:
        encoded = chat.encode(record)
        return Example(encoded.ids, encoded.mask, record)

    return prepare(
        data, read_demonstrations, lambda d: d.prompt, encode, lambda e: len(e.ids), limit, seed=seed, held_out=held_out
    )


def comparisons(
    chat: Chat,
    data: Data,
    limit: int,
    *,
    seed: int = 0,
    held_out: float = 0.0,
    part: tuple[float, float] = (0.0, 1.0),
) -> Prepared[Preference, Pair]:
    """Pairs of which both rows have at most `limit` tokens, of prompts in `part` of [0, 1)."""
    return prepare(
        data,
        read_preferences,
        lambda p: p.prompt,
        lambda p: encode_pair(chat, p),
        longest,
        limit,
        seed=seed,
        held_out=held_out,
        part=part,
    )


def prompts(
    data: Data,
    length: Callable[[Prompt], int],
    limit: int,
    *,
    seed: int = 0,
    held_out: float = 0.0,
    distinct: bool = True,
) -> Prepared[Prompt, Prompt]:
    """Prompts of at most `limit` tokens by `length`, each once where `distinct`: in the first data set that has it."""
    return prepare(
        data, read_prompts, lambda p: p, lambda p: p, length, limit, seed=seed, held_out=held_out, distinct=distinct
    )


def prompts_to_answer(
    data: Data,
    length: Callable[[Prompt], int],
    limit: int,
    say: Callable[[str], None],
    *,
    seed: int,
    distinct: bool = True,
) -> Prepared[Prompt, Prompt]:
    """`prompts`, all of them to be answered: says what became of them. Raises UserError where none is left."""
    found = prompts(data, length, limit, seed=seed, distinct=distinct)
    say(f"{found.found.note()}; {f'{len(found.records)} distinct prompts; ' if distinct else ''}{found.counted()}")
    if not found.train:
        raise UserError(f"{found.names}: every prompt has more than {limit} tokens (max_prompt, or the context)")
    return found


def encode_pair(chat: Chat, p: Preference) -> Pair:
    prompt = chat.prompt_ids(p.prompt.messages)
    chosen, rejected = (prompt + chat.reply_ids(c.text, c.ended) for c in (p.chosen, p.rejected))
    return Pair(chosen, rejected, p, len(prompt))


def longest(pair: Pair) -> int:
    return max(len(pair.chosen), len(pair.rejected))


def longer_wins(pairs: Sequence[Pair]) -> float:
    """How often the reply of more tokens is the better one by the label; of equal length, half."""
    gaps = [len(p.chosen) - len(p.rejected) for p in pairs]
    labels = [p.preference.label for p in pairs]
    won = [label if gap > 0 else 1 - label if gap < 0 else 0.5 for gap, label in zip(gaps, labels, strict=True)]
    return sum(won) / len(won)


def prepare(
    data: Data,
    read: Callable[[Source], Rows[R]],
    prompt: Callable[[R], Prompt],
    encode: Callable[[R], T],
    length: Callable[[T], int],
    limit: int,
    *,
    seed: int,
    held_out: float,
    part: tuple[float, float] = (0.0, 1.0),
    distinct: bool = False,
) -> Prepared[R, T]:
    """What all of them do: `read` a data set, `encode` its records, keep what has `limit` tokens by `length`, hold out
    by `prompt`. `distinct` is for records that are prompts."""
    listed = sources(data)
    out: Prepared[R, T] = Prepared(", ".join(source.label for source in listed), limit)
    parts: list[list[T]] = []
    known: set[R] = set()
    for source in listed:
        found = read(source)
        records = select_by_prompt(found.records, part, prompt)
        if distinct:
            records = [r for r in dict.fromkeys(records) if r not in known]
            known.update(records)
        encoded = [(record, encode(record)) for record in records]
        lengths = [length(row) for _, row in encoded]
        fitting = [row for row, tokens in zip(encoded, lengths, strict=True) if tokens <= limit]
        train, held = split_by_prompt(fitting, held_out, lambda row: prompt(row[0]))
        parts.append([row for _, row in train])
        out.held += [row for _, row in held]
        out.held_of[source.label] = out.held_of.get(source.label, 0) + len(held)
        out.found.records += found.records
        out.found.dropped += found.dropped
        out.records += records
        out.lengths += lengths
    drawn = [draw(rows, source, [seed, i]) for i, (rows, source) in enumerate(zip(parts, listed, strict=True))]
    if any(drawn) and (len(listed) > 1 or listed[0].weight != 1):
        for source, rows in zip(listed, drawn, strict=True):
            out.mix[source.label] = out.mix.get(source.label, 0) + len(rows)
    out.train = mixed(drawn)
    return out


def draw(rows: list[T], source: Source, seed: Sequence[int]) -> list[T]:
    """An epoch's rows of one data set: all of them as often as its weight has wholes, and a share drawn by `seed`."""
    wholes, rest = divmod(source.weight, 1)
    some = sorted(np.random.default_rng(seed).permutation(len(rows))[: round(rest * len(rows))])
    drawn = rows * int(wholes) + [rows[i] for i in some]
    if rows and not drawn:
        raise UserError(f"{source.path}: weight {source.weight:g} leaves none of its {len(rows)} rows")
    return drawn


def mixed(parts: Sequence[list[T]]) -> list[T]:
    """The rows of all parts, each part in its order and spread evenly over the whole."""
    places = sorted(((j + 0.5) / len(rows), i, j) for i, rows in enumerate(parts) for j in range(len(rows)))
    return [parts[i][j] for _, i, j in places]
