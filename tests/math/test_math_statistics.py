"""Calibration by hand, Wilson's interval against the test that it inverts, the bootstrap against known answers."""

import json
from statistics import NormalDist

import pytest
import torch

from trueup.math import (
    bootstrap_interval,
    expected_calibration_error,
    nested_bootstrap,
    student_mass,
    student_quantile,
)
from trueup.math.statistics import _interpolate


def test_calibration_worked_by_hand():
    # Bin [.5, .75): p .5 .7 (mean .6), one of two right: |.6 - .5| x 2/5. Bin [.75, 1]: p .8 1 .9 (mean .9),
    # outcomes 1, 1, .1 (a soft label; mean .7): .2 x 3/5. Together .04 + .12.
    error, table = expected_calibration_error([0.5, 0.8, 0.7, 1.0, 0.9], [0.0, 1.0, 1.0, 1.0, 0.1], bins=4)
    assert error == pytest.approx(0.16, abs=1e-12)
    assert table == [
        {"lower": 0.5, "upper": 0.75, "n": 2, "confidence": pytest.approx(0.6), "observed": 0.5},
        {"lower": 0.75, "upper": 1.0, "n": 3, "confidence": pytest.approx(0.9), "observed": pytest.approx(0.7)},
    ]
    assert json.loads(json.dumps([error, table])) == [error, table]


def test_calibration_counts_errors_of_either_sign():
    over, _ = expected_calibration_error([0.9, 0.9], [0.0, 1.0])
    under, _ = expected_calibration_error([0.1, 0.1], [0.0, 1.0])
    both, _ = expected_calibration_error([0.9, 0.9, 0.1, 0.1], [0.0, 1.0, 0.0, 1.0])
    assert over == under == both == pytest.approx(0.4)


def test_calibrated_probabilities_have_no_error():
    error, table = expected_calibration_error(torch.tensor([0.25] * 4 + [1.0]), torch.tensor([1.0, 0, 0, 0, 1]))
    assert error == 0 and [row["n"] for row in table] == [4, 1]


def test_calibration_bins():
    edges = [i / 8 for i in range(9)]
    _, table = expected_calibration_error(edges, [0.0] * 9, bins=8)
    assert [row["lower"] for row in table] == edges[:-1] and [row["upper"] for row in table] == edges[1:]
    assert [row["n"] for row in table] == [1] * 7 + [2]
    middles = [0.05 + i / 10 for i in range(10)]
    assert expected_calibration_error(middles, [0.0] * 10) == expected_calibration_error(middles, [0.0] * 10, bins=10)
    assert len(expected_calibration_error(middles, [0.0] * 10)[1]) == 10
    assert len(expected_calibration_error(middles, [0.0] * 10, bins=1)[1]) == 1
    assert expected_calibration_error([], []) == (0.0, [])


