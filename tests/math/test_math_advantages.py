"""Advantages without a critic, worked by hand; that their baselines leave the policy gradient where it is."""

import itertools
import math

import pytest
import torch

from trueup.math import RunningBaseline, grpo_advantages, rloo_advantages


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Two prompts with three completions each: their scores are 1 2 6, and 5 5 5.
REWARDS = f64([1, 2, 6], [5, 5, 5])


def test_leave_one_out_worked_by_hand(close):
    # 1 - (2 + 6) / 2 = -3;   2 - (1 + 6) / 2 = -1.5;   6 - (1 + 2) / 2 = 4.5
    close(rloo_advantages(REWARDS), f64([-3, -1.5, 4.5], [0, 0, 0]))
    close(rloo_advantages(f64([1, 4])), f64([-3, 3]))


def test_group_relative_worked_by_hand(close):
    # mean 3: -2 -1 3;   variance (4 + 1 + 9) / 2 = 7
    std = math.sqrt(7) + 1e-4
    close(grpo_advantages(REWARDS), f64([-2 / std, -1 / std, 3 / std], [0, 0, 0]))
    close(grpo_advantages(REWARDS, scale=False), f64([-2, -1, 3], [0, 0, 0]))


def test_prompts_do_not_see_each_other(close):
    for function in (rloo_advantages, grpo_advantages):
        close(function(REWARDS)[:1], function(REWARDS[:1]))
        assert function(REWARDS.float()).dtype == torch.float32


@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_gradient_is_that_of_the_mean_reward(k, close):
    """Over every group of k completions that a policy of three may give."""
    theta = f64([0.3, -0.5, 0.1])[0].requires_grad_()
    reward = f64([1.0, -2.0, 0.5])[0]
    logp = theta.log_softmax(0)
    [exact] = torch.autograd.grad((logp.exp() * reward).sum(), theta, retain_graph=True)
    groups = torch.tensor(list(itertools.product(range(3), repeat=k)))
    weight = logp.detach()[groups].sum(1).exp()

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        loss = (weight[:, None] * advantages * logp[groups]).sum() / k
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    close(gradient(rloo_advantages(reward[groups])), exact)
    # The group's mean has the completion itself in it: shorter by (k - 1) / k, the same direction.
    close(gradient(grpo_advantages(reward[groups], scale=False)), exact * (k - 1) / k)
    close(gradient(reward[groups] - 0.7), exact)  # as any constant baseline


def test_running_baseline_worked_by_hand(close):
    baseline = RunningBaseline(decay=0.75)
    assert baseline.value is None
    close(baseline.advantages(f64([1, 3])), f64([-1, 1]))  # the first batch: its own mean, 2
    assert baseline.value == 2
    close(baseline.advantages(f64([6, 8, 10])), f64([4, 6, 8]))  # what came before: 2
    assert baseline.value == 0.75 * 2 + 0.25 * 8 and type(baseline.value) is float
    close(baseline.advantages(f64([3.5])), f64([0]))
    assert RunningBaseline().decay == 0.9 and RunningBaseline(0).decay == 0


def test_running_baseline_goes_on_from_its_state():
    whole, first, rest = RunningBaseline(), RunningBaseline(), RunningBaseline()
    for baseline in (whole, first):
        baseline.advantages(f64([1, 2]))
    rest.load_state(first.state())
    for baseline in (whole, rest):
        baseline.advantages(f64([0.1, 0.7]))
    assert rest.value == whole.value != first.value
    rest.load_state(RunningBaseline().state())
    assert rest.value is None
    with pytest.raises(KeyError):
        rest.load_state({})


def test_what_is_no_group_or_no_number_is_refused():
    for function in (rloo_advantages, grpo_advantages):
        for shape in ((4,), (4, 1), (2, 2, 2)):
            with pytest.raises(ValueError, match="completions of each") as error:
                function(torch.zeros(shape))
            assert str(shape) in str(error.value)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=str(decay)):
            RunningBaseline(decay)
    baseline = RunningBaseline()
    with pytest.raises(ValueError, match="nan"):
        baseline.advantages(f64([1, math.nan]))
    assert baseline.value is None
