"""Gradient checkpointing (Chen et al. 2016): a layer keeps only its inputs, and runs again in the backward.

Not transformers' own switch: that asks for train mode, where some families drop out, and runs a layer again with the
weights that it has by then, which under `InBF16` are no longer those of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trueup.records import UserError


class _Recomputed:
    """Comes before a layer's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # The weights as they are now: the backward comes when `functional_call` has put the masters back.
        weights = {f"layer.{name}": p for name, p in self.named_parameters()}  # type: ignore[attr-defined]
        again = _Held(self, run)  # type: ignore[arg-type]

        def held(*args: Any, **kwargs: Any) -> Any:
            return functional_call(again, weights, args, kwargs)

        return checkpoint(held, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Held(nn.Module):
    """What `functional_call` needs to call a layer's own forward."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on the model's layers run again in the backward. In place; weights and files stay as they are."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} has no layers that can run again")
    for layer in layers:
        if not isinstance(layer, _Recomputed):
            layer.__class__ = type(type(layer).__name__, (_Recomputed, type(layer)), {})
