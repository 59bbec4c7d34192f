"""PPO: the policy is moved towards what the scorer likes, and held near the reference by a KL penalty.

In order (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024): sample prompts, generate, score; the reward is
-kl_coef x KL at every token plus the score at the end token; advantages by GAE with a critic that starts as the
reward model; clipped updates of policy and critic over epochs and minibatches. Two choices: where advantages come from
(GAE; or, without a critic, RLOO, GRPO or REINFORCE with a running baseline), and whether the KL penalty is part of the
reward or a loss of its own. Step 0 checks itself and stops where a check fails. Not in it: reward models (scorers),
sampling and gradients (engine), the formulas (math), what is said of a step (engine/rollout.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.batches import Batch, Order, completion_batch
from trueup.data.chat import Chat
from trueup.data.files import Data
from trueup.data.prepare import prompts as prepare_prompts
from trueup.engine.fit import load_state, model_bytes, state_bytes, state_writer
from trueup.engine.learner import Learner, Losses, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.rollout import Clock, Rollout, describe_rollout, end_rate, findings, samples
from trueup.engine.rows import forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.math import (
    AdaptiveKL,
    RunningBaseline,
    approx_kl,
    clip_fraction,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_loss,
    ppo_policy_loss,
    ppo_value_loss,
    rloo_advantages,
    shape_rewards,
    whiten,
)
from trueup.models.load import context_length, load_policy
from trueup.models.lora import Lora
from trueup.models.net import Net, Precision
from trueup.models.roles import Models, load_reward, load_weights, models_of, save_checked, save_weights
from trueup.records import CheckFailed, Completion, Prompt, Scorer, UserError, start_of
from trueup.run import Best, Keep, Run, peak_memory
from trueup.scorers import Spec, make_scorer, reward_model_in
from trueup.watch import Watch, Watcher

WHAT = "moves the policy towards higher scores, held near its start by a KL penalty: far away the score means nothing"
VERSION = 3


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
    """What is optimized: a reward model's folder, `module:function`, an `http://` address, a weighted sum
    {scorer: weight}, or an ensemble {ensemble: FOLDER, combine: wco}."""
    prompts: Data
    """Prompts to answer; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight:
    0.5}]."""
    reference: str | None = None
    """The policy that the KL penalty holds on to; the start where none is named."""
    critic: str | None = None
    """The reward model that the critic starts from; by default the scorer where that is one, the one that weighs most
    in it, or an ensemble's best member."""
    audit: Spec | None = None
    """Another scorer that is only logged, beside the one that is optimized: a gold score where one is known."""
    watch: Watch | None = None
    """The alarm: signs of over-optimization looked for without a gold score, and what is done about them:
    {judge: JUDGE, labels: 200, every: 10, act: back}."""
    seed: Seed = 0
    steps: int = Field(80, gt=0)
    batch: int = Field(64, gt=0)
    """Completions a step."""
    samples: int = Field(1, gt=0)
    """Completions of each prompt of a step, a group; rloo and grpo need 2 or more."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """What a completion is measured against. gae: a critic, token by token. Without a critic: rloo, the mean of the
    others of its group; grpo, the group's mean, in s.d. of the group; reinforce, a running mean of earlier steps."""
    scale_rewards: bool = True
    """grpo divides by the group's s.d.; false does not (Dr. GRPO)."""
    epochs: int = Field(2, gt=0)
    minibatches: int = Field(2, gt=0)
    kl_coef: float = Field(0.25, ge=0)
    kl_in: Literal["reward", "loss"] = "reward"
    """The KL penalty as a part of the reward, or as a loss beside the policy's: there advantages are of the score
    alone, and `kl_coef` is in their unit."""
    adaptive_kl: Adaptive | None = None
    """Where given, `kl_coef` is only the controller's start."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Of gae, as `lam`, `clip_value`, `whiten_rewards`, `critic` and `critic_optim` are."""
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
    lora: Lora | None = None
    """Train adapters on one frozen base: {r: 16, alpha: 32}. The base is the reference, and carries the critic too,
    and a reward model whose adapter was trained on the same `model`."""
    optim: Optim = Optim(lr=3e-4)
    critic_optim: Optim = Optim(lr=3e-4)
    precision: Precision = "fp32"
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts on which score - kl_coef x KL is validated; the best policy is kept."""
    validate_every: int = Field(10, gt=0)
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one; 0 never stops early."""
    snapshots: tuple[int, ...] = ()
    """Keep the policy as it is after these numbers of steps, in `snapshots/`."""
    save_every: int = display(10, gt=0)
    """Steps between checkpoints to go on from."""
    keep: Keep = display(Keep())
    """Which of them stay, and how much of the time they may take."""
    show: int = display(3, ge=0)
    """Samples written a step."""
    say_every: int = display(10, gt=0)
    """Steps between two samples shown on the terminal."""


