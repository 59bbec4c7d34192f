"""Masked mean, variance and whitening: equal to the plain ones on the positions that count."""

import pytest
import torch
from torch.autograd import gradcheck

from trueup.math import masked_mean, masked_var, whiten


def example(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return 3 + 2 * torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7) < 0.6


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_plain_ones_on_what_counts(seed, close):
    x, mask = example(seed)
    inside = x[mask]
    close(masked_mean(x, mask), inside.mean())
    close(masked_var(x, mask), inside.var(unbiased=False))
    close(masked_var(x, mask, unbiased=True), inside.var(unbiased=True))
    white = whiten(x, mask)
    close(white[mask], (inside - inside.mean()) / (inside.var(unbiased=False) + 1e-8).sqrt())
    close(whiten(x, mask, shift_mean=False)[mask], white[mask] + inside.mean())
    assert not white[~mask].any() and not whiten(x, mask, shift_mean=False)[~mask].any()


@pytest.mark.parametrize("seed", range(5))
def test_whitened_has_mean_0_and_variance_1_over_the_batch_not_over_rows(seed, close):
    x, mask = example(seed)
    x[0] += 10
    white = whiten(x, mask)
    close(masked_mean(white, mask), 0.0)
    close(masked_var(white, mask), 1.0, atol=1e-7)
    assert masked_mean(white[:1], mask[:1]) > 1
    close(masked_mean(whiten(x, mask, shift_mean=False), mask), masked_mean(x, mask))


def test_the_constant_1e_8_is_added_to_the_variance(close):
    # x = 0, 2e-4: mean 1e-4, variance 1e-8 (unbiased 2e-8), so 1e-4 / sqrt(2e-8) = 1 / sqrt 2 (unbiased 1 / sqrt 3)
    x, mask = torch.tensor([[0, 2e-4, 5.0]], dtype=torch.float64), torch.tensor([[1, 1, 0]])
    close(whiten(x, mask)[0, 1], 0.5**0.5)
    close(whiten(x, mask, unbiased=True)[0, 1], (1 / 3) ** 0.5)


def test_defaults_shift_the_mean_and_are_biased():
    x, mask = example(0)
    assert torch.equal(whiten(x, mask), whiten(x, mask, shift_mean=True, unbiased=False))
    assert torch.equal(masked_var(x, mask), masked_var(x, mask, unbiased=False))


@pytest.mark.parametrize("unbiased", [False, True])
def test_nothing_or_one_position_counts(unbiased):
    x, none = torch.tensor([[4.0, 9.0]]), torch.zeros(1, 2, dtype=torch.bool)
    one = torch.tensor([[False, True]])
    zeros = torch.zeros(1, 2)
    assert masked_mean(x, none) == 0 and masked_mean(x, one) == 9
    assert masked_var(x, none, unbiased=unbiased) == 0 and masked_var(x, one, unbiased=unbiased) == 0
    assert torch.equal(whiten(x, none, unbiased=unbiased), zeros)
    assert torch.equal(whiten(x, one, unbiased=unbiased), zeros)
    assert torch.equal(whiten(x, one, unbiased=unbiased, shift_mean=False), torch.tensor([[0.0, 9.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_dtypes(dtype, mask_dtype):
    x, mask = example(1)
    assert whiten(x.to(dtype), mask.to(mask_dtype)).dtype == dtype
    assert masked_mean(x.to(dtype), mask.to(mask_dtype)).dtype == dtype
    assert torch.equal(whiten(x, mask.to(mask_dtype)), whiten(x, mask))


def test_what_is_not_zero_in_a_mask_counts_once():
    x, mask = example(1)
    for function in (masked_mean, masked_var, whiten):
        assert torch.equal(function(x, mask * 2.0), function(x, mask))


def test_gradients(close):
    x, mask = example(2)
    x.requires_grad_()
    assert gradcheck(lambda x: masked_var(x, mask, unbiased=True), x)
    for shift in (True, False):
        assert gradcheck(lambda x, shift=shift: whiten(x, mask, shift_mean=shift), x)
    [grad] = torch.autograd.grad(masked_mean(x, mask), x)
    close(grad, mask / mask.sum().double())


@pytest.mark.parametrize("function", [masked_mean, masked_var, whiten])
def test_a_mask_of_another_shape_is_refused(function):
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(3,\)"):
        function(torch.ones(2, 3), torch.ones(3))
