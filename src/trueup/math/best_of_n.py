"""Best of n: what the best of n samples by one score is worth by another, and how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trueup.math.masked import same_shape


def best_of_n(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> Tensor:
    """The expected gold of the best by proxy among n of N samples, over all subsets of n: with the samples in
    ascending order of proxy,

        sum_i w_i gold_(i),   w_i = C(i - 1, n - 1) / C(N, n)

    proxy, gold [N] or [P, N]: scores of the same samples (of P prompts) -> [len(ns)] or [P, len(ns)] in the unit of
    gold and, where that is a floating one, its dtype. It is unbiased for fresh draws of n. Equal proxies are a toss, so
    each counts as the mean of all. ValueError where the shapes differ, a proxy is NaN, or an n is not in 1..N. Source:
    Nakano et al. 2021 (WebGPT), appendix I.
    """
    same_shape(proxy=proxy, gold=gold)
    _check(proxy, ns)
    order = proxy.argsort(-1)
    ranked, values = proxy.gather(-1, order), gold.double().gather(-1, order)
    tier = _tiers(ranked)
    sums, counts = (torch.zeros_like(values).scatter_add_(-1, tier, x) for x in (values, torch.ones_like(values)))
    values = sums.gather(-1, tier) / counts.gather(-1, tier)
    best = torch.stack([(values * _weights(n, values)).sum(-1) for n in ns], -1)
    return best.to(gold.dtype) if gold.is_floating_point() else best


def best_of_n_kl(proxy: Tensor, ns: Sequence[int], *, probs: Tensor | None = None) -> Tensor:
    """KL(best of n || policy) where answers are N discrete ones: with F the probability of a score at or below,

        sum over distinct scores t of q_t log(q_t / p_t),   q_t = F_t^n - F_(t-1)^n

    proxy [N] or [P, N]; probs, of its shape: the probability of each answer, 1/N each without (N samples stand for
    the policy; answers that repeat score alike) -> [len(ns)] or [P, len(ns)] nats, float64. Never above -log of the
    best score's probability, where log n - (n - 1)/n goes on rising. ValueError as in `best_of_n`; n may be above N
    where probs are given. Source: Beirami et al. 2024, with ties as tosses.
    """
    _check(proxy, ns, any_n=probs is not None)
    probs = torch.full_like(proxy, 1 / proxy.shape[-1], dtype=torch.float64) if probs is None else probs.double()
    same_shape(proxy=proxy, probs=probs)
    order = proxy.argsort(-1)
    tier = _tiers(proxy.gather(-1, order))
    p = torch.zeros_like(probs).scatter_add_(-1, tier, probs.gather(-1, order))
    upto = p.cumsum(-1)
    out = []
    for n in ns:
        q = upto**n - (upto - p) ** n
        out.append(torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1).clamp(min=0))
    return torch.stack(out, -1)


def best_of_n_bound(n: int) -> float:
    """log n - (n - 1)/n nats: the KL of best of n where no two samples are alike, a bound where some are.

    ValueError for n below 1. Source: Stiennon et al. 2020, appendix G.3; that it is a bound: Beirami et al. 2024.
    """
    if n < 1:
        raise ValueError(f"n is 1 or more, not {n}")
    return math.log(n) - (n - 1) / n


def _check(proxy: Tensor, ns: Sequence[int], any_n: bool = False) -> None:
    if wrong := [n for n in ns if n < 1 or (n > proxy.shape[-1] and not any_n)]:
        raise ValueError(f"n is from 1 to the {proxy.shape[-1]} samples, not {wrong[0]}")
    if proxy.isnan().any():
        raise ValueError("a proxy score is NaN")


def _tiers(ranked: Tensor) -> Tensor:
    """The number of each sample's tier, from 0, where ascending scores [..., N] are equal in a tier."""
    new = torch.ones_like(ranked, dtype=torch.long)
    new[..., 1:] = ranked[..., 1:] > ranked[..., :-1]
    return new.cumsum(-1) - 1


def _weights(n: int, like: Tensor) -> Tensor:
    """w [..., N] for samples like these, by w_N = n / N and w_i = w_(i+1) (i + 1 - n) / i: no binomial is formed."""
    rank = torch.ones_like(like).cumsum(-1)
    falls = (rank + 1 - n) / rank
    falls[..., -1] = n / like.shape[-1]
    return falls.flip(-1).cumprod(-1).flip(-1)
