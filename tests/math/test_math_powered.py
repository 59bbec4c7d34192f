"""Prediction-powered means and the number of decisive pairs: by hand, and by simulation."""

from __future__ import annotations

import math

import pytest
import torch

from trueup.math import decisive_pairs, prediction_powered_mean


def test_by_hand():
    """cov = 10/39, var of all sixty predictions = 15/59; w = (10/39) / ((1 + 40/20) 15/59)."""
    y, f, rest = [1.0, 1.0, 0.0, 0.0] * 10, [1.0, 1.0, 0.0, 0.0] * 10, [1.0, 0.0] * 10
    found = prediction_powered_mean(y, f, rest)
    w = (10 / 39) / (3 * 15 / 59)
    assert found.weight == pytest.approx(w)
    assert found.mean == pytest.approx(w * 0.5 + (1 - w) * 0.5)
    left = [1 - w, 1 - w, 0, 0] * 10 + [1 - w * 0.5, -w * 0.5]
    centre = sum(left) / 42
    variance = sum((x - centre) ** 2 for x in left) / 41 / 42 + w**2 * (5 / 19) / 20
    half = 2.019541 * math.sqrt(variance)  # Student's t, 41 degrees of freedom
    assert (found.low, found.high) == pytest.approx((w * 0.5 + centre - half, w * 0.5 + centre + half), abs=1e-5)


def test_the_means_differ_where_the_predictions_are_off():
    """Predictions too high everywhere by the same: the labels' own mean comes back, moved by how the others differ."""
    y, f = torch.tensor([0.1, 0.3, 0.5, 0.7]), torch.tensor([0.3, 0.5, 0.7, 0.9])
    rest = torch.tensor([0.4, 0.6, 0.8, 1.0] * 50)
    found = prediction_powered_mean(y, f, rest)
    assert found.mean == pytest.approx(0.4 + found.weight * 0.1)
    assert 0.9 < found.weight <= 1


def test_without_others_or_with_useless_predictions_it_is_the_labels_mean():
    y = [1.0, 0.0, 1.0, 1.0]
    for f, rest in (([0.5] * 4, []), ([0.2, 0.9, 0.3, 0.4], []), ([0.5] * 4, [0.5] * 9), ([0, 1, 0, 0], [0, 1] * 9)):
        found = prediction_powered_mean(y, f, rest)
        assert (found.mean, found.weight) == (0.75, 0.0)
    padded = torch.tensor([1.0, 0, 1, 1, 1, 0])
    half = 2.570582 * float(padded.std()) / math.sqrt(6)
    assert (found.low, found.high) == pytest.approx((4 / 6 - half, min(1, 4 / 6 + half)), abs=1e-5)


def test_all_alike_is_not_certain():
    found = prediction_powered_mean([1.0] * 20, [1.0] * 20, [1.0] * 100)
    assert found.mean == found.high == 1 and 0.75 < found.low < 0.95
    assert prediction_powered_mean([0.0] * 20, [0.0] * 20, []).low == 0


def test_few_rows():
    for rest in ([], [0.9]):  # one other row has no variance
        found = prediction_powered_mean([1.0, 0.0], [0.8, 0.3], rest)
        assert (found.mean, found.weight) == (0.5, 0.0) and found.high == 1
    two = prediction_powered_mean([1.0, 0.0] * 20, [0.8, 0.3] * 20, [0.8, 0.9])
    assert 0.05 < two.weight < 0.2 and two.mean == pytest.approx(0.5 + two.weight * 0.3)
    assert all(type(x) is float for x in two)


def test_a_mean_beyond_what_can_be_is_cut_off():
    y, f = [1.0] * 10 + [0.5], [0.5] * 10 + [0.0]
    assert prediction_powered_mean(y, f, [1.0] * 50 + [0.9] * 50).mean == 1
    assert prediction_powered_mean([1 - x for x in y], [1 - x for x in f], [0.0] * 50 + [0.1] * 50).mean == 0


