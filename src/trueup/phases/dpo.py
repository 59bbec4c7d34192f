"""DPO: the policy learns from comparisons themselves, without a reward model and without sampling.

In order (Rafailov et al. 2023): the reference's log-probs of all replies, once; then, on pairs, a loss of how much more
than the reference the policy prefers the chosen reply, beta x [(log pi/ref of chosen) - (log pi/ref of rejected)]. Its
kin differ in the loss alone: cDPO, robust DPO, IPO, hinge; KTO takes single replies with a thumb up or down. The policy
starts as the reference, so the loss starts at ln 2, which is checked. At each validation the policy answers held-out
prompts: its KL on its own samples, and what it says. Not in it: the formulas (math), the cache (engine/reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.batches import Batch, completion_batch, pair_completions
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import prepare
from trueup.data.readers import read_preferences, read_thumbs
from trueup.engine.fit import Training, fit
from trueup.engine.learner import Learner, Losses, LossFn, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.reference import reference_logprobs
from trueup.engine.rows import exact_kl, forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.math import dpo_loss, kto_baseline, kto_loss
from trueup.models.load import context_length
from trueup.models.lora import Lora
from trueup.models.net import Net
from trueup.models.roles import Models, load_weights, models_of, save_checked, save_weights
from trueup.records import CheckFailed, Preference, Prompt, Thumb, UserError
from trueup.run import Run

WHAT = "learns from the comparisons themselves: how much more than its start it prefers what people chose"
VERSION = 1
SAMPLED = ("kl", "length", "end_rate")
"""What is measured on the policy's own answers."""


class DPOConfig(Config):
    """Direct preference optimization."""

    model: str
    """The SFT model: the policy's start, and the reference."""
    data: Data
    """Comparisons: `prompt, chosen, rejected`, with `label` and `weight` where they are there; for kto thumbs: `prompt,
    completion, label`. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    seed: Seed = 0
    loss: Literal["sigmoid", "cdpo", "robust", "ipo", "ipo_mean", "hinge", "kto"] = "sigmoid"
    """ipo is summed over a reply's tokens, as in the paper; ipo_mean is averaged over them."""
    beta: float = Field(0.1, gt=0)
    """How hard the policy is held to the reference: less lets it go further."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """cdpo and robust: the share of labels that are taken to be wrong."""
    sft_coef: float = Field(0.0, ge=0)
    """Weight of an SFT term, -log-prob per token of the chosen reply (of a liked one): it holds that log-prob up."""
    good_weight: float = Field(1.0, ge=0)
    """kto: weight of liked replies."""
    bad_weight: float = Field(1.0, ge=0)
    """kto: weight of disliked ones. The paper: good x their number over bad x theirs between 1 and 4/3."""
    max_length: int = Field(1024, gt=1)
    """Rows with a longer reply, prompt included, or one that the context does not hold, are dropped, and counted."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts kept for validation; the weights with the lowest loss there are kept."""
    lora: Lora | None = None
    """Train an adapter: {r: 16, alpha: 32}. The reference is the model without it, in memory once."""
    train: Training = Training(
        epochs=1, batch=64, validate_every=0.25, optim=Optim(lr=1e-6, schedule="cosine", warmup=0.1, micro_tokens=4096)
    )
    """The rate is for whole models of a billion weights; adapters and small models take a hundred times as much. Half
    of the other phases' `micro_tokens`: as fast on a CPU, in three quarters of the memory (docs/benchmarks.md)."""
    sampling: Sampling = Sampling(max_tokens=64)
    samples: int = display(128, ge=0)
    """Held-out prompts that are answered at each validation, for KL, length, end rate, and to be read."""
    show: int = display(8, ge=0)
    """How many of these answers are written down."""


@dataclass
class Row:
    """Two replies to a prompt as tokens, ends included: chosen and rejected; for kto the row's own, and one to another
    prompt. `ref`: the reference's log-prob of each."""

    prompt: list[int]
    replies: list[list[int]]
    record: Preference | Thumb
    ref: list[float] = field(default_factory=list)


