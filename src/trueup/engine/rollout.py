"""What one step of reinforcement learning learns from, and what is said of it: figures, samples, findings.

Not in it: how it is made and what is learned from it (phases).
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trueup.data.batches import Batch
from trueup.data.chat import describe
from trueup.math import explained_variance, masked_mean
from trueup.records import Completion, Prompt
from trueup.run import peak_memory


@dataclass
class Rollout:
    """`batch`: ids, mask, old_logprobs [B, L], lengths [B]; then advantages [B, L], with a critic old_values and
    returns, and ref_logprobs where a loss reads them. All of it lies on the CPU."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Tensor  # [B], missing end tokens counted in
    audit: np.ndarray | None  # [B]
    k1: Tensor  # [B, L], as are the next three
    k3: Tensor
    rewards: Tensor  # score and KL penalty, wherever the penalty is optimized
    sampled_logprobs: Tensor
    batch: Batch
    seconds: dict[str, float]
    disagreement: np.ndarray | None = None  # [B], where the scorer is an ensemble


def describe_rollout(rollout: Rollout, kl_coef: float, group: int = 1) -> dict[str, float]:
    """The figures of a step, before its update. KL in nats per completion; `group` completions of each prompt."""
    mask, batch = rollout.batch["mask"], rollout.batch
    out = {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl": float(rollout.k1.sum(1).mean()),
        "kl_k3": float(rollout.k3.sum(1).mean()),
        "kl_coef": kl_coef,
        "reward": float(rollout.rewards.sum(1).mean()),
        "length": float(mask.sum(1).float().mean()),
        "end_rate": end_rate(rollout),
        "distinct": len({c.text for c in rollout.completions}) / len(rollout.completions),
        "peak_memory_mb": peak_memory() / 2**20,
    }
    if "old_values" in batch:
        out["value"] = float(masked_mean(batch["old_values"], mask))
        out["explained_variance"] = float(explained_variance(batch["old_values"], batch["returns"], mask))
    if group > 1:
        groups = rollout.scores.view(-1, group)
        out["flat_groups"] = float((groups == groups[:, :1]).all(1).float().mean())
    by_category: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(rollout.prompts):
        if prompt.category:
            by_category[prompt.category].append(i)
    out |= {f"score/{c}": float(rollout.scores[rows].mean()) for c, rows in sorted(by_category.items())}
    if rollout.disagreement is not None:
        out["disagreement"] = float(rollout.disagreement.mean())
    if rollout.audit is not None:
        out["audit"] = float(rollout.audit.mean())
        out |= {f"audit/{c}": float(rollout.audit[rows].mean()) for c, rows in sorted(by_category.items())}
    return out


def end_rate(rollout: Rollout) -> float:
    return float(np.mean([c.ended for c in rollout.completions]))


def samples(rollout: Rollout, count: int, kl_coef: float) -> list[dict[str, Any]]:
    """A few of the step's completions with score, KL and total."""
    rows = []
    for i in range(min(count, len(rollout.completions))):
        completion, kl = rollout.completions[i], float(rollout.k1[i].sum())
        rows.append(
            {
                **describe(rollout.prompts[i]),
                "completion": completion.text,
                "stop": completion.stop,
                "score": float(rollout.scores[i]),
                "kl": kl,
                "total": float(rollout.scores[i]) - kl_coef * kl,
                **({"audit": float(rollout.audit[i])} if rollout.audit is not None else {}),
                **({"disagreement": float(rollout.disagreement[i])} if rollout.disagreement is not None else {}),
            }
        )
    return rows


def findings(
    rollout: Rollout, kl_coef: float, *, end_id: int, fp32: bool, from_reference: bool
) -> list[tuple[str, bool]]:
    """What the self-check of step 0 found, and whether it is as it should be: sampler and training path agree, the
    score sits on the end token, KL starts at 0 where the policy starts `from_reference`. See docs/metrics.md."""
    batch, mask = rollout.batch, rollout.batch["mask"]
    limit = 1e-4 if fp32 else 2e-2
    gap = ((batch["old_logprobs"] - rollout.sampled_logprobs).exp() - 1).abs()
    # bf16 rounds single tokens of a low probability by more than any limit that would still find a fault.
    ratio = float(gap[mask].max() if fp32 else gap[mask].mean())
    rows, last = torch.arange(len(mask)), batch["lengths"] - 1
    score_part = rollout.rewards + kl_coef * rollout.k1
    placed = torch.zeros_like(score_part)
    placed[rows, last] = rollout.scores
    ended = torch.tensor([c.stop == "eos" for c in rollout.completions])
    at_end = batch["ids"][rows, last] == end_id
    found = [
        (
            f"sampler and training path agree: {'' if fp32 else 'mean '}|ratio - 1| = {ratio:.1e} (limit {limit:.0e})",
            ratio <= limit,
        ),
        (
            "the score sits on the last token, which is the end token where there is one",
            torch.allclose(score_part, placed, atol=1e-4) and bool((at_end == ended).all()),
        ),
    ]
    if from_reference:
        kl = float(rollout.k1.abs().max())
        found.append((f"KL to the reference is {kl:.1e} at the start", kl <= 1e-6))
    return found


class Clock:
    """Seconds since the last mark, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now