@pytest.mark.parametrize(
    ("y", "f", "rest"),
    [
        ([1.0], [1.0], []),
        ([1.0, 0], [1.0], []),
        ([[1.0, 0], [1, 0]], [[1.0, 0], [1, 0]], []),
        ([1.0, 0], [1.0, 0], [[1.0, 0]]),
        ([1.0, 2], [1.0, 0], []),
        ([1.0, 0], [1.0, 0], [-1]),
    ],
)
def test_what_does_not_fit(y, f, rest):
    with pytest.raises(ValueError):
        prediction_powered_mean(y, f, rest)


@pytest.mark.parametrize(("n", "others", "truth"), [(100, 900, 0.5), (100, 900, 0.8), (300, 900, 0.65)])
@pytest.mark.parametrize(("right", "sure"), [(0.5, True), (0.75, False), (0.9, True)])
def test_the_interval_holds_the_truth_as_often_as_it_says(n, others, truth, right, sure):
    """Coverage of 95% within 93 and 97, of labels and a machine that is right so often; 1,500 draws have a standard
    error of .0056."""
    generator = torch.Generator().manual_seed(n + int(100 * truth + 10 * right))
    held, narrow, plain, draws = 0, 0.0, 0.0, 1500
    for _ in range(draws):
        z = (torch.rand(n + others, generator=generator, dtype=torch.float64) < truth).double()
        wrong = torch.rand(n + others, generator=generator, dtype=torch.float64) > right
        f = torch.where(wrong, 1 - z, z)
        if not sure:
            f = 0.5 + (f - 0.5) * torch.rand(n + others, generator=generator, dtype=torch.float64)
        found = prediction_powered_mean(z[:n], f[:n], f[n:])
        alone = prediction_powered_mean(z[:n], f[:n], [])
        held += found.low <= truth <= found.high
        narrow, plain = narrow + found.high - found.low, plain + alone.high - alone.low
    assert 0.93 <= held / draws <= 0.97
    assert narrow < (1.01 if right == 0.5 else 0.97 if right == 0.75 else 0.80) * plain


def test_more_predictions_are_worth_more():
    generator = torch.Generator().manual_seed(1)
    z = (torch.rand(2000, generator=generator) < 0.6).double()
    f = torch.where(torch.rand(2000, generator=generator) < 0.85, z, 1 - z)
    few, many = (prediction_powered_mean(z[:100], f[:100], f[100:k]) for k in (200, 2000))
    assert few.weight < many.weight and few.high - few.low > many.high - many.low


@pytest.mark.parametrize(
    ("share", "power", "level"), [(0.55, 0.8, 0.95), (0.6, 0.8, 0.95), (0.6, 0.9, 0.99), (0.4, 0.8, 0.95)]
)
def test_so_many_decisive_pairs_tell_the_share(share, power, level):
    """The exact power of the two-sided sign test at that n."""
    n = decisive_pairs(share, power=power, level=level)

    def mass(k: int, p: float) -> float:
        return math.exp(
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(p)
            + (n - k) * math.log1p(-p)
        )

    tail, cut = 0.0, n
    while tail + mass(cut, 0.5) <= (1 - level) / 2:
        tail += mass(cut, 0.5)
        cut -= 1
    found = sum(mass(k, max(share, 1 - share)) for k in range(cut + 1, n + 1))
    assert abs(found - power) < 0.03


def test_decisive_pairs_by_hand():
    # n0 = ((1.95996 / 2 + .84162 sqrt(.2475)) / .05)^2 = 782.3; n0 / 4 (1 + sqrt(1 + 2 / (n0 .05)))^2 = 802.2
    assert decisive_pairs(0.55) == decisive_pairs(0.45) == 803
    for share in (0.5, 0.0, 1.0):
        with pytest.raises(ValueError, match=f"share {share}:"):
            decisive_pairs(share)
