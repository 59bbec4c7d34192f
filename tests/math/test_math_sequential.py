"""Bets by hand, bounds against values that can be solved for, and coverage at every look by simulation."""

import math

import pytest
import torch

from trueup.math import betting_bounds, drop_bound, log_capital, unimodal_fit


def capital(values, mean, **more):
    return math.exp(log_capital(values, mean, **more))


def test_capital_worked_by_hand():
    # Staking c at a mean of 1/4 a 1 pays 1 - c + 4c = 1 + 3c, a 0 leaves 1 - c. The stakes' mean is 1/2, their mean
    # square 1/3 - 1/(12 K^2) = .3333 - 1/30000 for K = 50.
    square = 1 / 3 - 1 / 30_000
    assert capital([1.0], 0.25) == pytest.approx(2.5, abs=1e-12)
    assert capital([0.0], 0.25) == pytest.approx(0.5, abs=1e-12)
    assert capital([0.5], 0.25) == pytest.approx(1.5, abs=1e-12)  # 1 - c + 2c
    assert capital([1.0, 0.0], 0.25) == pytest.approx(1 + 2 / 2 - 3 * square, abs=1e-12)  # (1 + 3c)(1 - c)
    assert capital([1.0, 1.0], 0.25) == pytest.approx(1 + 6 / 2 + 9 * square, abs=1e-12)
    assert capital([], 0.25) == pytest.approx(1, abs=1e-12)
    assert capital([0.3, 0.3], 0.3) == pytest.approx(1, abs=1e-12)
    assert capital([1.0], 1) == pytest.approx(1, abs=1e-12)


def test_bets_that_begin_later_are_averaged():
    # From the first: 2.5 x ... as above; from the second: a 1 alone, 2.5; the third has not begun: 1.
    both = 1 + 6 / 2 + 9 * (1 / 3 - 1 / 30_000)
    assert capital([1.0, 1.0], 0.25, starts=[0, 1]) == pytest.approx((both + 2.5) / 2, abs=1e-12)
    assert capital([1.0, 1.0], 0.25, starts=[1, 2, 7]) == pytest.approx((2.5 + 1 + 1) / 3, abs=1e-12)
    quiet = [0.0] * 30 + [1.0] * 8
    assert capital(quiet, 0.5, starts=[0, 30]) > 20 > 1 > capital(quiet, 0.5)


def test_bounds_that_can_be_solved_for():
    # One value of 1: capital 1 + (1/m - 1)/2 reaches 2 = 1/error up to m = 1/3. Its mirror, 0, refutes nothing.
    assert betting_bounds([1.0], error=0.5) == (pytest.approx(1 / 3, abs=1e-10), 1)
    assert betting_bounds([0.0], error=0.5) == (0, pytest.approx(2 / 3, abs=1e-10))
    assert betting_bounds([5.0], error=0.5, low=-1, high=5) == (pytest.approx(1, abs=1e-9), 5)
    assert betting_bounds([-1.0], error=0.5, low=-1, high=5) == (-1, pytest.approx(3, abs=1e-9))
    assert betting_bounds([1.0], error=0.2) == (pytest.approx(1 / 9, abs=1e-10), 1)
    assert betting_bounds([1.0], error=0.2)[0] * 2**40 == 2**40 // 9  # rounded down
    # With a start that has not come: (1 + 1 + (1/m - 1)/2)/2 = 2 at m = 1/5.
    assert betting_bounds([1.0], error=0.5, starts=[0, 1]) == (pytest.approx(1 / 5, abs=1e-10), 1)
    single = torch.tensor([0.1, 0.7])
    assert betting_bounds(single, error=0.3, low=-1) == pytest.approx(
        betting_bounds(single.double(), error=0.3, low=-1), abs=1e-12
    )
    assert type(log_capital([0.5], 0.5)) is float
    assert betting_bounds([], error=0.5) == (0, 1) and betting_bounds([], error=0.1, low=-1) == (-1, 1)


def test_bounds_close_in_on_the_mean():
    values = torch.bernoulli(torch.full((3000,), 0.7), generator=torch.Generator().manual_seed(0))
    low, high = betting_bounds(values, error=0.05)
    assert low < values.mean() < high and 0.04 < high - low < 0.09
    mirrored = betting_bounds(1 - values, error=0.05)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
    wide, wider = betting_bounds(2 * values - 1, error=0.05, low=-1, high=1)
    assert (wide, wider) == (pytest.approx(2 * low - 1, abs=1e-9), pytest.approx(2 * high - 1, abs=1e-9))


@pytest.mark.parametrize("starts", [[0], list(range(0, 200, 20))])
def test_a_bound_is_wrong_at_any_of_its_looks_no_more_often_than_said(starts):
    # Reached at any of 200 looks: capital never more than 1/error against the true mean, in all but `error` of runs.
    # An ordinary test at 5% that is looked at ten times is wrong in about a fifth of them.
    generator = torch.Generator().manual_seed(1)
    runs, error, mean = 150, 0.1, 0.6
    wrong = naive = 0
    for _ in range(runs):
        values = torch.bernoulli(torch.full((200,), mean, dtype=torch.float64), generator=generator)
        wrong += any(log_capital(values[:n], mean, starts=starts) >= -math.log(error) for n in range(10, 201, 10))
        naive += any(values[:n].mean() - 1.2816 * math.sqrt(mean * (1 - mean) / n) > mean for n in range(10, 201, 10))
    assert wrong <= error * runs < naive


