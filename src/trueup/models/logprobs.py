"""Token log-probs, entropy and exact KL from hidden states and the vocabulary head, in chunks of rows.

Logits of a chunk [c, V] live only while it is worked on; the backward computes them again, unless all of them
together are small. Nothing here ever holds [B, T, V].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trueup.models.linear import product, weight_gradient

CHUNK = 1 << 22
"""Logits worked on at a time (16 MiB in float32)."""
KEEP = 1 << 23
"""Up to this many, the forward's probabilities are kept for the backward instead of being computed again."""


@dataclass(frozen=True)
class Head:
    """What turns a hidden state into logits: cap * tanh(x / cap) of x = (h W^T + b) * scale; no cap where None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of a causal language model, its parameters as they are at this moment."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> logits [..., V], float32, without gradients."""
        logits = product(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class _TokenLogprobs(torch.autograd.Function):
    """p = softmax(z / t); d logp_y = onehot(y) - p;  d H = -p (log p + H), both over z / t."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, scale, cap)
        count, rows = hidden.shape[0], max(1, CHUNK // weight.shape[0])
        keep = count * weight.shape[0] <= KEEP and any(ctx.needs_input_grad) and cap is None
        logprobs = hidden.new_empty(count, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        kept = []
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            z = head(hidden[part])
            logp = torch.log_softmax(z if temperature == 1.0 else z / temperature, -1)
            logprobs[part] = logp.gather(-1, targets[part, None])[:, 0]
            p = logp.exp()
            # A product, not p * logp with a sum: no third [c, V] buffer is made.
            entropy[part] = -torch.linalg.vecdot(p, logp.clamp(min=-1e30))
            if keep:
                kept.append(logp)
        ctx.settings = (scale, cap, temperature, rows, keep)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors
        scale, cap, temperature, rows, keep = ctx.settings
        head = Head(weight, bias, scale, cap)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        if grad_logprobs is None and grad_entropy is None:
            return grad_hidden, grad_weight, grad_bias, None, None, None, None
        for i, start in enumerate(range(0, hidden.shape[0], rows)):
            part = slice(start, start + rows)
            z = None
            if keep:
                logp = kept[i]
            else:
                z = head(hidden[part])
                logp = torch.log_softmax(z if temperature == 1.0 else z / temperature, -1)
            g = logp.exp()
            if grad_entropy is not None:
                h = grad_entropy[part, None]
                extra = (logp + entropy[part, None]).mul_(h)
                if grad_logprobs is not None:
                    extra.add_(grad_logprobs[part, None])
                g.mul_(extra).neg_()
            else:
                g.mul_(-grad_logprobs[part, None])  # type: ignore[index]
            if grad_logprobs is not None:
                g.scatter_add_(-1, targets[part, None], grad_logprobs[part, None])
            if cap is not None:
                g.mul_(1 - (z / cap) ** 2)  # type: ignore[operator]
            if scale != temperature:
                g.mul_(scale / temperature)
            if grad_bias is not None:
                grad_bias += g.sum(0)
            g = g.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(g, weight.T)
            if grad_weight is not None:
                grad_weight += weight_gradient(g, hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `targets`, and the entropy of that distribution in nats.

    hidden [M, d], targets [M] -> (logprobs [M], entropy [M]), float32, both with gradients to hidden and the head.
    """
    return _TokenLogprobs.apply(  # type: ignore[no-any-return]
        hidden, head.weight, head.bias, targets, head.scale, head.cap, temperature
    )


@torch.no_grad()
def compare(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(policy || reference) over the whole vocabulary at each row, in nats, and both log-probs of `targets`.

    hidden [M, d], [M, d'], targets [M] -> three times [M], float32.
    """
    rows = max(1, CHUNK // head.weight.shape[0])
    out = tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logp = torch.log_softmax(head(hidden[part]) / temperature, -1)
        logq = torch.log_softmax(ref_head(ref_hidden[part]) / temperature, -1)
        out[0][part] = torch.linalg.vecdot(logp.exp(), logp - logq)
        for logprobs, log in zip(out[1:], (logp, logq), strict=True):
            logprobs[part] = log.gather(-1, targets[part, None])[:, 0]
    return out  # type: ignore[return-value]
