"""The words of the field as typed records, and the protocols that join rooms. No torch here.

A record is frozen; a Prompt is known by the hash of its content. Files of records are JSONL in the ecosystem's
columns, read by `trueup.data.readers` and written by `write_jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import numpy as np

Role = Literal["system", "user", "assistant"]
Stop = Literal["eos", "stop", "length"]


class UserError(Exception):
    """Bad input, told in one line to the person who can mend it. The command line exits with 2."""


class CheckFailed(RuntimeError):
    """A phase's self-check found the machinery wrong; nothing was trained. The command line exits with 1."""


class Waiting(Exception):
    """A run cannot go on before somebody has done something: what, in one line. Not a failure: the command line exits
    with 75, and the same command goes on when it is done."""


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that awaits a reply. `meta` (category, a right answer: any other column) is not part of its
    identity."""

    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def id(self) -> str:
        """Sixteen hex digits of the SHA-256 of the content."""
        content = json.dumps([[m["role"], m["content"]] for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The last message's content: what the user asked."""
        return self.messages[-1]["content"]

    @property
    def category(self) -> str | None:
        return self.meta.get("category")

    @classmethod
    def of(cls, text: str, **meta: Any) -> Prompt:
        return cls(({"role": "user", "content": text},), meta)

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Completion:
    """Sampled tokens. `text` leaves the end token out; `ids` and `logprobs` hold it when `stop` is "eos"."""

    text: str
    stop: Stop = "eos"
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    version: str = ""

    @property
    def ended(self) -> bool:
        """True unless it was cut by length; a stop string counts as ended."""
        return self.stop != "length"


@dataclass(frozen=True)
class Demonstration:
    """A conversation whose assistant turns are ideal; `prompt` awaits `reply`."""

    prompt: Prompt
    reply: str


@dataclass(frozen=True)
class Comparison:
    """A prompt and two or more completions, in the order shown."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Reading:
    """One question put to a judge, and what came back. `p`: that the comparison's first completion is better, whichever
    was shown first; None where the answer could not be read. `cost` in the unit of the judge's prices."""

    principle: str
    swapped: bool
    p: float | None
    raw: str = ""
    prompt_hash: str = ""
    cost: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """`p`: the probability that the first completion is better; None where the judge abstains, or where what it said
    could not be read: no label is made of that. `readings`: what it rests on, an order and a principle each."""

    p: float | None
    rater: str
    note: str = ""
    readings: tuple[Reading, ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Verdict:
        """From the row that `dataclasses.asdict` makes of it."""
        return cls(**{**row, "readings": tuple(Reading(**r) for r in row.get("readings", ()))})

    @property
    def readable(self) -> bool:
        return all(r.p is not None for r in self.readings)

    @property
    def cost(self) -> float:
        return sum(r.cost for r in self.readings)

    @property
    def orders(self) -> dict[bool, float]:
        """Shown as it is (False) and swapped (True) -> the mean p of the readings in that order, of the principles that
        were asked in both where any was."""
        found: dict[bool, list[float]] = {}
        twice = {r.principle for r in self.readings if r.swapped}
        for r in self.readings:
            if r.p is not None and (not twice or r.principle in twice):
                found.setdefault(r.swapped, []).append(r.p)
        return {order: sum(ps) / len(ps) for order, ps in found.items()}

    @property
    def principles(self) -> dict[str, float | None]:
        """Principle -> the mean p of its orders; None where one of them could not be read."""
        found: dict[str, list[float | None]] = {}
        for r in self.readings:
            found.setdefault(r.principle, []).append(r.p)
        return {
            name: None if None in ps else sum(p for p in ps if p is not None) / len(ps) for name, ps in found.items()
        }

    @property
    def spread(self) -> float | None:
        """The s.d. of p over the principles: how far they disagree. None below two that could be read."""
        ps = [p for p in self.principles.values() if p is not None]
        return float(np.std(ps)) if len(ps) > 1 else None


@dataclass(frozen=True)
class Preference:
    """One judged pair: `label` is the probability that `chosen` is better than `rejected`."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    label: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    rater: str = ""


@dataclass(frozen=True)
class Thumb:
    """One completion, liked or not: a thumb up or down."""

    prompt: Prompt
    completion: Completion
    good: bool


@dataclass(frozen=True)
class Scores:
    """A scorer's numbers for B completions: `value` [B], and named parts [B] each, NaN where a part does not apply.
    `disagreement` [B] is the s.d. over an ensemble's members, in the unit of the value; None of other scorers."""

    value: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    disagreement: np.ndarray | None = None


@runtime_checkable
class Scorer(Protocol):
    """Scores completions from text and the reason for stopping; tokens are optional."""

    name: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores: ...


@runtime_checkable
class Judge(Protocol):
    """One verdict for each comparison of two completions; it may abstain."""

    name: str

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]: ...


def start_of(text: str, most: int = 80) -> str:
    """The first line of a text for a message, in quotes, shortened."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")


def visible(text: str, *, bidi: bool = True) -> str:
    """Control characters made visible, so that no page or terminal obeys them: ␀ to ␟, and � for the rest of them and
    for lone surrogates; without `bidi` for marks that turn the direction of writing, too."""
    return "".join(_visible(c, bidi) for c in text)


def safe(text: str) -> str:
    """For a terminal, which must not obey what a model wrote."""
    return visible(text, bidi=False)


def _visible(c: str, bidi: bool) -> str:
    code = ord(c)
    if c in "\n\t" or 32 <= code < 127:
        return c
    if code < 32:
        return chr(0x2400 + code)
    hidden = code == 127 or 128 <= code < 160 or 0xD800 <= code < 0xE000 or (not bidi and code in BIDI)
    return "\ufffd" if hidden else c


BIDI = {0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def is_local(name: str | Path) -> bool:
    """Whether a model's name is a place on this machine, there or not, and no Hub name (owner/name)."""
    text = str(name)
    hub = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).parent.exists()
    return Path(text).exists() or not hub


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Onto the disk, so that a loss of power cannot take it back: a file's content, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
