"""The reward model: from comparisons, a number that stands in for what the raters want.

In order (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020): start from the SFT model with a fresh scalar head,
read the score at the reply's last token, minimise the Bradley-Terry loss (soft labels, margins and weights where the
data has them), keep the weights with the lowest held-out loss, normalize to mean 0 and s.d. 1 on fresh SFT samples,
and measure on held-out prompts: accuracy beside the longer-wins rule and the raters' own ceiling, calibration.
Not in it: any use of a gold score; where the data carries one (`gold_margin`) it is only measured against.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.batches import Batch, pair_batch, rectangle
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import Pair, Prepared, comparisons, longer_wins
from trueup.engine.fit import Training, fit
from trueup.engine.learner import Learner, Losses, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.rows import forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.math import bradley_terry_loss, center_penalty, expected_calibration_error
from trueup.models.load import context_length, is_policy
from trueup.models.lora import Lora
from trueup.models.net import Net
from trueup.models.roles import Models, load_weights, models_of, save_checked, save_weights, start_of
from trueup.records import Preference, UserError
from trueup.run import Run

WHAT = "learns a score from the comparisons: PPO needs a number for every answer, and raters cannot give them all"
VERSION = 3


class RewardConfig(Config):
    """A reward model from comparisons."""

    model: str
    """The SFT model it starts from: a folder or Hub name."""
    data: Data
    """Comparisons: `prompt, chosen, rejected`; `label`, `margin`, `weight`, `category` are used where they are. Several
    data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    part: tuple[float, float] = (0.0, 1.0)
    """Only the prompts in this part of [0, 1): a reward model on (0.7, 1) can judge a policy trained against one on
    (0, 0.7), since they share no prompt."""
    seed: Seed = 0
    head_seed: int | None = None
    """Of the fresh head, where it is not `seed`: reward models with one head and different seeds can be averaged."""
    bootstrap: bool = False
    """Train on as many pairs drawn with replacement; the held-out ones stay."""
    raters: tuple[str, ...] | None = None
    """Train on the pairs of these raters (column `rater`) alone; the held-out ones stay."""
    max_length: int = Field(1024, gt=1)
    """Pairs with a longer row, or one that the model's context does not hold, are dropped, and counted."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts kept for validation."""
    limit: int = Field(0, ge=0)
    """Train on at most so many pairs, drawn by the seed: those of a smaller limit are among those of a larger one, and
    the held-out pairs stay the same. 0 takes all."""
    flips: float = Field(0.0, ge=0, le=1)
    """Turn this share of the training labels round, to see what noise in the labels does."""
    center: float = Field(0.01, ge=0)
    """Weight of (chosen + rejected)^2, which keeps scores near zero (Eisenstein et al. 2023)."""
    lora: Lora | None = None
    """Train an adapter and the head on the frozen model: {r: 16, alpha: 32}. `final/` holds merged weights all the
    same, and PPO with an adapter on the same model shares that model's weights with it."""
    train: Training = Training(epochs=2, optim=Optim(lr=5e-4, schedule="cosine", warmup=0.05, weight_decay=0.05))
    normalize_samples: int = Field(512, ge=0)
    """Fresh samples of `model` on which scores get mean 0 and s.d. 1; 0 leaves them raw."""
    sampling: Sampling = Sampling(max_tokens=64)
    samples: int = display(32, ge=0)
    """Held-out pairs shown with their scores."""


def pair_loss(outputs: Batch, batch: Batch, *, center: float) -> Losses:
    """Bradley-Terry loss [B] of scores [B, 2], chosen first; and the centring penalty."""
    chosen, rejected = outputs["scores"].unbind(1)
    losses = bradley_terry_loss(chosen, rejected, margin=batch["margin"], label=batch["label"])
    return {"loss": (losses, batch["weight"]), "center": (center * center_penalty(chosen, rejected), batch["weight"])}