@dataclass
class Players:
    """Who takes part: `policy` and `critic` learn, `reference` and the scorers stay as they are."""

    chat: Chat
    policy: Learner
    critic: Learner | None  # gae alone has one
    reference: Net
    sampler: Sampler
    scorer: Scorer
    audit: Scorer | None
    mesh: Mesh
    watcher: Watcher | None = None
    missing_eos_score: float = 0.0
    baseline: RunningBaseline = field(default_factory=RunningBaseline)  # reinforce alone reads it


def run_phase(config: PPOConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    refuse(config)
    chat = Chat.load(config.model)
    limit = min(config.max_prompt, context_length(config.model) - 1)
    found = prepare_prompts(config.prompts, chat.prompt_length, limit, seed=config.seed, held_out=config.held_out)
    train, held = found.train, found.held
    run.say(f"{found.found.note()}; {len(train)} distinct prompts to train on, {found.counted()}")
    if not train:
        raise UserError(f"{found.names}: no prompt is left to train on ({found.counted()})")

    players = gather_players(config, mesh, chat)
    kl = AdaptiveKL(
        config.kl_coef,
        *((config.adaptive_kl.target, config.adaptive_kl.horizon) if config.adaptive_kl else (1.0, float("inf"))),
    )
    model = sum(model_bytes(one.net) for one in (players.policy, players.critic) if one)
    run.reserve(config.keep, state=state_bytes(players.policy, players.critic), model=model)
    best = Best(run, patience=config.patience)
    watcher = players.watcher
    parts = {
        "policy": players.policy,
        "critic": players.critic,
        "kl": kl,
        "baseline": players.baseline,
        "watcher": watcher,
    }
    state = {name: part for name, part in parts.items() if part is not None}
    if folder := run.resume():
        extra = load_state(folder, **state)
        best.load_state(extra["best"])
        players.missing_eos_score = extra["missing_eos_score"]
    else:
        players.missing_eos_score = score_of_the_unended(config, players, train)
    run.say(f"a completion without its end token scores {players.missing_eos_score:.2f}")
    if watcher:
        watcher.begin(train, players.missing_eos_score)

    order = Order(len(train), config.batch // config.samples, config.seed)
    done = run.first
    for step in run.steps(config.steps, watch=("score", "audit", "kl", "length", "end_rate")):
        watched = look(config, players, step, run)
        if watcher and watcher.stop:
            if watched:
                run.log(step, **watched)
            break
        asked = [train[i] for i in order.at(step) for _ in range(config.samples)]
        rollout = make_rollout(config, players, asked, step, kl.value)
        if step == 0:
            self_check(config, run, players, rollout, kl.value)
        rollout.batch |= estimate_advantages(config, players, rollout)
        metrics = update(config, players, rollout, step, kl.value)
        metrics |= describe_rollout(rollout, kl.value, config.samples)
        if watcher:
            metrics |= watched | watcher.follow(step, rollout, run, kl.value)
        if players.baseline.value is not None:
            metrics["baseline"] = players.baseline.value
        kl.update(metrics["kl"], config.batch)
        better = False
        if held and ((step + 1) % config.validate_every == 0 or step + 1 == config.steps):
            metrics["validation"] = validate(config, players, held)
            better = best.offer(step, -metrics["validation"], partial(save_learners, players))
        if step + 1 in config.snapshots:
            run.write(f"snapshots/{step + 1}", partial(save_weights, players.policy.net.model, chat=chat))
        run.log(step, **metrics)
        done = step + 1
        rows = samples(rollout, config.show, metrics["kl_coef"])
        run.show(step, rows)
        if rows and step % config.say_every == 0:
            run.say("{prompt!r} -> {completion!r}  score {score:.2f}  KL {kl:.2f}  total {total:.2f}".format(**rows[0]))
        if step + 1 < config.steps:
            writer = state_writer(state, best=best.state(), missing_eos_score=players.missing_eos_score)
            run.checkpoint(step + 1, writer, every=config.save_every, best=better)
        if best.stop:
            run.say(f"stopped early: nothing better on held-out prompts since step {best.step}")
            break
    if watcher and done == config.steps:
        run.log(done, **look(config, players, done, run))
    if watcher:
        for version in watcher.finalists():
            load_weights(players.policy.net.model, run.folder / "snapshots" / str(version))
            watcher.audit_again(version, run)
    mesh.barrier()
    kept, delivered = done - 1, watcher.delivered() if watcher else None
    if best.step is not None:
        kept = best.step
        load_learners(players, run.folder / "best")
    elif delivered is not None:
        kept = delivered - 1
        load_weights(players.policy.net.model, run.folder / "snapshots" / str(delivered))
    run.write("final", partial(save_checked, players.policy.net.model, chat=chat))
    if players.critic:
        net = players.critic.net
        normalization = {"score_mean": float(net.mean), "score_std": float(net.std)}
        run.write("critic", partial(save_checked, net.model, chat=chat, extra_config={"trueup": normalization}))
    # A step's rollout is sampled before its update: the kept policy is described by the rollout after it, if any.
    rows = [row for row in run.metrics() if row["step"] <= kept + 1 and "score" in row]
    return {
        "steps": done,
        "best_step": best.step,
        "missing_eos_score": players.missing_eos_score,
        **{k: rows[-1].get(k) for k in ("score", "audit", "kl", "length", "end_rate", "entropy") if rows},
        **({"watch": {**watcher.results(), "delivered": kept + 1}} if watcher else {}),
    }


def look(config: PPOConfig, players: Players, step: int, run: Run) -> dict[str, float]:
    """The alarm's check of the policy after `step` updates, where one is due. Where it may go back, the policy is kept
    at each, before the first step, and where an alarm was set off."""
    watcher = players.watcher
    if not watcher:
        return {}
    if watcher.config.act == "back" and (watcher.due(step) or not step or watcher.stop):
        run.write(f"snapshots/{step}", partial(save_weights, players.policy.net.model, chat=players.chat))
    return watcher.check(step, run)


def refuse(config: PPOConfig) -> None:
    """Choices that do not fit together."""
    if watch := config.watch:
        if watch.act == "back" and config.held_out:
            raise UserError("held_out and watch.act=back both choose the policy that is kept: leave one out")
        if watch.every > config.steps:
            raise UserError(f"watch.every ({watch.every}) is beyond the last step ({config.steps}): nothing is checked")
        if watch.judge == config.scorer or watch.heldout == config.scorer:
            raise UserError("watch.judge and watch.heldout must not be what is optimized (scorer)")
    if config.sampling.top_k or config.sampling.top_p < 1 or config.sampling.greedy:
        raise UserError("PPO samples from the whole distribution: sampling.top_k must be 0, top_p 1, greedy false")
    for name, size in (("minibatches", config.minibatches), ("samples", config.samples)):
        if config.batch % size:
            raise UserError(f"batch ({config.batch}) must be a multiple of {name} ({size})")
    if config.advantage in ("rloo", "grpo") and config.samples < 2:
        raise UserError(f"advantage={config.advantage} compares completions of one prompt: samples must be 2 or more")
    if config.critic and config.advantage != "gae":
        raise UserError(f"advantage={config.advantage} has no critic: leave critic out, or take advantage=gae")


def save_learners(players: Players, folder: Path) -> None:
    """The policy in `folder`, its critic in `folder/critic`."""
    for learner, where in ((players.policy, folder), (players.critic, folder / "critic")):
        if learner:
            save_weights(learner.net.model, where, chat=players.chat)


def load_learners(players: Players, folder: Path) -> None:
    """The weights that `save_learners` wrote."""
    for learner, where in ((players.policy, folder), (players.critic, folder / "critic")):
        if learner:
            load_weights(learner.net.model, where)


def gather_players(config: PPOConfig, mesh: Mesh, chat: Chat) -> Players:
    updates = config.steps * config.epochs * config.minibatches
    temperature = config.sampling.temperature
    models = models_of(config.model, config.lora, precision=config.precision, device=mesh.device)
    policy = Net(models.policy(config.seed), "policy", temperature)
    own = config.reference in (None, config.model)
    held_to = models.untrained() if own else load_policy(str(config.reference), device=mesh.device)
    reference = Net(held_to, "policy", temperature)
    if reference.model.config.vocab_size != policy.model.config.vocab_size:
        raise UserError(f"{config.reference}: the reference must share the policy's vocabulary")
    scorer = make_scorer(config.scorer, mesh, models)
    sampler = Sampler.speaking(chat, policy.model, mesh)
    watcher = None
    if config.watch:
        start = Sampler.speaking(chat, held_to if own else models.untrained(), mesh)
        watcher = Watcher(
            config.watch,
            chat,
            mesh,
            models,
            policy=sampler,
            start=start,
            proxy=scorer,
            sampling=config.sampling,
            seed=config.seed,
            steps=config.steps,
        )
    critic = None
    if config.advantage == "gae":
        net = make_critic(config, models, chat, scorer)
        critic = Learner(net, config.critic_optim, mesh, steps=updates, precision=config.precision)
    return Players(
        chat,
        Learner(policy, config.optim, mesh, steps=updates, precision=config.precision),
        critic,
        reference,
        sampler,
        scorer,
        make_scorer(config.audit, mesh, models) if config.audit else None,
        mesh,
        watcher,
    )


def make_critic(config: PPOConfig, models: Models, chat: Chat, scorer: Scorer) -> Net:
    """The reward model where it speaks the policy's language, or the policy's start with a fresh head."""
    start = config.critic or reward_model_in(scorer)
    if start and Chat.load(start).tokenizer.get_vocab() == chat.tokenizer.get_vocab():
        return load_reward(start, models, kind="critic", seed=config.seed)
    return Net(models.scalar(config.seed), "critic")


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
    """Sample, score, and turn scores and KL into rewards."""
    clock = Clock()
    ids, completions = generate(config, players, prompts, step)
    clock.mark("generate")
    scored = players.scorer.score(prompts, completions)
    raw = scored.value.astype(np.float32)
    scores = torch.from_numpy(np.where([c.ended for c in completions], raw, np.float32(players.missing_eos_score)))
    audit = players.audit.score(prompts, completions).value if players.audit else None
    clock.mark("score")

    batch = completion_batch(ids, [c.ids for c in completions], players.chat.pad_id)
    mask = batch["mask"]
    old = players.policy.forward(batch)["logprobs"].float().cpu()
    # The very numerics of the policy: where weights are equal KL is 0, not rounding.
    bf16, budget = config.precision == "bf16", config.optim.micro_tokens
    ref = forward(players.reference, batch, players.mesh, micro_tokens=budget, bf16=bf16)["logprobs"].float().cpu()
    values = {"old_values": players.critic.forward(batch)["values"].float().cpu()} if players.critic else {}
    clock.mark("logprobs")
    found = {"policy": old, "reference": ref, **({"critic": values["old_values"]} if values else {})}
    check_finite(players, prompts, batch, found)

    batch |= {"old_logprobs": old, **values, **({"ref_logprobs": ref} if config.kl_in == "loss" else {})}
    k1, k3 = (kl_estimate(old, ref, kind=kind) for kind in ("k1", "k3"))
    rewards = shape_rewards(scores, k1, mask, kl_coef=kl_coef)
    sampled = torch.zeros(mask.shape)
    for row, prompt, completion in zip(sampled, ids, completions, strict=True):
        row[len(prompt) : len(prompt) + len(completion.ids)] = torch.tensor(completion.logprobs)
    doubt = scored.disagreement
    return Rollout(prompts, completions, scores, audit, k1, k3, rewards, sampled, batch, clock.seconds, doubt)


def check_finite(players: Players, prompts: Sequence[Prompt], batch: Batch, found: dict[str, torch.Tensor]) -> None:
    """Raises FloatingPointError naming whose outputs are no numbers where they count, and the first prompt: each row
    goes through the model alone, since one that is not finite spoils those that it is packed with."""
    for who, outputs in found.items():
        if not (~outputs.isfinite() & batch["mask"]).any():
            continue
        learner = players.critic if who == "critic" else players.policy
        net = players.reference if who == "reference" else learner.net if learner else None
        assert net is not None  # it gave these outputs
        name = "values" if who == "critic" else "logprobs"
        alone = forward(net, batch, players.mesh, micro_tokens=1)[name].cpu()
        bad = (~alone.isfinite() & batch["mask"]).any(1).nonzero().flatten().tolist()
        where = f"{len(bad)} of {len(prompts)} rows" if bad else "rows that are finite alone"
        first = f": the first answers {start_of(prompts[bad[0]].text)}" if bad else ""
        raise FloatingPointError(f"the {who}'s {name} are not finite in {where}{first}")


def estimate_advantages(config: PPOConfig, players: Players, rollout: Rollout) -> Batch:
    """advantages [B, L]; with a critic they are whitened, and returns [B, L] come with them."""
    batch, mask, rewards = rollout.batch, rollout.batch["mask"], rollout.rewards
    if config.kl_in == "loss":
        rewards = shape_rewards(rollout.scores, rollout.k1, mask, kl_coef=0.0)
    if config.advantage == "gae":
        shaped = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
        advantages, returns = gae(shaped, batch["old_values"], mask, gamma=config.gamma, lam=config.lam)
        return {"advantages": whiten(advantages, mask), "returns": returns}
    groups = rewards.sum(1).view(-1, config.samples)
    if config.advantage == "rloo":
        groups = rloo_advantages(groups)
    elif config.advantage == "grpo":
        groups = grpo_advantages(groups, scale=config.scale_rewards)
    else:
        groups = players.baseline.advantages(groups)
    return {"advantages": torch.where(mask, groups.view(-1, 1), 0.0)}


def policy_loss(outputs: Batch, batch: Batch, *, clip: float, entropy_coef: float, kl_coef: float) -> Losses:
    """The clipped surrogate, [B, L]; what is named `metric/` is measured, not optimized."""
    new, old, mask = outputs["logprobs"], batch["old_logprobs"], batch["mask"]
    losses = {"policy_loss": (ppo_policy_loss(new, old, batch["advantages"], clip=clip), mask)}
    if kl_coef:
        losses["kl_loss"] = (kl_coef * kl_loss(new, old, batch["ref_logprobs"]), mask)
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


def update(config: PPOConfig, players: Players, rollout: Rollout, step: int, kl_coef: float) -> dict[str, float]:
    """Epochs over minibatches of the rollout; each figure is the mean over the optimizer steps."""
    clock = Clock()
    figures: dict[str, list[float]] = defaultdict(list)
    kl_coef = kl_coef if config.kl_in == "loss" else 0.0
    policy_fn = partial(policy_loss, clip=config.clip, entropy_coef=config.entropy_coef, kl_coef=kl_coef)
    learners = [("policy", players.policy, policy_fn)]
    if players.critic:
        learners.append(("critic", players.critic, partial(value_loss, clip=config.clip_value)))
    rng = np.random.default_rng([config.seed, step, 1])
    epochs = 0
    while epochs < config.epochs:
        epochs += 1
        moved: list[float] = []
        for rows in np.split(rng.permutation(config.batch), config.minibatches):
            part = {name: tensor[torch.from_numpy(rows)] for name, tensor in rollout.batch.items()}
            found: dict[str, float] = {}
            for name, learner, loss_fn in learners:
                found |= learner.forward_backward(part, loss_fn)
                found |= {f"{name}_{k}": v for k, v in learner.step().items()}
            for name, value in found.items():
                figures[name.removeprefix("metric/")].append(value)
            moved.append(found["metric/approx_kl"])
        if config.target_kl and np.mean(moved) > config.target_kl:
            break
    for _, learner, _ in learners:
        learner.skip((config.epochs - epochs) * config.minibatches)
    clock.mark("update")
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    return {
        **means,
        "epochs": epochs,
        **{f"seconds_{k}": v for k, v in {**rollout.seconds, **clock.seconds}.items()},
    }


def validate(config: PPOConfig, players: Players, held: list[Prompt]) -> float:
    """Mean of score - kl_coef x KL on held-out prompts: the same random numbers and, though an adaptive coefficient
    moves, the same coefficient each time."""
    rollout = make_rollout(config, players, held, 2**31 - 2, config.kl_coef)
    return float(rollout.rewards.sum(1).mean())


def self_check(config: PPOConfig, run: Run, players: Players, rollout: Rollout, kl_coef: float) -> None:
    """Printed, and fatal where it fails: see `findings`."""
    from_reference = config.reference in (None, config.model)
    fp32, end_id = config.precision == "fp32", players.chat.end_id
    found = findings(rollout, kl_coef, end_id=end_id, fp32=fp32, from_reference=from_reference)
    for text, good in found:
        run.say(("self-check: " if good else "SELF-CHECK FAILED: ") + text)
    memory = peak_memory() / 2**20
    run.say(f"self-check: {end_rate(rollout):.0%} of the completions end by themselves; peak memory {memory:.0f} MB")
    if not all(good for _, good in found):
        raise CheckFailed("the self-check at step 0 failed: " + "; ".join(text for text, good in found if not good))
