"""Best of n: equal to trying every subset, ties and all, and the KL that goes with it."""

import math
from itertools import combinations, product

import pytest
import torch

from trueup.math import best_of_n, best_of_n_bound, best_of_n_kl

f64 = torch.float64


def brute_force(proxy: list[float], gold: list[float], n: int) -> float:
    """The mean, over all subsets of n samples, of the mean gold of a subset's best by proxy."""
    best = []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        tied = [gold[i] for i in subset if proxy[i] == top]
        best.append(sum(tied) / len(tied))
    return sum(best) / len(best)


@pytest.mark.parametrize("levels", [2, 3, 100])
def test_equals_brute_force(levels, close):
    """With few levels most proxies are tied."""
    generator = torch.Generator().manual_seed(levels)
    for count in range(1, 9):
        proxy = torch.randint(0, levels, (3, count), generator=generator).to(f64)
        gold = torch.randn(3, count, dtype=f64, generator=generator)
        ns = list(range(1, count + 1))
        want = [[brute_force(p, g, n) for n in ns] for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)]
        close(best_of_n(proxy, gold, ns), torch.tensor(want, dtype=f64))
        close(best_of_n(proxy[0], gold[0], ns), torch.tensor(want[0], dtype=f64))


def test_best_of_all_is_the_best_and_of_one_the_mean(close):
    proxy, gold = torch.tensor([2.0, 5.0, 3.0], dtype=f64), torch.tensor([1.0, 0.0, 5.0], dtype=f64)
    close(best_of_n(proxy, gold, [3, 1]), torch.tensor([0.0, 2.0], dtype=f64))


def test_the_dtype_is_golds_and_whole_numbers_become_fractions(close):
    proxy = torch.tensor([1, 2, 3, 3])
    assert best_of_n(proxy, torch.rand(4), [2]).dtype == torch.float32
    # Subsets of 2: {1,2} -> 1; five others hold a 3, whose mean gold is 1/2.
    close(best_of_n(proxy, torch.tensor([0, 1, 1, 0]), [2]), torch.tensor([(1 + 5 / 2) / 6], dtype=f64))


def test_sums_are_in_float64_whatever_comes_in(close):
    close(best_of_n(torch.zeros(3), torch.tensor([2.0**24, 1.0, 1.0]), [2]), torch.tensor([5592406.0]))
    kl = best_of_n_kl(torch.arange(2.0), [1, 2], probs=torch.tensor([0.25, 0.75]))
    close(kl, torch.tensor([0.0, math.log(1 / 4) / 16 + 15 / 16 * math.log(5 / 4)], dtype=f64))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_kl_equals_enumeration(n, close):
    """Every draw of n from four answers of which two are tied: the tied ones by a toss."""
    p, score = [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 1.0, 2.0]
    chosen = [0.0] * 4
    for draw in product(range(4), repeat=n):
        probability = math.prod(p[i] for i in draw)
        tied = [i for i in draw if score[i] == max(score[j] for j in draw)]
        for i in tied:
            chosen[i] += probability / len(tied)
    want = sum(q * math.log(q / p[i]) for i, q in enumerate(chosen) if q)
    got = best_of_n_kl(torch.tensor([score, score]), [n], probs=torch.tensor([p, p], dtype=f64))
    close(got, torch.tensor([[want], [want]], dtype=f64))
    assert want <= best_of_n_bound(n) + 1e-12


def test_samples_stand_for_the_policy(close):
    proxy = torch.tensor([0.5, 0.1, 0.5, 0.5])
    kl = best_of_n_kl(proxy, [2, 4])
    close(kl, best_of_n_kl(torch.tensor([0.1, 0.5]), [2, 4], probs=torch.tensor([0.25, 0.75], dtype=f64)))
    close(best_of_n_kl(torch.stack([proxy, -proxy]), [2])[0], kl[:1])
    # Of many answers that never repeat it is the formula.
    close(best_of_n_kl(torch.arange(40_000.0), [8])[0], best_of_n_bound(8), atol=2e-4)
    # Best of one is the policy; rounding makes no KL negative.
    ones = best_of_n_kl(torch.rand(50, 7, generator=torch.Generator().manual_seed(0)), [1])
    close(ones, torch.zeros(50, 1, dtype=f64))
    assert (ones >= 0).all()
    # All alike: choosing changes nothing.
    close(best_of_n_kl(torch.zeros(5), [3]), torch.zeros(1, dtype=f64))


def test_no_probability_underflows_into_nan(close):
    proxy = torch.arange(3.0)
    probs = torch.tensor([0.1, 0.2, 0.7], dtype=f64)
    close(best_of_n_kl(proxy, [10_000], probs=probs), torch.tensor([-math.log(0.7)], dtype=f64))


def test_what_has_no_meaning_is_refused():
    proxy, gold = torch.arange(4.0), torch.zeros(4)
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n is from 1 to the 4 samples, not {n}"):
            best_of_n(proxy, gold, [1, n])
        with pytest.raises(ValueError, match=f"n is from 1 to the 4 samples, not {n}"):
            best_of_n_kl(proxy, [4, n])
    with pytest.raises(ValueError, match="n is from 1 to the 4 samples, not 0"):
        best_of_n_kl(proxy, [0], probs=proxy / 6)
    with pytest.raises(ValueError, match="n is 1 or more, not 0"):
        best_of_n_bound(0)
    with pytest.raises(ValueError, match="a proxy score is NaN"):
        best_of_n(torch.tensor([0.0, math.nan]), torch.zeros(2), [1])
    with pytest.raises(ValueError, match="a proxy score is NaN"):
        best_of_n_kl(torch.tensor([0.0, math.nan]), [1])
    with pytest.raises(ValueError, match=r"proxy \(4,\), gold \(2, 4\)"):
        best_of_n(proxy, torch.zeros(2, 4), [1])
    with pytest.raises(ValueError, match=r"proxy \(4,\), probs \(4, 1\)"):
        best_of_n_kl(proxy, [1], probs=torch.full((4, 1), 0.25))
