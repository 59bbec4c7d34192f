"""Rows shared out over processes and micro-batches: for learners, and for networks that only answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trueup.engine.mesh import Mesh, Shares
from trueup.models.net import Batch, InBF16, Net, compare_per_token

MICRO_TOKENS = 16384


@torch.no_grad()
def forward(
    net: Net, batch: Batch, mesh: Mesh, *, micro_tokens: int = MICRO_TOKENS, bf16: bool = False
) -> dict[str, Tensor]:
    """The outputs of all rows [B, ...], on every rank. With a learner's precision and `micro_tokens` they equal those
    of a learner with the same weights bit for bit."""
    return by_rows(InBF16(net) if bf16 else net, net.outputs_like(batch), batch, mesh, micro_tokens)


@torch.no_grad()
def compare(
    policy: Net, reference: Net, batch: Batch, mesh: Mesh, *, micro_tokens: int = MICRO_TOKENS
) -> dict[str, Tensor]:
    """Of all rows, on every rank, what `compare_per_token` gives: kl, logprobs, ref_logprobs [B, L]."""
    zero = torch.zeros_like(batch["ids"], dtype=torch.float32)
    like = dict.fromkeys(("kl", "logprobs", "ref_logprobs"), zero)
    return by_rows(lambda part: compare_per_token(policy, reference, part), like, batch, mesh, micro_tokens)


def exact_kl(policy: Net, reference: Net, batch: Batch, mesh: Mesh, *, micro_tokens: int = MICRO_TOKENS) -> Tensor:
    """KL(policy || reference) over the vocabulary at every counted token, nats [B, L]; zero outside the mask."""
    return compare(policy, reference, batch, mesh, micro_tokens=micro_tokens)["kl"]


def by_rows(
    fn: Callable[[Batch], dict[str, Tensor]], like: dict[str, Tensor], batch: Batch, mesh: Mesh, micro_tokens: int
) -> dict[str, Tensor]:
    """`fn` over this rank's rows in micro-batches, gathered from all ranks; `like` has the outputs' shapes."""
    batch = {name: value.to(mesh.device) for name, value in batch.items()}
    shares, parts = split(batch, mesh, micro_tokens)
    mine = shares[mesh.rank]
    place = {row: i for i, row in enumerate(mine)}
    local = {name: zero[: len(mine)].to(mesh.device, copy=True) for name, zero in like.items()}
    for rows in parts[mesh.rank]:
        index = torch.tensor([place[row] for row in rows], device=mesh.device)
        for name, value in fn(take(batch, rows)).items():
            local[name][index] = value.to(local[name].dtype)
    return {name: mesh.gather_rows(value, shares) for name, value in local.items()}


def split(batch: Batch, mesh: Mesh, micro_tokens: int) -> tuple[Shares, list[Shares]]:
    """The rows of each rank, and each rank's rows in micro-batches of like length within the token budget."""
    lengths = batch["lengths"]
    costs = (lengths if lengths.ndim == 1 else lengths.sum(-1)).tolist()
    shares = mesh.shard(costs)
    return shares, [list(_micro(rows, costs, micro_tokens)) for rows in shares]


def _micro(rows: list[int], costs: list[int], budget: int) -> Iterator[list[int]]:
    part: list[int] = []
    tokens = 0
    for row in sorted(rows, key=lambda r: -costs[r]):
        if part and tokens + costs[row] > budget:
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += costs[row]
    if part:
        yield part


def take(batch: Batch, rows: list[int]) -> Batch:
    index = torch.tensor(rows)
    return {name: value.index_select(0, index.to(value.device)) for name, value in batch.items()}
