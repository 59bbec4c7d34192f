"""Losses of a reward model that learns from pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from trueup.math.masked import same_shape


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0, label: float | Tensor = 1.0
) -> Tensor:
    """Negative log-likelihood of a label under the Bradley-Terry model, with s the logistic function:

        -y log s(c - r - m) - (1 - y) log s(r - c - m)

    chosen c [B], rejected r [B]: scores; margin m: a number or [B], in the unit of the scores, by which the
    better one should lead; label y: a number or [B] in [0, 1], the probability that chosen is better (1
    certain, 0.5 a tie) -> [B] nats. At equal scores without a margin it is ln 2. ValueError where the shapes
    differ. Source: Bradley and Terry 1952; Ouyang et al. 2022, equation 1; the margin: Touvron et al. 2023
    (Llama 2), equation 2; soft labels: Bai et al. 2022 (Constitutional AI), section 4.1.
    """
    given = {"margin": margin, "label": label}
    per_pair = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
    same_shape(chosen=chosen, rejected=rejected, **per_pair)
    gap = chosen - rejected
    return -label * logsigmoid(gap - margin) - (1 - label) * logsigmoid(-gap - margin)


def center_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(c + r)^2, which ties down the constant that `bradley_terry_loss` leaves free.

    chosen c [B], rejected r [B] -> [B] in the unit of the scores squared; small weights (0.01) do. ValueError
    where the shapes differ. Source: Eisenstein et al. 2023 ("Helping or herding?"), as in TRL's
    `center_rewards`.
    """
    same_shape(chosen=chosen, rejected=rejected)
    return (chosen + rejected).square()