@pytest.mark.parametrize(
    ("p", "outcome", "bins", "message"),
    [
        ([0.5, 1.5], [0, 1], 10, "p holds"),
        ([0.5, -0.1], [0, 1], 10, "p holds"),
        ([0.5, float("nan")], [0, 1], 10, "p holds"),
        ([0.5, 0.1], [2, 1], 10, "outcome holds"),
        ([0.5, 0.1], [-1, 1], 10, "outcome holds"),
        ([0.5, 0.1], [1], 10, r"p \(2,\) and outcome \(1,\)"),
        ([[0.5, 0.1]], [[1, 0]], 10, r"p \(1, 2\)"),
        ([0.5], [1], 0, "bins 0"),
    ],
)
def test_calibration_refuses_what_is_not_a_probability(p, outcome, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(p, outcome, bins)


def test_bootstrap_of_two_values():
    # Means of resamples of (0, 1): 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    ends = {level: bootstrap_interval([0, 1], seed=0, level=level, samples=2000) for level in (0.4, 0.6)}
    assert [float(x) for x in ends[0.4]] == [0.5, 0.5]
    assert [float(x) for x in ends[0.6]] == [0, 1]


def test_bootstrap_of_many_values_is_nearly_normal():
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for level in (0.5, 0.95):
        low, high = bootstrap_interval(values, seed=1, level=level, samples=4000)
        half = NormalDist().inv_cdf((1 + level) / 2) * values.std(unbiased=False).item() / 200**0.5
        assert float(low) == pytest.approx(values.mean().item() - half, abs=0.08 * half)
        assert float(high) == pytest.approx(values.mean().item() + half, abs=0.08 * half)


def test_bootstrap_draws_rows_whole():
    column = torch.randn(50, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(torch.stack([column, column + 1, 2 * column], 1), seed=3, samples=200)
    assert low.shape == high.shape == (3,) and low.dtype == torch.float64
    torch.testing.assert_close(low[1], low[0] + 1)
    torch.testing.assert_close(high[2], 2 * high[0])
    assert (low < high).all()


def test_bootstrap_is_a_function_of_its_seed():
    values = torch.arange(20.0)
    first, again, other = (bootstrap_interval(values, seed=s, samples=100) for s in (0, 0, 1))
    assert first == again != other


def test_bootstrap_defaults():
    default = bootstrap_interval([0.0, 3.0, 10.0, 11.0, 2.5], seed=0)
    assert default == bootstrap_interval([0.0, 3.0, 10.0, 11.0, 2.5], seed=0, level=0.95, samples=10_000)


def test_bootstrap_of_one_row_and_of_one_sample():
    assert bootstrap_interval([4.0], seed=0, samples=10) == (4.0, 4.0)
    low, high = bootstrap_interval([1.0, 2.0, 5.0], seed=0, samples=1)
    assert low == high


@pytest.mark.parametrize(("values", "level"), [([], 0.9), ([1.0], 0.0), ([1.0], 1.0)])
def test_bootstrap_refuses_no_rows_and_senseless_levels(values, level):
    with pytest.raises(ValueError, match=f"level {level}"):
        bootstrap_interval(values, seed=0, level=level)


def test_nested_bootstrap_draws_groups_and_in_each_its_rows():
    # Two seeds: one whose rows are all 0, one with rows 1 and 3 (both parts alike).
    groups = [torch.zeros(1, 3, 1), torch.tensor([[[1.0], [3.0]]])]
    means = nested_bootstrap(groups, seed=0, samples=8000)
    assert means.shape == (8000, 2, 1, 1) and means.dtype == torch.float64
    values, counts = means.flatten().unique(return_counts=True)
    # A slot holds the first seed half of the time; else 1, 2, 3 with chances 1/4, 1/2, 1/4.
    assert values.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(counts / 16000, torch.tensor([1 / 2, 1 / 8, 1 / 4, 1 / 8]), rtol=0, atol=0.01)
    pairs = means[:, :, 0, 0]
    assert ((pairs == 0).all(1).double().mean() - 0.25).abs() < 0.02  # slots are drawn apart,
    twice = pairs[(pairs != 0).all(1)]
    assert (
        (twice[:, 0] == twice[:, 1]).double().mean() - 3 / 8
    ).abs() < 0.03  # and a seed drawn twice has two resamples


def test_nested_bootstrap_keeps_columns_together_and_parts_apart():
    rows = torch.randn(40, generator=torch.Generator().manual_seed(0))
    part = torch.stack([rows, 2 * rows + 1], 1)
    means = nested_bootstrap([torch.stack([part, part + 10])] * 3, seed=1, samples=200)
    assert means.shape == (200, 3, 2, 2)
    torch.testing.assert_close(means[..., 1], 2 * means[..., 0] + torch.tensor([1.0, -9.0], dtype=torch.float64))
    assert not torch.allclose(means[:, :, 1, 0], means[:, :, 0, 0] + 10)
    assert means[:, :, 1].mean() > 9 > means[:, :, 0].mean()


def test_nested_bootstrap_is_a_function_of_its_seed_and_takes_ten_thousand():
    groups = [torch.arange(4.0).reshape(1, 4, 1), torch.arange(6.0).reshape(1, 6, 1)]
    first, again, other = (nested_bootstrap(groups, seed=s, samples=50) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(nested_bootstrap(groups, seed=0)) == 10_000


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [torch.zeros(1, 2, 1), torch.zeros(1, 0, 1)],
        [torch.zeros(1, 2, 1), torch.zeros(2, 2, 1)],
        [torch.zeros(1, 2, 1), torch.zeros(1, 2, 2)],
    ],
)
def test_nested_bootstrap_refuses_what_does_not_fit(groups):
    with pytest.raises(ValueError, match="some, alike but in N, with rows"):
        nested_bootstrap(groups, seed=0)


def test_nested_bootstrap_keeps_parts_and_columns_apart():
    """Two parts, three columns, every row the same: each mean is its part's and column's own value."""
    own = torch.arange(6.0).view(2, 1, 3).expand(2, 4, 3)
    found = nested_bootstrap([own, own], seed=0, samples=5)
    assert found.shape == (5, 2, 2, 3)
    assert torch.equal(found, torch.arange(6.0).double().view(2, 3).expand(5, 2, 2, 3))


def test_between_the_points_of_a_table_the_line_counts():
    xs, ys = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([2.0, 10.0, 0.0, 7.0])
    found = [_interpolate(x, xs, ys) for x in (0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0)]
    assert found == [2, 6, 10, 5, 0, 3.5, 7] and type(found[0]) is float


@pytest.mark.parametrize(
    ("level", "freedom", "t"),
    [(0.95, 1, 12.7062), (0.95, 4, 2.77645), (0.9, 2, 2.91999), (0.99, 3, 5.84091), (0.95, 200, 1.97190)],
)
def test_student(level, freedom, t):
    assert student_quantile(level, freedom) == pytest.approx(t, rel=1e-4)
    assert student_mass(t, freedom) == pytest.approx(level, abs=1e-5)
    assert student_mass(student_quantile(level, freedom), freedom) == pytest.approx(level, abs=1e-12)
