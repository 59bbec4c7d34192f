"""The models of a pipeline in their roles, on top of `load` and `lora`: reward model, critic, weights to a folder and
back, of the whole model or of its adapter alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel

from trueup.data.chat import Chat
from trueup.models.load import assert_roundtrip, load_policy, load_scalar, save_model, score_name
from trueup.models.lora import (
    ADAPTER,
    Base,
    Lora,
    adapted,
    assert_merged,
    fingerprint,
    load_adapter,
    merged,
    save_adapter,
)
from trueup.models.net import Net, Precision
from trueup.records import UserError


class Whole:
    """Networks that start from one folder, each with weights of its own, all of which learn. `lora.Base` gives the
    same networks on shared frozen weights."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device

    def untrained(self) -> PreTrainedModel:
        """What the networks start from, as it is: the reference."""
        return load_policy(self.folder, device=self.device)

    def policy(self, seed: int) -> PreTrainedModel:
        return self.untrained()

    def scalar(self, seed: int) -> PreTrainedModel:
        """A reward model or critic; its head is fresh where the start is a language model."""
        return load_scalar(self.folder, seed=seed, device=self.device).model

    def reward(self, folder: str | Path) -> PreTrainedModel:
        """A trained reward model, to score with."""
        return load_scalar(folder, device=self.device).model

    def critic(self, folder: str | Path, seed: int) -> PreTrainedModel:
        """A critic that starts as that reward model."""
        return self.reward(folder)


Models = Whole | Base


def models_of(folder: str, lora: Lora | None, *, precision: Precision, device: torch.device) -> Models:
    """The networks that start from `folder`: whole ones, or with a `lora` adapters on its frozen weights."""
    return Base(folder, lora, precision=precision, device=device) if lora else Whole(folder, device)


def load_reward(
    folder: str | Path, models: Models | None = None, *, kind: Literal["reward", "critic"] = "reward", seed: int = 0
) -> Net:
    """A trained reward model, as what it is or as the critic's start, normalized as its config.json says
    (`trueup: {score_mean, score_std}`; raw where it says nothing)."""
    models = models or Whole(folder)
    net = Net(models.reward(folder) if kind == "reward" else models.critic(folder, seed), kind)
    normalization = recorded(folder)
    net.set_affine(normalization.get("score_mean", 0.0), normalization.get("score_std", 1.0))
    return net


def recorded(folder: str | Path) -> dict[str, Any]:
    """What a reward model's config.json says of it: {score_mean, score_std, n, start, answers: how many different ones
    it was trained on}, empty of others' models."""
    return getattr(AutoConfig.from_pretrained(str(folder)), "trueup", None) or {}


def start_of(model: PreTrainedModel) -> str:
    """The hash of the weights and the head that a scalar model which has not learned yet starts from; an adapter,
    which changes nothing yet, is no part of it."""
    body: Any = model.base_model
    if adapted(model):
        made_on: Any = model._trueup_base
        weights = made_on["sha256"]
    else:
        weights = fingerprint(body)
        del body._trueup_sha256  # this body is about to change
    head = getattr(model, score_name(model)).weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(weights.encode() + head.tobytes()).hexdigest()[:16]


@torch.no_grad()
def average_weights(folders: Sequence[str | Path], device: torch.device | str = "cpu") -> PreTrainedModel:
    """The reward model whose every weight is the mean over reward models that started from the same weights and head
    (WARM, Rame et al. 2024): only there is the mean of the weights near the mean of the scores. Raises UserError
    where their recorded starts differ, or one has none."""
    starts = [recorded(folder).get("start") for folder in folders]
    for folder, start in zip(folders, starts, strict=True):
        if start is None:
            raise UserError(f"{folder}: its config.json records no start, so its weights cannot be averaged")
        if start != starts[0]:
            raise UserError(
                f"{folder}: started elsewhere ({start}) than {folders[0]} ({starts[0]}); weights can be averaged only "
                "of reward models that share starting weights and head (model, head_seed)"
            )
    mean = load_scalar(folders[0], device=device).model
    weights = mean.state_dict()
    for count, folder in enumerate(folders[1:], 2):
        other = load_scalar(folder, device=device).model.state_dict()
        for name, weight in weights.items():
            if weight.is_floating_point():
                weight.lerp_(other[name], 1 / count)
    return mean


def save_weights(model: PreTrainedModel, folder: Path, *, chat: Chat) -> None:
    """What `load_weights` needs to bring a model back: its adapter and head alone where it has them."""
    if adapted(model):
        save_adapter(model, folder)
    else:
        save_model(model, folder, chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """The weights of `folder` into `model`, which has the same architecture."""
    if adapted(model):
        return load_adapter(model, folder)
    load = load_policy if model.can_generate() else load_scalar
    loaded = load(folder, dtype=model.dtype)
    model.load_state_dict((loaded if isinstance(loaded, PreTrainedModel) else loaded.model).state_dict())


def save_checked(
    model: PreTrainedModel, folder: Path, *, chat: Chat, extra_config: Mapping[str, Any] | None = None
) -> None:
    """Save with tokenizer and template, load again, and compare weights and outputs. Of a model with an adapter the
    merged weights, and the adapter in `folder/adapter`."""
    ids = torch.tensor([chat.prompt_ids([{"role": "user", "content": "What is it?"}]) + chat.reply_ids("Yes.")])
    whole = merged(model) if adapted(model) else model
    save_model(whole, folder, chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id, extra_config=extra_config)
    assert_roundtrip(whole, folder, ids)
    if adapted(model):
        assert_merged(model, whole, ids)
        save_adapter(model, folder / ADAPTER)
