"""PPO: the policy is moved towards what the scorer likes, and held near the reference by a KL penalty.

In order (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024): sample prompts, generate, score; the reward is
-kl_coef x KL at every token plus the score at the end token; advantages by GAE with a critic that starts as the
reward model; clipped updates of policy and critic over epochs and minibatches. Step 0 checks itself and stops where
a check fails. Not in it: reward models (scorers), sampling and gradients (engine), the formulas (math).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trueup.config import Config, display
from trueup.data.batches import Batch, Order, completion_batch
from trueup.data.chat import Chat, describe
from trueup.data.readers import read_prompts, split_by_prompt
from trueup.engine.fit import Precision, load_state, state_writer
from trueup.engine.learner import Learner, Losses, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.rows import forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.math import (
    AdaptiveKL,
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    shape_rewards,
    whiten,
)
from trueup.models.load import load_policy, load_scalar, save_model
from trueup.models.net import Net
from trueup.models.roles import load_reward, load_weights, save_checked
from trueup.records import Completion, Prompt, Scorer, UserError
from trueup.run import Best, Run, peak_memory
from trueup.scorers import Spec, Weighted, make_scorer
from trueup.scorers.reward_model import RewardModel

WHAT = "moves the policy towards higher scores, held near its start by a KL penalty: far away the score means nothing"
VERSION = 1


class Adaptive(Config):
    """The controller of Ziegler et al. 2019: the coefficient moves so that KL meets a target."""

    target: float = Field(6.0, gt=0)
    """KL in nats per completion."""
    horizon: float = Field(10_000, gt=0)
    """Completions over which the coefficient may move by its whole size."""


class PPOConfig(Config):
    """PPO under a KL penalty."""

    model: str
    """The policy's start, the SFT model; it is the reference too unless one is named."""
    scorer: Spec
    """What is optimized: a reward model's folder, `module:function`, or a weighted sum {scorer: weight}."""
    prompts: str
    """Prompts to answer; preference and demonstration files serve too."""
    reference: str | None = None
    """The policy that the KL penalty holds on to; the start where none is named."""
    critic: str | None = None
    """The reward model that the critic starts from; by default the scorer where that is one, or the one that weighs
    most in it."""
    audit: Spec | None = None
    """Another scorer that is only logged, beside the one that is optimized: a gold score where one is known."""
    seed: int = 0
    steps: int = Field(80, gt=0)
    batch: int = Field(64, gt=0)
    """Completions a step."""
    epochs: int = Field(2, gt=0)
    minibatches: int = Field(2, gt=0)
    kl_coef: float = Field(0.25, ge=0)
    adaptive_kl: Adaptive | None = None
    """Where given, `kl_coef` is only the controller's start."""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)
    clip_value: float | None = Field(0.2, gt=0)
    target_kl: float | None = Field(None, gt=0)
    """Ends a step's epochs once the new policy is this far from the one that sampled, in nats per token."""
    entropy_coef: float = Field(0.0, ge=0)
    whiten_rewards: bool = False
    missing_eos_score: float | None = None
    """Score of a completion that was cut by length; where None, one s.d. below the worst of `missing_eos_samples`."""
    missing_eos_samples: int = Field(256, gt=1)
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    optim: Optim = Optim(lr=3e-4)
    critic_optim: Optim = Optim(lr=3e-4)
    precision: Precision = "fp32"
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts on which score - kl_coef x KL is validated; the best policy is kept."""
    validate_every: int = Field(10, gt=0)
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one; 0 never stops early."""
    save_every: int = display(10, gt=0)
    show: int = display(3, ge=0)
    """Samples written a step."""
    say_every: int = display(10, gt=0)
    """Steps between two samples shown on the terminal."""


@dataclass
class Players:
    """Who takes part: `policy` and `critic` learn, `reference` and the scorers stay as they are."""

    chat: Chat
    policy: Learner
    critic: Learner
    reference: Net
    sampler: Sampler
    scorer: Scorer
    audit: Scorer | None
    mesh: Mesh
    missing_eos_score: float = 0.0


