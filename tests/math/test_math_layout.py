"""Layouts: where the mask lies must not matter, and what lies outside it is never read.

right padding   p p a b e . .      mask 0 0 1 1 1 0 0      p prompt, a b reply, e end token, . padding
left padding    . . p p a b e      mask 0 0 0 0 1 1 1
cut by length   p p a b c d f      mask 0 0 1 1 1 1 1
one token       p p e . . . .      mask 0 0 1 0 0 0 0
with a hole     p a b t t c e      mask 0 1 1 0 0 1 1      t: a tool's or user's turn between
nothing         p p p . . . .      mask 0 0 0 0 0 0 0
"""

import pytest
import torch

from trueup.math import explained_variance, gae, masked_mean, masked_var, shape_rewards, whiten

LAYOUTS = {
    "right padding": "0011100",
    "left padding": "0000111",
    "cut by length": "0011111",
    "one token": "0010000",
    "with a hole": "0110011",
    "first token": "1000000",
    "last token": "0000001",
    "full": "1111111",
    "nothing": "0000000",
}


def rectangle(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


MASK = rectangle(*LAYOUTS.values())
B, T = MASK.shape


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_any_layout_equals_its_valid_tokens_alone(layout, close):
    [mask] = rectangle(LAYOUTS[layout])
    n = int(mask.sum())
    scores, kl, values = normal(1), normal(n, seed=1), normal(n, seed=2)
    wide_kl, wide_values = normal(T, seed=3), normal(T, seed=4)
    wide_kl[mask], wide_values[mask] = kl, values

    rewards = shape_rewards(scores, wide_kl[None], mask[None], kl_coef=0.3)
    expected = -0.3 * kl
    if n:
        expected[-1] += scores[0]
    close(rewards[0][mask], expected)
    assert not rewards[0][~mask].any()

    advantages, returns = gae(rewards, wide_values[None], mask[None], gamma=0.9, lam=0.8)
    alone = torch.ones(1, n, dtype=torch.bool)
    if n:
        advantages_alone, returns_alone = gae(expected[None], values[None], alone, gamma=0.9, lam=0.8)
        close(advantages[0][mask], advantages_alone[0])
        close(returns[0][mask], returns_alone[0])
    assert not advantages[0][~mask].any() and not returns[0][~mask].any()


def test_rows_do_not_touch_each_other():
    scores, kl, values = normal(B), normal(B, T, seed=1), normal(B, T, seed=2)
    rewards = shape_rewards(scores, kl, MASK, kl_coef=0.3)
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    for i in range(B):
        row = slice(i, i + 1)
        assert torch.equal(rewards[row], shape_rewards(scores[row], kl[row], MASK[row], kl_coef=0.3))
        alone = gae(rewards[row], values[row], MASK[row], gamma=0.9, lam=0.8)
        assert torch.equal(advantages[row], alone[0]) and torch.equal(returns[row], alone[1])


FUNCTIONS = {
    "shape_rewards": lambda x, y, mask: shape_rewards(torch.ones(B).double(), x, mask, kl_coef=0.3),
    "gae": lambda x, y, mask: torch.stack(gae(x, y, mask, gamma=0.9, lam=0.8)),
    "masked_mean": lambda x, y, mask: masked_mean(x, mask),
    "masked_var": lambda x, y, mask: masked_var(x, mask),
    "whiten": lambda x, y, mask: whiten(x, mask),
    "whiten, mean kept": lambda x, y, mask: whiten(x, mask, shift_mean=False),
    "explained_variance": lambda x, y, mask: explained_variance(x, y, mask),
}


@pytest.mark.parametrize("junk", [1e300, -7.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_junk_outside_the_mask_changes_nothing_and_gets_no_gradient(name, junk):
    function = FUNCTIONS[name]

    def run(fill: float) -> list[torch.Tensor]:
        x, y = (normal(B, T, seed=s).masked_fill(~MASK, fill).requires_grad_() for s in (1, 2))
        out = function(x, y, MASK)
        weights = normal(*out.shape, seed=3)
        grads = torch.autograd.grad((weights * out).sum(), (x, y), allow_unused=True)
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    clean, dirty = run(0.0), run(junk)
    assert len(clean) == len(dirty) >= 2
    for a, b in zip(clean, dirty, strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, b)
    for out in (clean[0], dirty[0]):
        assert not out.ndim or not out[..., ~MASK].any()
    for grad in dirty[1:]:
        assert grad[MASK].any() and not grad[~MASK].any()


def test_a_score_of_a_row_without_valid_tokens_is_read_nowhere():
    scores = torch.tensor([torch.nan, 2.0], dtype=torch.float64, requires_grad=True)
    rewards = shape_rewards(scores, torch.zeros(2, 3).double(), rectangle("000", "110"), kl_coef=1.0)
    assert torch.equal(rewards, torch.tensor([[0, 0, 0], [0, 2.0, 0]], dtype=torch.float64))
    rewards.sum().backward()
    assert scores.grad.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    kl, values = normal(B, T).to(dtype), normal(B, T, seed=1).to(dtype)
    for mask in (MASK, MASK.long(), MASK.float()):
        rewards = shape_rewards(torch.ones(B, dtype=dtype), kl, mask, kl_coef=0.3)
        advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
        assert rewards.dtype == advantages.dtype == returns.dtype == dtype
        assert torch.equal(advantages, gae(rewards, values, MASK, gamma=0.9, lam=0.8)[0])


def test_more_leading_axes_are_rows_too():
    # Pairs [B, 2, T] go through the same functions as rows [2 B, T].
    kl, values, scores = normal(3, 2, 5), normal(3, 2, 5, seed=1), normal(3, 2, seed=2)
    mask = normal(3, 2, 5, seed=3) > 0
    rewards = shape_rewards(scores, kl, mask, kl_coef=0.3)
    flat = shape_rewards(scores.view(6), kl.view(6, 5), mask.view(6, 5), kl_coef=0.3)
    assert torch.equal(rewards.view(6, 5), flat)
    for a, b in zip(
        gae(rewards, values, mask, gamma=0.9, lam=0.8),
        gae(flat, values.view(6, 5), mask.view(6, 5), gamma=0.9, lam=0.8),
        strict=True,
    ):
        assert torch.equal(a.view(6, 5), b)


def test_shapes_that_would_broadcast_are_refused():
    kl, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"kl \(2, 3\), mask \(1, 3\)"):
        shape_rewards(torch.zeros(2), kl, mask[:1], kl_coef=1.0)
    with pytest.raises(ValueError, match=r"scores \(2, 1\), rows \(2,\)"):
        shape_rewards(torch.zeros(2, 1), kl, mask, kl_coef=1.0)
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 1\), mask \(2, 3\)"):
        gae(kl, kl[:, :1], mask, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"values \(2, 3\), returns \(2, 1\)"):
        explained_variance(kl, kl[:, :1], mask)
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(2, 1\)"):
        explained_variance(kl, kl, mask[:, :1])
