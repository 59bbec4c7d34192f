"""The Bradley-Terry loss: its formula, what it does not see, and its sign."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trueup.math import bradley_terry_loss, center_penalty

many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
score = st.floats(-30, 30, allow_subnormal=False)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@many
@given(score, score, st.floats(0, 5), st.floats(0, 1))
def test_equals_its_formula(c, r, margin, label):
    def nll(x: float) -> float:
        return math.log1p(math.exp(-x))

    expected = label * nll(c - r - margin) + (1 - label) * nll(r - c - margin)
    actual = bradley_terry_loss(f64(c), f64(r), margin=margin, label=label).item()
    assert actual == pytest.approx(expected, abs=1e-9)
    assert bradley_terry_loss(f64(c), f64(r), margin=f64(margin), label=f64(label)).item() == actual


@many
@given(score, score, st.floats(-100, 100), st.floats(0, 5), st.floats(0, 1))
def test_a_constant_on_both_scores_is_not_seen(c, r, shift, margin, label):
    def loss(c: float, r: float) -> float:
        return bradley_terry_loss(f64(c), f64(r), margin=margin, label=label).item()

    assert loss(c + shift, r + shift) == pytest.approx(loss(c, r), abs=1e-9)


def test_asymmetric_by_hand(close):
    # s(1 - 0 - .5) = s(.5) = .6224593312, s(0 - 1 - .5) = s(-1.5) = .1824255238
    chosen, rejected = f64(1.0), f64(0.0)
    a, b = -math.log(0.6224593312018546), -math.log(0.18242552380635635)
    close(bradley_terry_loss(chosen, rejected, margin=0.5), f64(a))
    close(bradley_terry_loss(chosen, rejected, margin=0.5, label=0.0), f64(b))
    close(bradley_terry_loss(chosen, rejected, margin=0.5, label=0.7), f64(0.7 * a + 0.3 * b))
    close(bradley_terry_loss(rejected, chosen, margin=0.5, label=0.3), f64(0.7 * a + 0.3 * b))


def test_learning_raises_chosen_and_lowers_rejected():
    scores = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(*scores).sum().backward()
    assert scores.grad.tolist() == [[-0.5], [0.5]]


def test_at_equal_scores_it_is_ln_2_and_a_tie_pulls_scores_together(close):
    for label in (0.0, 0.3, 1.0):
        close(bradley_terry_loss(f64(1.5), f64(1.5), label=label), f64(math.log(2)))
    gap = f64(3.0).requires_grad_()
    bradley_terry_loss(gap, f64(0.0), label=0.5).sum().backward()
    assert gap.grad.item() > 0


def test_defaults_are_no_margin_and_certainty(close):
    chosen, rejected = f64(0.3, -2.0), f64(-0.4, 1.0)
    close(bradley_terry_loss(chosen, rejected), bradley_terry_loss(chosen, rejected, margin=0.0, label=1.0))
    close(bradley_terry_loss(chosen, rejected), -(chosen - rejected).sigmoid().log())


def test_margins_and_labels_of_each_pair(close):
    chosen, rejected, margin, label = f64(1, 2), f64(0.5, 3), f64(0.25, 1.5), f64(1.0, 0.2)
    together = bradley_terry_loss(chosen, rejected, margin=margin, label=label)
    for i in range(2):
        alone = bradley_terry_loss(
            chosen[i : i + 1], rejected[i : i + 1], margin=margin[i].item(), label=label[i].item()
        )
        close(together[i : i + 1], alone)
    close(bradley_terry_loss(chosen, rejected, margin=margin[1]), bradley_terry_loss(chosen, rejected, margin=1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", [0.0, 0.25, 1.0])
def test_no_overflow(dtype, label, close):
    gap = torch.tensor([-1e30, -800.0, 800.0, 1e30], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(gap, torch.zeros_like(gap), label=label, margin=0.5)
    [grad] = torch.autograd.grad(loss.sum(), gap)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all() and loss.dtype == dtype
    close(grad, torch.tensor([-label, -label, 1 - label, 1 - label], dtype=dtype))


def test_center_penalty(close):
    close(center_penalty(f64(1.5, -2.0), f64(0.5, 2.0)), f64(4.0, 0.0))
    chosen = f64(1.5).requires_grad_()
    center_penalty(chosen, f64(0.5)).sum().backward()
    assert chosen.grad.item() == 4


def test_gradients():
    inputs = [torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    inputs.append(torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64))
    for x in inputs:
        x.requires_grad_()
    assert gradcheck(lambda c, r, m, y: bradley_terry_loss(c, r, margin=m, label=y), inputs)
    assert gradcheck(center_penalty, inputs[:2])


def test_shapes_that_would_broadcast_are_refused():
    row, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"chosen \(3,\), rejected \(3, 1\)"):
        bradley_terry_loss(row, column)
    with pytest.raises(ValueError, match=r"chosen \(3,\), rejected \(3, 1\)"):
        center_penalty(row, column)
    with pytest.raises(ValueError, match=r"rejected \(3,\), margin \(3, 1\)"):
        bradley_terry_loss(row, row, margin=column)
    with pytest.raises(ValueError, match=r"rejected \(3,\), label \(3, 1\)"):
        bradley_terry_loss(row, row, label=column)
