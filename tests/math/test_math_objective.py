"""PPO's gradient against the exact one, by enumerating every completion of a tiny language.

Tokens a, b and the end token e; at most three tokens, so that completions end at once, later, or are cut by length:
e, a e, b e, a a e, ..., b b b. With a row for each, weighted by its probability, expectations are exact sums.
"""

import itertools

import pytest
import torch

from trueup.math import exact_kl, gae, kl_estimate, kl_loss, ppo_policy_loss, ppo_value_loss, shape_rewards

A, B, END, START = 0, 1, 2, 3
LENGTH = 3


def completions() -> list[tuple[int, ...]]:
    ended = [(*body, END) for n in range(LENGTH) for body in itertools.product((A, B), repeat=n)]
    return ended + list(itertools.product((A, B), repeat=LENGTH))


ROWS = completions()
MASK = torch.tensor([[t < len(row) for t in range(LENGTH)] for row in ROWS])
IDS = torch.tensor([[*row, *[END] * (LENGTH - len(row))] for row in ROWS])
PREVIOUS = torch.cat([torch.full((len(ROWS), 1), START), IDS[:, :-1]], 1)
POSITION = torch.arange(LENGTH).expand_as(IDS)


def table(seed: int) -> torch.Tensor:
    """Logits [position, previous token, next token]."""
    return torch.randn(LENGTH, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_logprobs(theta: torch.Tensor) -> torch.Tensor:
    return theta.log_softmax(-1)[POSITION, PREVIOUS, IDS].masked_fill(~MASK, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_completions_are_all_there_are_and_their_kl_is_the_sum_of_its_tokens(seed, close):
    theta, ref = table(seed), table(seed + 10)
    logprobs = token_logprobs(theta)
    probability = logprobs.sum(1).exp()
    close(probability.sum(), 1.0)
    sequences = (probability * (logprobs - token_logprobs(ref)).sum(1)).sum()
    tokens = exact_kl(theta, ref)[POSITION, PREVIOUS].masked_fill(~MASK, 0.0)
    close((probability * tokens.sum(1)).sum(), sequences)


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_ppo_climbs_the_score_less_the_exact_kl(seed, kl_coef, close):
    theta, ref = table(seed).requires_grad_(), table(seed + 10)
    scores = torch.randn(len(ROWS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    logprobs, ref_logprobs = token_logprobs(theta), token_logprobs(ref)
    log_probability = logprobs.sum(1)
    kl_of_completions = log_probability - ref_logprobs.sum(1)
    objective = (log_probability.exp() * (scores - kl_coef * kl_of_completions)).sum()
    [exact] = torch.autograd.grad(objective, theta, retain_graph=True)

    old = logprobs.detach()
    rewards = shape_rewards(scores, kl_estimate(old, ref_logprobs, kind="k1"), MASK, kl_coef=kl_coef)
    baseline = table(seed + 20).mean(-1)[POSITION, PREVIOUS]  # any function of the state leaves the mean unchanged
    advantages, _ = gae(rewards, baseline, MASK, gamma=1.0, lam=1.0)
    losses = ppo_policy_loss(logprobs, old, advantages, clip=0.2)
    [estimate] = torch.autograd.grad((old.sum(1).exp()[:, None] * losses * MASK).sum(), theta)
    close(estimate, -exact)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["the loss", "k3 alone"])
@pytest.mark.parametrize("seed", range(3))
def test_kl_in_the_loss_descends_the_kl_of_each_token_given_its_prefix(seed, kind, close):
    """The prefixes are taken as they come: what a token does to the KL of later ones is left out. k3 differentiated as
    it stands descends KL(reference || policy) instead."""
    theta, ref = table(seed).requires_grad_(), table(seed + 10)
    logprobs, ref_logprobs = token_logprobs(theta), token_logprobs(ref)
    old = logprobs.detach()
    weight = old.sum(1).exp()[:, None] * MASK
    forward, backward = (
        torch.autograd.grad((weight * kl[POSITION, PREVIOUS]).sum(), theta, retain_graph=True)[0]
        for kl in (exact_kl(theta, ref), exact_kl(ref, theta))
    )
    losses = (
        kl_loss(logprobs, old, ref_logprobs) if kind == "the loss" else kl_estimate(logprobs, ref_logprobs, kind="k3")
    )
    [estimate] = torch.autograd.grad((weight * losses).sum(), theta)
    close(estimate, forward if kind == "the loss" else backward)
    assert (forward - backward).abs().max() > 0.01


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_the_critic_rests_at_the_expected_return_and_lam_does_not_move_it(lam, close):
    theta = table(0)
    probability = token_logprobs(theta).sum(1).exp()
    scores = torch.randn(len(ROWS), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rewards = shape_rewards(scores, torch.zeros_like(MASK, dtype=torch.float64), MASK, kl_coef=0.0)

    # The true value of each prefix: the mean score of the completions that begin with it.
    values = torch.zeros_like(rewards)
    for i, row in enumerate(ROWS):
        for t in range(len(row)):
            same = torch.tensor([other[:t] == row[:t] for other in ROWS])
            values[i, t] = (probability * scores)[same].sum() / probability[same].sum()
    values.requires_grad_()
    _, returns = gae(rewards, values.detach(), MASK, gamma=1.0, lam=lam)
    losses = ppo_value_loss(values, values.detach(), returns, clip=0.2)
    [grad] = torch.autograd.grad((probability[:, None] * losses * MASK).sum(), values)
    for t in range(LENGTH):
        for prefix in {row[:t] for row in ROWS if len(row) > t}:
            same = torch.tensor([other[:t] == prefix and len(other) > t for other in ROWS])
            close(grad[same, t].sum(), 0.0)
