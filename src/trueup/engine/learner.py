"""What can `forward_backward` and `step`: a network, its optimizer and its share of the batch.

A phase hands over one optimizer minibatch and a loss function; the learner splits the rows over ranks and into
micro-batches of a token budget, and reduces. Each named loss is sum(loss x weight) / sum(weight), where the weights
are summed over the whole minibatch before the first micro-batch runs, so that neither the budget nor the number of
processes changes the update beyond rounding. What couples rows is computed before and carried in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trueup.config import Config
from trueup.engine.mesh import Mesh
from trueup.engine.rows import by_rows, split, take
from trueup.models.net import Batch, InBF16, Net, Precision
from trueup.models.recompute import recompute_layers

Losses = dict[str, tuple[Tensor, Tensor]]
LossFn = Callable[[dict[str, Tensor], Batch], Losses]
"""loss_fn(outputs, batch) -> {name: (losses, weight)}, unreduced and of one shape. Weights depend on the batch alone.
It is called on parts of the batch, and once on all of it with zeros for outputs, to sum the weights. What is named
"metric/..." is reduced like the rest and reported, but not optimized."""


class Optim(Config):
    """AdamW with decoupled weight decay on matrices (not on norms and biases), warm-up, and a schedule."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root in Adam's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled: each step takes lr x this share off every matrix."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the rate rises linearly from near 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from its peak after the warm-up; linear and cosine end at 0."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 leaves it alone."""
    micro_tokens: int = Field(default=8192, ge=1)
    """Tokens that go through the model at a time: memory, not the result, depends on it."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer and run it again in the backward: far less memory, a third more time, the
    same result."""

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 .. steps - 1."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.lr * share[self.schedule]


class NotFinite(FloatingPointError):
    """A loss that is no number; `rows` of the minibatch are those where it is not."""

    def __init__(self, text: str, rows: list[int]) -> None:
        super().__init__(text)
        self.rows = rows


class Learner:
    """A policy, critic or reward model that learns. `steps` is how many `step` calls the schedule spans.

    precision "bf16": the forward and backward run on a bfloat16 copy, masters and optimizer stay float32.
    """

    def __init__(
        self,
        net: Net,
        optim: Optim,
        mesh: Mesh | None = None,
        *,
        steps: int,
        precision: Precision = "fp32",
    ) -> None:
        self.mesh = mesh or Mesh()
        self.net = net.to(self.mesh.device)
        self.optim = optim
        self.steps = steps
        self.done = 0
        if optim.gradient_checkpointing:
            recompute_layers(net.model)
        self._module: nn.Module = InBF16(net) if precision == "bf16" else net
        self._parallel: nn.Module = self._module
        if self.mesh.world > 1:
            self._parallel = DistributedDataParallel(self._module, broadcast_buffers=False)
        self._named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        decayed = [p for _, p in self._named if p.ndim >= 2]
        plain = [p for _, p in self._named if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )

    # --- the batch in, numbers out -------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of all rows [B, ...], without gradients, through the same numerics as training."""
        like = self.net.outputs_like(batch)
        return by_rows(self._module, like, batch, self.mesh, self.optim.micro_tokens)

    def forward_backward(self, batch: Batch, loss_fn: LossFn) -> dict[str, float]:
        """Add the gradient of the sum of the named losses over this minibatch; returns each loss, reduced.

        Raises NotFinite naming a loss that is not finite, and its rows.
        """
        batch = {name: value.to(self.mesh.device) for name, value in batch.items()}
        with torch.no_grad():
            weights = loss_fn(self.net.outputs_like(batch), batch)
        total = {name: float(weight.sum()) for name, (_, weight) in weights.items()}
        sums = torch.zeros(len(total), dtype=torch.float64, device=self.mesh.device)
        _, parts = split(batch, self.mesh, self.optim.micro_tokens)
        mine, rounds = parts[self.mesh.rank], max(map(len, parts))
        for i in range(rounds):
            # Every rank runs the same number of forwards; one that has no rows left runs a row of weight zero.
            rows, share = (mine[i], 1.0) if i < len(mine) else ([0], 0.0)
            last = i == rounds - 1
            with nullcontext() if last or self.mesh.world == 1 else self._parallel.no_sync():  # type: ignore[operator]
                part = take(batch, rows)
                losses = loss_fn(self._parallel(part), part)
                parts_of = [
                    (loss * weight).sum() * (share / total[name]) if total[name] else (loss * 0.0).sum()
                    for name, (loss, weight) in losses.items()
                ]
                stacked = torch.stack(parts_of)
                optimized = torch.stack([v for v, name in zip(parts_of, losses, strict=True) if not _is_metric(name)])
                # DDP divides by the number of ranks; ours are sums.
                (optimized.sum() * self.mesh.world).backward()
                sums += stacked.detach()
        values = dict(zip(total, self.mesh.sum(sums).tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value) and not _is_metric(name):
                self._adam.zero_grad()
                rows = self._rows_at_fault(name, batch, loss_fn)
                where = f"{len(rows)} of {len(batch['ids'])} rows" if rows else "the sum over rows that are finite"
                raise NotFinite(f"loss '{name}' is {value} in {where}, weights unchanged", rows)
        return values

    def _rows_at_fault(self, name: str, batch: Batch, loss_fn: LossFn) -> list[int]:
        """The rows where a loss is not finite, for who looks for the cause. Each goes through the model alone, since
        one that is not finite spoils those that it is packed with."""
        with torch.no_grad():
            alone = by_rows(self._module, self.net.outputs_like(batch), batch, self.mesh, 1)
            losses, weight = loss_fn(alone, batch)[name]
            bad = ~(losses * weight).isfinite()
        return bad.flatten(1).any(1).nonzero().flatten().tolist() if bad.ndim > 1 else bad.nonzero().flatten().tolist()

    def step(self) -> dict[str, float]:
        """Clip, update, clear. Raises FloatingPointError naming a parameter whose gradient is not finite, before any
        weight changes."""
        rate = self.optim.rate(self.done, self.steps)
        parameters = [p for _, p in self._named if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        if not math.isfinite(norm):
            bad = [name for name, p in self._named if p.grad is not None and not p.grad.isfinite().all()]
            self._adam.zero_grad()
            where = bad[0] if bad else "the sum of squares"
            raise FloatingPointError(f"gradient of {where} is not finite, weights unchanged")
        if self.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        self.done += 1
        return {"grad_norm": float(norm), "lr": rate}

    def skip(self, steps: int) -> None:
        """Steps that will not be taken after all: the schedule counts them."""
        self.done += steps

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors by name: masters, Adam's means, the position in the
        schedule, the affine of a scalar net. The tensors are the live ones: write them before the next step."""
        out = {"step": torch.tensor(self.done), "affine.mean": self.net.mean, "affine.std": self.net.std}
        for name, parameter in self._named:
            out[f"param.{name}"] = parameter.detach()
            for key, value in self._adam.state.get(parameter, {}).items():
                out[f"adam.{key}.{name}"] = value
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, into a learner of the same network. Raises KeyError where a tensor is missing."""
        self.done = int(state["step"])
        self.net.mean.copy_(state["affine.mean"])
        self.net.std.copy_(state["affine.std"])
        for name, parameter in self._named:
            parameter.copy_(state[f"param.{name}"])
            self._adam.state.pop(parameter, None)
            if f"adam.step.{name}" in state:
                self._adam.state[parameter] = {
                    key: state[f"adam.{key}.{name}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def _is_metric(name: str) -> bool:
    return name.startswith("metric/")
