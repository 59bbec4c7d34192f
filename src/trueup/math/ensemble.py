"""Several reward models as one: their scores combined, and how far they disagree."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Combine = Literal["mean", "median", "wco", "uwo"]


def ensemble_score(scores: Tensor, *, kind: Combine = "mean", penalty: float = 0.5) -> Tensor:
    """One number for each completion from the scores of K members, with m their mean:

        mean     m = (1/K) sum_k s_k
        median   the middle one; of an even number the mean of the two in the middle
        wco      min_k s_k                                     worst case
        uwo      m - penalty * (1/K) sum_k (s_k - m)^2         the variance, with 1/K: not the standard deviation

    scores [K, B], K >= 1, all members in one unit (normalized); penalty: lambda of uwo alone, 1 / that unit
    -> [B] in that unit. ValueError unless scores are [K, B] and the kind is known. Source: Coste et al. 2023,
    equations 3 to 5.
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)} must be [K, B]")
    if kind == "mean":
        return scores.mean(0)
    if kind == "median":
        return scores.quantile(0.5, dim=0)
    if kind == "wco":
        return scores.amin(0)
    if kind == "uwo":
        return scores.mean(0) - penalty * scores.var(0, correction=0)
    raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Combine))}")


def disagreement(scores: Tensor) -> Tensor:
    """The standard deviation over K members, sqrt((1/K) sum_k (s_k - m)^2) with m their mean.

    scores [K, B] -> [B] in the unit of the scores; 0 for one member. ValueError unless scores are [K, B].
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)} must be [K, B]")
    return scores.std(0, correction=0)
