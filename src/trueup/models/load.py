"""Models in Hugging Face layout, in and out: causal language models and scalar models (num_labels = 1).

A folder that this writes is read by plain `AutoModelForCausalLM` or `AutoModelForSequenceClassification`: config,
safetensors, tokenizer with its chat template, and a generation config that names the end token.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from trueup.models.logprobs import Head
from trueup.models.net import prepare
from trueup.models.weightless import is_weightless, made
from trueup.records import UserError, is_local
from trueup.run import write_folder


def is_policy(path: str | Path) -> bool:
    """Whether a folder (or Hub name) holds a language model; it may be a reward model."""
    return not _architecture(_config(path)).endswith("ForSequenceClassification")


class Scalar(NamedTuple):
    """A scalar model; `fresh` where its head is new, because the folder held a language model."""

    model: PreTrainedModel
    fresh: bool


def load_policy(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal language model from a folder or a Hub name, ready for `Net` and the sampler, dropout off.

    Raises UserError where there is no model, no weights, a reward model, or a family whose logits are not its head
    applied to its last hidden state.
    """
    config = _config(path)
    if not is_policy(path):
        raise UserError(f"{path}: holds a reward model ({_architecture(config)}); a language model is needed here")
    model, info = _load(AutoModelForCausalLM, path, config, dtype)
    if info["missing_keys"]:
        raise UserError(f"{path}: the weights lack {_some(info['missing_keys'])}")
    prepare(model.to(device))  # type: ignore[arg-type]
    check_head(model, str(path))
    return model