@dataclass
class Rollout:
    """What one step learns from. `batch`: ids, mask, old_logprobs, old_values, advantages, returns [B, L]."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Tensor  # [B], missing end tokens counted in
    audit: np.ndarray | None  # [B]
    k1: Tensor  # [B, L], as are the next three
    k3: Tensor
    rewards: Tensor
    sampled_logprobs: Tensor
    batch: Batch
    seconds: dict[str, float]


def run_phase(config: PPOConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    if config.sampling.top_k or config.sampling.top_p < 1 or config.sampling.greedy:
        raise UserError("PPO samples from the whole distribution: sampling.top_k must be 0, top_p 1, greedy false")
    if config.batch % config.minibatches:
        raise UserError(f"batch ({config.batch}) must be a multiple of minibatches ({config.minibatches})")
    chat = Chat.load(config.model)
    found = read_prompts(config.prompts)
    prompts = [p for p in dict.fromkeys(found.records) if len(chat.prompt_ids(p.messages)) <= config.max_prompt]
    train, held = split_by_prompt(prompts, config.held_out, lambda p: p)
    run.say(f"{found.note()}; {len(train)} distinct prompts to train on, {len(held)} held out")
    if not train:
        raise UserError(f"{config.prompts}: every prompt has more than {config.max_prompt} tokens (max_prompt)")

    players = gather_players(config, mesh, chat)
    kl = AdaptiveKL(
        config.kl_coef,
        *((config.adaptive_kl.target, config.adaptive_kl.horizon) if config.adaptive_kl else (1.0, float("inf"))),
    )
    model = players.policy.net.model
    critic = players.critic.net
    best = Best(run, patience=config.patience)
    learners = {"policy": players.policy, "critic": players.critic, "kl": kl}
    if folder := run.resume():
        extra = load_state(folder, **learners)
        best.load_state(extra["best"])
        players.missing_eos_score = extra["missing_eos_score"]
    else:
        players.missing_eos_score = score_of_the_unended(config, players, train)
    run.say(f"a completion without its end token scores {players.missing_eos_score:.2f}")

    order = Order(len(train), config.batch, config.seed)
    for step in run.steps(config.steps, watch=("score", "audit", "kl", "length", "end_rate")):
        rollout = make_rollout(config, players, [train[i] for i in order.at(step)], step, kl.value)
        if step == 0:
            self_check(config, run, players, rollout, kl.value)
        metrics = update(config, players, rollout, step)
        metrics |= describe_rollout(rollout, kl.value)
        kl.update(metrics["kl"], config.batch)
        if held and ((step + 1) % config.validate_every == 0 or step + 1 == config.steps):
            metrics["validation"] = validate(config, players, held)
            best.offer(step, -metrics["validation"], partial(save_both, chat, model, critic.model))
        run.log(step, **metrics)
        rows = samples(rollout, config.show, metrics["kl_coef"])
        run.show(step, rows)
        if rows and step % config.say_every == 0:
            run.say("{prompt!r} -> {completion!r}  score {score:.2f}  KL {kl:.2f}  total {total:.2f}".format(**rows[0]))
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            run.checkpoint(
                step + 1, state_writer(learners, best=best.state(), missing_eos_score=players.missing_eos_score)
            )
        if best.stop:
            run.say(f"stopped early: nothing better on held-out prompts since step {best.step}")
            break
    mesh.barrier()
    kept = step
    if best.step is not None:
        kept = best.step
        load_weights(model, run.folder / "best")
        load_weights(critic.model, run.folder / "best" / "critic")
    run.write("final", partial(save_checked, model, chat=chat))
    normalization = {"score_mean": float(critic.mean), "score_std": float(critic.std)}
    run.write("critic", partial(save_checked, critic.model, chat=chat, extra_config={"trueup": normalization}))
    # A step's rollout is sampled before its update: the kept policy is described by the rollout after it, if any.
    rows = [row for row in run.metrics() if row["step"] <= kept + 1]
    return {
        "steps": step + 1,
        "best_step": best.step,
        "missing_eos_score": players.missing_eos_score,
        **{k: rows[-1].get(k) for k in ("score", "audit", "kl", "length", "end_rate", "entropy") if rows},
    }


def save_both(chat: Chat, policy: Any, critic: Any, folder: Path) -> None:
    """The policy in `folder`, its critic in `folder/critic`."""
    for model, where in ((policy, folder), (critic, folder / "critic")):
        save_model(model, where, tokenizer=chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id)


def gather_players(config: PPOConfig, mesh: Mesh, chat: Chat) -> Players:
    updates = config.steps * config.epochs * config.minibatches
    temperature = config.sampling.temperature
    policy = Net(load_policy(config.model, device=mesh.device), "policy", temperature)
    reference = Net(load_policy(config.reference or config.model, device=mesh.device), "policy", temperature)
    if reference.model.config.vocab_size != policy.model.config.vocab_size:
        raise UserError(f"{config.reference}: the reference must share the policy's vocabulary")
    scorer = make_scorer(config.scorer, mesh)
    start = config.critic or reward_model_in(scorer)
    if start and Chat.load(start).tokenizer.get_vocab() == chat.tokenizer.get_vocab():
        critic = load_reward(start, kind="critic", device=mesh.device)
    else:  # another tokenizer, or no reward model at all: the policy's start with a fresh head
        critic = Net(load_scalar(config.model, seed=config.seed, device=mesh.device).model, "critic")
    return Players(
        chat,
        Learner(policy, config.optim, mesh, steps=updates, precision=config.precision),
        Learner(critic, config.critic_optim, mesh, steps=updates, precision=config.precision),
        reference,
        Sampler.speaking(chat, policy.model, mesh),
        scorer,
        make_scorer(config.audit, mesh) if config.audit else None,
        mesh,
    )


def reward_model_in(scorer: Scorer) -> str | None:
    """The reward model's folder that a scorer is, or that weighs most in it."""
    if isinstance(scorer, RewardModel):
        return scorer.name
    parts = [(abs(w), one) for one, w in scorer.scorers] if isinstance(scorer, Weighted) else []
    found = [(w, name) for w, one in parts if (name := reward_model_in(one))]
    return max(found)[1] if found else None


