"""The processes of a run: one, or many under torchrun. Everyone holds the global batch; the mesh shares out rows
and gathers results, so that nothing above the engine mentions a rank.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trueup.records import UserError

T = TypeVar("T")
Shares = list[list[int]]
"""The global row indices of each rank; together every row once."""


@dataclass(frozen=True)
class Mesh:
    """This process among `world` of them."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_env(cls, device: str = "auto") -> Mesh:
        """From the environment that torchrun sets (a world of 1 without it). `auto` takes CUDA where there is one.

        Starts the process group, nccl on CUDA and gloo on CPUs, and ends it when the process exits. Raises UserError
        where this machine has no such device.
        """
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{local}"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device '{device}': {reason}; expected auto, cpu, cuda or cuda:1") from None
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            atexit.register(close)
        return cls(int(os.environ.get("RANK", 0)), world, torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, costs: Sequence[float]) -> Shares:
        """The rows of each rank, balanced by cost; the same answer on every rank."""
        shares: Shares = [[] for _ in range(self.world)]
        load = [0.0] * self.world
        for row in sorted(range(len(costs)), key=lambda r: -costs[r]):
            rank = min(range(self.world), key=lambda r: (load[r], len(shares[r])))
            shares[rank].append(row)
            load[rank] += costs[row]
        return shares

    def sum(self, values: Tensor) -> Tensor:
        """Added over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, mine: Tensor, shares: Shares) -> Tensor:
        """Rows [len(shares[rank]), ...] of every rank, put at their global indices [B, ...]."""
        total = sum(map(len, shares))
        if self.world == 1:
            parts = [mine]
        else:
            # all_gather wants equal shapes.
            most = max(map(len, shares))
            padded = mine.new_zeros(most, *mine.shape[1:])
            padded[: len(mine)] = mine
            # Not every backend gathers booleans.
            sent = padded.to(torch.uint8) if mine.dtype is torch.bool else padded
            parts = [torch.empty_like(sent) for _ in range(self.world)]
            dist.all_gather(parts, sent)
        out = mine.new_empty(total, *mine.shape[1:])
        for part, rows in zip(parts, shares, strict=True):
            out[torch.tensor(rows, dtype=torch.long, device=mine.device)] = part[: len(rows)]
        return out

    def gather_objects(self, mine: Sequence[T], shares: Shares) -> list[T]:
        """Python objects of every rank, put at their global indices."""
        parts: list[Any] = [list(mine)]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, list(mine))
        out: list[Any] = [None] * sum(map(len, shares))
        for part, rows in zip(parts, shares, strict=True):
            for row, value in zip(rows, part, strict=True):
                out[row] = value
        return out

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make()` gives in the main process, which alone calls it; known to every rank. What it raises there,
        the others raise as UserError: they would wait for an answer for ever."""
        found: list[Any] = [None, None]
        try:
            found[0] = make() if self.is_main else None
        except Exception as error:
            found[1] = str(error)
            if self.world > 1:
                dist.broadcast_object_list(found)
            raise
        if self.world > 1:
            dist.broadcast_object_list(found)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world > 1:
            dist.barrier()


def close() -> None:
    """Ends the process group. Learners go first: one that outlives the group frees the group's threads itself, with
    the interpreter's lock held, and may then hang or abort."""
    gc.collect()  # wrapped modules are in reference cycles
    if dist.is_initialized():
        dist.destroy_process_group()
