"""Tiny random models of several families, and the plain forwards that the fast ones are held to."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers as hf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCAB, END, PAD = 61, 60, 0
_base = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
_gpt2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_gpt2 |= {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD}

PACKED = {
    "llama": lambda: hf.LlamaConfig(**_base, num_key_value_heads=2),
    "llama-tied": lambda: hf.LlamaConfig(**_base, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**_base, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**_base, num_key_value_heads=2, head_dim=12),
    "neox": lambda: hf.GPTNeoXConfig(**_base),
    "gpt2": lambda: hf.GPT2Config(**_gpt2),
    "gemma": lambda: hf.GemmaConfig(**_base, num_key_value_heads=1, head_dim=16),
}
"""Families that run packed."""

PADDED = {
    "mistral-window": lambda: hf.MistralConfig(**_base, num_key_value_heads=2, sliding_window=4),
    "gemma2": lambda: hf.Gemma2Config(**_base, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(**_base, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD),
}
"""Families that fall back to padding: windows shorter than a row, soft caps, ALiBi."""

HEADS = {
    "granite": lambda: hf.GraniteConfig(**_base, num_key_value_heads=2, logits_scaling=3.0),
    "cohere": lambda: hf.CohereConfig(**_base, logit_scale=0.3),
    "gemma2": PADDED["gemma2"],
    "phi": lambda: hf.PhiConfig(**_base),
}
"""Families whose logits are more than hidden x weight: a scale, a cap, a bias."""

ALL = PACKED | PADDED


@cache
def _build(name: str, scalar: bool) -> PreTrainedModel:
    config = (ALL | HEADS)[name]()
    config.attention_dropout = 0.0
    config.num_labels = 1
    torch.manual_seed(sum(map(ord, name)))
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Sharp enough that a wrong position or a leaked token shows.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def policy(name: str = "llama") -> PreTrainedModel:
    """A fresh copy of a tiny causal language model, on its family's own attention."""
    return copy.deepcopy(_build(name, False))


def scalar(name: str = "llama") -> PreTrainedModel:
    """A fresh copy of a tiny model with one number per token."""
    return copy.deepcopy(_build(name, True))


def rows(lengths: list[int] = [9, 2, 5, 13, 7], seed: int = 0) -> dict[str, Tensor]:  # noqa: B006
    """A batch of right-padded rows with junk past their lengths; every second token from the third on counts."""
    generator = torch.Generator().manual_seed(seed)
    count, width = torch.tensor(lengths), max(lengths) + 2
    ids = torch.randint(1, VOCAB, (len(lengths), width), generator=generator)
    column = torch.arange(width)[None]
    mask = (column < count[:, None]) & (column >= 1) & ((column + torch.arange(len(lengths))[:, None]) % 3 != 0)
    return {"ids": ids, "lengths": count, "mask": mask}


def plain_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits of each row by itself, through the model's own forward in eager attention: a list of [length, V]."""
    model.set_attn_implementation("eager")
    return [model(input_ids=ids[None, :n]).logits[0] for ids, n in zip(batch["ids"], batch["lengths"], strict=True)]


def plain_logprobs(model: PreTrainedModel, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Log-prob of each token given those before it, zero outside the mask, row by row [B, L]."""
    out = []
    for logits, ids, mask in zip(plain_logits(model, batch), batch["ids"], batch["mask"], strict=True):
        logp = torch.log_softmax(logits / temperature, -1)
        row = [logp[i - 1, ids[i]] if mask[i] else logp.new_zeros(()) for i in range(len(ids))]
        out.append(torch.stack(row))
    return torch.stack(out)


def plain_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Last hidden states of each row by itself in eager attention: a list of [length, d]."""
    model.set_attn_implementation("eager")
    ids = batch["ids"].flatten(0, -2)
    return [
        model.base_model(input_ids=row[None, :n]).last_hidden_state[0]
        for row, n in zip(ids, batch["lengths"].flatten().tolist(), strict=True)
    ]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