def load_scalar(
    path: str | Path,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Scalar:
    """A model with one number per token for a reward model or a critic, from its own folder or, where `seed` is
    given, from a language model's: the backbone is kept and the head drawn from N(0, 1 / (d + 1)) (Stiennon et al.
    2020), without a bias.

    Raises UserError where there is no model, no weights, more than one label, or a language model and no seed.
    """
    config = _config(path)
    name = _architecture(config)
    trained = name.endswith("ForSequenceClassification")
    if trained and config.num_labels != 1:
        raise UserError(f"{path}: has {config.num_labels} labels; a reward model has num_labels = 1")
    if not trained and seed is None:
        raise UserError(f"{path}: holds a language model ({name}); a reward model is needed here")
    config.num_labels = 1
    if not trained and hasattr(config, "trueup"):
        del config.trueup  # figures about another model
    model, info = _load(AutoModelForSequenceClassification, path, config, dtype)
    head = score_name(model)
    missing = [key for key in info["missing_keys"] if trained or not key.startswith(head + ".")]
    if missing:
        raise UserError(f"{path}: the weights lack {_some(missing)}")
    if not trained:
        draw_head(model, seed or 0)
    prepare(model.to(device))  # type: ignore[arg-type]
    return Scalar(model, not trained)


def draw_head(model: PreTrainedModel, seed: int) -> None:
    """A scalar model's head from N(0, 1 / (d + 1)), its bias, if any, at zero."""
    layer = getattr(model, score_name(model))
    fresh = torch.empty(layer.weight.shape)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data.copy_(fresh.normal_(0.0, 1 / math.sqrt(fresh.shape[1] + 1), generator=generator))
    if layer.bias is not None:
        layer.bias.data.zero_()


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    end_id: int | None = None,
    pad_id: int | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """The model, and the tokenizer with its chat template, in `folder`, which appears whole or not at all.

    `end_id` and `pad_id` (the tokenizer's where None) go into the config and the generation config, so that plain
    `generate` stops where we do. They must differ: plain transformers reads a reward model's score at the last token
    that is not the pad token, and that must be the end token. `extra_config` (such as trueup: {score_mean, ...})
    goes into config.json.
    """
    folder = Path(folder)
    if tokenizer is not None:
        end_id = tokenizer.eos_token_id if end_id is None else end_id
        pad_id = tokenizer.pad_token_id if pad_id is None else pad_id
    if pad_id is not None and pad_id == end_id:
        raise ValueError(f"the pad token and the end token must differ; both are {pad_id}")
    config = model.config
    for key, value in (("eos_token_id", end_id), ("pad_token_id", pad_id), *(extra_config or {}).items()):
        if value is not None:
            setattr(config, key, value)
    if model.can_generate():
        old = model.generation_config
        bos = old.bos_token_id if old is not None else None
        model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=end_id, pad_token_id=pad_id)

    def save(into: Path) -> None:
        model.save_pretrained(into, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(into)

    with _quiet():
        write_folder(folder, save)
    return folder


def assert_roundtrip(model: PreTrainedModel, folder: str | Path, ids: Tensor) -> None:
    """Load `folder` by plain transformers and compare: weights to the last bit, logits (a scalar model: scores) on
    ids [B, L] to rounding, since a product's last bit may depend on where in memory a weight lies.

    Raises RuntimeError where they differ.
    """
    auto = AutoModelForCausalLM if model.can_generate() else AutoModelForSequenceClassification
    with _quiet():
        copy = auto.from_pretrained(str(folder), dtype=model.dtype).eval().to(model.device)
    prepare(copy)  # equality asks for one way of computing on both sides
    ids = ids.to(model.device)
    with torch.no_grad():
        want, got = model(input_ids=ids).logits, copy(input_ids=ids).logits
    saved = copy.state_dict()
    other = [name for name, weight in model.state_dict().items() if not torch.equal(weight, saved[name])]
    worst, size = float((want.float() - got.float()).abs().max()), float(want.float().abs().max())
    if not model.can_generate():
        size = max(size, 1.0)  # a score near zero is a sum of large terms, which round as they are
    if other or not worst <= (1e-5 if model.dtype is torch.float32 else 1e-2) * size:
        where = f"{_some(other)} differ" if other else f"outputs differ by {worst:.3e}"
        raise RuntimeError(f"{folder}: what was saved is not what was in memory; {where}")


def check_head(model: PreTrainedModel, name: str) -> None:
    """The engine computes logits as `Head.of(model)` of the last hidden state; a model where they are something
    else would train on wrong log-probs, so it is refused (UserError)."""
    if is_weightless():
        return  # no numbers to compare
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, 4), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = Head.of(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not want.isfinite().all():
        raise UserError(f"{name}: its logits are not finite numbers; its weights are damaged")
    if want.shape != got.shape or not torch.allclose(want, got, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
        raise UserError(f"{name}: {type(model).__name__} is not supported: its logits are not its head's output")


def score_name(model: PreTrainedModel) -> str:
    """The attribute that holds a sequence classifier's linear layer. Raises UserError where there is none."""
    for name in ("score", "classifier"):
        if isinstance(getattr(model, name, None), nn.Linear):
            return name
    raise UserError(f"{type(model).__name__} is not supported as a reward model: it has no linear score head")


def _config(path: str | Path) -> Any:
    path = str(path)
    if is_local(path) and not (Path(path) / "config.json").is_file():
        what = "no such folder" if not Path(path).is_dir() else "no config.json in this folder"
        raise UserError(f"{path}: {what}; a model folder in Hugging Face layout is needed")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a model: {str(error).splitlines()[0]}") from None


def context_length(path: str | Path) -> int:
    """How many tokens a model of this folder was made for; without a stated number a very large one."""
    stated = getattr(_config(path).get_text_config(), "max_position_embeddings", None)
    return int(stated) if stated else 1 << 30


def _architecture(config: Any) -> str:
    return (config.architectures or ["a model of unknown kind"])[0]


def _load(auto: Any, path: str | Path, config: Any, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with _quiet():
            if is_weightless():
                return made(auto, config, dtype), {"missing_keys": []}
            return auto.from_pretrained(str(path), config=config, dtype=dtype, output_loading_info=True)  # type: ignore[no-any-return]
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise UserError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None
        raise UserError(f"{path}: transformers has no {auto.__name__} for {type(config).__name__}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading reports and progress bars say nothing that our own errors do not."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
