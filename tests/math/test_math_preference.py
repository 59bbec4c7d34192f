"""Bradley-Terry, DPO and its kin, KTO: the formulas, what they do not see, and their signs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trueup.math import bradley_terry_loss, center_penalty, dpo_loss, kto_baseline, kto_loss

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


# DPO and its kin

KINDS = ["sigmoid", "cdpo", "robust", "ipo", "hinge"]


def by_hand(h: float, beta: float, kind: str, e: float) -> float:
    def nll(x: float) -> float:
        return math.log1p(math.exp(-x))

    right, wrong = nll(beta * h), nll(-beta * h)
    return {
        "sigmoid": right,
        "cdpo": (1 - e) * right + e * wrong,
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "ipo": (h - 0.5 / beta) ** 2,
        "hinge": max(0.0, 1 - beta * h),
    }[kind]


@many
@given(score, score, score, score, st.floats(0.01, 2), st.floats(0, 0.45), st.sampled_from(KINDS))
def test_dpo_equals_its_formula(c, r, ref_c, ref_r, beta, e, kind):
    expected = by_hand((c - ref_c) - (r - ref_r), beta, kind, e)
    actual = dpo_loss(f64(c), f64(r), f64(ref_c), f64(ref_r), beta=beta, kind=kind, label_smoothing=e)
    assert actual.item() == pytest.approx(expected, abs=1e-9, rel=1e-12)


def test_dpo_by_hand_with_four_different_log_probs(close):
    # h = (-1 + 2) - (-5 + 4) = 2; beta h = .5; log(1 + e^-.5) = .4740769842
    given = f64(-1.0), f64(-5.0), f64(-2.0), f64(-4.0)
    close(dpo_loss(*given, beta=0.25), f64(0.47407698418010663))
    close(dpo_loss(*given, beta=0.25, kind="hinge"), f64(0.5))
    close(dpo_loss(*given, beta=0.25, kind="ipo"), f64(0.0))
    close(dpo_loss(*given, beta=0.5, kind="ipo"), f64(1.0))
    close(dpo_loss(*given, beta=1.0, kind="hinge"), f64(0.0))


def test_without_smoothing_cdpo_and_robust_are_sigmoid(close):
    given = f64(-1.0, 3.0), f64(-5.0, 2.0), f64(-2.0, 9.0), f64(-4.0, 1.0)
    for kind in ("cdpo", "robust"):
        close(dpo_loss(*given, beta=0.3, kind=kind), dpo_loss(*given, beta=0.3))


def test_robust_has_the_clean_loss_as_its_mean_over_flips(close):
    e, given = 0.2, (f64(-1.0), f64(-5.0), f64(-2.0), f64(-4.0))
    flipped = (given[1], given[0], given[3], given[2])
    keys = {"beta": 0.3, "kind": "robust", "label_smoothing": e}
    close((1 - e) * dpo_loss(*given, **keys) + e * dpo_loss(*flipped, **keys), dpo_loss(*given, beta=0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_raises_chosen_and_lowers_rejected(kind):
    chosen, rejected = f64(-2.0).requires_grad_(), f64(-3.0).requires_grad_()
    dpo_loss(chosen, rejected, f64(-2.0), f64(-3.0), beta=0.1, kind=kind, label_smoothing=0.1).sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item() == -chosen.grad.item()


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_gradients_and_no_overflow(kind):
    inputs = [torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    for x in inputs:
        x.requires_grad_()
    assert gradcheck(lambda *x: dpo_loss(*x, beta=0.7, kind=kind, label_smoothing=0.1), inputs)
    far = torch.tensor([-1e15, 1e15], requires_grad=True)
    loss = dpo_loss(far, -far, torch.zeros(2), torch.zeros(2), beta=0.1, kind=kind, label_smoothing=0.1)
    [grad] = torch.autograd.grad(loss.sum(), far)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all() and loss.dtype == torch.float32


def test_kto_by_hand(close):
    # beta (l - ref - z) = .5 (2 - .4) = .8 and .5 (-3 - .4) = -1.7; s(.8) = .6899744811, s(1.7) = .8455347349
    logprobs, reference = f64(-1.0, -5.0), f64(-3.0, -2.0)
    good, bad = torch.tensor([True, True]), torch.tensor([False, False])
    close(kto_loss(logprobs, reference, good, 0.4, beta=0.5), f64(1 - 0.6899744811276125, 1 - 0.15446526508353473))
    close(kto_loss(logprobs, reference, bad, 0.4, beta=0.5), f64(0.6899744811276125, 1 - 0.8455347349164652))
    each = kto_loss(logprobs, reference, torch.tensor([1, 0]), f64(0.4, 0.0), beta=0.5)
    close(each, f64(1 - 0.6899744811276125, 1 - 0.8175744761936437))
    close(kto_loss(reference, reference, good, 0.0, beta=0.5), f64(0.5, 0.5))
    close(
        kto_loss(logprobs, reference, good, f64(0.4)[0], beta=0.5), kto_loss(logprobs, reference, good, 0.4, beta=0.5)
    )


def test_kto_gradients():
    logprobs, reference = f64(-1.0, -5.0).requires_grad_(), f64(-3.0, -2.0)
    side = torch.tensor([True, False])
    assert gradcheck(lambda x: kto_loss(x, reference, side, 0.3, beta=0.5), [logprobs])
    kto_loss(logprobs, reference, side, 0.3, beta=0.5).sum().backward()
    assert logprobs.grad[0] < 0 < logprobs.grad[1]


def test_kto_baseline_is_a_mean_and_never_negative(close):
    close(kto_baseline(f64(-1.0, -5.0), f64(-3.0, -4.5)), torch.tensor(0.75, dtype=torch.float64))
    close(kto_baseline(f64(-3.0, -5.0), f64(-1.0, -4.5)), torch.tensor(0.0, dtype=torch.float64))


def test_what_dpo_and_kto_refuse():
    row, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"chosen \(3,\), rejected \(3, 1\), ref_chosen \(3,\), ref_rejected \(3,\)"):
        dpo_loss(row, column, row, row, beta=0.1)
    with pytest.raises(ValueError, match=r"ref_rejected \(3, 1\)"):
        dpo_loss(row, row, row, column, beta=0.1)
    with pytest.raises(ValueError, match=r"ref_chosen \(3, 1\)"):
        dpo_loss(row, row, column, row, beta=0.1)
    with pytest.raises(ValueError, match="not 'mse'"):
        dpo_loss(row, row, row, row, beta=0.1, kind="mse")
    for beta, smoothing in ((0.0, 0.0), (0.1, 0.5), (0.1, -0.1)):
        with pytest.raises(ValueError, match=f"beta {beta} is not positive, or label_smoothing {smoothing} not in"):
            dpo_loss(row, row, row, row, beta=beta, label_smoothing=smoothing)
    side = torch.ones(3, dtype=torch.bool)
    for one, other in ((row, column), (column, row)):
        said = rf"logprobs \({one.shape[0]},.*ref_logprobs \({other.shape[0]},"
        with pytest.raises(ValueError, match=said):
            kto_loss(one, other, torch.ones_like(other, dtype=torch.bool), 0.0, beta=0.1)
        with pytest.raises(ValueError, match=said):
            kto_baseline(one, other)
    with pytest.raises(ValueError, match=r"desirable \(3, 1\)"):
        kto_loss(row, row, side[:, None], 0.0, beta=0.1)
    with pytest.raises(ValueError, match=r"baseline \(3, 1\)"):
        kto_loss(row, row, side, column, beta=0.1)


@pytest.mark.parametrize("odd", ["logprobs", "ref_logprobs", "desirable"])
def test_kto_refuses_one_shape_that_is_not_the_others(odd):
    given = {"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3), "desirable": torch.ones(3, dtype=torch.bool)}
    given[odd] = given[odd][:1]  # which would broadcast
    with pytest.raises(ValueError):
        kto_loss(**given, baseline=0.0, beta=0.1)
