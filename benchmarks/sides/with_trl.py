"""TRL's side, at its best settings: no gradient checkpointing, no logs, no checkpoints, fused AdamW, SDPA attention.

TRL's trainers own their loop, so a callback hands each step to the gate: an interval runs from one step's end to the
next one's, and so holds the collator and all else that the loop does.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
)

from sides.gate import Done, Figures, Gate
from sides.setting import END, PAD, Job, read_rows, stops_by_chance, text_of


class AtGate(TrainerCallback):
    """Waits before each step and reports after it. `figures(i)` says what step i was."""

    def __init__(self, gate: Gate, figures: Any) -> None:
        self.gate, self.figures, self.steps = gate, figures, count()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.gate.end(self.figures(next(self.steps)))
        self.gate.begin()


def arguments(job: Job) -> dict[str, Any]:
    """What every trainer is given."""
    rows = job.micro_rows or job.size.batch
    return {
        "output_dir": str(Path(job.folder) / "trl"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job.size.batch // rows,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device != "cpu",
        "seed": 0,
    }


def load(job: Job, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    return auto.from_pretrained(Path(job.folder) / name, dtype=dtype).to(job.device)


def load_tokenizer(job: Job, **settings: Any) -> Any:
    return AutoTokenizer.from_pretrained(Path(job.folder) / "policy", **settings)


def keeps_losses(trainer: type) -> type:
    """The trainer, with the sum of a step's micro-batch losses in `step_loss`."""

    class Keeps(trainer):  # type: ignore[misc,valid-type]
        step_loss = 0.0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.step_loss = self.step_loss + loss.detach()
            return loss

        def take_loss(self) -> float:
            value, self.step_loss = float(self.step_loss), 0.0
            return value

    return Keeps


def train(trainer: Any, job: Job, gate: Gate, tokens: list[int]) -> None:
    def figures(i: int) -> Figures:
        n = job.rows_a_step
        losses = {"loss": trainer.take_loss()}
        return {"samples": n, "tokens": sum(tokens[i * n : (i + 1) * n]), "losses": losses}

    trainer.add_callback(AtGate(gate, figures))
    trainer.train()


def sft(job: Job, gate: Gate) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(job)
    ids = [r["prompt"] + r["reply"] for r in rows]
    labels = [[-100] * len(r["prompt"]) + r["reply"] for r in rows]
    config = SFTConfig(
        **arguments(job), max_steps=job.steps, max_length=None, max_grad_norm=1.0, train_sampling_strategy="sequential"
    )
    trainer = keeps_losses(SFTTrainer)(
        model=load(job, "policy"),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=load_tokenizer(job),
    )
    train(trainer, job, gate, [len(row) for row in ids])


def reward(job: Job, gate: Gate) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = read_rows(job)
    chosen, rejected = ([r["prompt"] + r[name] for r in rows] for name in ("reply", "other"))
    config = RewardConfig(
        **arguments(job), max_steps=job.steps, max_length=None, max_grad_norm=1.0, train_sampling_strategy="sequential"
    )
    trainer = keeps_losses(RewardTrainer)(
        model=load(job, "reward"),
        args=config,
        train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
        processing_class=load_tokenizer(job),
    )
    train(trainer, job, gate, [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)])


def dpo(job: Job, gate: Gate) -> None:
    """The reference's log-probs are computed at set-up. The trainer tokenizes itself; the tokens are the rows' own."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = read_rows(job)
    texts = {"prompt": [text_of(r["prompt"]) for r in rows]}
    texts |= {
        to: [" " + text_of(r[name][:-1]) for r in rows] for to, name in (("chosen", "reply"), ("rejected", "other"))
    }
    config = DPOConfig(
        **arguments(job),
        max_steps=job.steps,
        max_length=None,
        max_grad_norm=1.0,
        beta=0.1,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
    )
    trainer = keeps_losses(DPOTrainer)(
        model=load(job, "policy"),
        ref_model=load(job, "reference"),
        args=config,
        train_dataset=Dataset.from_dict(texts),
        processing_class=load_tokenizer(job),
    )
    trainer.ref_model = None
    for to, name in (("prompt_ids", "prompt"), ("chosen_ids", "reply"), ("rejected_ids", "other")):
        assert list(trainer.train_dataset[to]) == [r[name] for r in rows], f"{to} are not the rows' own"
    train(trainer, job, gate, [len(r["prompt"]) * 2 + len(r["reply"]) + len(r["other"]) for r in rows])


def ppo(job: Job, gate: Gate, record: bool = False) -> None:
    """With `record`, raises Recorded after the first step instead of going on."""
    if job.precision == "bf16":
        # Its trainer builds an Accelerator without a precision: bf16=True alone changes nothing.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    fixed = torch.bfloat16 if job.precision == "bf16" else torch.float32
    policy, reference = (stops_by_chance(load(job, "policy", t), job.size) for t in (torch.float32, fixed))
    config = PPOConfig(
        **arguments(job),
        total_episodes=job.steps * job.size.batch,
        num_ppo_epochs=job.ppo_epochs,
        num_mini_batches=1,
        local_rollout_forward_batch_size=job.micro_rows or job.size.batch,
        num_sample_generations=0,
        response_length=job.size.lengths.limit,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=1.0,
        kl_coef=0.05,
        vf_coef=1.0,  # policy and value model share no weights, and Adam no scale: as two losses of their own
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=load_tokenizer(job, padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=load(job, "reward", fixed),
        value_model=load(job, "reward"),
        train_dataset=Dataset.from_dict({"input_ids": [r["prompt"] for r in read_rows(job)]}),
        callbacks=[PPOAtGate(gate, record)],
    )
    in_order = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=job.size.batch, collate_fn=trainer.data_collator, drop_last=True
    )
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    trainer.train()


class Recorded(Exception):
    """Ends the trainer's loop with what it was to record."""

    def __init__(self, rollout: dict[str, Any]) -> None:
        self.rollout = rollout


