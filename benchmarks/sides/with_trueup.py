"""Trueup's side: a step as the phases take it, from rows in memory to updated weights and reduced losses."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sides.gate import Done, Figures, Gate
from sides.setting import Job, read_rows, stops_by_chance, text_of
from trueup.data.batches import completion_batch, text_batch
from trueup.data.chat import Chat, Encoded
from trueup.engine.learner import Learner, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.reference import reference_logprobs
from trueup.engine.rollout import describe_rollout
from trueup.engine.rows import forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import load_policy, load_scalar
from trueup.models.net import Net
from trueup.phases import dpo, ppo, reward, sft
from trueup.records import Completion, Preference, Prompt


class Task:
    """Set up once; `step(i)` takes batch i."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.policy, self.reward = (str(Path(job.folder) / name) for name in ("policy", "reward"))
        self.mesh = Mesh.from_env(job.device)
        self.chat = Chat.load(self.policy)
        self.rows = read_rows(job)

    def optim(self, **settings: Any) -> Optim:
        tokens = {"micro_tokens": self.job.micro_tokens} if self.job.micro_tokens else {}
        return Optim(lr=self.job.lr, **tokens, **settings)

    def batch(self, i: int) -> slice:
        n = self.job.rows_a_step
        return slice(i * n, (i + 1) * n)

    def step(self, i: int) -> Figures:
        raise NotImplementedError


class SFT(Task):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        net = Net(load_policy(self.policy, device=self.mesh.device), "policy")
        self.learner = Learner(net, self.optim(), self.mesh, steps=job.steps, precision=job.precision)
        self.encoded = [
            Encoded(r["prompt"] + r["reply"], [False] * len(r["prompt"]) + [True] * len(r["reply"])) for r in self.rows
        ]

    def step(self, i: int) -> Figures:
        batch = text_batch(self.encoded[self.batch(i)], self.chat.pad_id)
        losses = self.learner.forward_backward(batch, sft.sft_loss)
        self.learner.step()
        return {"samples": len(batch["ids"]), "tokens": int(batch["lengths"].sum()), "losses": losses}


class Reward(Task):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        net = Net(load_scalar(self.reward, device=self.mesh.device).model, "reward")
        self.learner = Learner(net, self.optim(), self.mesh, steps=job.steps, precision=job.precision)
        preference = Preference(Prompt.of(""), Completion(""), Completion(""))
        self.pairs = [reward.Pair(r["prompt"] + r["reply"], r["prompt"] + r["other"], preference) for r in self.rows]
        self.loss = partial(reward.pair_loss, center=0.0)

    def step(self, i: int) -> Figures:
        batch = reward.batch_of(self.pairs[self.batch(i)], self.chat.pad_id)
        losses = self.learner.forward_backward(batch, self.loss)
        self.learner.step()
        return {
            "samples": len(batch["ids"]),
            "tokens": int(batch["lengths"].sum()),
            "losses": {"loss": losses["loss"]},
        }


