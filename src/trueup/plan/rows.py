"""How long the rows of a stage's data are: read as the phase reads them, or assumed where they are not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.data.chat import Chat
from trueup.data.files import Source, sources
from trueup.data.prepare import encode_pair
from trueup.data.readers import read_demonstrations, read_preferences, read_prompts, select_by_prompt, split_by_prompt
from trueup.models.load import context_length
from trueup.plan.standins import Folders
from trueup.recipe import Stage
from trueup.records import Prompt, UserError, is_local

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
    """Of pairs: the prompt's share of the shorter row."""


def text_of(chat: Chat, tokens: int) -> str:
    """A text of about so many tokens."""
    each = len(chat._ids(WORD * 64)) / 64
    return (WORD * max(1, round(tokens / each))).strip()


def rows_of(stage: Stage, folders: Folders) -> Rows:
    """The rows of a stage's data, by the phase's own reading where the file is there; else as long as the phase's
    limits let them be."""
    config: Any = stage.config
    model = folders.of(config.model if hasattr(config, "model") else next(iter(config.models.values())))
    chat, context = Chat.load(model), context_length(model)
    plain = model in folders.plain

    def long(ids: list[int], text: str) -> int:
        return max(1, len(text) // A_TOKEN) if plain else len(ids)

    opening: list[int] = []
    listed = sources(getattr(config, "data", None) or config.prompts)
    if far := [s.path for s in listed if not is_local(s.path)]:
        limit = min(getattr(config, "max_length", getattr(config, "max_prompt", 512)), context)
        return _assumed(far[0], [limit] * (2 if stage.phase == "reward" else 1))
    to_come = [s.path for s in listed if any(s.path.startswith(f"{folder}/") for folder in folders.stages)]

    def records(read: Callable[[Source], Any]) -> list[Any] | None:
        """None where a stage of the recipe has yet to make one of the data sets."""
        try:
            return [record for source in listed for record in read(source).records]
        except UserError:
            if to_come:
                return None
            raise

    if stage.phase == "sft":
        limit = min(config.max_length, context)
        if (found := records(read_demonstrations)) is None:
            return _assumed(to_come[-1], [limit])
        train, _ = split_by_prompt(found, config.held_out, lambda d: d.prompt)
        some = train[:LOOKED_AT]
        sizes = [
            [long(chat.encode(d).ids if not plain else [], "".join(m["content"] for m in d.prompt.messages) + d.reply)]
            for d in some
        ]
    elif stage.phase == "reward":
        limit = min(config.max_length, context)
        if (found := records(read_preferences)) is None:
            return _assumed(to_come[-1], [limit, limit])
        train, _ = split_by_prompt(
            select_by_prompt(found, config.part, lambda p: p.prompt), config.held_out, lambda p: p.prompt
        )
        some = train[:LOOKED_AT]
        sizes = []
        for p in some:
            pair = encode_pair(chat, p)
            before = "".join(m["content"] for m in p.prompt.messages)
            sizes.append([long(pair.chosen, before + p.chosen.text), long(pair.rejected, before + p.rejected.text)])
            opening.append(long(pair.chosen[: pair.prompt], before))
    else:
        limit = min(getattr(config, "max_prompt", context), context - 1)
        if (found := records(read_prompts)) is None:
            return _assumed(to_come[-1], [min(limit, 512)])
        train = list(dict.fromkeys(found))
        some = train[:LOOKED_AT]
        sizes = [[long(chat.prompt_ids(p.messages), "".join(m["content"] for m in p.messages))] for p in some]
    kept = [(size, record) for size, record in zip(sizes, some, strict=True) if max(size) <= limit]
    if not kept:
        raise UserError(f"stage '{stage.name}': every row has more than {limit} tokens")
    weight = sum(s.weight for s in listed) / len(listed)  # of data sets of like size
    total = round(weight * len(train) * len(kept) / len(sizes))
    mean = sum(map(sum, sizes)) / len(sizes)
    how = f"{total} rows of {mean:.0f} tokens on average" + (", four characters a token" if plain else "")
    if len(train) > len(some):
        how += f" (the first {len(some)} were looked at)"
    known = [record for _, record in kept] if stage.phase not in ("sft", "reward") and not plain else []
    shared = sum(opening) / max(1, sum(map(min, sizes)))
    return Rows([size for size, _ in kept], total, how, known, shared)  # type: ignore[arg-type]


ASSUMED = 10_000
"""Rows of a data set that cannot be read here."""


def _assumed(name: str, lengths: list[int]) -> Rows:
    short = "/".join(Path(name).parts[-2:])
    each = f"{lengths[0]} tokens" + (" on either side" if len(lengths) == 2 else "")
    return Rows([lengths], ASSUMED, f"{short} is not here: assumed are {ASSUMED} rows as long as they may be, {each}")
