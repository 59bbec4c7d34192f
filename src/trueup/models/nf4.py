"""Frozen linear layers in four bits (NF4, Dettmers et al. 2023), by the kernels of bitsandbytes.

A weight is kept as NF4 in blocks of 64 with their scales quantized once more (4.13 bits a weight), and spread out to
the type of the input for each product. Not bitsandbytes' own layer: that one takes other kernels without gradients
than with them, and on some CPUs repacks its weight on the way, so that sampling and training would see different
log-probs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trueup.models.linear import product
from trueup.records import UserError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used here


class NF4Linear(nn.Linear):
    """nn.Linear whose `weight` is packed, uint8; `state` says how to unpack it. Neither is trained."""

    state: Any

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device | str) -> NF4Linear:
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        packed, made.state = _functional().quantize_4bit(
            layer.weight.detach().contiguous().to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        made.weight = nn.Parameter(packed, requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        return made

    def full(self) -> Tensor:
        """The weight that the packed one stands for, [out, in], in the type of the weight that was packed."""
        return _functional().dequantize_4bit(self.weight.detach(), self.state)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """Unpacks in the forward and again in the backward: the full weight is kept by neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return product(x, layer.full().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return product(grad, ctx.layer.full().to(grad.dtype).T), None, None


def to_nf4(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The linear layers of the model's body in four bits, one after the other, and all of it on `device`; embeddings,
    norms and heads stay as they are. In place. Raises UserError where bitsandbytes or its kernels are missing."""
    _functional()
    try:
        NF4Linear.of(nn.Linear(64, 64), device).full()
    except Exception as error:  # what a missing kernel raises is up to the device's backend
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"lora.quantize=nf4: bitsandbytes has no working NF4 kernel for {device}: {said}") from None
    linears = [(name, m) for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UserError(f"lora.quantize=nf4: {type(model).__name__} has no nn.Linear layers to keep in four bits")
    for name, layer in linears:
        model.base_model.set_submodule(name, NF4Linear.of(layer, device))
    for parameter in model.parameters():
        if parameter.is_floating_point():  # a copy: loaded weights are views of the mapped file, which so can go
            parameter.data = parameter.data.to(device, copy=True)
    return model.to(device)  # type: ignore[arg-type, return-value]


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError:
        raise UserError("lora.quantize=nf4 needs bitsandbytes: pip install 'trueup[quantize]'") from None
    return functional
