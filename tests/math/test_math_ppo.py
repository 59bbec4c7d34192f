"""Advantages against a slow oracle, the PPO losses at every corner of the clip, and what is logged."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trueup.math import (
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    shape_rewards,
)

many = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rewards_worked_by_hand(close):
    # kl_coef .5, KL .2 -.4 .6: -.1, +.2, -.3 and the score 2 on the last valid token: 2 - .3
    kl, mask = f64([9, 0.2, -0.4, 0.6, 9]), torch.tensor([[0, 1, 1, 1, 0]])
    close(shape_rewards(f64([2.0])[0], kl, mask, kl_coef=0.5), f64([0, -0.1, 0.2, 1.7, 0]))


def test_gae_worked_by_hand(close):
    # gamma .9, lam .5, r = 1 0 2, V = .5 1 -1, a prompt before and padding after.
    #   delta_3 = 2 + .9 x 0 - (-1)   = 3        A_3 = 3
    #   delta_2 = 0 + .9 x (-1) - 1   = -1.9     A_2 = -1.9 + .45 x 3     = -.55
    #   delta_1 = 1 + .9 x 1 - .5     = 1.4      A_1 = 1.4 + .45 x (-.55) = 1.1525
    #   R = A + V = 1.6525, .45, 2
    rewards, values = f64([7, 1, 0, 2, 7]), f64([7, 0.5, 1, -1, 7])
    advantages, returns = gae(rewards, values, torch.tensor([[0, 1, 1, 1, 0]]), gamma=0.9, lam=0.5)
    close(advantages, f64([0, 1.1525, -0.55, 3, 0]))
    close(returns, f64([0, 1.6525, 0.45, 2, 0]))


@st.composite
def rollouts(draw):
    """(rewards, values, mask), each a list of rows, of any layout."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))

    def rectangle(element):
        row = st.lists(element, min_size=length, max_size=length)
        return draw(st.lists(row, min_size=rows, max_size=rows))

    number = st.floats(-5, 5, allow_subnormal=False)
    return rectangle(number), rectangle(number), rectangle(st.booleans())


def slow_gae(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k} for one row of valid tokens, by the definition."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@many
@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_definition(rollout, gamma, lam):
    rewards, values, mask = rollout
    advantages, returns = gae(*(torch.tensor(x, dtype=torch.float64) for x in rollout), gamma=gamma, lam=lam)
    for i, row in enumerate(mask):
        valid = [t for t, counts in enumerate(row) if counts]
        expected = slow_gae([rewards[i][t] for t in valid], [values[i][t] for t in valid], gamma, lam)
        for t, advantage in zip(valid, expected, strict=True):
            assert advantages[i, t].item() == pytest.approx(advantage, abs=1e-9)
            assert returns[i, t].item() == pytest.approx(advantage + values[i][t], abs=1e-9)


@many
@given(rollouts())
def test_gae_1_1_is_the_return_to_go_less_the_value(rollout):
    rewards, values, mask = (torch.tensor(x, dtype=torch.float64) for x in rollout)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-9)
    torch.testing.assert_close(advantages, to_go - values * mask, rtol=0, atol=1e-9)


def test_gae_is_linear_in_rewards_and_values():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    inputs = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert gradcheck(lambda r, v: gae(r, v, mask, gamma=0.9, lam=0.8), inputs)


def test_rewards_gradients():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    inputs = normal(2).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert gradcheck(lambda s, kl: shape_rewards(s, kl, mask, kl_coef=0.3), inputs)


# Each corner of the clip at .2: (ratio, advantage, loss, gradient by the new log-prob, clipped).
CORNERS = [
    (1.0, 2.0, -2.0, -2.0, 0),  # nothing moved: the plain policy gradient, -A
    (1.0, -2.0, 2.0, 2.0, 0),
    (1.1, 2.0, -2.2, -2.2, 0),  # inside the clip: -A rho
    (1.5, 2.0, -2.4, 0.0, 1),  # a good token grew enough: held at 1.2
    (0.5, 2.0, -1.0, -1.0, 0),  # a good token shrank: pushed back
    (1.5, -2.0, 3.0, 3.0, 0),  # a bad token grew: pushed back
    (0.5, -2.0, 1.6, 0.0, 1),  # a bad token shrank enough: held at .8
    (1.5, 0.0, 0.0, 0.0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), CORNERS)
def test_policy_loss_at_the_corners_of_the_clip(ratio, advantage, loss, gradient, clipped, close):
    old = f64([-1.0])
    new = (old + f64([ratio]).log()).requires_grad_()
    actual = ppo_policy_loss(new, old, f64([advantage]), clip=0.2)
    close(actual, f64([loss]))
    close(torch.autograd.grad(actual.sum(), new)[0], f64([gradient]))
    close(clip_fraction(new.detach(), old, f64([advantage]), clip=0.2), f64([clipped]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.5, 0.0, -1.5])