def generate(
    config: PPOConfig, players: Players, prompts: Sequence[Prompt], step: int
) -> tuple[list[list[int]], list[Completion]]:
    ids = [players.chat.prompt_ids(p.messages) for p in prompts]
    return ids, players.sampler.sample(ids, config.sampling, seed=config.seed, step=step)


def score_of_the_unended(config: PPOConfig, players: Players, prompts: Sequence[Prompt]) -> float:
    """Below anything that the start's own samples get, by their s.d. or, where all score alike, by 1: a small
    subtraction can be outbid by a reward model that extrapolates."""
    if config.missing_eos_score is not None:
        return config.missing_eos_score
    asked = [prompts[i % len(prompts)] for i in range(config.missing_eos_samples)]
    _, completions = generate(config, players, asked, step=-1 % 2**31)
    scores = players.scorer.score(asked, completions).value
    spread = float(scores.std())
    return float(scores.min()) - (spread if spread > 1e-6 else 1.0)


def make_rollout(config: PPOConfig, players: Players, prompts: list[Prompt], step: int, kl_coef: float) -> Rollout:
    """Sample, score, and turn scores and KL into advantages and returns."""
    clock = Clock()
    ids, completions = generate(config, players, prompts, step)
    clock.mark("generate")
    raw = players.scorer.score(prompts, completions).value.astype(np.float32)
    scores = torch.from_numpy(np.where([c.ended for c in completions], raw, np.float32(players.missing_eos_score)))
    audit = players.audit.score(prompts, completions).value if players.audit else None
    clock.mark("score")

    batch = completion_batch(ids, [c.ids for c in completions], players.chat.pad_id)
    mask = batch["mask"]
    batch["old_logprobs"] = players.policy.forward(batch)["logprobs"].float()
    # The very numerics of the policy: where weights are equal KL is 0, not rounding.
    bf16, budget = config.precision == "bf16", config.optim.micro_tokens
    reference = forward(players.reference, batch, players.mesh, micro_tokens=budget, bf16=bf16)
    ref_logprobs = reference["logprobs"].float()
    batch["old_values"] = players.critic.forward(batch)["values"].float()
    clock.mark("logprobs")

    k1 = kl_estimate(batch["old_logprobs"], ref_logprobs, kind="k1")
    rewards = shape_rewards(scores.to(k1), k1, mask.to(k1.device), kl_coef=kl_coef)
    shaped = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
    advantages, batch["returns"] = gae(shaped, batch["old_values"], mask, gamma=config.gamma, lam=config.lam)
    batch["advantages"] = whiten(advantages, mask)
    sampled = torch.zeros(mask.shape)
    for row, prompt, completion in zip(sampled, ids, completions, strict=True):
        row[len(prompt) : len(prompt) + len(completion.ids)] = torch.tensor(completion.logprobs)
    k3 = kl_estimate(batch["old_logprobs"], ref_logprobs, kind="k3")
    return Rollout(prompts, completions, scores, audit, k1, k3, rewards, sampled, batch, clock.seconds)