class DPO(Task):
    """The reference's log-probs are computed at set-up."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        preference = Preference(Prompt.of(""), Completion(""), Completion(""))
        self.pairs = [dpo.Row(r["prompt"], [r["reply"], r["other"]], preference) for r in self.rows]
        config = dpo.DPOConfig(model="", data="", beta=0.1)
        optim = self.optim(**{} if job.micro_tokens else {"micro_tokens": config.train.optim.micro_tokens})
        bf16 = job.precision == "bf16"
        found, _ = reference_logprobs(
            load_policy(str(Path(job.folder) / "reference"), device=self.mesh.device),
            [(row.prompt, row.replies) for row in self.pairs],
            self.mesh,
            Path(job.folder) / "logprobs",
            pad_id=self.chat.pad_id,
            micro_tokens=optim.micro_tokens,
            bf16=bf16,
        )
        for row, ref in zip(self.pairs, found, strict=True):
            row.ref = ref
        net = Net(load_policy(self.policy, device=self.mesh.device), "policy")
        self.learner = Learner(net, optim, self.mesh, steps=job.steps, precision=job.precision)
        self.loss = dpo.loss_of(config)

    def step(self, i: int) -> Figures:
        batch = dpo.batch_of(self.pairs[self.batch(i)], self.chat.pad_id)
        losses = self.learner.forward_backward(batch, self.loss)
        self.learner.step()
        tokens = int(batch["lengths"].sum())
        return {"samples": len(batch["ids"]), "tokens": tokens, "losses": {"loss": losses["loss"]}}


class PPO(Task):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.config = ppo.PPOConfig(
            model=self.policy,
            scorer=self.reward,
            prompts="",
            steps=job.steps,
            batch=job.size.batch,
            epochs=job.ppo_epochs,
            minibatches=1,
            kl_coef=0.05,
            missing_eos_score=-1.0,
            sampling=Sampling(max_tokens=job.size.lengths.limit),
            optim=self.optim(clip_norm=0.0),  # as TRL's, which does not clip
            critic_optim=self.optim(clip_norm=0.0),
            precision=job.precision,
        )
        self.players = ppo.gather_players(self.config, self.mesh, self.chat)
        self.players.missing_eos_score = -1.0
        for net in (self.players.policy.net, self.players.reference):
            stops_by_chance(net.model, job.size)
        self.prompts = [Prompt.of(text_of(r["prompt"])) for r in self.rows]

    def step(self, i: int) -> Figures:
        rollout = ppo.make_rollout(self.config, self.players, self.prompts[self.batch(i)], i, self.config.kl_coef)
        rollout.batch |= ppo.estimate_advantages(self.config, self.players, rollout)
        metrics = ppo.update(self.config, self.players, rollout, i, self.config.kl_coef)
        metrics |= describe_rollout(rollout, self.config.kl_coef)
        parts = {k.removeprefix("seconds_"): v for k, v in metrics.items() if k.startswith("seconds_")}
        losses = {name: metrics[name] for name in ("policy_loss", "value_loss")}
        tokens = int(rollout.batch["mask"].sum())
        return {
            "samples": len(rollout.completions),
            "tokens": tokens,
            "losses": losses,
            "parts": parts,
            "length": metrics["length"],
        }

    def replay(self, record: dict[str, Any]) -> dict[str, float]:
        """The losses of TRL's own first update, on TRL's rollout: the largest difference over its epochs' mean.

        TRL counts the value one column past the end token too; a row that is one longer, and a mask for the critic
        with that column, say the same.
        """
        prompts, replies = record["prompts"], record["replies"]
        policy = completion_batch(prompts, replies, self.chat.pad_id)
        beyond = [[*r, self.chat.pad_id] if one else r for r, one in zip(replies, record["one_more"], strict=True)]
        critic = completion_batch(prompts, beyond, self.chat.pad_id)
        for batch, names in ((policy, ("old_logprobs", "advantages")), (critic, ("old_values", "returns"))):
            for name in names:
                batch[name] = torch.zeros(batch["ids"].shape)
                for row, p, values in zip(batch[name], prompts, record[name], strict=True):
                    row[len(p) : len(p) + len(values)] = torch.tensor(values)
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        assert self.players.critic is not None
        policy_fn = partial(ppo.policy_loss, clip=0.2, entropy_coef=0.0, kl_coef=0.0)
        for _ in range(self.job.ppo_epochs):
            for learner, batch, fn in (
                (self.players.policy, policy, policy_fn),
                (self.players.critic, critic, partial(ppo.value_loss, clip=0.2)),
            ):
                for name, value in learner.forward_backward(batch, fn).items():
                    if name in sums:
                        sums[name] += value / self.job.ppo_epochs
                learner.step()
        return sums


class Rollout(Task):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        model = stops_by_chance(load_policy(self.policy, device=self.mesh.device), job.size)
        if job.precision == "bf16":
            model.to(torch.bfloat16)
        self.sampler = Sampler.speaking(self.chat, model, self.mesh)
        self.sampler.slots = job.slots or self.sampler.slots
        self.sampling = Sampling(max_tokens=job.size.lengths.limit)

    def step(self, i: int) -> Figures:
        prompts = [r["prompt"] for r in self.rows[self.batch(i)]]
        done = self.sampler.sample(prompts, self.sampling, seed=0, step=i)
        tokens = sum(len(c.ids) for c in done)
        return {"samples": len(done), "tokens": tokens, "losses": {}, "length": tokens / len(done)}

    def replay(self, record: dict[str, Any]) -> dict[str, float]:
        """The mean log-prob of what `generate` sampled, by the path that training takes."""
        batch = completion_batch(record["prompts"], record["replies"], self.chat.pad_id)
        found = forward(Net(self.sampler.model, "policy"), batch, self.mesh)["logprobs"]
        return {"logprob": float(found.sum() / batch["mask"].sum())}


TASKS: dict[str, type[Task]] = {"sft": SFT, "reward": Reward, "dpo": DPO, "ppo": PPO, "rollout": Rollout}


def run(job: Job, gate: Gate) -> None:
    """Steps until the gate says that it is enough."""
    task = TASKS[job.task](job)
    try:
        for i in count():
            gate.begin()
            gate.end(task.step(i))
    except Done:
        return
