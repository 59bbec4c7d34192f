"""Records from rows (`files`), in the ecosystem's columns.

    messages (or conversations)   a conversation whose last turn is the assistant's   -> Demonstration
    prompt, completion            string or message list                              -> Demonstration
    instruction, input, output    Alpaca's columns; `instances` of input and output   -> Demonstration
    question, answer              as in GSM8K                                         -> Demonstration
    prompt (or question)          string or message list                              -> Prompt
    prompt, chosen, rejected      replies, or whole conversations that open with it   -> Preference
    chosen, rejected              the prompt is what both conversations share         -> Preference
    prompt, completion, label     true (liked) or false, for KTO                      -> Thumb

A message is {role, content}, or ShareGPT's {from, value}. `system` is a system message where the conversation has none.
Strings may be "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts: whole in `chosen`/`rejected` without a prompt, up to
the reply in `prompt`. Other columns stay with the prompt, in `Prompt.meta`, where JSON can hold their values: a Python
scorer gets them. A row that cannot be read stops the reader with file and line; a row that is readable but useless
(chosen == rejected) is dropped and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from trueup.data.files import Source, raw_rows, sources
from trueup.records import Completion, Demonstration, Message, Preference, Prompt, Stop, Thumb, UserError

T = TypeVar("T")
ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
SHAREGPT |= {"system": "system"}
TEXTS = {"messages", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "instances"}
TEXTS |= {"question", "completions", "conversations", "system", "meta"}
"""Columns that `Prompt.meta` does not repeat."""
SAME = "chosen == rejected"
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


class Useless(Exception):
    """A row that can be read but teaches nothing: it is dropped, and counted under this reason."""


def read_demonstrations(data: str | Path | Source) -> Rows[Demonstration]:
    return _read(data, _demonstration, "messages; prompt, completion; instruction, output; or question, answer")


def read_prompts(data: str | Path | Source) -> Rows[Prompt]:
    """Prompts; a preference or demonstration file serves too, its replies are left aside."""
    return _read(data, _prompt, "prompt, question, messages, or chosen and rejected")


def read_preferences(data: str | Path | Source) -> Rows[Preference]:
    return _read(data, _preference, "prompt, chosen and rejected, or chosen and rejected")


def preference_of(row: dict[str, Any], where: str) -> Preference:
    """One row as a preference. Raises UserError naming `where`, or Useless where the row teaches nothing."""
    try:
        return _preference({name: value for name, value in row.items() if value is not None})
    except BadRow as error:
        raise UserError(f"{where}: {error} (expected columns: prompt, chosen and rejected)") from None


def read_thumbs(data: str | Path | Source) -> Rows[Thumb]:
    return _read(data, _thumb, "prompt, completion and label")


def _read(data: str | Path | Source, make: Callable[[dict[str, Any]], T], expected: str) -> Rows[T]:
    (source,) = sources(data)
    rows: Rows[T] = Rows([])
    others = Counter[str]()
    for place, row in _instances(raw_rows(source)):
        if source.categories and row.get("category") not in source.categories:
            others[str(row.get("category") or "none")] += 1
            continue
        try:
            rows.records.append(make({name: value for name, value in row.items() if value is not None}))
        except BadRow as error:
            raise UserError(f"{source.path}, {place}: {error} (expected columns: {expected})") from None
        except Useless as error:
            rows.dropped[str(error)] += 1
    if others:
        rows.dropped["of other categories"] = others.total()
    if not rows.records:
        found = f"; categories there: {', '.join(sorted(others))}" if others else ""
        raise UserError(f"{source.path}: no usable rows; {rows.note()}{found}")
    return rows


def _instances(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Self-instruct's rows hold several instances of one instruction; each becomes a row."""
    for line, row in rows:
        instances = row.get("instances")
        if "instruction" in row and isinstance(instances, list):
            for instance in instances:
                yield line, {**row, **(instance if isinstance(instance, dict) else {})}
        else:
            yield line, row


# columns to records


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        return _alternating(_transcript(value) or [{"role": "user", "content": value}], column)
    if not isinstance(value, list) or not value:
        raise BadRow(f"column '{column}' must be text or a list of messages, found {type(value).__name__}")
    out: list[Message] = []
    for message in value:
        out.append(_message(message, column))
    return _alternating(out, column)


def _message(message: Any, column: str) -> Message:
    if isinstance(message, dict) and isinstance(message.get("value"), str) and "role" not in message:
        speaker, content, known = message.get("from"), message["value"], SHAREGPT
    elif isinstance(message, dict) and isinstance(message.get("content"), str):
        speaker, content, known = message.get("role"), message["content"], {role: role for role in ROLES}
    else:
        raise BadRow(f"column '{column}': each message needs a role and a content that is text")
    if speaker not in known:
        raise BadRow(f"column '{column}': role {speaker!r}; expected one of {', '.join(known)}")
    return {"role": known[speaker], "content": content}


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
    if not messages[-1]["content"].strip():
        raise Useless("empty prompts")
    return Prompt((*_system(messages, row), *messages), _meta(row))


def _system(messages: Sequence[Message], row: dict[str, Any]) -> list[Message]:
    """The column `system` as a message, where the conversation brings none of its own."""
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise BadRow(f"column 'system' must be text, found {type(text).__name__}")
    return [{"role": "system", "content": text}] if text.strip() and messages[0]["role"] != "system" else []


