"""An ensemble's members scored one after another, against all in one pass over a stack of their weights.

    python benchmarks/ensemble.py [--members 5] [--rows 64] [--model FOLDER]

Both score the same rows, packed, without gradients. One after another is what `trueup.scorers.ensemble` does. The
stack is torch.func's: parameters [K, ...] by `stack_module_state`, the forward by `vmap` over `functional_call`, in
which every linear layer becomes a batched product. Said: seconds of either (median of interleaved rounds), and how far
their scores lie apart.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trueup.models.forward import pack, states_of
from trueup.models.linear import FastLinear
from trueup.models.net import Net, score_head
from trueup.models.roles import Whole


@dataclass(frozen=True)
class PlainLayout:
    """`forward.Layout` without its own backward, which vmap cannot go through."""

    token_of: Tensor
    place_of: Tensor
    shapes: tuple[tuple[int, int], ...]
    wanted: None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        sizes = [rows * length for rows, length in self.shapes]
        q, k, v = (x[0].transpose(0, 1).index_select(0, self.token_of).split(sizes) for x in (query, key, value))
        out = []
        for shape, *parts in zip(self.shapes, q, k, v, strict=True):
            qb, kb, vb = (x.unflatten(0, shape).transpose(1, 2) for x in parts)
            if groups > 1:
                kb, vb = kb.repeat_interleave(groups, 1), vb.repeat_interleave(groups, 1)
            ob = scaled_dot_product_attention(qb, kb, vb, is_causal=True, scale=scaling)
            out.append(ob.transpose(1, 2).flatten(0, 1))
        return torch.cat(out).index_select(0, self.place_of)[None]


class Stacked:
    """Reward models of one shape as one function of their stacked weights."""

    def __init__(self, nets: list[Net]) -> None:
        self.weights, self.buffers = stack_module_state([net.model for net in nets])
        self.mean, self.std = (torch.stack([getattr(net, name) for net in nets]) for name in ("mean", "std"))
        self.model = copy.deepcopy(nets[0].model)
        for module in self.model.modules():
            if type(module) is FastLinear:  # vmap turns nn.Linear into a batched product; oneDNN's call it cannot
                module.__class__ = nn.Linear

    @torch.no_grad()
    def scores(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[K, B]."""
        packed = pack(lengths.tolist(), ids.shape[1], ids.device)
        layout = PlainLayout(packed.layout.token_of, packed.layout.place_of, packed.layout.shapes)
        flat = ids.reshape(-1).index_select(0, packed.token)
        last = packed.flat[torch.arange(len(ids)), lengths - 1]

        class Reads(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                states = states_of(self.model, flat[None], packed.position[None], layout)[0]
                return score_head(self.model)(states.index_select(0, last))[:, 0]

        reads = Reads(self.model)
        weights = {f"model.{n}": w for n, w in self.weights.items()}
        buffers = {f"model.{n}": b for n, b in self.buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash kernel has no rule for vmap, which would loop over it
            raw = vmap(lambda w, b: functional_call(reads, (w, b), ()))(weights, buffers)
        return (raw - self.mean[:, None]) / self.std[:, None]


@torch.no_grad()
def one_by_one(nets: list[Net], ids: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack([net({"ids": ids, "lengths": lengths})["scores"] for net in nets])


def members(folder: str | Path, count: int) -> list[Net]:
    """Reward models with heads and weights of their own."""
    nets = []
    for seed in range(count):
        model = Whole(folder).scalar(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        nets.append(Net(model, "reward"))
    return nets


def measure(folder: str | Path, count: int, rows: int, rounds: int) -> dict[str, float]:
    nets = members(folder, count)
    stacked = Stacked(nets)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 61, (rows,), generator=generator)
    ids = torch.randint(5, nets[0].model.config.vocab_size, (rows, 60), generator=generator)
    ways = {"one": lambda: one_by_one(nets, ids, lengths), "stack": lambda: stacked.scores(ids, lengths)}
    first = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        **medians,
        "speedup": medians["one"] / medians["stack"],
        "difference": float((first["one"] - first["stack"]).abs().max()),
        "parameters": float(sum(p.numel() for p in nets[0].model.parameters())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", help="a folder; the built-in world's base where none is named")
    args = parser.parse_args()
    if args.model is None:
        from trueup.world import base_path

        args.model = str(base_path())
    print(f"{args.members} members, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for rows in args.rows:
        found = measure(args.model, args.members, rows, args.rounds)
        print(
            f"{rows:4} rows: one after another {1000 * found['one']:.1f} ms, stacked {1000 * found['stack']:.1f} ms, "
            f"{found['speedup']:.2f} times as fast; scores differ by {found['difference']:.1e} "
            f"({found['parameters'] / 1e6:.2f}M parameters)"
        )


if __name__ == "__main__":
    main()
