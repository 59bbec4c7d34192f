"""Temperature scaling, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trueup.math import at_temperature, fit_temperature


def test_temperature_by_hand():
    """p = .8 has odds 4. At T = 2 they are 2: 2/3; at T = 1/2 they are 16: 16/17. Its mirror .2 goes the other way."""
    assert at_temperature([0.8, 0.2, 0.5], 2).tolist() == pytest.approx([2 / 3, 1 / 3, 0.5])
    assert at_temperature([0.8], 0.5).item() == pytest.approx(16 / 17, rel=1e-12)  # in float64, whatever is given
    assert at_temperature(torch.tensor([0.5]), 0.5).dtype == torch.float64
    assert at_temperature([0.0, 1.0], 1).tolist() == pytest.approx([1e-6, 1 - 1e-6], rel=1e-6)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature {wrong} must"):
            at_temperature([0.5], wrong)


def test_the_fitted_temperature_is_the_one_that_was_planted():
    """A judge that says 16/17 and is right on 2 of 3: odds 2 = 16 ^ (1 / T) has T = 4. On soft outcomes as well."""
    assert fit_temperature([16 / 17] * 3, [1, 1, 0]) == pytest.approx(4, rel=1e-6)
    assert fit_temperature([16 / 17, 1 / 17], [2 / 3, 1 / 3]) == pytest.approx(4, rel=1e-6)
    assert fit_temperature([16 / 17] * 3, [True, True, False]) == pytest.approx(4, rel=1e-6)
    assert fit_temperature([2 / 3] * 17, [1] * 16 + [0]) == pytest.approx(0.25, rel=1e-6)


def test_the_fit_stays_within_bounds():
    assert fit_temperature([0.9], [0.0]) == pytest.approx(20) and fit_temperature([0.9], [1.0]) == pytest.approx(0.05)
    assert fit_temperature([0.9], [0.0], highest=3) == pytest.approx(3)
    assert fit_temperature([0.9], [1.0], lowest=0.5) == pytest.approx(0.5)
    assert fit_temperature([0.5, 0.5], [1, 0]) == 1.0


@pytest.mark.parametrize("p, outcome", [([], []), ([0.5], [1, 0]), ([[0.5]], [[1]])])
def test_the_fit_refuses(p, outcome):
    with pytest.raises(ValueError, match="must be"):
        fit_temperature(p, outcome)