def run_phase(config: DPOConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    if config.label_smoothing and config.loss not in ("cdpo", "robust"):
        raise UserError(f"label_smoothing is for loss=cdpo and loss=robust; loss={config.loss} has none")
    thumbs, chat = config.loss == "kto", Chat.load(config.model)
    limit = min(config.max_length, context_length(config.model))
    read: Any = read_thumbs if thumbs else read_preferences
    keys: dict[str, Any] = {"seed": config.seed, "held_out": config.held_out}
    found = prepare(config.data, read, lambda r: r.prompt, partial(encode, chat), longest, limit, **keys)
    rows, valid = found.train, found.held
    what = "thumbs" if thumbs else "pairs"
    run.say(f"{found.found.note()}; {len(rows)} {what} to train on, {found.counted()}")
    if not rows:
        raise UserError(f"{found.names}: no row is left to train on ({found.counted()})")
    if thumbs:
        for part in (rows, valid):
            add_others(part, limit)

    models = models_of(config.model, config.lora, precision=config.train.precision, device=mesh.device)
    add_reference(config, run, mesh, chat, models, [*rows, *valid])
    model = models.policy(config.seed)
    net, loss_fn = Net(model, "policy"), loss_of(config)
    make_batch = partial(thumb_batch if thumbs else batch_of, pad_id=chat.pad_id)
    self_check(config, run, mesh, net, make_batch(rows[: config.train.batch]), loss_fn)
    prompts = list({row.record.prompt: None for row in valid or rows})[: config.samples]

    def validate(learner: Learner) -> dict[str, float]:
        figures = measure(learner, make_batch(valid), loss_fn) if valid else {}
        return figures | sample(config, run, mesh, chat, models, net, prompts, learner.done - 1)

    results = fit(
        run,
        net,
        mesh,
        config.train,
        rows,
        seed=config.seed,
        make_batch=make_batch,
        loss_fn=loss_fn,
        validate=validate,
        save=partial(save_weights, model, chat=chat),
        load=partial(load_weights, model),
        before=with_baseline if thumbs else None,
    )
    run.write("final", partial(save_checked, model, chat=chat))
    kept = results["steps"] - 1 if results["best_step"] is None else results["best_step"]
    [last] = [row for row in run.metrics() if row["step"] == kept]
    of_what_is_kept = {k: v for k, v in last.items() if k.startswith("validation_") or k in SAMPLED}
    return {**results, **found.results(), **of_what_is_kept}


def encode(chat: Chat, record: Preference | Thumb) -> Row:
    said = [record.completion] if isinstance(record, Thumb) else [record.chosen, record.rejected]
    return Row(chat.prompt_ids(record.prompt.messages), [chat.reply_ids(c.text, c.ended) for c in said], record)


def longest(row: Row) -> int:
    return len(row.prompt) + max(map(len, row.replies))


def add_others(rows: Sequence[Row], limit: int) -> None:
    """To each thumb's own reply one to another prompt, from half the data away: those to one prompt often stand
    together."""
    own = [row.replies[0] for row in rows]
    for i, row in enumerate(rows):
        row.replies = [own[i], own[(i + len(rows) // 2) % len(rows)][: limit - len(row.prompt)]]


def add_reference(config: DPOConfig, run: Run, mesh: Mesh, chat: Chat, models: Models, rows: Sequence[Row]) -> None:
    """The reference's log-probs into every row."""
    found, computed = reference_logprobs(
        models.untrained(),
        [(row.prompt, row.replies) for row in rows],
        mesh,
        run.folder.parents[1] / ".reference-logprobs",
        pad_id=chat.pad_id,
        micro_tokens=config.train.optim.micro_tokens,
        bf16=config.train.precision == "bf16",
    )
    for row, ref in zip(rows, found, strict=True):
        row.ref = ref
    run.say(f"the reference's log-probs of {len(rows)} rows: {len(rows) - computed} known before, {computed} computed")


def batch_of(rows: Sequence[Row], pad_id: int) -> Batch:
    """ids, mask [B, 2, L], lengths, ref [B, 2], chosen first; label, weight [B]."""
    batch = pair_completions([(row.prompt, row.replies) for row in rows], pad_id)
    batch["ref"] = torch.tensor([row.ref for row in rows])
    for name in ("label", "weight"):
        batch[name] = torch.tensor([getattr(row.record, name) for row in rows], dtype=torch.float32)
    return batch


def thumb_batch(rows: Sequence[Row], pad_id: int) -> Batch:
    """ids, mask [B, L], lengths, ref, good [B]; with `other_` before their names those of replies to other prompts."""
    prompts = [row.prompt for row in rows]
    own, other = (completion_batch(prompts, [row.replies[i] for row in rows], pad_id) for i in (0, 1))
    own["ref"], other["ref"] = torch.tensor([row.ref for row in rows]).unbind(1)
    own["good"] = torch.tensor([isinstance(row.record, Thumb) and row.record.good for row in rows])
    return own | {f"other_{name}": value for name, value in other.items()}


def with_baseline(learner: Learner, batch: Batch) -> Batch:
    """KTO's baseline [B], one for all rows, in place of the replies that it comes from."""
    other = {name.removeprefix("other_"): value for name, value in batch.items() if name.startswith("other_")}
    baseline = kto_baseline(learner.forward(other)["logprobs"].float().sum(-1).cpu(), other["ref"])
    own = {name: value for name, value in batch.items() if not name.startswith("other_")}
    return own | {"baseline": baseline.expand(len(own["good"])).clone()}


def loss_of(config: DPOConfig) -> LossFn:
    if config.loss == "kto":
        weights = (config.good_weight, config.bad_weight)
        return partial(thumb_loss, beta=config.beta, weights=weights, sft_coef=config.sft_coef)
    keys: dict[str, Any] = {
        "beta": config.beta,
        "label_smoothing": config.label_smoothing,
        "sft_coef": config.sft_coef,
    }
    return partial(pair_loss, kind=config.loss, **keys)


def pair_loss(
    outputs: Batch, batch: Batch, *, kind: str, beta: float, label_smoothing: float, sft_coef: float
) -> Losses:
    """The loss [B] of log-probs [B, 2, L], chosen first; the SFT term where it has a weight; what is only logged."""
    logprobs, ref, weight, label = outputs["logprobs"].sum(-1), batch["ref"], batch["weight"], batch["label"]
    length = batch["mask"].sum(-1)
    per = length if kind == "ipo_mean" else 1
    four = [x for pair in (logprobs / per, ref / per) for x in pair.unbind(1)]
    keys: dict[str, Any] = {"beta": beta, "kind": "ipo" if per is length else kind, "label_smoothing": label_smoothing}
    # A label below 1 is a chance that the other one is the better.
    losses = label * dpo_loss(*four, **keys) + (1 - label) * dpo_loss(four[1], four[0], four[3], four[2], **keys)
    chosen, rejected = (beta * (logprobs - ref)).unbind(1)
    right = torch.where(chosen > rejected, label, torch.where(chosen < rejected, 1 - label, 0.0))
    found: Losses = {"loss": (losses, weight)}
    if sft_coef:
        found["sft"] = (-sft_coef * logprobs[:, 0] / length[:, 0], weight)
    logged = {
        "accuracy": right,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logprobs": logprobs[:, 0],
        "rejected_logprobs": logprobs[:, 1],
    }
    return found | {f"metric/{name}": (value.detach(), weight) for name, value in logged.items()}


def thumb_loss(outputs: Batch, batch: Batch, *, beta: float, weights: tuple[float, float], sft_coef: float) -> Losses:
    """KTO's loss [B] of log-probs [B, L]; chosen and rejected are the liked and the disliked replies."""
    logprobs, good = outputs["logprobs"].sum(-1), batch["good"]
    ones = torch.ones_like(logprobs)
    scale = torch.where(good, ones * weights[0], ones * weights[1])
    losses = kto_loss(logprobs, batch["ref"], good, batch["baseline"], beta=beta)
    reward, liked, disliked = beta * (logprobs - batch["ref"]), good.float(), 1 - good.float()
    found: Losses = {"loss": (scale * losses, ones)}
    if sft_coef:
        found["sft"] = (-sft_coef * logprobs / batch["mask"].sum(-1), liked)
    logged = {
        "accuracy": (((reward > beta * batch["baseline"]) == good).float(), ones),
        "baseline": (batch["baseline"], ones),
        "chosen_reward": (reward, liked),
        "rejected_reward": (reward, disliked),
        "chosen_logprobs": (logprobs, liked),
        "rejected_logprobs": (logprobs, disliked),
    }
    return found | {f"metric/{name}": (value.detach(), weight) for name, (value, weight) in logged.items()}


def reduced(losses: Losses) -> dict[str, float]:
    """Each named loss as the engine reduces it."""
    return {n.removeprefix("metric/"): float((x * w).sum() / w.sum().clamp(min=1e-9)) for n, (x, w) in losses.items()}


def measure(learner: Learner, batch: Batch, loss_fn: LossFn) -> dict[str, float]:
    """The held-out rows' figures; `validation_loss` is what is optimized, the SFT term with it."""
    batch = with_baseline(learner, batch) if "good" in batch else batch
    found = reduced(loss_fn({name: value.float().cpu() for name, value in learner.forward(batch).items()}, batch))
    found["loss"] += found.pop("sft", 0.0)
    return {f"validation_{name}": value for name, value in found.items()}


def sample(
    config: DPOConfig, run: Run, mesh: Mesh, chat: Chat, models: Models, net: Net, prompts: list[Prompt], step: int
) -> dict[str, float]:
    """The policy's own answers: their KL to the reference, exact along them, in nats per completion."""
    if not prompts:
        return {}
    ids = [chat.prompt_ids(p.messages) for p in prompts]
    answers = Sampler.speaking(chat, net.model, mesh).sample(ids, config.sampling, seed=config.seed, step=step)
    batch = completion_batch(ids, [a.ids for a in answers], chat.pad_id)
    policy, reference = (Net(m, "policy", config.sampling.temperature) for m in (net.model, models.untrained()))
    kl = exact_kl(policy, reference, batch, mesh).sum(1).tolist()
    told = zip(prompts, answers, kl, strict=True)
    rows = [{**describe(p), "completion": a.text, "stop": a.stop, "kl": k} for p, a, k in told][: config.show]
    run.show(step, rows)
    return {
        "kl": sum(kl) / len(kl),
        "length": sum(len(a.ids) for a in answers) / len(answers),
        "end_rate": sum(a.ended for a in answers) / len(answers),
    }


def self_check(config: DPOConfig, run: Run, mesh: Mesh, net: Net, batch: Batch, loss_fn: LossFn) -> None:
    """Before training: the policy is the reference, so the loss is known (ln 2 for most). Fatal where it is not."""
    fp32 = config.train.precision == "fp32"
    keys: dict[str, Any] = {"micro_tokens": config.train.optim.micro_tokens, "bf16": not fp32}
    outputs = {name: value.float().cpu() for name, value in forward(net, batch, mesh, **keys).items()}
    same = {"logprobs": outputs["logprobs"].clone()}  # as it would be if the reference said the very same
    same["logprobs"][..., 0] += batch["ref"] - outputs["logprobs"].sum(-1)
    if config.loss == "kto":
        batch = batch | {"baseline": torch.zeros(len(batch["good"]))}
    loss, start = (reduced(loss_fn(x, batch))["loss"] for x in (outputs, same))
    gap = (outputs["logprobs"].sum(-1) - batch["ref"]).abs()
    worst = float(gap.max() if fp32 else (gap / batch["mask"].sum(-1)).mean())
    said = f"the loss starts at {loss:.4f}, for policy = reference it is {start:.4f}; log-probs differ by {worst:.1e}"
    if not (worst <= (1e-3 if fp32 else 2e-2) and abs(loss - start) <= (1e-3 if fp32 else 2e-2) * start):
        raise CheckFailed(f"the self-check before step 0 failed: {said}")
    run.say(f"self-check: {said}")
