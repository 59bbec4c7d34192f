"""The models of a pipeline in their roles, on top of `load` and `lora`: reward model, critic, weights to a folder and
back, of the whole model or of its adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel

from trueup.data.chat import Chat
from trueup.models.load import assert_roundtrip, load_policy, load_scalar, save_model
from trueup.models.lora import ADAPTER, Base, Lora, adapted, assert_merged, load_adapter, merged, save_adapter
from trueup.models.net import Net, Precision


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
    normalization = getattr(AutoConfig.from_pretrained(str(folder)), "trueup", None) or {}
    net.set_affine(normalization.get("score_mean", 0.0), normalization.get("score_std", 1.0))
    return net


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