def run_phase(config: RewardConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    chat = Chat.load(config.model)
    found, rows = read_pairs(config, chat)
    records, valid = found.records, found.held
    run.say(
        f"{found.found.note()}; {len(records)} in this part of the prompts; {len(rows)} pairs to train on, "
        f"{found.counted()}"
    )

    models = models_of(config.model, config.lora, precision=config.train.precision, device=mesh.device)
    model = models.scalar(config.seed if config.head_seed is None else config.head_seed)
    start = start_of(model)
    net = Net(model, "reward")
    results = fit(
        run,
        net,
        mesh,
        config.train,
        rows,
        seed=config.seed,
        make_batch=partial(batch_of, pad_id=chat.pad_id),
        loss_fn=partial(pair_loss, center=config.center),
        validate=partial(validate, valid, chat.pad_id) if valid else None,
        save=partial(save_weights, model, chat=chat),
        load=partial(load_weights, model),
        text_of=lambda pair: pair.preference.prompt.text,
    )

    normalization = normalize(config, net, mesh, chat, rows, models)
    answers = {(p.preference.prompt.id, c.text) for p in rows for c in (p.preference.chosen, p.preference.rejected)}
    about = {"trueup": {**normalization, "start": start, "answers": len(answers)}}
    run.write("final", partial(save_checked, model, chat=chat, extra_config=about))
    report = {}
    if valid:
        scores = pair_scores(net, mesh, valid, chat.pad_id)
        report = evaluate(valid, scores, normalization["score_std"], records)
        if len(found.held_of) > 1:
            report["by_data"] = by_data(found.held_of, valid, scores)
        show(run, valid[: config.samples], scores, normalization, results["steps"])
        run.say(
            f"held-out accuracy {report['accuracy']:.3f}; longer wins {report['longer_wins']:.3f}"
            + (f"; ceiling set by the raters' noise {report['ceiling']:.3f}" if report["ceiling"] else "")
        )
    return {**results, **found.results(), "normalization": normalization, **report}


def read_pairs(config: RewardConfig, chat: Chat) -> tuple[Prepared[Preference, Pair], list[Pair]]:
    """The comparisons, held out by prompt, and those to train on: cut and turned (`limit`, `flips`), chosen by rater,
    drawn again. Raises UserError where none is left."""
    limit = min(config.max_length, context_length(config.model))
    found = comparisons(chat, config.data, limit, seed=config.seed, held_out=config.held_out, part=config.part)
    if not found.records:
        raise UserError(f"{found.names}: no prompt falls into part {config.part[0]:g} to {config.part[1]:g}")
    rows = degraded(found.train, config)
    if not rows:
        raise UserError(
            f"{found.names}: every pair has a row with more than {limit} tokens (max_length, or the model's context)"
            if found.too_long == len(found.records)
            else f"{found.names}: no pair is left to train on ({found.counted()})"
        )
    if config.raters is not None:
        known = sorted({p.rater for p in found.records})
        rows = [p for p in rows if p.preference.rater in config.raters]
        if unknown := sorted(set(config.raters) - set(known)):
            raise UserError(f"{found.names}: no pair is by rater '{unknown[0]}'; raters: {', '.join(known)}")
        if not rows:
            raise UserError(f"{found.names}: no pair to train on is by {', '.join(config.raters)}")
    if config.bootstrap:
        drawn = np.random.default_rng([config.seed, 2]).integers(len(rows), size=len(rows))
        rows = [rows[i] for i in drawn]
    return found, rows


def degraded(pairs: list[Pair], config: RewardConfig) -> list[Pair]:
    """So many of the pairs, in their order, a share of their labels turned round."""
    rng = np.random.default_rng([config.seed, 2])
    order, draws = rng.permutation(len(pairs)), rng.random(len(pairs))
    kept = sorted(order[: config.limit or None])
    turned = {i for i in kept if draws[i] < config.flips}
    return [
        replace(pairs[i], preference=replace(pairs[i].preference, label=1 - pairs[i].preference.label))
        if i in turned
        else pairs[i]
        for i in kept
    ]


def batch_of(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """ids [B, 2, L], lengths [B, 2]; label, margin, weight [B]."""
    batch = pair_batch([(p.chosen, p.rejected) for p in pairs], pad_id)
    for name in ("label", "margin", "weight"):
        batch[name] = torch.tensor([getattr(p.preference, name) for p in pairs], dtype=torch.float32)
    return batch


def pair_scores(net: Net, mesh: Mesh, pairs: Sequence[Pair], pad_id: int) -> torch.Tensor:
    """Raw scores [B, 2]."""
    return forward(net, batch_of(pairs, pad_id), mesh)["scores"].double().cpu()


def validate(pairs: list[Pair], pad_id: int, learner: Learner) -> dict[str, float]:
    batch = batch_of(pairs, pad_id)
    chosen, rejected = learner.forward(batch)["scores"].float().cpu().unbind(1)
    losses = bradley_terry_loss(chosen, rejected, margin=batch["margin"], label=batch["label"])
    return {
        "validation_loss": float((losses * batch["weight"]).sum() / batch["weight"].sum()),
        "accuracy": right(chosen - rejected, batch["label"]),
    }


def right(gap: torch.Tensor, label: torch.Tensor) -> float:
    """Share of pairs ordered as labelled; a tie in the scores is not right, a label of one half counts half."""
    return float(torch.where(gap > 0, label, torch.where(gap < 0, 1 - label, 0.0)).mean())


def normalize(
    config: RewardConfig, net: Net, mesh: Mesh, chat: Chat, pairs: Sequence[Pair], models: Models
) -> dict[str, float]:
    """Mean and s.d. of the scores of fresh samples from the SFT model; of the data's own replies where the start
    was not a language model."""
    prompts = list({p.preference.prompt: None for p in pairs})[: config.normalize_samples]
    if not prompts:
        return {"score_mean": 0.0, "score_std": 1.0, "n": 0}
    if is_policy(config.model):
        sampler = Sampler.speaking(chat, models.untrained(), mesh)
        wanted = [prompts[i % len(prompts)] for i in range(config.normalize_samples)]
        ids = [chat.prompt_ids(p.messages) for p in wanted]
        answers = sampler.sample(ids, config.sampling, seed=config.seed, step=0)
        texts = [[*i, *a.ids] for i, a in zip(ids, answers, strict=True)]
    else:
        texts = [row for p in pairs for row in (p.chosen, p.rejected)][: 2 * config.normalize_samples]
    rows, lengths = rectangle(texts, chat.pad_id)
    scores = forward(net, {"ids": rows, "lengths": lengths}, mesh)["scores"].double()
    return {"score_mean": float(scores.mean()), "score_std": max(float(scores.std()), 1e-6), "n": len(texts)}


# what the held-out pairs say of it


def evaluate(
    pairs: Sequence[Pair], scores: torch.Tensor, std: float, everything: Sequence[Preference]
) -> dict[str, Any]:
    """Accuracy whole, by category and by margin; calibration; the baseline and the ceiling it lies between."""
    gap = scores[:, 0] - scores[:, 1]
    label = torch.tensor([p.preference.label for p in pairs], dtype=torch.float64)
    sure = torch.sigmoid(gap.abs())
    outcome = torch.where(gap >= 0, label, 1 - label)
    ece, table = expected_calibration_error(sure, outcome, bins=10)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        groups[pair.preference.prompt.category or "all"].append(i)
    agreement = rater_agreement(everything)
    longer = torch.tensor([float(len(p.chosen) - len(p.rejected)) for p in pairs])
    apart = longer != 0
    return {
        "accuracy": right(gap, label),
        "longer_wins": longer_wins(pairs),
        "prefers_longer": right(gap[apart], (longer[apart] > 0).double()) if bool(apart.any()) else None,
        "cut": {
            side: float(np.mean([not getattr(p, side).ended for p in everything])) for side in ("chosen", "rejected")
        },
        "agreement": agreement,
        "ceiling": ceiling(agreement),
        "pairs": len(pairs),
        "calibration_error": ece,
        "reliability": table,
        "by_category": {c: {"accuracy": right(gap[i], label[i]), "pairs": len(i)} for c, i in sorted(groups.items())},
        "by_margin": by_margin(gap / std, label),
        "clean": clean_accuracy(pairs, gap, label),
    }


def by_data(counts: Mapping[str, int], pairs: Sequence[Pair], scores: torch.Tensor) -> dict[str, dict[str, float]]:
    """Accuracy on the held-out pairs of each data set, such as the comparisons of each round; `counts`: how many of
    `pairs` are whose, in order."""
    gap = scores[:, 0] - scores[:, 1]
    label = torch.tensor([p.preference.label for p in pairs], dtype=torch.float64)
    out, start = {}, 0
    for name, count in counts.items():
        some = slice(start, start + count)
        if count:
            out[name] = {"accuracy": right(gap[some], label[some]), "pairs": count}
        start += count
    return out


def by_margin(gap: torch.Tensor, label: torch.Tensor, bins: int = 5) -> list[dict[str, float]]:
    """Accuracy by the size of the predicted margin, in s.d. of the SFT samples' scores; equal counts a bin."""
    parts = gap.abs().argsort().chunk(bins)
    return [
        {
            "from": float(gap[p].abs().min()),
            "to": float(gap[p].abs().max()),
            "accuracy": right(gap[p], label[p]),
            "pairs": len(p),
        }
        for p in parts
        if len(p)
    ]


def clean_accuracy(
    pairs: Sequence[Pair], gap: torch.Tensor, label: torch.Tensor, clear: float = 0.4
) -> dict[str, float] | None:
    """Against the gold score where the data carries its margin (`gold_margin`, chosen minus rejected): the model's
    order, and the labels themselves."""
    gold = torch.tensor([p.preference.prompt.meta.get("gold_margin", math.nan) for p in pairs], dtype=torch.float64)
    known = gold.abs() > 1e-9
    if not bool(known.any()):
        return None
    far = gold.abs() > clear
    agree = gap * gold > 0
    return {
        "accuracy": float(agree[known].double().mean()),
        "label_accuracy": right(gold[known], label[known]),
        "pairs": int(known.sum()),
        "clear_margin": clear,
        "clear_accuracy": float(agree[far].double().mean()) if bool(far.any()) else math.nan,
        "clear_pairs": int(far.sum()),
    }


def rater_agreement(preferences: Sequence[Preference]) -> float | None:
    """How often two raters of the same pair agree; None where no pair was rated twice."""
    votes: dict[tuple[str, frozenset[str]], list[tuple[str, str]]] = defaultdict(list)
    for p in preferences:
        if p.label != 0.5:
            winner = p.chosen.text if p.label > 0.5 else p.rejected.text
            votes[p.prompt.id, frozenset((p.chosen.text, p.rejected.text))].append((p.rater, winner))
    same = [a[1] == b[1] for v in votes.values() for i, a in enumerate(v) for b in v[i + 1 :] if a[0] != b[0]]
    return float(np.mean(same)) if same else None


def ceiling(agreement: float | None) -> float | None:
    """The accuracy of a perfect model on noisy labels: raters who each flip with probability p agree with
    probability 1 - 2p(1 - p), and label right with 1 - p."""
    return None if agreement is None else (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def show(run: Run, pairs: Sequence[Pair], scores: torch.Tensor, normalization: dict[str, float], step: int) -> None:
    mean, std = normalization["score_mean"], normalization["score_std"]
    for i, pair in enumerate(pairs):
        p = pair.preference
        sides = ((p.chosen, "chosen"), (p.rejected, "rejected"))
        run.show(
            step,
            [
                {
                    **describe(p.prompt),
                    "completion": c.text,
                    "stop": c.stop,
                    "side": side,
                    "pair": i,
                    "score": (float(scores[i, j]) - mean) / std,
                }
                for j, (c, side) in enumerate(sides)
            ],
        )
