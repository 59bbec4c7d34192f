"""How likely something is, given what is known of a case: logistic regression for few cases. Float64, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from trueup.math.statistics import Numbers


def fit_logistic(x: Numbers | list[list[float]], outcome: Numbers, ridge: Numbers, *, steps: int = 50) -> Tensor:
    """The weights w that minimize sum_i [log(1 + exp(z_i)) - y_i z_i] + sum_d ridge_d w_d^2 / 2, z = x w.

    x [N, D] (a column of ones is an intercept), outcome y [N] in [0, 1], soft ones too, ridge [D] > 0 -> w [D] float64.
    A weight's ridge is one over the variance of a Gaussian prior around 0: few cases move it little, none not at all,
    and cases that one column separates leave it finite. By `steps` of Newton's method, each halved while it does not
    lead down; the loss is strictly convex, so there is one minimum. ValueError for shapes that do not fit, an outcome
    outside [0, 1] or a ridge that is not above 0. Source: Hastie, Tibshirani and Friedman 2009, sections 4.4.1, 4.4.4.
    """
    x, y, ridge = (torch.as_tensor(a, dtype=torch.float64) for a in (x, outcome, ridge))
    if x.ndim != 2 or y.shape != x.shape[:1] or ridge.shape != x.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)} must be [N, D], outcome {tuple(y.shape)} [N], ridge {tuple(ridge.shape)} [D]"
        )
    if not ((y >= 0) & (y <= 1)).all() or not (ridge > 0).all():
        raise ValueError("outcomes must lie in [0, 1], and ridge above 0")

    def loss(w: Tensor) -> Tensor:
        z = x @ w
        return (torch.nn.functional.softplus(z) - y * z).sum() + (ridge * w**2).sum() / 2

    w = x.new_zeros(x.shape[1])
    for _ in range(steps):
        q = torch.sigmoid(x @ w)
        slope = x.T @ (q - y) + ridge * w
        step = torch.linalg.solve(x.T @ ((q * (1 - q))[:, None] * x) + ridge.diag(), slope)
        while loss(w - step) > (1 + 1e-9) * loss(w):  # beyond rounding
            step = step / 2
        w = w - step
    return w
