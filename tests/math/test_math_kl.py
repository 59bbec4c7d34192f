"""KL estimates against the exact divergence, extremes, and the controller of the coefficient."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from trueup.math import AdaptiveKL, exact_kl, kl_estimate, kl_loss


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_estimates_worked_by_hand(close):
    # l = -1 - (-1.5) = 0.5:  k1 = .5, k2 = .125, k3 = e^-.5 - 1 + .5;   l = -2 - (-1) = -1:  k3 = e - 1 - 1
    logprobs, ref = f64(-1.0, -2.0), f64(-1.5, -1.0)
    close(kl_estimate(logprobs, ref, kind="k1"), f64(0.5, -1.0))
    close(kl_estimate(logprobs, ref, kind="k2"), f64(0.125, 0.5))
    close(kl_estimate(logprobs, ref, kind="k3"), f64(math.exp(-0.5) - 0.5, math.e - 2))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_equal_policies_have_no_kl(kind):
    logprobs = logits(0, 2, 3)
    assert not kl_estimate(logprobs, logprobs, kind=kind).any()


def test_k3_keeps_its_digits_for_nearly_equal_policies_in_float32():
    log_ratio = torch.tensor([1e-3, -1e-3, 3e-5])
    k3 = kl_estimate(log_ratio, torch.zeros(3), kind="k3")
    torch.testing.assert_close(k3, log_ratio**2 / 2, rtol=2e-2, atol=0)
    assert (k3 >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_expectations_over_the_vocabulary(seed, close):
    theta, ref = logits(seed, 5), logits(seed + 10, 5)
    logp, logq = theta.log_softmax(-1), ref.log_softmax(-1)
    exact = exact_kl(theta, ref)
    by_hand = sum(math.exp(a) * (a - b) for a, b in zip(logp.tolist(), logq.tolist(), strict=True))
    close(exact, by_hand)
    close((logp.exp() * kl_estimate(logp, logq, kind="k1")).sum(), exact)
    close((logp.exp() * kl_estimate(logp, logq, kind="k3")).sum(), exact)
    assert abs((logp.exp() * kl_estimate(logp, logq, kind="k2")).sum() - exact) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_only_k2_has_the_gradient_of_the_kl(seed, close):
    theta, ref = logits(seed, 5).requires_grad_(), logits(seed + 10, 5)
    p = theta.detach().softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, theta)[0]

    def expected(kind: str) -> torch.Tensor:
        return gradient((p * kl_estimate(theta.log_softmax(-1), ref.log_softmax(-1), kind=kind)).sum())

    close(expected("k2"), gradient(exact_kl(theta, ref)))
    close(expected("k1"), torch.zeros(5, dtype=torch.float64))
    close(expected("k3"), gradient(exact_kl(ref, theta)))


def test_the_loss_worked_by_hand(close):
    # rho = e^.5 and e^-1, k3 as above
    logprobs, old, ref = f64(-1.0, -2.0), f64(-1.5, -1.0), f64(-1.5, -1.0)
    close(kl_loss(logprobs, old, ref), f64(math.exp(0.5) * (math.exp(-0.5) - 0.5), (math.e - 2) / math.e))


@pytest.mark.parametrize("moved", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_has_the_kl_and_its_gradient_as_its_means(seed, moved, close):
    """Over a whole vocabulary; also where the policy has moved since it sampled."""
    theta, ref = logits(seed, 5).requires_grad_(), logits(seed + 10, 5)
    old = theta.detach() + moved * logits(seed + 20, 5)
    logp, old_logp, logq = (x.log_softmax(-1) for x in (theta, old, ref))
    losses, exact = (old_logp.exp() * kl_loss(logp, old_logp, logq)).sum(), exact_kl(theta, ref)
    close(losses, exact)
    [right] = torch.autograd.grad(exact, theta, retain_graph=True)
    close(torch.autograd.grad(losses, theta, retain_graph=True)[0], right)
    # k3 alone has the value, when on policy, and not the gradient.
    [naive] = torch.autograd.grad((old_logp.exp() * kl_estimate(logp, logq, kind="k3")).sum(), theta)
    assert (naive - right).abs().max() > 0.05


def test_the_loss_does_not_overflow(close):
    new = f64(25.0, 19.9, 0.0).requires_grad_()
    losses = kl_loss(new, torch.zeros_like(new), torch.zeros_like(new))
    close(losses.detach(), f64(math.exp(20) * (math.exp(-25) + 24), math.exp(19.9) * (math.exp(-19.9) + 18.9), 0), 1e-5)
    single = kl_loss(torch.tensor([300.0]), torch.zeros(1), torch.zeros(1))
    assert torch.isfinite(single).all()


def test_exact_kl_reduces_the_vocabulary_alone_and_normalizes(close):
    theta, ref = logits(0, 2, 3, 4), logits(1, 2, 3, 4)
    kl = exact_kl(theta, ref)
    assert kl.shape == (2, 3) and (kl > 0).all()
    close(kl[1, 2], exact_kl(theta[1, 2], ref[1, 2]))
    close(exact_kl(theta + 5, ref - 3), kl)
    assert (exact_kl(ref, theta) - kl).abs().min() > 1e-3
    assert not exact_kl(theta, theta).any()


def test_exact_kl_at_extremes():
    # The policy is sure of token 0, to which the reference gives e^-800: the KL is 800 nats.
    policy, ref = torch.tensor([800.0, 0.0]), torch.tensor([0.0, 800.0])
    assert exact_kl(policy, ref) == 800
    huge = torch.tensor([3e38, -3e38, 0.0])
    assert exact_kl(huge, huge) == 0


def test_tokens_that_cannot_occur(close):
    inf = torch.inf
    ruled_out = f64(0.0, -inf, -inf, 1.0).requires_grad_()
    ref = f64(1.0, 0.5, -inf, 0.0)
    kl = exact_kl(ruled_out, ref)
    logp, logq = ruled_out[[0, 3]].log_softmax(0), ref.log_softmax(0)[[0, 3]]
    close(kl, (logp.exp() * (logp - logq)).sum())
    [grad] = torch.autograd.grad(kl, ruled_out)
    assert torch.isfinite(grad).all() and grad[0] != 0 and not grad[1:3].any()
    assert exact_kl(ref, ruled_out.detach()) == inf
    # Ruled out by underflow here, by -inf there.
    assert exact_kl(torch.tensor([0.0, -800.0]), torch.tensor([0.0, -inf])) == 0


def test_gradients():
    theta, ref = logits(0, 2, 3).requires_grad_(), logits(1, 2, 3).requires_grad_()
    assert gradcheck(exact_kl, (theta, ref))
    for kind in ("k1", "k2", "k3"):
        assert gradcheck(lambda a, b, kind=kind: kl_estimate(a, b, kind=kind), (theta, ref))


def test_another_kind_or_shape_is_refused():
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3', not 'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")
    with pytest.raises(ValueError, match=r"logprobs \(2, 3\), ref_logprobs \(3,\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(3), kind="k1")
    with pytest.raises(ValueError, match=r"logprobs \(2,\), old_logprobs \(1,\)"):
        kl_loss(torch.zeros(2), torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"ref_logprobs \(1,\)"):
        kl_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"logits \(2, 3\), ref_logits \(3,\)"):
        exact_kl(torch.zeros(2, 3), torch.zeros(3))


def test_controller_moves_towards_the_target_and_no_faster_than_a_fifth(close):
    # 64 of 1000 completions: clip(9 / 6 - 1) = .2, so x (1 + .2 x .064); clip(6.6 / 6 - 1) = .1; 0 -> -.2
    for kl, factor in ((9.0, 1.0128), (6.6, 1.0064), (6.0, 1.0), (5.7, 0.9968), (0.0, 0.9872), (torch.inf, 1.0128)):
        controller = AdaptiveKL(0.1, 6.0, 1000)
        controller.update(kl, 64)
        close(controller.value, 0.1 * factor, atol=1e-15)


def test_controller_takes_a_tensor_and_stays_a_number():
    controller = AdaptiveKL(1, 0.5, 0.5)
    assert type(controller.value) is float
    controller.update(torch.tensor(0.5625), 1)  # 1/8 above the target, with n / horizon = 2
    assert controller.value == 1.25 and type(controller.value) is float
    controller.load_state({"value": 2})
    assert type(controller.value) is float


def test_controller_goes_on_from_its_state():
    whole, first = AdaptiveKL(0.2, 6.0, 100), AdaptiveKL(0.2, 6.0, 100)
    for controller in (whole, first):
        controller.update(8.0, 10)
    rest = AdaptiveKL(99.0, 6.0, 100)
    rest.load_state(first.state())
    for controller in (whole, rest):
        controller.update(3.0, 10)
    assert rest.value == whole.value != 0.2
    with pytest.raises(KeyError):
        rest.load_state({})


@pytest.mark.parametrize(("init", "target", "horizon"), [(-0.1, 6, 100), (0.1, 0, 100), (0.1, 6, 0), (0.1, -1, 9)])
def test_controller_refuses_senseless_settings(init, target, horizon):
    with pytest.raises(ValueError, match=f"init {init} .* target {target} .* horizon {horizon}"):
        AdaptiveKL(init, target, horizon)


def test_controller_of_zero_stays_zero():
    controller = AdaptiveKL(0.0, 6.0, 100)
    controller.update(60.0, 10)
    assert controller.value == 0


def test_controller_refuses_nan_and_a_step_that_could_change_its_sign():
    controller = AdaptiveKL(0.1, 6.0, 10)
    with pytest.raises(ValueError, match="nan"):
        controller.update(math.nan, 1)
    with pytest.raises(ValueError, match=r"50 completions .* above 10\.0, not 10"):
        controller.update(0.0, 50)
    assert controller.value == 0.1
    controller.update(0.0, 49)
    assert 0 < controller.value < 0.01
