"""Files of records in the ecosystem's columns: JSONL and Parquet, .gz of JSONL.

    messages                      a conversation whose last turn is the assistant's   -> Demonstration
    prompt, completion            string or message list                              -> Demonstration
    instruction, input, output    Alpaca's columns; `instances` of input and output   -> Demonstration
    question, answer              as in GSM8K                                         -> Demonstration
    prompt (or question)          string or message list                              -> Prompt
    prompt, chosen, rejected      replies, or whole conversations that open with it   -> Preference
    chosen, rejected              the prompt is what both conversations share         -> Preference

Strings may be "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts: whole in `chosen`/`rejected` without a prompt, up to
the reply in `prompt`. Other columns stay with the prompt, in `Prompt.meta`, where JSON can hold their values: a Python
scorer gets them. A row that cannot be read stops the reader with file and line; a row that is readable but useless
(chosen == rejected) is dropped and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from trueup.records import Completion, Demonstration, Message, Preference, Prompt, UserError

T = TypeVar("T")
ROLES = ("system", "user", "assistant")
TEXTS = {"messages", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "instances"}
TEXTS |= {"question", "completions", "meta"}
"""Columns that `Prompt.meta` does not repeat."""
LARGEST = 3e38
"""The losses are computed in float32, which holds no larger number."""


@dataclass
class Rows(Generic[T]):
    """What a reader found: the records, and how many rows were dropped and why."""

    records: list[T]
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)

    def note(self) -> str:
        """'1200 rows' or '1190 of 1200 rows (10 dropped: chosen == rejected)'."""
        lost = sum(self.dropped.values())
        if not lost:
            return f"{len(self)} rows"
        why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
        return f"{len(self)} of {len(self) + lost} rows (dropped: {why})"


class BadRow(Exception):
    """A row that cannot be read; the reader adds file and line."""


def read_demonstrations(path: str | Path) -> Rows[Demonstration]:
    return _read(path, _demonstration, "messages; prompt, completion; instruction, output; or question, answer")


def read_prompts(path: str | Path) -> Rows[Prompt]:
    """Prompts; a preference or demonstration file serves too, its replies are left aside."""
    return _read(path, _prompt, "prompt, question, messages, or chosen and rejected")


def read_preferences(path: str | Path) -> Rows[Preference]:
    return _read(path, _preference, "prompt, chosen and rejected, or chosen and rejected")


def _read(path: str | Path, make: Callable[[dict[str, Any]], T | str], expected: str) -> Rows[T]:
    path = Path(path)
    rows: Rows[T] = Rows([])
    for line, row in _instances(raw_rows(path)):
        try:
            record = make(row)
        except BadRow as error:
            raise UserError(f"{path}, line {line}: {error} (expected columns: {expected})") from None
        if isinstance(record, str):
            rows.dropped[record] += 1
        else:
            rows.records.append(record)
    if not rows.records:
        raise UserError(f"{path}: no usable rows; {rows.note()}")
    return rows


def _instances(rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Self-instruct's rows hold several instances of one instruction; each becomes a row."""
    for line, row in rows:
        instances = row.get("instances")
        if "instruction" in row and isinstance(instances, list):
            for instance in instances:
                yield line, {**row, **(instance if isinstance(instance, dict) else {})}
        else:
            yield line, row


def raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSONL, JSONL.gz or Parquet file. Raises UserError naming file and line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from None
        yield from enumerate(table.to_pylist(), 1)
        return
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz or .parquet")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse(path, number, line)
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: damaged gzip: {error}") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected an object with columns, found {type(row).__name__}")
    return row


# columns to records


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        return _alternating(_transcript(value) or [{"role": "user", "content": value}], column)
    if not isinstance(value, list) or not value:
        raise BadRow(f"column '{column}' must be text or a list of messages, found {type(value).__name__}")
    out: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow(f"column '{column}': each message needs a role and a content that is text")
        role = message.get("role")
        if role not in ROLES:
            raise BadRow(f"column '{column}': role {role!r}; expected one of {', '.join(ROLES)}")
        out.append({"role": role, "content": message["content"]})
    return _alternating(out, column)


def _alternating(messages: list[Message], column: str) -> list[Message]:
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise BadRow(
            f"column '{column}': roles out of order ({', '.join(spoken)}); expected user, assistant, user, ..."
        )
    return messages


