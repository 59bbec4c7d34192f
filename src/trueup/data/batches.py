"""Rectangles for the engine: tokens right-padded, lengths beside them, masks from lengths alone; and their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trueup.data.chat import Encoded

Batch = dict[str, Tensor]


def rectangle(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids [B, L] right-padded, lengths [B])."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, lengths


def text_batch(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """ids [B, L], lengths [B], mask [B, L]: True where the loss counts."""
    ids, lengths = rectangle([row.ids for row in rows], pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row.mask)] = torch.tensor(row.mask, dtype=torch.bool)
    return {"ids": ids, "lengths": lengths, "mask": mask}


def completion_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """ids [B, L] of prompt + completion, lengths [B], mask [B, L]: True on the completion's tokens, end included."""
    rows = [Encoded([*p, *c], [False] * len(p) + [True] * len(c)) for p, c in zip(prompts, completions, strict=True)]
    return text_batch(rows, pad_id)


def pair_completions(pairs: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int) -> Batch:
    """Of prompts with two replies each: ids [B, 2, L], lengths [B, 2], mask [B, 2, L] as in `completion_batch`."""
    prompts = [prompt for prompt, replies in pairs for _ in replies]
    batch = completion_batch(prompts, [reply for _, replies in pairs for reply in replies], pad_id)
    return {name: value.unflatten(0, (len(pairs), 2)) for name, value in batch.items()}


def pair_batch(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Batch:
    """ids [B, 2, L], lengths [B, 2]: chosen first. One tensor, so that a chosen row cannot lose its partner."""
    ids, lengths = rectangle([row for pair in pairs for row in pair], pad_id)
    return {"ids": ids.view(len(pairs), 2, -1), "lengths": lengths.view(len(pairs), 2)}


class Order:
    """Which rows step n takes: a fresh permutation an epoch, known from (seed, step) alone, so that a resumed
    run sees what the uninterrupted one would have seen. An epoch's last batch is filled from the next epoch."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed

    def at(self, step: int) -> list[int]:
        first = step * self.batch
        return [int(self._epoch((first + k) // self.n)[(first + k) % self.n]) for k in range(self.batch)]

    def _epoch(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", (None,))[0] != epoch:
            self._cached = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n))
        return self._cached[1]

    def steps(self, epochs: float) -> int:
        """Steps that see every row `epochs` times, rounded up."""
        return max(1, -(-int(self.n * epochs) // self.batch))
