"""How many labels random needs, as scripts/routing.py reads it off, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.routing import labels, needed, pooled


@pytest.mark.parametrize(
    ("target", "found"), [(0.50, 100), (0.60, 100), (0.65, 150), (0.70, 200), (0.71, 310), (0.80, 400), (0.81, None)]
)
def test_labels_are_read_off_between_budgets_at_the_first_crossing(target, found):
    """It falls from 200 to 300 labels, and passes .71 a tenth of the way from .70 to .80 after that."""
    at = needed(target, [400, 100, 200, 300], [0.80, 0.60, 0.70, 0.70])
    assert at == (None if found is None else pytest.approx(found))


def test_the_interval_is_over_seeds_and_says_when_no_budget_reaches():
    spent = np.array([[100, 100, 300]] * 4)
    alike = pooled(spent, np.array([[0.7, 0.6, 0.8]] * 4))
    assert alike == (pytest.approx(200),) * 3
    seeds = np.array([[0.7, 0.6, 0.8], [0.6, 0.6, 0.8], [0.8, 0.6, 0.8], [1.1, 0.6, 0.8]])
    one, low, high = pooled(spent, seeds)  # the mean, .8, is reached at 300; most draws of seeds pass it
    assert one == pytest.approx(300) and low < 200 and high is None
    assert [labels(x, 300) for x in (one, high)] == ["300", "more than 300"]