def _transcript(text: str) -> list[Message] | None:
    """'\\n\\nHuman: ...\\n\\nAssistant: ...' as messages, replies in a row as one; None where the text is not one."""
    if not text.lstrip().startswith("Human:"):
        return None
    out: list[Message] = []
    for part in ("\n\n" + text.lstrip()).split("\n\nHuman:")[1:]:
        human, *replies = part.split("\n\nAssistant:")
        out.append({"role": "user", "content": human.strip()})
        if replies:
            out.append({"role": "assistant", "content": "\n\n".join(replies).strip()})
    return out


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are no text of the conversation, and those below `meta`."""
    inner = row.get("meta")
    columns = {**(inner if isinstance(inner, dict) else {}), **{k: v for k, v in row.items() if k not in TEXTS}}
    return {name: value for name, value in columns.items() if value is not None and _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    return value is None or isinstance(value, str | int | float)


def _before(row: dict[str, Any]) -> list[Message]:
    """The prompt's messages; a transcript may end with the assistant's turn, still empty."""
    messages = _messages(row["prompt"], "prompt")
    if isinstance(row["prompt"], str) and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def _awaiting(messages: Sequence[Message], row: dict[str, Any], column: str) -> Prompt:
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRow(f"column '{column}' must end with the user's turn")
    return Prompt(tuple(messages), _meta(row))


def _reply(value: Any, column: str) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise BadRow(f"column '{column}' must hold one assistant message")
        value = value[0].get("content")
    if not isinstance(value, str):
        raise BadRow(f"column '{column}' must be text, found {type(value).__name__}")
    return value


def _split(value: Any, column: str) -> tuple[list[Message], str]:
    """A whole conversation as (what awaits the reply, the reply)."""
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"column '{column}' must end with the assistant's turn")
    return messages[:-1], messages[-1]["content"]


def _after(prompt: list[Message], value: Any, column: str) -> tuple[list[Message], str]:
    """(what awaits the reply, the reply) from a reply, or from a whole conversation that opens with the prompt."""
    if not isinstance(value, list) or len(value) < 2:
        return prompt, _reply(value, column)
    before, reply = _split(value, column)
    # a prompt that is only the first question says nothing of the system message above it
    opening = before if prompt[0]["role"] == "system" else [m for m in before if m["role"] != "system"]
    if opening[: len(prompt)] != prompt:
        raise BadRow(f"column '{column}' holds a conversation that does not start with the messages of column 'prompt'")
    return before, reply


def _instruction(row: dict[str, Any]) -> list[Message]:
    """An instruction, with its input below it where there is one."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(p, str) for p in parts):
        raise BadRow("columns 'instruction' and 'input' must be text")
    return [{"role": "user", "content": "\n\n".join(p.strip() for p in parts if p.strip())}]


def _demonstration(row: dict[str, Any]) -> Demonstration | str:
    if "instruction" in row and "output" in row:
        before, reply = _instruction(row), _reply(row["output"], "output")
    elif "messages" in row:
        before, reply = _split(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        before, reply = _before(row), _reply(row["completion"], "completion")
    elif "question" in row and "answer" in row:
        before, reply = _messages(row["question"], "question"), _reply(row["answer"], "answer")
    else:
        raise BadRow(f"found columns {', '.join(map(repr, row)) or 'none'}")
    return Demonstration(_awaiting(before, row, "prompt"), reply) if reply.strip() else "empty replies"


def _prompt(row: dict[str, Any]) -> Prompt | str:
    if "prompt" in row:
        return _awaiting(_before(row), row, "prompt")
    if "instruction" in row:
        return _awaiting(_instruction(row), row, "instruction")
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        return _awaiting(messages[:-1] if messages[-1]["role"] == "assistant" else messages, row, "messages")
    if "question" in row and "chosen" not in row:
        return _awaiting(_messages(row["question"], "question"), row, "question")
    preference = _preference(row)
    return preference if isinstance(preference, str) else preference.prompt


def _preference(row: dict[str, Any]) -> Preference | str:
    if "chosen" not in row or "rejected" not in row:
        raise BadRow(f"found columns {', '.join(map(repr, row)) or 'none'}")
    if "prompt" in row:
        prompt = _before(row)
        (before, chosen), (other, rejected) = (_after(prompt, row[side], side) for side in ("chosen", "rejected"))
    else:
        (before, chosen), (other, rejected) = (_split(row[side], side) for side in ("chosen", "rejected"))
    if before != other:
        return "pairs whose conversations differ before the last turn"
    if chosen.strip() == rejected.strip():
        return "chosen == rejected"
    defaults = {"label": 1.0, "margin": 0.0, "weight": 1.0}
    numbers = {name: _number(row, name, default) for name, default in defaults.items()}
    if not 0 <= numbers["label"] <= 1 or numbers["weight"] < 0:
        raise BadRow("column 'label' must lie in [0, 1] and 'weight' must not be negative")
    stops = {True: "eos", False: "length"}
    return Preference(
        _awaiting(before, row, "prompt"),
        Completion(chosen, stops[row.get("chosen_ended") is not False]),  # type: ignore[arg-type]
        Completion(rejected, stops[row.get("rejected_ended") is not False]),  # type: ignore[arg-type]
        rater=str(row.get("rater") or ""),
        **numbers,
    )


def _number(row: dict[str, Any], column: str, default: float) -> float:
    value = default if row.get(column) is None else row[column]
    if not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise BadRow(f"column '{column}' must be a finite number, found {value!r}")
    return float(value)


# splits


def split_by_prompt(records: Sequence[T], share: float, prompt: Callable[[T], Prompt]) -> tuple[list[T], list[T]]:
    """(train, held out): a prompt falls wholly on one side, by the hash of its content, about `share` held out."""
    held = select_by_prompt(records, (0.0, share), prompt, salt="split")
    kept = select_by_prompt(records, (share, 1.0), prompt, salt="split")
    return kept, held


def select_by_prompt(
    records: Sequence[T], part: tuple[float, float], prompt: Callable[[T], Prompt], *, salt: str = "part"
) -> list[T]:
    """The records whose prompt's place on [0, 1), by the hash of its content and `salt`, lies in `part`: two reward
    models trained on (0, .5) and (.5, 1) have seen no prompt in common."""

    def place(record: T) -> float:
        digest = hashlib.sha256((salt + prompt(record).id).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [record for record in records if part[0] <= place(record) < part[1]]
