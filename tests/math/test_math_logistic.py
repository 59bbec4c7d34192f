"""Logistic regression, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trueup.math import fit_logistic


def test_an_intercept_alone_is_the_log_odds():
    """3 of 4: odds 3. A prior of next to no weight changes nothing; soft outcomes count as shares."""
    ones = [[1.0]] * 4
    assert fit_logistic(ones, [1, 1, 1, 0], [1e-9]).item() == pytest.approx(math.log(3), rel=1e-6)
    assert fit_logistic(ones, [0.5, 0.5, 1, 1], [1e-9]).item() == pytest.approx(math.log(3), rel=1e-6)
    assert fit_logistic(ones, [1, 1, 1, 0], [1e-9]).dtype == torch.float64


def test_the_ridge_by_hand():
    """One case, y = 1, x = 2: 2 (s(2 w) - 1) + ridge w = 0. With w = 1/2: s(1) = .731059, so ridge = 1.0757657."""
    ridge = 4 * (1 - 1 / (1 + math.exp(-1)))
    assert ridge == pytest.approx(1.0757657, rel=1e-7)
    assert fit_logistic([[2.0]], [1], [ridge]).item() == pytest.approx(0.5, rel=1e-9)
    assert fit_logistic([[2.0]], [0], [ridge]).item() == pytest.approx(-0.5, rel=1e-9)


def test_what_was_planted_is_found():
    """Each cell of a table, in the shares that weights (-1, 2) with intercept .5 give."""
    x = torch.tensor([[1.0, a, b] for a in (0, 1) for b in (0, 1, 2)], dtype=torch.float64)
    planted = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = fit_logistic(x, torch.sigmoid(x @ planted), [1e-9] * 3)
    assert found.tolist() == pytest.approx(planted.tolist(), rel=1e-5)


def test_the_slope_of_the_loss_is_zero_where_it_ends():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) * 3
    y = torch.rand(30, generator=generator, dtype=torch.float64)
    ridge = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)
    w = fit_logistic(x, y, ridge)
    slope = x.T @ (torch.sigmoid(x @ w) - y) + ridge * w
    assert slope.abs().max() < 1e-9


def test_cases_that_a_column_separates_leave_its_weight_finite():
    """Steep and far apart: full Newton steps from 0 would not lead down."""
    x = [[1.0, v] for v in (-80.0, -60.0, 60.0, 90.0)]
    w = fit_logistic(x, [0, 0, 1, 1], [1e-3, 1e-3])
    assert 0 < w[1] < 1 and math.isfinite(w[0])
    q = torch.sigmoid(torch.tensor(x, dtype=torch.float64) @ w)
    assert q[1] < 0.01 and q[2] > 0.99
    assert fit_logistic(torch.zeros(0, 2), [], [1.0, 1.0]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("x", "y", "ridge", "said"),
    [
        ([1.0], [1], [1.0], r"x \(1,\)"),
        ([[1.0]], [1, 0], [1.0], r"outcome \(2,\)"),
        ([[1.0]], [1], [1.0, 1.0], r"ridge \(2,\)"),
        ([[1.0]], [1.1], [1.0], "outcomes must lie"),
        ([[1.0]], [-0.1], [1.0], "outcomes must lie"),
        ([[1.0]], [math.nan], [1.0], "outcomes must lie"),
        ([[1.0]], [1], [0.0], "ridge above 0"),
    ],
)
def test_what_does_not_fit_is_told(x, y, ridge, said):
    with pytest.raises(ValueError, match=said):
        fit_logistic(x, y, ridge)
