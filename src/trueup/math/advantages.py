"""Advantages without a critic: what a completion brought beyond others, one number for all of its tokens.

Rewards are those of whole completions: [P, k], k completions of each of P prompts, a prompt's in one row, where a
completion is measured against its group. An advantage above 0 makes all tokens of the completion likelier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Leave-one-out: A_i = r_i - mean of the other k - 1 rewards of the prompt = k / (k - 1) (r_i - mean r).

    rewards [P, k] -> [P, k] in the unit of the rewards; each row sums to 0. The baseline does not depend on the
    completion, so that the policy gradient is unbiased. ValueError for another number of axes or k < 2.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024 (RLOO).
    """
    k = _group(rewards)
    return (rewards - rewards.mean(1, keepdim=True)) * (k / (k - 1))


def grpo_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """Relative to the group: A_i = (r_i - mean r) / (std r + 1e-4); `scale=False` leaves the division out.

    rewards [P, k] -> [P, k], without a unit where scaled; each row sums to 0. The standard deviation is the
    unbiased one, of the row. A group whose rewards are equal gets zeros. Scaling makes a prompt that is nearly
    always, or nearly never, answered well weigh as much as any. ValueError for another number of axes or k < 2.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2, with TRL's 1e-4; unscaled: Liu et al. 2025 (Dr. GRPO).
    """
    _group(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def _group(rewards: Tensor) -> int:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are [prompts, 2 or more completions of each], not {tuple(rewards.shape)}")
    return rewards.shape[1]


class RunningBaseline:
    """REINFORCE's baseline: a running mean of the rewards of earlier batches.

    A_i = r_i - b, then b <- decay b + (1 - decay) mean r. The first batch has none before it and is measured
    against its own mean; `value`, the b to come, is None until then. Source: Williams 1992 (REINFORCE), with the
    baseline of Sutton 1984 (reinforcement comparison).

    ValueError for a decay outside [0, 1), or for rewards whose mean is not finite.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay {decay} does not lie in [0, 1)")
        self.decay = decay
        self.value: float | None = None

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards of any shape -> the same shape, in their unit; then takes their mean into account."""
        mean = float(rewards.mean())
        if not math.isfinite(mean):
            raise ValueError(f"the mean of the rewards is {mean}")
        before = mean if self.value is None else self.value
        self.value = self.decay * before + (1 - self.decay) * mean
        return rewards - before

    def state(self) -> dict[str, float | None]:
        """What a checkpoint holds."""
        return {"value": self.value}

    def load_state(self, state: Mapping[str, float | None]) -> None:
        """Goes on from what `state` gave. KeyError where the value is missing."""
        self.value = state["value"]
