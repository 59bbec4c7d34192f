"""Tiny real models and tokenizers, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch

from trueup.data.chat import Chat

CORPUS = [
    "User: what is the colour of the sky?\nAssistant: the sky is blue.",
    "say yes or no, please and thank you",
    "Hello there! How are you today? I am fine, thanks. 0 1 2 3 4 5 6 7 8 9 good bad a b c d e f",
]


def make_tokenizer(*, pad: bool = True, template: str | None = None, bos: bool = False):
    """A byte-level BPE tokenizer trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        **({"pad_token": "<pad>"} if pad else {}),
        **({"bos_token": "<bos>"} if bos else {}),
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, tokenizer=None, *, seed: int = 0, family: str = "llama") -> Path:
    """A tiny random causal model with its tokenizer, saved in Hugging Face layout."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    chat = Chat(tokenizer)
    torch.manual_seed(seed)
    size = len(tokenizer)
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                eos_token_id=chat.end_id,
                pad_token_id=chat.pad_id,
                bos_token_id=None,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size,
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=512,
                eos_token_id=chat.end_id,
                pad_token_id=chat.pad_id,
                bos_token_id=None,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
