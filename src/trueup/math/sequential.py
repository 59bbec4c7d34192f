"""Means that are looked at again and again: tests and bounds that hold at every look, by betting.

An ordinary 95% interval that is computed after every check is wrong at some check far more often than once in twenty
runs. These are not: the chance that they are wrong at *any* check, however many there are and whenever one stops, is
at most `error`. They reduce, work in float64 on the CPU, and give plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trueup.math.statistics import Numbers

STAKES = 50
ROUNDING = 1e-12  # curves whose costs differ by less fit alike


def log_capital(values: Numbers, mean: float, *, starts: Sequence[int] = (0,)) -> float:
    """Log of what somebody owns by now who has bet a capital of 1 that the values' mean is above `mean`:

        (1/S) sum over starts s, (1/K) sum over stakes c = 1/2K, 3/2K, ...   prod_(i >= s) (1 - c + c x_i / mean)

    At each value a share c of the capital is staked at odds of 1 / mean, which is fair, or worse, where no value's
    expectation given the earlier ones is above `mean`: the capital is then a supermartingale, and the chance that it
    ever reaches 1/a is at most a (Ville). The mixture over K = 50 stakes needs no guess of how far above; that over
    starts finds a mean that rises late.

    values [N] in [0, 1], in the order in which they came, mean in (0, 1]; starts: positions from which it may be bet,
    the same ones at every look: those at or after N still hold their 1 -> nats. ValueError for a value outside [0, 1],
    a mean outside (0, 1], no start, or a negative one. Source: Waudby-Smith and Ramdas 2024, section 4; over starts:
    Shin, Ramdas and Rinaldo 2024.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all() or not 0 < mean <= 1 or not starts or min(starts) < 0:
        raise ValueError(f"values {tuple(x.shape)} must lie in [0, 1], mean {mean} in (0, 1], starts {list(starts)}")
    stakes = (torch.arange(STAKES, dtype=torch.float64) + 0.5) / STAKES
    gains = (1 - stakes + stakes * x[:, None] / mean).log()
    owned = torch.stack([gains[start:].sum(0) for start in starts])
    return float(owned.logsumexp([0, 1])) - math.log(owned.numel())


def betting_bounds(
    values: Numbers, *, error: float, low: float = 0.0, high: float = 1.0, starts: Sequence[int] = (0,)
) -> tuple[float, float]:
    """(lower, upper) bound of the mean of values that come one by one, each wrong at any time with chance `error`.

    lower: the largest mean against which `log_capital` has reached log(1 / error): some value's expectation, given the
    earlier ones, is above it (where all have one expectation: that). upper: the same of the mirrored values. With
    several `starts` a bound may come from the values after one of them alone, so that lower may lie above upper: the
    mean has moved. No values: (low, high).

    values [N] in [low, high], in their order; starts as in `log_capital` -> both in the unit of the values, in
    [low, high]. ValueError as there, or unless 0 < error < 1 and low < high. Source: as there.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if not 0 < error < 1 or not low < high or not ((x >= low) & (x <= high)).all():
        raise ValueError(f"error {error} must lie in (0, 1), low {low} below high {high}, the values between these")
    shares = (x - low) / (high - low)
    return low + (high - low) * _lower(shares, error, starts), high - (high - low) * _lower(1 - shares, error, starts)


def _lower(x: Tensor, error: float, starts: Sequence[int]) -> float:
    """The largest multiple of 2^-40 that the bets refute: capital falls as the mean rises, at 1 it is at most 1."""
    refuted, open_ = 0.0, 1.0
    for _ in range(40):
        middle = (refuted + open_) / 2
        if log_capital(x, middle, starts=starts) >= -math.log(error):
            refuted = middle
        else:
            open_ = middle
    return refuted


def drop_bound(values: Numbers, splits: Sequence[int], *, error: float, planned: int) -> float:
    """How far the mean has surely fallen: the largest, over splits s, of

        lower bound of the mean of values[:s] - upper bound of the mean of values[s:]

    values [N] in [0, 1], in their order; splits: positions at which the values may be parted; `planned`: how many
    splits there will be at most, over which the error is shared -> a number in [-1, 1], below 0 where a fall is not
    sure; -1 without a split inside the values. The chance that it is ever above 0 while no value is expected to be
    below what an earlier one was is at most `error`. ValueError as in `betting_bounds`, or for more splits than
    planned. Source: the bounds of Waudby-Smith and Ramdas 2024, shared out by Bonferroni.
    """
    if len(splits) > planned:
        raise ValueError(f"{len(splits)} splits, {planned} planned")
    inside = [s for s in splits if 0 < s < len(values)]
    each = error / (2 * planned)
    return max(
        (betting_bounds(values[:s], error=each)[0] - betting_bounds(values[s:], error=each)[1] for s in inside),
        default=-1,
    )


def unimodal_fit(values: Numbers, weights: Numbers) -> Tensor:
    """The curve that first rises and then falls, either in steps, nearest to the values:

        argmin over u with u_1 <= ... <= u_k >= ... >= u_N for some k   of sum_i weights_i (values_i - u_i)^2

    values, weights [N], weights above 0 -> [N] float64 in the unit of the values; of peaks that fit alike the first.
    ValueError where the shapes differ, there is no value, or a weight is not above 0. Source: Frisen 1986; rising and
    falling parts by pooling adjacent violators (Barlow et al. 1972).
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    w = torch.as_tensor(weights, dtype=torch.float64)
    if x.shape != w.shape or x.ndim != 1 or not len(x) or not (w > 0).all():
        raise ValueError(f"values {tuple(x.shape)} and weights {tuple(w.shape)}, above 0, must be [N]")
    fits = torch.stack(
        [torch.cat([_rising(x[:k], w[:k]), _rising(x[k:].flipud(), w[k:].flipud()).flipud()]) for k in range(len(x))]
    )
    costs = (x - fits) ** 2 @ w
    return fits[(costs < costs.min() + ROUNDING).int().argmax()]


def _rising(x: Tensor, w: Tensor) -> Tensor:
    """The nearest curve that never falls: neighbours that do are pooled into their weighted mean."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in torch.stack([x, w], 1).tolist():
        pool = value, weight, 1
        while pools and pools[-1][0] >= pool[0]:
            mean, heavy, many = pools.pop()
            total = heavy + pool[1]
            pool = (mean * heavy + pool[0] * pool[1]) / total, total, many + pool[2]
        pools.append(pool)
    return torch.tensor([mean for mean, _, many in pools for _ in range(many)], dtype=torch.float64)