def policy_loss(outputs: Batch, batch: Batch, *, clip: float, entropy_coef: float) -> Losses:
    """The clipped surrogate, [B, L]; what is named `metric/` is measured, not optimized."""
    new, old, mask = outputs["logprobs"], batch["old_logprobs"], batch["mask"]
    losses = {"policy_loss": (ppo_policy_loss(new, old, batch["advantages"], clip=clip), mask)}
    if entropy_coef:
        losses["entropy_bonus"] = (-entropy_coef * outputs["entropy"], mask)
    return losses | {
        "metric/entropy": (outputs["entropy"], mask),
        "metric/clip_fraction": (clip_fraction(new, old, batch["advantages"], clip=clip), mask),
        "metric/approx_kl": (approx_kl(new, old), mask),
    }


def value_loss(outputs: Batch, batch: Batch, *, clip: float | None) -> Losses:
    return {
        "value_loss": (
            ppo_value_loss(outputs["values"], batch["old_values"], batch["returns"], clip=clip),
            batch["mask"],
        )
    }


def update(config: PPOConfig, players: Players, rollout: Rollout, step: int) -> dict[str, float]:
    """Epochs over minibatches of the rollout; each figure is the mean over the optimizer steps."""
    clock = Clock()
    figures: dict[str, list[float]] = defaultdict(list)
    policy_fn = partial(policy_loss, clip=config.clip, entropy_coef=config.entropy_coef)
    value_fn = partial(value_loss, clip=config.clip_value)
    rng = np.random.default_rng([config.seed, step, 1])
    epochs = 0
    while epochs < config.epochs:
        epochs += 1
        moved: list[float] = []
        for rows in np.split(rng.permutation(config.batch), config.minibatches):
            part = {name: tensor[torch.from_numpy(rows)] for name, tensor in rollout.batch.items()}
            found = players.policy.forward_backward(part, policy_fn)
            found |= {f"policy_{k}": v for k, v in players.policy.step().items()}
            found |= players.critic.forward_backward(part, value_fn)
            found |= {f"critic_{k}": v for k, v in players.critic.step().items()}
            for name, value in found.items():
                figures[name.removeprefix("metric/")].append(value)
            moved.append(found["metric/approx_kl"])
        if config.target_kl and np.mean(moved) > config.target_kl:
            break
    for learner in (players.policy, players.critic):
        learner.skip((config.epochs - epochs) * config.minibatches)
    clock.mark("update")
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    return {
        **means,
        "epochs": epochs,
        **{f"seconds_{k}": v for k, v in {**rollout.seconds, **clock.seconds}.items()},
    }


