"""Supervised fine-tuning: the base model learns to answer, in the tone of the demonstrations, and to stop.

In order (Ouyang et al. 2022, section 3.5): read demonstrations, hold some prompts out, maximise the log-prob of the
assistant's tokens and their end token, keep the weights with the lowest held-out loss, and sample from them to see
that they stop. Not in it: any judgement of what is good; it imitates the good and the bad alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.batches import Batch, text_batch
from trueup.data.chat import Chat, Encoded, describe
from trueup.data.files import Data
from trueup.data.prepare import demonstrations
from trueup.engine.fit import Training, fit, masked_sum
from trueup.engine.learner import Learner, Losses, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import context_length
from trueup.models.lora import Lora
from trueup.models.net import Net
from trueup.models.roles import load_weights, models_of, save_checked, save_weights
from trueup.records import Demonstration, UserError
from trueup.run import Run

WHAT = "imitates demonstrations: a base model only goes on with text, it must learn to answer and to stop"
VERSION = 2


class SFTConfig(Config):
    """Supervised fine-tuning."""

    model: str
    """The base model: a folder or Hub name."""
    data: Data
    """Demonstrations: `messages`, or `prompt` and `completion`. Several data sets: [a.jsonl, {path: b, weight: 0.5}]
    """
    seed: Seed = 0
    max_length: int = Field(1024, gt=1)
    """Rows with more tokens, or more than the model's context holds, are dropped, and counted."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts kept for validation."""
    lora: Lora | None = None
    """Train an adapter on the frozen model: {r: 16, alpha: 32}. `final/` holds merged weights all the same."""
    train: Training = Training(optim=Optim(lr=3e-4, schedule="cosine", warmup=0.05))
    sampling: Sampling = Sampling(max_tokens=64)
    """How the samples at the end are drawn."""
    samples: int = display(64, ge=0)
    """How many prompts, held-out ones where there are any, are answered at the end, to see whether the model stops."""


def sft_loss(outputs: Batch, batch: Batch) -> Losses:
    """Cross-entropy of the assistant's tokens and their end token, [B, L]."""
    return {"loss": (-outputs["logprobs"], batch["mask"])}


def run_phase(config: SFTConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    chat = Chat.load(config.model)
    limit = min(config.max_length, context_length(config.model))
    found = demonstrations(chat, config.data, limit, seed=config.seed, held_out=config.held_out)
    rows, valid = found.train, found.held
    run.say(
        f"{found.found.note()}; {len(rows)} to train on, {found.counted()}"
        + (f"; {chat.last_turn_only} with only their last turn" if chat.last_turn_only else "")
        + (f"; {chat.rewritten} whose reply the template rewrites" if chat.rewritten else "")
    )
    if not rows:
        raise UserError(
            f"{found.names}: every row has more than {limit} tokens (max_length, or the model's context)"
            if found.too_long == len(found.records)
            else f"{found.names}: no row is left to train on ({found.counted()})"
        )

    models = models_of(config.model, config.lora, precision=config.train.precision, device=mesh.device)
    model = models.policy(config.seed)
    results = fit(
        run,
        Net(model, "policy"),
        mesh,
        config.train,
        rows,
        seed=config.seed,
        loss_fn=sft_loss,
        make_batch=partial(text_batch, pad_id=chat.pad_id),
        validate=partial(validate, valid, chat) if valid else None,
        save=partial(save_weights, model, chat=chat),
        load=partial(load_weights, model),
        text_of=lambda row: str(chat.tokenizer.decode(row.ids)),
    )
    run.write("final", partial(save_checked, model, chat=chat))
    held, train = ([row.demonstration for row in part] for part in (valid, rows))
    return {
        **results,
        **found.results(),
        **sample(config, run, mesh, model, chat, held, train, results["steps"]),
    }


def validate(rows: Sequence[Encoded], chat: Chat, learner: Learner) -> dict[str, float]:
    """Held-out loss in nats per token."""
    batch = text_batch(rows, chat.pad_id)
    total = masked_sum(learner.forward(batch)["logprobs"], batch["mask"])
    return {"validation_loss": -total / int(batch["mask"].sum())}


def sample(
    config: SFTConfig,
    run: Run,
    mesh: Mesh,
    model: Any,
    chat: Chat,
    held: list[Demonstration],
    train: list[Demonstration],
    step: int,
) -> dict[str, Any]:
    """Answers to held-out prompts, else to trained ones: does it stop, how long are they, and what do they look like?
    Shares of the answers: `copied`, in the words of a reply that was trained on; `speaks_for_user`, gone on with the
    user's next turn. Shares of the demonstrations to these prompts: `recurring`, whose reply another one has too;
    `beyond_max_tokens`, too long to be sampled."""
    shown, replies = held or train, Counter(d.reply.strip() for d in train)
    prompts = list({d.prompt: None for d in shown})[: config.samples]
    if not prompts:
        return {}
    sampler = Sampler.speaking(chat, model, mesh)
    answers = sampler.sample([chat.prompt_ids(p.messages) for p in prompts], config.sampling, seed=config.seed, step=0)
    run.show(
        step, [{**describe(p), "completion": a.text, "stop": a.stop} for p, a in zip(prompts, answers, strict=True)]
    )
    ended = sum(a.ended for a in answers) / len(answers)
    length = sum(len(a.ids) for a in answers) / len(answers)
    run.say(f"samples: {ended:.0%} end by themselves, {length:.0f} tokens on average")
    opener = chat.user_opener()
    return {
        "end_rate": ended,
        "length": length,
        "samples": len(answers),
        "copied": sum(a.text.strip() in replies for a in answers) / len(answers),
        "recurring": sum(replies[d.reply.strip()] > (not held) for d in shown) / len(shown),
        "speaks_for_user": sum(bool(opener) and opener in a.text for a in answers) / len(answers),
        "beyond_max_tokens": sum(len(chat.reply_ids(d.reply)) > config.sampling.max_tokens for d in shown) / len(shown),
    }