def test_a_capital_of_just_what_it_takes_is_enough():
    ones = [1.0] * 10
    assert betting_bounds(ones, error=math.exp(-log_capital(ones, 0.5)))[0] == 0.5


def test_a_gap_is_found_with_few_values():
    values = torch.bernoulli(torch.full((60,), 0.8, dtype=torch.float64), generator=torch.Generator().manual_seed(2))
    assert betting_bounds(values, error=0.05)[0] > 0.55


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_capital([1.5], 0.5), r"values \(1,\)"),
        (lambda: log_capital([-0.5], 0.5), "values"),
        (lambda: log_capital([[0.5]], 0.5), r"values \(1, 1\)"),
        (lambda: log_capital([0.5], 0.0), "mean 0.0"),
        (lambda: log_capital([0.5], 1.1), "mean 1.1"),
        (lambda: log_capital([0.5], 0.5, starts=[]), r"starts \[\]"),
        (lambda: log_capital([0.5], 0.5, starts=[0, -1]), r"starts \[0, -1\]"),
        (lambda: betting_bounds([0.5], error=0.0), "error 0.0"),
        (lambda: betting_bounds([0.5], error=1.0), "error 1.0"),
        (lambda: betting_bounds([], error=0.5, low=2.0), "low 2.0 below high 1.0"),
        (lambda: betting_bounds([], error=0.5, low=1.0), "low 1.0 below high 1.0"),
        (lambda: betting_bounds([1.5], error=0.5), "values between"),
        (lambda: betting_bounds([-0.5], error=0.5), "values between"),
        (lambda: drop_bound([0.5, 0.5], [1, 1], error=0.5, planned=1), "2 splits, 1 planned"),
        (lambda: unimodal_fit([], []), r"values \(0,\)"),
        (lambda: unimodal_fit([1.0], [1.0, 2.0]), r"weights \(2,\)"),
        (lambda: unimodal_fit([[1.0]], [[1.0]]), r"values \(1, 1\)"),
        (lambda: unimodal_fit([1.0], [0.0]), "above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_fall_worked_by_hand():
    # Two splits planned, error .8: each bound has .2. A 1 is above 1/9 (as above); three 0s are below
    # 1 - m, m solving mean (1 - c + c/m)^3 = 5.
    ones = betting_bounds([1.0], error=0.2)[0]
    zeros = betting_bounds([0.0] * 3, error=0.2)[1]
    assert drop_bound([1.0, 0, 0, 0], [1], error=0.8, planned=2) == pytest.approx(ones - zeros, abs=1e-12)
    first, last = betting_bounds([1.0, 0], error=0.2)[0], betting_bounds([0.0, 0], error=0.2)[1]
    assert drop_bound([1.0, 0, 0, 0], [2], error=0.8, planned=2) == pytest.approx(first - last, abs=1e-12)
    both = drop_bound([1.0, 0, 0, 0], [1, 2], error=0.8, planned=2)
    assert both == pytest.approx(max(ones - zeros, first - last), abs=1e-12)
    assert drop_bound([1.0, 0, 0, 0], [0, 4], error=0.8, planned=2) == -1
    assert drop_bound([], [], error=0.8, planned=2) == -1


def test_a_fall_is_seen_and_a_rise_is_not():
    good, bad = [1.0] * 45 + [0.0] * 5, [1.0, 0.0, 0.0, 0.0] * 15
    assert drop_bound(good + bad, [10, 50, 70], error=0.05, planned=3) > 0.1
    assert drop_bound(bad + good, [10, 50, 70], error=0.05, planned=3) < 0


def test_a_curve_that_rises_and_falls(close):
    close(unimodal_fit([1, 3, 2, 4, 1], [1] * 5), [1, 2.5, 2.5, 4, 1])
    # Of two peaks the nearer fit counts: 5 and 1 pooled cost 8, 1 and 6 pooled 12.5; with weights the other way.
    close(unimodal_fit([5, 1, 6, 0], [1] * 4), [3, 3, 6, 0])
    close(unimodal_fit([5, 1, 6, 0], [4, 1, 1, 1]), [5, 3.5, 3.5, 0])
    close(unimodal_fit([5, 1, 6, 0], [1, 3, 1, 1]), [2, 2, 6, 0])
    close(unimodal_fit([9, 1, 3], [1, 1, 3]), [9, 2.5, 2.5])
    close(unimodal_fit([0.5, 0.2, 0.1], [9.0, 1, 1]), [0.5, 0.2, 0.1])
    close(unimodal_fit([0.5, 0.7, 0.9], [9.0, 1, 1]), [0.5, 0.7, 0.9])
    close(unimodal_fit([0.7], [2.0]), [0.7])
    close(unimodal_fit([2, 2, 2], [1, 1, 1]), [2, 2, 2])


def test_of_peaks_that_fit_alike_the_first_counts(close):
    close(unimodal_fit([1, 0, 1], [1, 1, 1]), [1, 0.5, 0.5])
    mean = 3.1 / 6  # the costs of this and of its mirror image differ by rounding
    close(unimodal_fit([1, 0.3, 0.5, 0.5, 0.5, 0.3, 1], [1] * 7), [1, *[mean] * 6])