@pytest.mark.parametrize("gap", [1000.0, 100.0, -100.0, -1000.0])
def test_policy_loss_does_not_overflow(dtype, advantage, gap):
    old = torch.full((1, 1), -1.0, dtype=dtype)
    new = (old + gap).requires_grad_()
    loss = ppo_policy_loss(new, old, torch.full((1, 1), advantage, dtype=dtype), clip=0.2)
    [grad] = torch.autograd.grad(loss.sum(), new)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert clip_fraction(new, old, torch.full((1, 1), advantage, dtype=dtype), clip=0.2).dtype == dtype


def test_a_log_ratio_counts_as_20_at_most(close):
    def loss(gap: float) -> torch.Tensor:
        return ppo_policy_loss(f64([gap]), f64([0.0]), f64([-1.0]), clip=0.2)

    torch.testing.assert_close(loss(19.9), f64([19.9]).exp())
    torch.testing.assert_close(loss(20.5), f64([20.0]).exp())


def test_value_loss_worked_by_hand(close):
    # V, V_old, R, clip .2:  .9 .5 1 -> clipped .7: max(.01, .09) / 2;   -.3 .2 0 -> clipped 0: max(.09, 0) / 2
    # 2 1.9 1 -> inside: 1 / 2;   .1 .5 1 -> clipped .3: max(.81, .49) / 2;   .1 .5 0 -> clipped .3: max(.01, .09) / 2
    values, old, returns = f64([0.9, -0.3, 2, 0.1, 0.1]), f64([0.5, 0.2, 1.9, 0.5, 0.5]), f64([1, 0, 1, 1, 0])
    close(ppo_value_loss(values, old, returns, clip=0.2), f64([0.045, 0.045, 0.5, 0.405, 0.045]))
    close(ppo_value_loss(values, old, returns, clip=None), f64([0.005, 0.045, 0.5, 0.405, 0.005]))
    assert ppo_value_loss(values, old, returns, clip=0.0)[0, 0] == 0.125


def test_value_loss_has_no_gradient_where_the_clip_holds(close):
    values = f64([0.9, -0.3, 2, 0.1, 0.1]).requires_grad_()
    old, returns = f64([0.5, 0.2, 1.9, 0.5, 0.5]), f64([1, 0, 1, 1, 0])
    [grad] = torch.autograd.grad(ppo_value_loss(values, old, returns, clip=0.2).sum(), values)
    close(grad, f64([0, -0.3, 1, -0.9, 0]))
    [grad] = torch.autograd.grad(ppo_value_loss(values, old, returns, clip=None).sum(), values)
    close(grad, f64([-0.1, -0.3, 1, -0.9, 0.1]))


def test_loss_gradients():
    new, other, advantages = (normal(3, 4, seed=s) for s in range(3))
    assert gradcheck(lambda x: ppo_policy_loss(x, other, advantages, clip=0.2), new.requires_grad_())
    for clip in (0.2, None):
        assert gradcheck(lambda x, clip=clip: ppo_value_loss(x, other, advantages, clip=clip), new)


def test_approx_kl_is_k3_of_the_policy_that_sampled(close):
    # rho = 2: 2 - 1 - ln 2;  rho = 1/2: ln 2 - 1/2
    ln2 = f64([2.0]).log().item()
    new, old = f64([-1 + ln2, -1 - ln2, -3]), f64([-1, -1, -3])
    close(approx_kl(new, old), f64([1 - ln2, ln2 - 0.5, 0]))
    # Samples of the old policy: the mean over its vocabulary is KL(old || new).
    p, q = normal(5).log_softmax(0), normal(5, seed=1).log_softmax(0)
    close((p.exp() * approx_kl(q, p)).sum(), (p.exp() * kl_estimate(p, q, kind="k1")).sum())


def test_explained_variance(close):
    returns = f64([1, 2, 4, 99], [3, 7, 99, 99])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    # Var(R) = 4.24. Values at R + 5: all of it. Constant: none. V = 2 R doubles the error's share: 1 - 1 = 0.
    # V = -R: 1 - 4 = -3. V = R / 2: 1 - 1/4.
    guesses = (returns + 5, 1.0), (torch.full_like(returns, 3), 0.0), (2 * returns, 0.0), (-returns, -3.0)
    for values, expected in (*guesses, (returns / 2, 0.75)):
        close(explained_variance(values, returns, mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_of_returns_that_do_not_vary_is_0(dtype):
    mask = torch.ones(1, 7)
    for returns in (torch.zeros(1, 7), torch.full((1, 7), 0.3), torch.full((1, 7), 1e4 / 3)):
        explained = explained_variance(normal(1, 7).to(dtype), returns.to(torch.float32), mask)
        assert explained == 0 and explained.dtype == torch.float64
    assert explained_variance(normal(1, 7), normal(1, 7, seed=1), torch.zeros(1, 7)) == 0


@pytest.mark.parametrize("function", [ppo_policy_loss, ppo_value_loss, clip_fraction])
def test_shapes_that_would_broadcast_are_refused(function):
    whole, column = torch.zeros(2, 3), torch.zeros(2, 1)
    for shapes in itertools.permutations([whole, whole, column]):
        with pytest.raises(ValueError, match=r"\(2, 1\)"):
            function(*shapes, clip=0.2)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        approx_kl(whole, column)
