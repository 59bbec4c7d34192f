"""Proximal policy optimization for language models: rewards, advantages, the two losses, and what to watch.

In the order of a step: scores and KL become rewards per token, rewards and values become advantages, and the
losses compare the policy with the one that sampled. Tensors are [B, T], B completions of T token positions;
position t belongs to token t. A mask marks the sampled tokens, wherever they lie:

    right padding   p p a b e . .      mask 0 0 1 1 1 0 0      p prompt, a b reply, e end token, . padding
    left padding    . . p p a b e      mask 0 0 0 0 1 1 1      the score lands on e
    cut by length   p p a b c d f      mask 0 0 1 1 1 1 1      the score lands on f

Nothing outside a mask is read. The losses take no mask: the caller weighs them by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trueup.math.kl import kl_estimate
from trueup.math.masked import inside, masked_var, same_shape


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards per token: r_t = -kl_coef kl_t, plus the score at the last valid token of the row.

    scores [B], kl [B, T] nats, mask [B, T] -> [B, T] in the unit of the scores, zero outside the mask. The
    last valid token is the end token where there is one. A row without a valid token gets zeros, its score
    nowhere. ValueError where the shapes do not fit. Source: Ziegler et al. 2019, equation 2, R = r - beta
    log(pi / rho), spread over the tokens; Ouyang et al. 2022, equation 2. The score's place is that of
    OpenRLHF and AlpacaFarm (some codes have it one slot later).
    """
    same_shape(kl=kl, mask=mask)
    same_shape(scores=scores, rows=mask.any(-1))
    mask = mask.bool()
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    penalty = inside(-kl_coef * kl, mask)
    return torch.where(last, penalty + scores[..., None], penalty)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, backwards over the valid tokens of each row.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    where t + 1 is the next valid token of the row; after the last one V = A = 0.

    rewards [B, T], values [B, T], mask [B, T] -> (advantages [B, T], returns [B, T]) in the unit of the
    rewards and the dtype of the inputs, zero outside the mask. Not whitened. ValueError where the shapes
    differ. Source: Schulman et al. 2016 (GAE), equation 16.
    """
    same_shape(rewards=rewards, values=values, mask=mask)
    mask = mask.bool()
    advantage: Tensor | float = 0.0
    next_value: Tensor | float = 0.0
    advantages: list[Tensor] = []
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = torch.where(mask[..., t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[..., t], values[..., t], next_value)
        advantages.append(advantage)
    result = inside(torch.stack(advantages[::-1], -1), mask)
    return result, inside(result + values, mask)


def _surrogates(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(min(logprobs - old_logprobs, 20))."""
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    # Past e^20 the ratio would overflow, and its zero gradient under the clip turn into 0 x inf = NaN.
    ratio = (logprobs - old_logprobs).clamp(max=20).exp()
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """Clipped surrogate, to be minimised: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old.

    logprobs [B, T] with gradient, old_logprobs [B, T], advantages [B, T] constants -> [B, T] in the unit of
    the advantages. The gradient is zero where the clip is active. Log-ratios above 20 count as 20. ValueError
    where the shapes differ. Source: Schulman et al. 2017 (PPO), equation 7, with its sign turned.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip)
    return torch.maximum(plain, clipped)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Clipped value loss: 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    `clip` None leaves 1/2 (V - R)^2.

    values [B, T] with gradient, old_values [B, T], returns [B, T] constants -> [B, T] in the unit of the
    returns squared. `clip` is in the unit of the values. ValueError where the shapes differ. Source:
    openai/baselines `ppo2`; Ziegler et al. 2019 (openai/lm-human-preferences `train_policy.py`).
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    loss = (values - returns).square()
    if clip is not None:
        clipped = values.clamp(old_values - clip, old_values + clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """1 at tokens where `ppo_policy_loss` is clipped (the clipped term is the larger), 0 elsewhere.

    Shapes and errors as in `ppo_policy_loss` -> [B, T]; its mean over the mask is the clip fraction. A ratio
    beyond the clip on the side that the loss still corrects does not count.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip)
    return (clipped > plain).to(plain.dtype)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(pi_old || pi) at each token that pi_old sampled, as k3: rho - 1 - log rho, rho = pi / pi_old.

    logprobs [B, T], old_logprobs [B, T] -> [B, T] nats. How far this step's updates have moved the policy;
    its mean over the mask is what a target-KL stop reads. ValueError where the shapes differ. Source: see
    `kl_estimate`.
    """
    return kl_estimate(old_logprobs, logprobs, kind="k3")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic foretold: 1 - Var(R - V) / Var(R) over the mask.

    values [B, T], returns [B, T], mask [B, T] -> [] float64, at most 1; 0 is a constant guess, below 0 worse.
    0 also where the returns do not vary. ValueError where the shapes differ. Source: openai/baselines.
    """
    same_shape(values=values, returns=returns)
    # In float64 the variance of equal float32 returns is exactly zero, not a rounding error to divide by.
    returns = returns.double()
    total = masked_var(returns, mask)
    return torch.where(total > 0, 1 - masked_var(returns - values, mask) / total, 0.0)