def describe_rollout(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """The figures of a step, before its update. KL in nats per completion."""
    mask, batch = rollout.batch["mask"], rollout.batch
    out = {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl": float(rollout.k1.sum(1).mean()),
        "kl_k3": float(rollout.k3.sum(1).mean()),
        "kl_coef": kl_coef,
        "reward": float(rollout.rewards.sum(1).mean()),
        "value": float(masked_mean(batch["old_values"], mask)),
        "explained_variance": float(explained_variance(batch["old_values"], batch["returns"], mask)),
        "length": float(mask.sum(1).float().mean()),
        "end_rate": float(np.mean([c.ended for c in rollout.completions])),
        "peak_memory_mb": peak_memory() / 2**20,
    }
    by_category: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(rollout.prompts):
        if prompt.category:
            by_category[prompt.category].append(i)
    out |= {f"score/{c}": float(rollout.scores[rows].mean()) for c, rows in sorted(by_category.items())}
    if rollout.audit is not None:
        out["audit"] = float(rollout.audit.mean())
        out |= {f"audit/{c}": float(rollout.audit[rows].mean()) for c, rows in sorted(by_category.items())}
    return out


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
            }
        )
    return rows


def validate(config: PPOConfig, players: Players, held: list[Prompt]) -> float:
    """Mean of score - kl_coef x KL on held-out prompts: the same random numbers and, though an adaptive coefficient
    moves, the same coefficient each time."""
    rollout = make_rollout(config, players, held, 2**31 - 2, config.kl_coef)
    return float(rollout.rewards.sum(1).mean())


class CheckFailed(RuntimeError):
    """The self-check at step 0 found the machinery wrong; nothing was trained."""


def self_check(config: PPOConfig, run: Run, players: Players, rollout: Rollout, kl_coef: float) -> None:
    """Printed, and fatal where it fails: sampler and training path agree, KL starts at 0, the score sits on the
    end token. See docs/metrics.md."""
    batch, mask = rollout.batch, rollout.batch["mask"]
    fp32 = config.precision == "fp32"
    limit = 1e-4 if fp32 else 2e-2
    gap = ((batch["old_logprobs"] - rollout.sampled_logprobs.to(batch["old_logprobs"])).exp() - 1).abs()
    # bf16 rounds single tokens of a low probability by more than any limit that would still find a fault.
    ratio = float(gap[mask].max() if fp32 else gap[mask].mean())
    last = batch["lengths"] - 1
    score_part = rollout.rewards + kl_coef * rollout.k1
    placed = torch.zeros_like(score_part)
    placed[torch.arange(len(last)), last] = rollout.scores.to(placed)
    ended = torch.tensor([c.stop == "eos" for c in rollout.completions])
    at_end = batch["ids"][torch.arange(len(last)), last] == players.chat.end_id
    checks = [
        (
            f"sampler and training path agree: {'' if fp32 else 'mean '}|ratio - 1| = {ratio:.1e} (limit {limit:.0e})",
            ratio <= limit,
        ),
        (
            "the score sits on the last token, which is the end token where there is one",
            torch.allclose(score_part, placed, atol=1e-4) and bool((at_end == ended).all()),
        ),
    ]
    if config.reference in (None, config.model):
        kl = float(rollout.k1.abs().max())
        checks.append((f"KL to the reference is {kl:.1e} at the start", kl <= 1e-6))
    for text, good in checks:
        run.say(("self-check: " if good else "SELF-CHECK FAILED: ") + text)
    rate = float(np.mean([c.ended for c in rollout.completions]))
    run.say(f"self-check: {rate:.0%} of the completions end by themselves; peak memory {peak_memory() / 2**20:.0f} MB")
    if not all(good for _, good in checks):
        raise CheckFailed("the self-check at step 0 failed: " + "; ".join(text for text, good in checks if not good))


class Clock:
    """Seconds since the last mark, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now
