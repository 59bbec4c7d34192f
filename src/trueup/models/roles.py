"""The models of a pipeline in their roles, on top of `load`: reward model, critic, weights back from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trueup.data.chat import Chat
from trueup.models.load import assert_roundtrip, load_policy, load_scalar, save_model
from trueup.models.net import Kind, Net


def load_reward(folder: str | Path, *, kind: Kind = "reward", device: torch.device | str = "cpu") -> Net:
    """A trained reward model, as what it is or as the critic's start, normalized as its config.json says
    (`trueup: {score_mean, score_std}`; raw where it says nothing)."""
    model = load_scalar(folder, device=device).model
    net = Net(model, kind)
    normalization = getattr(model.config, "trueup", None) or {}
    net.set_affine(normalization.get("score_mean", 0.0), normalization.get("score_std", 1.0))
    return net


def is_policy(folder: str | Path) -> bool:
    """Whether a folder (or Hub name) holds a causal language model."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return True  # a Hub name: loading says what it is
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    return not names[0].endswith("ForSequenceClassification")


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """The weights of `folder` into `model`, which has the same architecture."""
    load = load_policy if model.can_generate() else load_scalar
    loaded = load(folder, dtype=model.dtype)
    model.load_state_dict((loaded if isinstance(loaded, PreTrainedModel) else loaded.model).state_dict())


def save_checked(
    model: PreTrainedModel, folder: Path, *, chat: Chat, extra_config: Mapping[str, Any] | None = None
) -> None:
    """Save with tokenizer and template, load again, and compare outputs to equality."""
    save_model(model, folder, chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id, extra_config=extra_config)
    ids = torch.tensor([chat.prompt_ids([{"role": "user", "content": "What is it?"}]) + chat.reply_ids("Yes.")])
    assert_roundtrip(model, folder, ids)
