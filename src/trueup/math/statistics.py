"""How sure a measured figure is: calibration of probabilities, and intervals.

Unlike the rest of `trueup.math` these reduce, work in float64 on the CPU, and give plain numbers where one
number is the answer. They check their input, since they run once at the end of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float]
POINTS = 200_001  # in the table of a Student variable


def expected_calibration_error(p: Numbers, outcome: Numbers, bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """How far stated probabilities are from what happened: sum_b n_b / N |mean p - mean outcome| over bins b.

    p [N] in [0, 1], outcome [N] in [0, 1] (soft ones too), `bins` of equal width, a value on an edge
    belonging to the upper one -> (error in [0, 1], the reliability table: for each bin that is not empty, in
    order, {lower, upper, n, confidence: mean p, observed: mean outcome}). No values: (0.0, []). ValueError
    where the shapes do not fit, a value is not a probability, or bins is below 1. Source:
    Naeini et al. 2015; Guo et al. 2017, equation 3.
    """
    p = torch.as_tensor(p, dtype=torch.float64)
    outcome = torch.as_tensor(outcome, dtype=torch.float64)
    if p.shape != outcome.shape or p.ndim != 1 or bins < 1:
        raise ValueError(f"p {tuple(p.shape)} and outcome {tuple(outcome.shape)} must be [N]; bins {bins} >= 1")
    for name, x in {"p": p, "outcome": outcome}.items():
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"{name} holds what is not a probability")
    index = (p * bins).long().clamp(max=bins - 1)
    error, table = 0.0, []
    for b in range(bins):
        n = int((index == b).sum())
        if n == 0:
            continue
        confidence, observed = p[index == b].mean().item(), outcome[index == b].mean().item()
        error += n / len(p) * abs(confidence - observed)
        table.append(
            {"lower": b / bins, "upper": (b + 1) / bins, "n": n, "confidence": confidence, "observed": observed}
        )
    return error, table


def bootstrap_interval(
    values: Numbers, *, seed: int, level: float = 0.95, samples: int = 10_000
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of the mean over the first axis.

    values [N, ...], rows independent (a prompt each, not a token) -> (low [...], high [...]) float64 in the
    unit of the values: the quantiles (1 -+ level) / 2 of the means of `samples` resamples of N rows. Rows are
    drawn whole, so that differences of columns keep their pairing. The same seed gives the same interval.
    ValueError for no rows, or unless 0 < level < 1. Source: Efron 1979; Efron and Tibshirani 1993, chapter
    13.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if not len(values) or not 0 < level < 1:
        raise ValueError(f"values {tuple(values.shape)} at level {level}")
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(samples))
    means = torch.stack([values[rows].mean(0) for rows in draws])
    low, high = (means.quantile(q, dim=0) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high


def nested_bootstrap(groups: Sequence[Tensor], *, seed: int, samples: int = 10_000) -> Tensor:
    """Means of resamples of groups, and within each of its rows: of seeds, and of each seed's prompts.

    groups: G of [H, N, C]: N rows (a prompt each) in each of H parts, which are resampled apart; N may differ from
    group to group -> [samples, G, H, C] float64: in each resample G groups drawn with replacement, and of each the
    means of N of its rows, drawn with replacement. Rows are drawn whole, so that columns (conditions) keep their
    pairing; a group that is drawn twice has its rows drawn twice. The same seed gives the same resamples. ValueError
    without groups, for one without rows, or where H or C differ. Source: Davison and Hinkley 1997, section 3.8.
    """
    shapes = {(group.shape[0], group.shape[2]) for group in groups}
    if len(shapes) != 1 or any(not group.shape[1] for group in groups):
        raise ValueError(f"groups of {[tuple(group.shape) for group in groups]}: some, alike but in N, with rows")
    [(parts, columns)] = shapes
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(groups), (samples, len(groups)), generator=generator)
    out = torch.empty(samples, len(groups), parts, columns, dtype=torch.float64)
    for i, group in enumerate(groups):
        n, rows = len(drawn[drawn == i]), group.shape[1]
        picks = torch.randint(rows, (n, parts, rows), generator=generator)
        counts = torch.zeros(n, parts, rows, dtype=torch.float64).scatter_add_(
            2, picks, torch.ones_like(picks).double()
        )
        out[drawn == i] = torch.einsum("npr,prc->npc", counts, group.double()) / rows
    return out


def student_mass(t: float, freedom: int) -> float:
    """The probability that a Student variable of so many degrees of freedom stays within +- t.

    t >= 0, freedom >= 1 -> in [0, 1]. Source: Student 1908; with t = sqrt(freedom) tan(u) the density of u in
    [-pi/2, pi/2] is proportional to cos(u)^(freedom - 1).
    """
    u, mass = _student(freedom)
    return _interpolate(math.atan(t / math.sqrt(freedom)), u, mass)


def student_quantile(level: float, freedom: int) -> float:
    """The t that a Student variable stays within, either side, with probability `level` in (0, 1)."""
    u, mass = _student(freedom)
    return math.sqrt(freedom) * math.tan(_interpolate(level, mass, u))


@lru_cache(maxsize=16)
def _student(freedom: int) -> tuple[Tensor, Tensor]:
    u = torch.linspace(0, math.pi / 2, POINTS, dtype=torch.float64)
    mass = (u.cos() ** (freedom - 1)).cumsum(0)
    return u, mass / mass[-1]


def _interpolate(x: float, xs: Tensor, ys: Tensor) -> float:
    """y at x on the line through the neighbours, xs ascending and x within them."""
    i = torch.searchsorted(xs[1:-1], x)  # of how many it is right
    share = (x - xs[i]) / (xs[i + 1] - xs[i])
    return float(ys[i] + share * (ys[i + 1] - ys[i]))
