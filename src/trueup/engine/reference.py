"""The reference's log-probs of replies that are known beforehand: computed once, kept on the disk, used again.

A reply's figure is found by content: the file by the reference's weights and the precision, the line by the tokens,
which hold what tokenizer, template and row have to say. So another seed, another beta, another loss on the same data
reads what the first run has computed; a changed model, template or row is computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from trueup.data.batches import pair_completions
from trueup.engine.mesh import Mesh
from trueup.engine.rows import forward
from trueup.models.lora import fingerprint
from trueup.models.net import Net
from trueup.run import append_line, read_lines

CHUNK = 256
"""Pairs computed between two writes: no more than these are lost to a kill."""

Pair = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt's ids, and those of two replies to it."""


def reference_logprobs(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    mesh: Mesh,
    folder: Path,
    *,
    pad_id: int,
    micro_tokens: int,
    bf16: bool = False,
) -> tuple[list[list[float]], int]:
    """(log-prob of each pair's two replies, in nats, summed over their tokens; how many pairs had to be computed)."""
    path = folder / f"{_hash([fingerprint(model), model.dtype, bf16])}.jsonl"
    known: dict[str, float] = mesh.from_main(lambda: _read(path))
    names = [[_hash([list(prompt), list(reply)]) for reply in replies] for prompt, replies in pairs]
    net, computed = Net(model, "policy"), 0
    for start in range(0, len(pairs), CHUNK):
        part = [name for pair in names[start : start + CHUNK] for name in pair]
        if all(name in known for name in part):
            continue
        batch = pair_completions(pairs[start : start + CHUNK], pad_id)
        sums = forward(net, batch, mesh, micro_tokens=micro_tokens, bf16=bf16)["logprobs"].float().sum(-1).cpu()
        new = {n: v for n, v in zip(part, sums.flatten().tolist(), strict=True) if n not in known}
        known |= new
        computed += len(part) // 2
        if mesh.is_main:
            append_line(path, new)
    return [[known[name] for name in pair] for pair in names], computed


def _read(path: Path) -> dict[str, float]:
    """What comes first stays: a run that goes on must find the very figures that it began with."""
    known: dict[str, float] = {}
    for line in reversed(read_lines(path)):
        known |= line
    return known


def _hash(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()[:16]
