"""Temperature scaling: one number that makes stated probabilities as sure as they deserve. Float64, plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float]
SURE = 1e-6
"""A probability is taken as no nearer to 0 or 1: certainty has no finite log-odds."""


def at_temperature(p: Numbers, temperature: float) -> Tensor:
    """s(logit(p) / T), s the logistic function: above 1 less sure, below 1 more sure; 1/2 stays.

    p [N] in [0, 1], T > 0 -> [N] float64. ValueError for another T. Source: Guo et al. 2017, section 4.2.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    return torch.sigmoid(_logits(p) / temperature)


def fit_temperature(p: Numbers, outcome: Numbers, *, lowest: float = 0.05, highest: float = 20.0) -> float:
    """The T in [lowest, highest] that minimizes the mean of -y log q - (1 - y) log(1 - q), q = `at_temperature`(p, T).

    p [N] in [0, 1], outcome y [N] in [0, 1] (soft ones too). The loss is convex in 1/T, whose root is bisected. Where
    all p are 1/2 any T does: 1. ValueError where the shapes differ, or without values. Source: Guo et al. 2017,
    section 4.2.
    """
    z, y = _logits(p), torch.as_tensor(outcome, dtype=torch.float64)
    if z.shape != y.shape or z.ndim != 1 or not len(z):
        raise ValueError(f"p {tuple(z.shape)} and outcome {tuple(y.shape)} must be [N], N >= 1")
    if not z.any():
        return 1.0
    low, high = 1 / highest, 1 / lowest
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        slope = (z * (torch.sigmoid(middle * z) - y)).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / middle


def _logits(p: Numbers) -> Tensor:
    return torch.logit(torch.as_tensor(p, dtype=torch.float64), eps=SURE)
