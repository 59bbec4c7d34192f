"""Tiny random models of two real families, each with a tokenizer of its own, trained on the text of your files.

    python -m tests.models_real FOLDER FILE.jsonl[.gz] ...

writes FOLDER/qwen3 (ChatML with a standing system message; `<|im_end|>` ends a turn, `<|endoftext|>` pads) and
FOLDER/neox (no chat template, no pad token, another vocabulary). They know nothing.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def strings(value: Any) -> Iterator[str]:
    """Every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def texts(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            for line in lines:
                yield from strings(json.loads(line))


def tokenizer_of(files: Iterable[Path], size: int, special: list[str], **names: Any) -> Any:
    """A byte-level BPE tokenizer of `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts(files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def make_real(folder: Path, files: list[Path], *, context: int = 1024) -> None:
    """FOLDER/qwen3 and FOLDER/neox."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

    qwen = tokenizer_of(
        files,
        1500,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN_TEMPLATE,
    )
    neox = tokenizer_of(files, 1000, ["<|endoftext|>", "<|padding|>"], eos_token="<|endoftext|>")
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    size |= {"max_position_embeddings": context}
    torch.manual_seed(0)
    models = {
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(
                **size,
                vocab_size=len(qwen),
                num_key_value_heads=2,
                head_dim=16,
                tie_word_embeddings=True,
                eos_token_id=qwen.eos_token_id,
                pad_token_id=qwen.pad_token_id,
                bos_token_id=None,
            )
        ),
        "neox": GPTNeoXForCausalLM(
            GPTNeoXConfig(**size, vocab_size=len(neox), eos_token_id=neox.eos_token_id, bos_token_id=neox.eos_token_id)
        ),
    }
    for (name, model), tokenizer in zip(models.items(), (qwen, neox), strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    make_real(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
