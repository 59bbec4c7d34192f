"""How the true score moves as a proxy is optimized: the two forms of Gao et al. 2022, their fits and their peaks.

d = sqrt(KL(policy || start)), KL in nats per completion; R(d) = true score minus the start's, so R(0) = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trueup.math.masked import same_shape


class ScalingFit(NamedTuple):
    """What `fit_scaling` found, each [...]."""

    alpha: Tensor
    beta: Tensor
    r2: Tensor  # 1 - residual / total sum of squares about the mean
    over_line: Tensor  # AICc of the line R = alpha d minus AICc of the form: above 0 the form is the better one


def scaling_curve(d: Tensor, alpha: Tensor | float, beta: Tensor | float, *, form: str) -> Tensor:
    """R(d) of best-of-n, d (alpha - beta d), form "bon"; of reinforcement learning, d (alpha - beta log d), form "rl".

    d [...] at or above 0 (at 0 R is 0), alpha and beta broadcast -> [...] in their unit. ValueError for another form.
    Source: Gao, Schulman, Hilton 2022, section 3.1.
    """
    return alpha * d - beta * _bend(d, form)


def scaling_peak(alpha: Tensor, beta: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Where R is highest, and how high: d* = alpha / (2 beta), R* = alpha^2 / (4 beta) for "bon"; d* =
    exp(alpha / beta - 1), R* = beta d* for "rl".

    alpha, beta [...] -> d* [...], R* [...]. Both mean something only where beta > 0 (and alpha > 0 for "bon"): else R
    does not turn. ValueError for another form. Source: derived from the forms; the paper does not print them.
    """
    if form == "bon":
        return alpha / (2 * beta), alpha.square() / (4 * beta)
    if form == "rl":
        d = (alpha / beta - 1).exp()
        return d, beta * d
    raise _unknown(form)


def fit_scaling(d: Tensor, gain: Tensor, *, form: str, mask: Tensor | None = None) -> ScalingFit:
    """Ordinary least squares of R(d) without an intercept: both forms are linear in alpha and beta.

    d, gain, mask [..., K], mask True where a point counts (all without) -> `ScalingFit` of [...], float64. The
    points of a curve share samples, so that errors from residuals mean nothing: bootstrap the whole fit. AICc =
    K log(RSS / K) + 2 k + 2 k (k + 1) / (K - k - 1) with k coefficients and the variance. ValueError where shapes
    differ, for another form, or for fewer than 5 points, where AICc does not exist. Source: Gao, Schulman, Hilton 2022,
    section 3.1; Burnham and Anderson 2002, section 2.4.
    """
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    same_shape(d=d, gain=gain, mask=mask)
    count = mask.sum(-1).double()
    if (count < 5).any():
        raise ValueError(f"{int(count.min())} points: a fit that is held against a line takes 5")
    x, y = (torch.where(mask, value.double(), 0.0) for value in (d, gain))
    columns = torch.stack([x, -_bend(x, form)], -1)
    (alpha, beta), rest = _least_squares(columns, y)
    _, rest_of_line = _least_squares(columns[..., :1], y)
    about_mean = torch.where(mask, y - (y.sum(-1) / count).unsqueeze(-1), 0.0).square().sum(-1)
    # K log K is in both of them.
    gap = count * (rest_of_line / rest).log() + _penalty(count, 2) - _penalty(count, 3)
    return ScalingFit(alpha, beta, 1 - rest / about_mean, gap)


def _least_squares(columns: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The coefficients of columns [..., K, C], [...] each, and the residual sum of squares [...]."""
    found = torch.linalg.lstsq(columns, y.unsqueeze(-1)).solution
    return found.squeeze(-1).unbind(-1), (y - (columns @ found).squeeze(-1)).square().sum(-1)


def _bend(d: Tensor, form: str) -> Tensor:
    """What beta multiplies: d^2, or d log d, which is 0 at 0."""
    if form == "bon":
        return d.square()
    if form == "rl":
        return torch.special.xlogy(d, d)
    raise _unknown(form)


def _unknown(form: str) -> ValueError:
    return ValueError(f"form is 'bon' or 'rl', not {form!r}")


def _penalty(count: Tensor, k: int) -> Tensor:
    return 2 * k + 2 * k * (k + 1) / (count - k - 1)
