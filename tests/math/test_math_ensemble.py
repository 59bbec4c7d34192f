"""Members' scores as one number: worked by hand, and what must not matter."""

from __future__ import annotations

import pytest
import torch

from trueup.math import disagreement, ensemble_score

# Three members on two completions. Means 2 and 0; deviations (-2, 0, 2) and (-3, 1, 2): variances 8/3 and 14/3.
SCORES = torch.tensor([[0.0, -3.0], [2.0, 1.0], [4.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "penalty", "expected"),
    [
        ("mean", 0.5, [2.0, 0.0]),
        ("median", 0.5, [2.0, 1.0]),
        ("wco", 0.5, [0.0, -3.0]),
        ("uwo", 0.5, [2 - 0.5 * 8 / 3, -0.5 * 14 / 3]),
        ("uwo", 0.1, [2 - 0.1 * 8 / 3, -0.1 * 14 / 3]),
        ("uwo", 0.0, [2.0, 0.0]),
    ],
)
def test_worked_by_hand(kind, penalty, expected, close):
    close(ensemble_score(SCORES, kind=kind, penalty=penalty), torch.tensor(expected, dtype=torch.float64))


def test_the_defaults_are_the_mean_and_a_penalty_of_one_half(close):
    close(ensemble_score(SCORES), torch.tensor([2.0, 0.0], dtype=torch.float64))
    close(ensemble_score(SCORES, kind="uwo"), ensemble_score(SCORES, kind="uwo", penalty=0.5))


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle(close):
    even = torch.tensor([[0.0], [1.0], [5.0], [100.0]], dtype=torch.float64)
    close(ensemble_score(even, kind="median"), torch.tensor([3.0], dtype=torch.float64))


def test_disagreement_is_the_standard_deviation_with_one_over_k(close):
    close(disagreement(SCORES), torch.tensor([(8 / 3) ** 0.5, (14 / 3) ** 0.5], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mean", "median", "wco", "uwo"])
def test_the_order_of_members_does_not_matter_and_a_shift_passes_through(kind, close):
    scores = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = ensemble_score(scores, kind=kind, penalty=0.3)
    close(ensemble_score(scores.flip(0), kind=kind, penalty=0.3), value)
    close(ensemble_score(scores + 2, kind=kind, penalty=0.3), value + 2)
    close(disagreement(scores + 2), disagreement(scores))


@pytest.mark.parametrize("kind", ["mean", "median", "wco", "uwo"])
def test_one_member_is_itself(kind, close):
    close(ensemble_score(SCORES[:1], kind=kind), SCORES[0])
    close(disagreement(SCORES[:1]), torch.zeros(2, dtype=torch.float64))


def test_what_cannot_be_is_refused():
    for function in (ensemble_score, disagreement):
        for wrong in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 1)):
            with pytest.raises(ValueError, match=r"must be \[K, B\]"):
                function(wrong)
    with pytest.raises(ValueError, match="'worst' is none of mean, median, wco, uwo"):
        ensemble_score(SCORES, kind="worst")
