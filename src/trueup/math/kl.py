"""KL divergence of a policy from its reference, estimated and exact, and the controller of its coefficient.

KL(policy || reference) throughout, in nats, of single tokens; a completion's KL is the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trueup.math.masked import same_shape


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str) -> Tensor:
    """Estimate of KL(policy || reference) at each token, from tokens that the policy sampled.

    With l = logprobs - ref_logprobs:  k1 = l,  k2 = l^2 / 2,  k3 = exp(-l) - 1 + l.

    logprobs [B, T], ref_logprobs [B, T] -> [B, T] nats. E[k1] = E[k3] = KL; k2 is biased but has the right
    gradient as a loss, which k1 and k3 have not. k2 and k3 are never negative (beyond rounding). Pairs of
    equal log-probs give 0, so rows that are zero outside a mask stay so. ValueError for another kind, or
    where the shapes differ. Source: Schulman 2020, "Approximating KL divergence"
    (joschu.net/blog/kl-approx.html), with r = exp(-l).
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        # exp(-l) - 1 would lose every digit of a small l in float32.
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind is 'k1', 'k2' or 'k3', not {kind!r}")


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) at each token as a loss, from tokens that an older policy sampled: rho k3.

        rho k3 = rho (exp(-l) - 1 + l),   rho = pi / pi_old,   l = log(pi / pi_ref),   d(rho k3) / d log pi = rho l

    logprobs [B, T] with gradient, old_logprobs [B, T] and ref_logprobs [B, T] constants -> [B, T] nats. Given what
    is before a token, the means of value and gradient are the KL of that token and its gradient, whatever pi_old.
    Without rho the mean gradient is that of KL(reference || policy), another thing: it has how a token's own term
    changes, but not that the token becomes likelier. What a token does to the KL of later ones is not in it; a
    penalty in the rewards has that. Log-ratios to the older policy above 20 count as 20. ValueError where the
    shapes differ. Source: DeepSeek-AI 2025 (DeepSeek-V3.2), equation 7; Tang and Munos 2025, "On a few pitfalls in
    KL divergence gradient estimation for RL".
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    ratio = (logprobs - old_logprobs).clamp(max=20).exp()
    return ratio * kl_estimate(logprobs, ref_logprobs, kind="k3")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of the next token's whole distribution: sum_v p_v (log p_v - log q_v).

    logits [B, T, V], ref_logits [B, T, V], normalized here -> [B, T] nats, in the dtype of the inputs. A
    logit of -inf is a token that cannot occur: it adds nothing where the policy rules it out, and the KL is
    inf where the reference alone does. ValueError where the shapes differ. Source: Kullback and Leibler 1951.
    """
    same_shape(logits=logits, ref_logits=ref_logits)
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logp.exp()
    # Where the policy rules a token out, 0 x log 0 = 0; arithmetic would say NaN.
    return (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)


class AdaptiveKL:
    """A KL coefficient that steers the measured KL to a target.

    After each step: value <- value (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon), where kl is the mean
    KL of the step's completions in nats, n their number, and horizon a number of completions. Source: Ziegler
    et al. 2019, section 2.2, in the form of openai/lm-human-preferences `AdaptiveKLController`.

    ValueError for a target or horizon that is not positive or a negative start; for a KL that is NaN; and for
    n of 5 horizons or more, where the coefficient could fall to zero or change its sign.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if init < 0 or target <= 0 or horizon <= 0:
            raise ValueError(f"init {init} is negative, or target {target} or horizon {horizon} not positive")
        self.value = float(init)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Takes the mean KL of n completions into account."""
        error = float(kl) / self.target - 1
        if error != error:
            raise ValueError(f"the KL of this step is {kl}")
        if n >= 5 * self.horizon:
            raise ValueError(f"{n} completions a step need a horizon above {n / 5}, not {self.horizon}")
        self.value *= 1 + max(-0.2, min(0.2, error)) * n / self.horizon

    def state(self) -> dict[str, float]:
        """What a checkpoint holds; target and horizon come from the config."""
        return {"value": self.value}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on from what `state` gave. KeyError where the value is missing."""
        self.value = float(state["value"])
