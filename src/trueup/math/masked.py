"""Means, variances and whitening over the positions that count.

A mask is a tensor of the values' shape; True (or non-zero) counts. What lies outside it is never read: NaN
and infinities there change no result, and get a gradient of exactly zero. A mask in which nothing counts
gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, with the shapes, unless all have one: broadcasting would hide a wrong layout."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items()))


def inside(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask counts, zero elsewhere. A product with the mask would not do: 0 x NaN is NaN."""
    return torch.where(mask.bool(), x, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask: sum(x m) / sum(m).

    x [...], mask [...] -> [] in the unit of x; 0 where nothing counts. ValueError where the shapes differ.
    """
    same_shape(x=x, mask=mask)
    return inside(x, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of x over the mask: sum((x - mean)^2 m) / n, n = sum(m), or n - 1 (Bessel) where `unbiased`.

    x [...], mask [...] -> [] in the unit of x squared; 0 where fewer than two positions count. ValueError
    where the shapes differ.
    """
    centred = inside(x - masked_mean(x, mask), mask)
    return centred.square().sum() / (mask.bool().sum() - int(unbiased)).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """(x - mean) rsqrt(var + 1e-8) over the mask; `shift_mean=False` adds the mean back (reward whitening).

    x [B, T], mask [B, T] -> [B, T] in the dtype of x, without a unit, zero outside the mask. Mean and
    variance are those of all positions that count, not of each row. ValueError where the shapes differ.
    Source: Ziegler et al. 2019, `whiten` of openai/lm-human-preferences, which uses the biased variance;
    `unbiased=True` is the form of TRL and verl.
    """
    mean = masked_mean(x, mask)
    # Cleaned before the product: junk would reach the scale's gradient as 0 x NaN.
    whitened = inside(x - mean, mask) * torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + 1e-8)
    return whitened if shift_mean else inside(whitened + mean, mask)
