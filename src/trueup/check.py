"""What a data set holds and what a model would see of it, before anything is trained: `trueup data check`.

In order: the columns; the records, what is dropped and why, duplicates; their lengths as tokens, and what does not fit;
a few rows token by token, with what the loss counts, the end token and the padding. Records, tokens, masks and limits
come from the functions that the phases use (`data.prepare`, `data.batches`). Readable without colours too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trueup.data.batches import pair_batch, text_batch
from trueup.data.chat import Chat, Encoded
from trueup.data.files import Data, raw_rows, sources
from trueup.data.prepare import Prepared, comparisons, demonstrations, longer_wins, prompts
from trueup.data.readers import SAME
from trueup.models.load import context_length
from trueup.phases.ppo import PPOConfig
from trueup.phases.reward import RewardConfig
from trueup.phases.sft import SFTConfig
from trueup.records import Demonstration, Preference, Prompt
from trueup.run import console

Kind = Literal["demonstrations", "comparisons", "prompts"]
LIMITS: dict[str, tuple[str, int]] = {
    "demonstrations": ("max_length", SFTConfig.model_fields["max_length"].default),
    "comparisons": ("max_length", RewardConfig.model_fields["max_length"].default),
    "prompts": ("max_prompt", PPOConfig.model_fields["max_prompt"].default),
}
PARTS = {"prompt": "dim", "counts": "green", "reply": "green", "end": "bold yellow", "padding": "dim red"}
"""What a token is to the loss, and its colour."""
BINS, WIDTH, TURNS = 12, 40, 6


def check(data: Data, model: str, *, kind: Kind | None, longest: int | None, held_out: float, rows: int) -> None:
    """Prints all of it. Raises UserError where a phase would."""
    chat = Chat.load(model)
    facts = columns(data)
    kind = kind or kind_of(facts)
    key, default = LIMITS[kind]
    context = context_length(model) - (kind == "prompts")  # a prompt leaves room for a reply
    limit = min(longest or default, context)
    found: Prepared[Any, Any]
    if kind == "demonstrations":
        found = demonstrations(chat, data, limit, held_out=held_out)
    elif kind == "comparisons":
        found = comparisons(chat, data, limit, held_out=held_out)
    else:
        found = prompts(data, chat.prompt_length, limit, held_out=held_out, distinct=False)
    heading(f"{found.names}: {kind}")
    show_columns(facts)
    show_records(found, chat)
    show_lengths(found, f"{key} {longest or default}, the model's context {context}")
    show_rows(found, chat, rows)


def heading(text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/bold]")


def say(text: str) -> None:
    console.print("  " + text, markup=False)


# columns


def columns(data: Data) -> dict[str, Counter[str]]:
    """Column -> what it holds, in how many rows."""
    out: dict[str, Counter[str]] = {}
    total = 0
    for source in sources(data):
        for _, row in raw_rows(source):
            total += 1
            for name, value in row.items():
                out.setdefault(name, Counter())[_kind(value)] += 1
    for held in out.values():
        held["missing"] = total - sum(held.values())
    return out


def _kind(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "empty"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "yes or no"
    if isinstance(value, int | float):
        return "number"
    return "messages" if isinstance(value, list) and isinstance(value[0], dict) else type(value).__name__


def kind_of(facts: dict[str, Any]) -> Kind:
    """What columns of these names are read as, where nobody says."""
    if {"chosen", "rejected"} <= facts.keys():
        return "comparisons"
    replies = {"messages", "conversations", "completion", "output", "instances", "answer"}
    return "demonstrations" if replies & facts.keys() else "prompts"


def show_columns(facts: dict[str, Counter[str]]) -> None:
    table = Table("column", "holds", box=None, header_style="dim", padding=(0, 2))
    for name, held in facts.items():
        table.add_row(escape(name), ", ".join(f"{what} in {n} rows" for what, n in held.most_common() if n))
    console.print(table)


# records


def show_records(found: Prepared[Any, Any], chat: Chat) -> None:
    heading("Records")
    say(found.found.note())
    asked = [_prompt(record) for record in found.records]
    count = Counter(asked)
    again = {p: n for p, n in count.items() if n > 1}
    text = f"{len(count)} distinct prompts"
    if again:
        text += f"; {len(again)} come more than once, in {sum(again.values())} rows"
        common, n = count.most_common(1)[0]
        text += f" (most often, {n} times: {shorten(common.text)})"
    say(text)
    turns = Counter(min(sum(m["role"] == "user" for m in p.messages), TURNS) for p in asked)
    more = {TURNS: f"{TURNS} or more"}
    say("user turns: " + ", ".join(f"{more.get(n, n)} in {rows} rows" for n, rows in sorted(turns.items())))
    if system := sum(p.messages[0]["role"] == "system" for p in asked):
        say(f"a system message in {system} rows")
    if categories := Counter(p.category for p in asked if p.category):
        say("categories: " + ", ".join(f"{name} {n}" for name, n in categories.most_common(8)))
    if isinstance(found.records[0], Preference):
        say(f"chosen and rejected are alike in {found.found.dropped[SAME]} rows")
    if isinstance(found.records[0], Preference) and (pairs := [*found.train, *found.held]):
        equal = sum(len(p.chosen) == len(p.rejected) for p in pairs)
        say(
            f"the longer reply wins {longer_wins(pairs):.1%} of the pairs that fit (by tokens; {equal} of equal length "
            "count half); a reward model must beat that"
        )
        cut = sum(not c.ended for p in pairs for c in (p.preference.chosen, p.preference.rejected))
        if cut:
            say(f"{cut} replies were cut by length: no end token follows them")
    if chat.last_turn_only:
        say(
            f"{chat.last_turn_only} conversations with loss on their last turn only: the template rewrites earlier "
            "turns"
        )
    if chat.rewritten:
        say(f"{chat.rewritten} replies that the chat template does not write as they are")
    if found.held:
        say(f"{len(found.held)} rows held out, of prompts that the other {len(found.train)} have none of")
    total = sum(found.mix.values())
    for name, n in found.mix.items():
        say(f"an epoch takes {n} rows ({n / total:.0%}) from {name}")


def _prompt(record: Demonstration | Preference | Prompt) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt


def shorten(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= width else text[: width - 1] + "…")


# lengths


def show_lengths(found: Prepared[Any, Any], why: str) -> None:
    lengths = sorted(found.lengths)
    what = "the longer row of a pair" if found.records and isinstance(found.records[0], Preference) else "a row"
    heading(f"Tokens of {what}")
    for line in histogram(lengths, found.limit):
        say(line)
    at = {"median": 0.5, "95%": 0.95, "99%": 0.99, "longest": 1.0}
    said = ", ".join(f"{name} {lengths[min(int(q * len(lengths)), len(lengths) - 1)]}" for name, q in at.items())
    say(f"{said}; {sum(lengths)} in all")
    fits = len(lengths) - found.too_long
    say(
        f"{found.too_long} of {len(lengths)} have more than {found.limit} tokens ({why}) and are dropped whole; "
        f"{fits} fit. Nothing is cut."
    )


def histogram(lengths: Sequence[int], limit: int) -> Iterator[str]:
    """Bars over the range; a last one for what lies far beyond the limit, so that one giant does not flatten all."""
    if not lengths:
        return
    top = min(lengths[-1], max(2 * limit, BINS))
    step = max(1, -(-(top + 1) // BINS))
    counts = Counter(min(n // step, BINS) for n in lengths)
    most = max(counts.values())
    for b in range(lengths[0] // step if lengths[0] <= top else 0, max(counts) + 1):
        first, last = b * step, (b + 1) * step - 1
        span = f"over {first - 1}" if b == BINS else f"{first} to {last}"
        bar = "█" * -(-WIDTH * counts[b] // most)
        dropped = "  dropped" if first > limit and counts[b] else ""
        mark = f"  the limit, {limit}, lies here" if first <= limit < last else dropped
        yield f"{span:>13} {bar:<{WIDTH}} {counts[b]}{mark}"


# tokens


def show_rows(found: Prepared[Any, Any], chat: Chat, rows: int) -> None:
    shown = [*found.train, *found.held][:rows]
    heading("Tokens of the first rows" if shown else "No row fits")
    end, pad = (f"{chat.tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in (chat.end_id, chat.pad_id))
    template = "none of its own: the plain one is used" if chat.plain else "the tokenizer's own"
    say(f"chat template: {template}; end token {end}; padding {pad}; │ parts tokens, ⏎ is a line's end")
    if not shown:
        return
    for number, parts in enumerate(views(shown, chat), 1):
        for title, ids, roles in parts:
            counted = sum(role in ("counts", "end") for role in roles)
            real = sum(role != "padding" for role in roles)
            note = f", {counted} in the loss" if "counts" in roles else ""
            console.print(f"\n  [bold]row {number}{title}[/bold]  {real} tokens{note}")
            grid = Table.grid(padding=(0, 2))
            for role, group in groupby(zip(ids, roles, strict=True), key=lambda pair: pair[1]):
                stretch = [i for i, _ in group]
                same = title == ", rejected" and role == "prompt"
                told = Text(f"the same {len(stretch)} tokens") if same else strip(chat, role, stretch)
                grid.add_row(f"    {role:<7}", told)
            console.print(grid, soft_wrap=False)


def views(shown: Sequence[Any], chat: Chat) -> Iterator[list[tuple[str, list[int], list[str]]]]:
    """Row by row, as the batch has them, padding included: (title, ids, what each token is)."""
    if isinstance(shown[0], Prompt):
        prompts_ids = [chat.prompt_ids(p.messages) for p in shown]
        batch = text_batch([Encoded(ids, [False] * len(ids)) for ids in prompts_ids], chat.pad_id)
        for ids, length in zip(batch["ids"].tolist(), batch["lengths"].tolist(), strict=True):
            yield [("", ids, ["prompt"] * length + ["padding"] * (len(ids) - length))]
    elif isinstance(shown[0], Encoded):
        batch = text_batch(shown, chat.pad_id)
        for ids, length, mask in zip(*(batch[k].tolist() for k in ("ids", "lengths", "mask")), strict=True):
            roles = [
                "padding" if i >= length else "prompt" if not mask[i] else "end" if ids[i] == chat.end_id else "counts"
                for i in range(len(ids))
            ]
            yield [("", ids, roles)]
    else:
        batch = pair_batch([(p.chosen, p.rejected) for p in shown], chat.pad_id)
        for pair, ids, lengths in zip(shown, batch["ids"].tolist(), batch["lengths"].tolist(), strict=True):
            yield [
                (
                    f", {side}",
                    row,
                    [
                        "padding"
                        if i >= length
                        else "prompt"
                        if i < pair.prompt
                        else "end"
                        if i == length - 1 and row[i] == chat.end_id
                        else "reply"
                        for i in range(len(row))
                    ],
                )
                for side, row, length in zip(("chosen", "rejected"), ids, lengths, strict=True)
            ]


def strip(chat: Chat, role: str, ids: Sequence[int], most: int = 120) -> Text:
    """A stretch of tokens of one role."""
    if role == "padding":
        return Text(f"{token(chat, ids[:1])} × {len(ids)}", style=PARTS[role])
    out = Text()
    cut = len(ids) > most
    for n, part in enumerate([ids[: most // 2], ids[-(most // 2) :]] if cut else [ids]):
        if n:
            out.append(f" … {len(ids) - most // 2 * 2} more tokens … ", style="dim blue")
        for m, group in enumerate(characters(chat, list(part))):
            out.append("│" if m else "", style="dim blue")
            out.append(token(chat, group), style=PARTS[role])
    return out


def characters(chat: Chat, ids: list[int]) -> Iterator[list[int]]:
    """One token each, but those together that are only together a character, as bytes of an apostrophe are."""
    start = 0
    while start < len(ids):
        ends = range(start + 1, min(start + 5, len(ids) + 1))
        end = next((e for e in ends if "\ufffd" not in chat.tokenizer.decode(ids[start:e])), start + 1)
        yield ids[start:end]
        start = end


def token(chat: Chat, ids: Sequence[int]) -> str:
    """Tokens as text: a leading space kept, a line's end made visible, bytes that are no text as the tokenizer names
    them."""
    name = "".join(chat.tokenizer.convert_ids_to_tokens(list(ids)))
    text = str(chat.tokenizer.decode(list(ids)))
    if name.startswith("▁") and not text.startswith(" "):
        text = " " + text
    if text == " ":
        return "␣"
    return (name if "\ufffd" in text or not text else text).replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
