"""How long the rows of a stage's data are: read as the phase reads them, or assumed where they are not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.data.chat import Chat
from trueup.data.files import Source, sources
from trueup.data.readers import (
    read_demonstrations,
    read_preferences,
    read_prompts,
    read_thumbs,
    select_by_prompt,
    split_by_prompt,
)
from trueup.models.load import context_length
from trueup.plan.standins import Folders
from trueup.recipe import Stage
from trueup.records import Demonstration, Preference, Prompt, Thumb, UserError, is_local

LOOKED_AT = 2000
"""Rows of a file that are tokenized to know their lengths."""
A_TOKEN = 4
"""Characters of a token, where no tokenizer is at hand."""
WORD = " good"
"""What stands for text of a known length."""


@dataclass
class Rows:
    """The lengths of a stage's rows. `made`: how they are known, for who reads the plan."""

    lengths: list[list[int]]  # of each row, its sequences: one, or chosen and rejected
    total: int
    made: str
    prompts: list[Prompt] = field(default_factory=list)
    shared: float = 0.0
    """The prompt's share of a row, of the shorter one in pairs."""


def text_of(chat: Chat, tokens: int) -> str:
    """A text of about so many tokens."""
    each = len(chat._ids(WORD * 64)) / 64
    return (WORD * max(1, round(tokens / each))).strip()


def rows_of(stage: Stage, folders: Folders) -> Rows:
    """The rows of a stage's data, by the phase's own reading where the file is there; else as long as the phase's
    limits let them be."""
    config: Any = getattr(stage.config, "member", stage.config)
    model = folders.of(config.model if hasattr(config, "model") else next(iter(config.models.values())))
    chat, context = Chat.load(model), context_length(model)
    read, sides = _reading(stage)
    if trains := read is not read_prompts:
        limit = longest = min(config.max_length, context)
    else:
        limit = min(getattr(config, "max_prompt", context), context - 1)
        longest = min(getattr(config, "max_prompt", 512), limit)
    listed = sources(getattr(config, "data", None) or config.prompts)
    if far := [s.path for s in listed if not is_local(s.path)]:
        return _assumed(far[0], [longest] * sides)
    try:
        found = [record for source in listed for record in read(source).records]
    except UserError:  # a stage of the recipe may have yet to make one of the data sets
        to_come = [s.path for s in listed if any(s.path.startswith(f"{folder}/") for folder in folders.stages)]
        if to_come:
            return _assumed(to_come[-1], [longest] * sides)
        raise
    if trains:
        found = select_by_prompt(found, getattr(config, "part", (0.0, 1.0)), _prompt_of)
        train, _ = split_by_prompt(found, config.held_out, _prompt_of)
    else:
        train = list(dict.fromkeys(found))
    some, plain = train[:LOOKED_AT], model in folders.plain
    measured = [_lengths(chat, record, plain) for record in some]
    kept = [(sizes, record) for (_, sizes), record in zip(measured, some, strict=True) if max(sizes) <= limit]
    if not kept:
        raise UserError(f"stage '{stage.name}': every row has more than {limit} tokens")
    weight = sum(s.weight for s in listed) / len(listed)  # of data sets of like size
    total = round(weight * len(train) * len(kept) / len(some))
    mean = sum(sum(sizes) for _, sizes in measured) / len(some)
    how = f"{total} rows of {mean:.0f} tokens on average" + (", four characters a token" if plain else "")
    if len(train) > len(some):
        how += f" (the first {len(some)} were looked at)"
    prompts = [record for _, record in kept] if not trains and not plain else []
    shared = sum(opening for opening, _ in measured) / max(1, sum(min(sizes) for _, sizes in measured))
    return Rows([sizes for sizes, _ in kept], total, how, prompts, shared)


def _reading(stage: Stage) -> tuple[Callable[[Source], Any], int]:
    """How the phase reads its data, and how many sequences a row has."""
    if stage.phase == "sft":
        return read_demonstrations, 1
    if stage.phase == "dpo" and stage.config.loss == "kto":  # type: ignore[attr-defined]
        return read_thumbs, 1
    return (read_preferences, 2) if stage.phase in ("reward", "ensemble", "dpo") else (read_prompts, 1)


def _prompt_of(record: Demonstration | Preference | Thumb) -> Prompt:
    return record.prompt


def _lengths(chat: Chat, record: Prompt | Demonstration | Preference | Thumb, plain: bool) -> tuple[int, list[int]]:
    """Tokens of a row's prompt (of a demonstration 0: nobody asks), and of each of its sequences, prompt included."""
    prompt = record if isinstance(record, Prompt) else record.prompt
    said = "".join(m["content"] for m in prompt.messages)

    def long(ids: list[int], text: str) -> int:
        return max(1, len(text) // A_TOKEN) if plain else len(ids)

    if isinstance(record, Demonstration):
        return 0, [long([] if plain else chat.encode(record).ids, said + record.reply)]
    ids = chat.prompt_ids(prompt.messages)
    opening = long(ids, said)
    if isinstance(record, Prompt):
        return opening, [opening]
    replies = [record.completion] if isinstance(record, Thumb) else [record.chosen, record.rejected]
    return opening, [long(ids + chat.reply_ids(c.text, c.ended), said + c.text) for c in replies]


ASSUMED = 10_000
"""Rows of a data set that cannot be read here."""


def _assumed(name: str, lengths: list[int]) -> Rows:
    short = "/".join(Path(name).parts[-2:])
    each = f"{lengths[0]} tokens" + (" on either side" if len(lengths) == 2 else "")
    return Rows([lengths], ASSUMED, f"{short} is not here: assumed are {ASSUMED} rows as long as they may be, {each}")
