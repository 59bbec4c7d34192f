"""`trueup init`: looks at a model and at files of data, and writes the recipe that trains on them, with comments.

In order: read each file as the stage that takes it will, say what was found, choose lengths, batches and rates by that,
write YAML. Not in it: a search for good settings; the choices are where to start from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trueup.data.chat import Chat
from trueup.data.files import raw_rows
from trueup.data.readers import Rows, read_demonstrations, read_preferences, read_prompts
from trueup.models.load import context_length
from trueup.records import Prompt, UserError

HERE = Path(__file__).parent / "recipes"
LOOKED_AT = 2000
"""Rows of a file that are tokenized to know their lengths."""
FEWEST = 20
"""Distinct prompts of comparisons below which no second reward model is split off."""
SMALL = 100e6
"""Parameters below which a model takes, and needs, larger steps."""


@dataclass
class Found:
    """A file of data: what it holds. Lengths are in tokens."""

    path: str
    kind: str
    columns: list[str]
    note: str
    prompts: list[Prompt]
    replies: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        distinct = len(set(self.prompts))
        text = f"{self.path}: {self.note} of {self.kind} from columns {', '.join(self.columns)}; {distinct} prompts"
        if self.replies:
            text += f"; replies of {_mean(self.replies)} tokens, 95% within {_within(self.replies, 95)}"
        return text


def look(kind: str, path: str, chat: Chat) -> Found:
    """Reads a file as the stage that takes it will. Raises UserError where it cannot."""
    columns = list(next(raw_rows(path), ("", {}))[1])
    if kind == "demonstrations":
        demos = read_demonstrations(path)
        pairs = [(d.prompt, [d.reply]) for d in demos.records]
        return _found(path, kind, columns, demos, pairs, chat)
    if kind == "comparisons":
        comparisons = read_preferences(path)
        pairs = [(p.prompt, [p.chosen.text, p.rejected.text]) for p in comparisons.records]
        return _found(path, kind, columns, comparisons, pairs, chat)
    prompts = read_prompts(path)
    return _found(path, kind, columns, prompts, [(p, []) for p in prompts.records], chat)


def _found(
    path: str, kind: str, columns: list[str], rows: Rows, pairs: Sequence[tuple[Prompt, list[str]]], chat: Chat
) -> Found:
    found = Found(path, kind, columns, rows.note(), [prompt for prompt, _ in pairs])
    for prompt, replies in pairs[:LOOKED_AT]:
        asked = len(chat.prompt_ids(prompt.messages))
        lengths = [len(chat.reply_ids(text)) for text in replies]
        found.replies += lengths
        found.rows += [asked + length for length in lengths] or [asked]
    return found


def starter(name: str, model: str, found: dict[str, Found]) -> str:
    """The recipe as commented YAML. `found`: what was looked at, by kind (demonstrations, comparisons, prompts,
    heldout). Raises UserError where there is nothing to learn from."""
    demos, comparisons = found.get("demonstrations"), found.get("comparisons")
    if not demos and not comparisons:
        raise UserError("name a file of --demonstrations, of --comparisons, or both: there is nothing to learn from")
    context, count = context_length(model), parameters(model)
    replies = [n for f in found.values() for n in f.replies]
    tokens = _power(_within(replies, 99), 16, max(16, context // 2))
    sft, reward, ppo = (3e-4, 3e-4, 1e-5) if count is not None and count < SMALL else (2e-5, 1e-5, 1e-6)
    rates = {"sft": sft, "reward": reward, "ppo": ppo, "critic": 5 * ppo}
    baseline = "sft" if demos else "start"
    models = {"base" if demos else "start": model}
    models |= ({"sft": "@sft/final"} if demos else {}) | ({"ppo": "@ppo/final"} if comparisons else {})
    asked = found.get("prompts") or comparisons
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return (
        environment.get_template("starter.yaml.j2").render(
            name=name,
            model=model,
            start="@sft/final" if demos else model,
            context=context,
            size="" if count is None else f", {count:,} parameters",
            found=list(found.values()),
            demonstrations=demos,
            comparisons=comparisons,
            judged=comparisons and len(set(comparisons.prompts)) >= FEWEST,
            asked=asked,
            heldout=found.get("heldout"),
            measured=found.get("heldout") or asked or demos,
            models=models,
            baseline=baseline,
            longest=_power(_within([n for f in found.values() for n in f.rows], 99), 64, context),
            tokens=tokens,
            told=f"99% of the replies are within {_within(replies, 99)} tokens",
            rates={key: _rate(value) for key, value in rates.items()},
            ppo=_ppo(len(set(asked.prompts))) if asked else {},
            fewest=FEWEST,
            quoted=lambda text: json.dumps(text, ensure_ascii=False),
            batch_of=_batch,
        )
        + "\n"
    )


def parameters(model: str) -> int | None:
    """How many a folder's weights hold; None of a Hub name, whose weights are not looked at."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in Path(model).glob("*.safetensors"):
        try:
            with safe_open(file, "numpy") as weights:
                total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
    return total or None


def _ppo(prompts: int) -> dict[str, int]:
    """Steps and completions a step: some three answers to each prompt, where the prompts are few."""
    batch = 2 ** int(math.log2(max(4, min(128, prompts / 2))))
    return {"batch": batch, "steps": int(min(200, max(20, 3 * prompts / batch)))}


def _rate(value: float) -> str:
    """3.0e-4: without the point YAML 1.1 reads text."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _mean(lengths: Sequence[int]) -> str:
    return f"{np.mean(lengths):.0f}"


def _within(lengths: Sequence[int], percent: int) -> int:
    return int(np.ceil(np.percentile(lengths, percent)))


def _power(least: int, low: int, high: int) -> int:
    """The power of two at or above `least`, between `low` and `high`."""
    return min(high, max(low, 2 ** math.ceil(math.log2(max(1, least)))))


def _batch(found: Found, most: int) -> int:
    """Twenty steps an epoch, where the rows are few."""
    return 2 ** int(math.log2(max(4, min(most, len(found.prompts) / 20))))
