"""Float32 matrix products on CPUs by oneDNN instead of the BLAS that torch calls.

torch sends float32 products to MKL, which leaves half of an AMD core unused (about 95 against 215 GFLOP/s, measured
on one thread of an AVX-512 EPYC); oneDNN, which ships with torch and is what its compiler calls, does not. Results
agree to float32 rounding. Other devices and types, and products too small to earn the call, go the usual way.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = 28_000_000
"""Bytes that oneDNN's compiled products take, measured once 64 shapes were there."""
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    # oneDNN compiles each shape and keeps 1024 of them, of half a megabyte each (measured); packed rows are hardly ever
    # as many again, and a step's own shapes are a few dozen.
    os.environ.setdefault(cache, "64")

SMALL = 6_000_000
"""Multiplications below which oneDNN's cost per call (about 15 microseconds, and a copy of the weights in its own
order) is not earned back."""

_available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b^T + bias of a [..., k], b [n, k] -> [..., n], without gradients."""
    if (
        _available
        and a.device.type == "cpu"
        and a.dtype is torch.float32
        and b.dtype is torch.float32
        and a.numel() * b.shape[0] >= SMALL
    ):
        return torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")  # type: ignore[no-any-return]
    return nn.functional.linear(a, b, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T @ x of grad [n, out], x [n, in] -> [out, in]. One side must be copied transposed: the narrower one."""
    if grad.shape[1] <= x.shape[1]:
        return product(grad.T, x.T)
    return product(x.T, grad.T).T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.T) if need_x else None,
            weight_gradient(flat, x.reshape(-1, x.shape[-1])) if need_weight else None,
            flat.sum(0) if need_bias else None,
        )


class FastLinear(nn.Linear):
    """nn.Linear, its products by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        small = x.numel() * self.out_features < SMALL
        if small or not (_available and x.device.type == "cpu" and x.dtype is torch.float32):
            return nn.functional.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]
        return product(x, self.weight, self.bias)


def fast_linears(model: nn.Module) -> None:
    """Turns the plain linear layers of a model into FastLinear, in place; weights, names and files stay the same."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
