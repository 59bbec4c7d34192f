"""What people prefer, estimated from few people and many verdicts of a machine; and how many people that takes."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch

from trueup.math.statistics import Numbers, student_quantile


class Powered(NamedTuple):
    """`mean` in [0, 1] with its interval; `weight` in [0, 1]: how far the predictions were believed."""

    mean: float
    low: float
    high: float
    weight: float


def prediction_powered_mean(labels: Numbers, predictions: Numbers, others: Numbers, *, level: float = 0.95) -> Powered:
    """The mean of labels over all rows, where a random n of them have labels and all have predictions.

        mean = w mean(others) + mean(labels - w predictions)
        w    = cov(labels, predictions) / ((1 + n / N) var(predictions and others)),  within [0, 1]

    labels [n] and predictions [n] of the labelled rows, others [N]: predictions of the rows without a label, all in
    [0, 1]. The mean is the people's, however wrong the predictions are, as long as the labelled rows are a random
    sample; good predictions narrow the interval, useless ones get the weight 0. With no others it is the labels' own
    mean. The interval is Student's t from the two means' variances; it is taken with one more row labelled 0 and one
    labelled 1 at the mean prediction (Agresti and Caffo 2000), without which it is far too narrow near 0 and 1.
    ValueError for shapes that do not fit, fewer than 2 labels, or values outside [0, 1]. Source: Angelopoulos et al.
    2023; the weight, Angelopoulos, Duchi and Zrnic 2023, section 6.
    """
    y, f, rest = (torch.as_tensor(x, dtype=torch.float64) for x in (labels, predictions, others))
    n, many = len(y), len(rest)
    if y.shape != f.shape or y.ndim != 1 or rest.ndim != 1 or n < 2:
        raise ValueError(f"labels {tuple(y.shape)}, predictions {tuple(f.shape)}, others {tuple(rest.shape)}")
    every = torch.cat([y, f, rest])
    if not ((every >= 0) & (every <= 1)).all():
        raise ValueError("labels and predictions must lie in [0, 1]")
    spread, weight, base, noise = torch.cat([f, rest]).var(), *torch.zeros(3)
    if many > 1 and spread > 0:
        together = torch.cov(torch.stack([y, f]))[0, 1]
        weight = (together / ((1 + n / many) * spread)).clamp(0, 1)
        base, noise = weight * rest.mean(), weight**2 * rest.var() / many
    left = y - weight * f
    mean = (base + left.mean()).clamp(0, 1)
    padded = torch.cat([left, torch.stack([1 - base, -base])])
    centre, variance = base + padded.mean(), padded.var() / (n + 2) + noise
    half = student_quantile(level, n + 1) * variance.sqrt()
    low, high = (centre - half).clamp(min=0), (centre + half).clamp(max=1)
    return Powered(*(float(x) for x in (mean, low, high, weight)))


def decisive_pairs(share: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """How many comparisons that are no ties it takes to tell a preference of `share` from one half by the sign test.

        n0 = ((z_(1+level)/2 / 2 + z_power sqrt(share (1 - share))) / d)^2,  d = |share - 1/2|
        n  = n0 / 4 (1 + sqrt(1 + 2 / (n0 d)))^2

    share in (0, 1) but 1/2: of the decisive comparisons, those that the better one wins -> n, rounded up, with which
    a two-sided test at `level` finds it with probability `power`. ValueError for a share of 1/2 or none. Source:
    Fleiss, Levin and Paik 2003, section 2.5, with the correction for continuity.
    """
    if not 0 < share < 1 or share == 0.5:
        raise ValueError(f"share {share}: expected a number in (0, 1) other than 0.5")
    z = NormalDist().inv_cdf
    wide = z((1 + level) / 2) / 2 + z(power) * math.sqrt(share * (1 - share))
    gap = abs(share - 0.5)
    rough = (wide / gap) ** 2
    return math.ceil(rough / 4 * (1 + math.sqrt(1 + 2 / (rough * gap))) ** 2)