def _reply(value: Any, column: str) -> str:
    if isinstance(value, list | dict):
        said = [_message(m, column) for m in (value if isinstance(value, list) else [value])]
        if [m["role"] for m in said] != ["assistant"]:
            raise BadRow(f"column '{column}' must hold one assistant message")
        return said[0]["content"]
    if not isinstance(value, str):
        raise BadRow(f"column '{column}' must be text, found {type(value).__name__}")
    return value


def _split(value: Any, column: str) -> tuple[list[Message], str]:
    """A whole conversation as (what awaits the reply, the reply)."""
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"column '{column}' must end with the assistant's turn")
    return messages[:-1], messages[-1]["content"]


def _after(prompt: list[Message], asked: str, value: Any, column: str) -> tuple[list[Message], str]:
    """(what awaits the reply, the reply) from a reply, or from a whole conversation that opens with the prompt of
    column `asked`."""
    if not isinstance(value, list) or len(value) < 2:
        return prompt, _reply(value, column)
    before, reply = _split(value, column)
    # a prompt that is only the first question says nothing of the system message above it
    opening = before if prompt[0]["role"] == "system" else [m for m in before if m["role"] != "system"]
    if opening[: len(prompt)] != prompt:
        raise BadRow(
            f"column '{column}' holds a conversation that does not start with the messages of column '{asked}'"
        )
    return before, reply


def _instruction(row: dict[str, Any]) -> list[Message]:
    """An instruction, with its input below it where there is one."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(p, str) for p in parts):
        raise BadRow("columns 'instruction' and 'input' must be text")
    return [{"role": "user", "content": "\n\n".join(p.strip() for p in parts if p.strip())}]


def _asked(row: dict[str, Any]) -> tuple[list[Message], str] | None:
    """What stands before the reply, and in which column; None where no column holds it alone."""
    if "prompt" in row:
        return _before(row), "prompt"
    if "instruction" in row:
        return _instruction(row), "instruction"
    if "question" in row:
        return _messages(row["question"], "question"), "question"
    return None


def _conversation(row: dict[str, Any]) -> str | None:
    """The column of a whole conversation."""
    return next((column for column in ("messages", "conversations") if column in row), None)


def _found(row: dict[str, Any]) -> BadRow:
    return BadRow(f"found columns {', '.join(map(repr, row)) or 'none'}")


def _demonstration(row: dict[str, Any]) -> Demonstration:
    if "instruction" in row and "output" in row:
        before, reply = _instruction(row), _reply(row["output"], "output")
    elif column := _conversation(row):
        before, reply = _split(row[column], column)
    elif "prompt" in row and "completion" in row:
        before, reply = _before(row), _reply(row["completion"], "completion")
    elif "question" in row and "answer" in row:
        before, reply = _messages(row["question"], "question"), _reply(row["answer"], "answer")
    else:
        raise _found(row)
    prompt = _awaiting(before, row, "prompt")
    if not reply.strip():
        raise Useless("empty replies")
    return Demonstration(prompt, reply)


def _prompt(row: dict[str, Any]) -> Prompt:
    column = None if "prompt" in row or "instruction" in row else _conversation(row)
    if column:
        messages = _messages(row[column], column)
        return _awaiting(messages[:-1] if messages[-1]["role"] == "assistant" else messages, row, column)
    if asked := _asked(row):
        return _awaiting(asked[0], row, asked[1])
    return _preference(row).prompt


def _preference(row: dict[str, Any]) -> Preference:
    if "chosen" not in row or "rejected" not in row:
        raise _found(row)
    asked = _asked(row)
    if asked is None and "conversations" in row:  # ShareGPT's form: the replies stand beside what both answer
        asked = _messages(row["conversations"], "conversations"), "conversations"
    if asked:
        (before, chosen), (other, rejected) = (_after(*asked, row[side], side) for side in ("chosen", "rejected"))
    else:
        (before, chosen), (other, rejected) = (_split(row[side], side) for side in ("chosen", "rejected"))
    if before != other:
        raise Useless("pairs whose conversations differ before the last turn")
    if chosen.strip() == rejected.strip():
        raise Useless(SAME)
    if not chosen.strip():
        raise Useless("empty chosen")
    prompt = _awaiting(before, row, asked[1] if asked else "chosen")
    defaults = {"label": 1.0, "margin": 0.0, "weight": 1.0}
    numbers = {name: _number(row, name, default) for name, default in defaults.items()}
    if not 0 <= numbers["label"] <= 1 or numbers["weight"] < 0:
        raise BadRow("column 'label' must lie in [0, 1] and 'weight' must not be negative")
    stops = {True: "eos", False: "length"}
    return Preference(
        prompt,
        Completion(chosen, stops[row.get("chosen_ended") is not False]),  # type: ignore[arg-type]
        Completion(rejected, stops[row.get("rejected_ended") is not False]),  # type: ignore[arg-type]
        rater=str(row.get("rater") or ""),
        **numbers,
    )


def _thumb(row: dict[str, Any]) -> Thumb:
    if missing := {"prompt", "completion", "label"} - row.keys():
        raise BadRow(f"column '{sorted(missing)[0]}' is missing; found {', '.join(map(repr, row)) or 'none'}")
    if row["label"] not in (True, False):  # 1 and 0 are equal to these
        raise BadRow(f"column 'label' must be true or false, found {row['label']!r}")
    before, reply = _after(_before(row), "prompt", row["completion"], "completion")
    stop: Stop = "length" if row.get("completion_ended") is False else "eos"
    return Thumb(_awaiting(before, row, "prompt"), Completion(reply, stop), bool(row["label"]))


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