class PPOAtGate(TrainerCallback):
    """Waits and reports; what a step was is read from the trainer's own variables, which nothing else shows."""

    def __init__(self, gate: Gate, record: bool) -> None:
        self.gate, self.record, self.logs = gate, record, dict[str, float]()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs = logs

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seen = trainers_variables()
        losses = {"policy_loss": self.logs["loss/policy_avg"], "value_loss": self.logs["loss/value_avg"]}
        tokens = int((~seen["padding_mask"]).sum())
        rows = len(seen["responses"])
        if self.record:
            raise Recorded({**recorded(seen), "losses": losses})
        self.gate.end({"samples": rows, "tokens": tokens, "losses": losses, "length": tokens / rows})
        self.gate.begin()


def trainers_variables() -> dict[str, Any]:
    """The local variables of `PPOTrainer.train`, from within a callback."""
    frame = sys._getframe()
    while frame.f_code.co_name != "train" or "padding_mask" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals


def recorded(seen: dict[str, Any]) -> dict[str, Any]:
    """A rollout as lists without padding. `one_more`: TRL's value loss counts a column past the end token."""
    counted, valued = ~seen["padding_mask"], ~seen["padding_mask_p1"]
    width = seen["responses"].shape[1]

    def rows(name: str, mask: torch.Tensor) -> list[list[Any]]:
        return [row[keep].tolist() for row, keep in zip(seen[name], mask, strict=True)]

    prompts = seen["query_responses"][:, :-width]
    return {
        "prompts": [row[row != PAD].tolist() for row in prompts],
        "replies": rows("responses", counted),
        "one_more": (valued.sum(1) > counted.sum(1)).tolist(),
        "old_logprobs": rows("logprobs", counted),
        "advantages": rows("advantages", counted),
        "old_values": rows("values", valued),
        "returns": rows("returns", valued),
    }


@torch.no_grad()
def rollout(job: Job, gate: Gate, record: bool = False) -> Any:
    """transformers' `generate` in static batches of left-padded prompts. With `record`, returns the first batch."""
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = stops_by_chance(load(job, "policy", dtype), job.size).eval()
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=job.size.lengths.limit, eos_token_id=END, pad_token_id=PAD
    )
    prompts = [r["prompt"] for r in read_rows(job)]
    torch.manual_seed(0)
    if record:
        return record_sample(model, settings, prompts[: job.size.together])
    n, size = job.rows_a_step, job.size.together
    for i in count():
        gate.begin()
        tokens = 0
        for start in range(i * n, (i + 1) * n, size):
            ids, real = left_padded(prompts[start : start + size], job.device)
            out = model.generate(ids, attention_mask=real, generation_config=settings)[:, ids.shape[1] :]
            tokens += int((out != PAD).sum())
        gate.end({"samples": n, "tokens": tokens, "losses": {}, "length": tokens / n})


def left_padded(prompts: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=device)
    return ids, (ids != PAD).long()


def record_sample(model: PreTrainedModel, settings: GenerationConfig, prompts: list[list[int]]) -> dict[str, Any]:
    ids, real = left_padded(prompts, str(model.device))
    out = model.generate(
        ids, attention_mask=real, generation_config=settings, return_dict_in_generate=True, output_scores=True
    )
    replies = out.sequences[:, ids.shape[1] :]
    scores = torch.stack(out.scores, 1).float().log_softmax(-1)
    logprobs = scores.gather(-1, replies[..., None])[..., 0][replies != PAD]
    listed = [row[row != PAD].tolist() for row in replies]
    return {"prompts": prompts, "replies": listed, "losses": {"logprob": float(logprobs.mean())}}


TASKS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "rollout": rollout}


def run(job: Job, gate: Gate) -> None:
    """Steps until the gate says that it is enough."""
    try:
        TASKS[job.task](job, gate)
    except Done:
        return


def record(job: Job, gate: Gate) -> Any:
    """The first rollout and the losses that came of it, for `with_trueup` to compute again."""
    try:
        return {"ppo": ppo, "rollout": rollout}[job.task](job, gate, record=True)
    except Recorded as found:
        return found.rollout
