"""What both sides share: sizes, models with random weights, rows of tokens, and how long they are.

    prompts     lengths U(16, 128)
    replies     lengths U(64, 128), the end token last           (SFT, reward model)
    rollouts    an end token with probability 1/96 at every position, cut at 128 tokens: 70 on average

Everything is written into a folder once: `policy/`, `reward/`, `reference/` (Hugging Face layout, a tokenizer beside)
and `rows.json`. Both sides read the same files, step n takes the n-th batch of rows.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PAD, UNKNOWN, END, FIRST = 0, 1, 2, 3
"""Three special ids; words follow."""
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
)
"""A prompt is its content alone, a reply its content and the end token: a word is a token, whoever tokenizes."""


@dataclass(frozen=True)
class Lengths:
    """Tokens: inclusive ranges of uniform draws, and the mean and the cut of the geometric ones."""

    prompt: tuple[int, int] = (16, 128)
    reply: tuple[int, int] = (64, 128)
    stop: int = 96
    limit: int = 128

    def __str__(self) -> str:
        return (
            f"prompts U{self.prompt}, replies U{self.reply}, "
            f"rollouts stop with probability 1/{self.stop} a token, cut at {self.limit}"
        )


@dataclass(frozen=True)
class Size:
    """A model's shape; how many rows an optimizer step takes (pairs, for a reward model); for how many prompts a
    rollout samples, and how many of them `generate` is given at a time."""

    layers: int
    width: int
    heads: int
    inner: int
    vocab: int
    batch: int
    kv_heads: int | None = None
    family: Literal["llama", "qwen2"] = "llama"
    rollout: int = 96
    together: int = 32
    lengths: Lengths = field(default_factory=Lengths)

    def config(self) -> PreTrainedConfig:
        shape: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "eos_token_id": END,
            "bos_token_id": None,
        }
        if self.family == "llama":
            return LlamaConfig(**shape, max_position_embeddings=512)
        return Qwen2Config(**shape, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6)


SIZES = {
    "T": Size(2, 32, 2, 64, 128, 4, lengths=Lengths((4, 12), (4, 12), 8, 16), rollout=8, together=4),
    "S": Size(4, 192, 4, 512, 2048, 32),
    "M": Size(8, 512, 8, 1376, 8192, 8),
}
"""T, tiny, shows that the scripts work; S has 2.2 million parameters, M 30 million."""


@dataclass(frozen=True)
class Job:
    """What one side is asked to do."""

    task: str
    folder: str
    size: Size
    steps: int
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    lr: float = 1e-4
    ppo_epochs: int = 4
    slots: int | None = None
    """Rows that Trueup samples at a time; its default where None."""
    micro_rows: int | None = None
    """TRL's rows at a time; all of a step's where None."""
    micro_tokens: int | None = None
    """Trueup's tokens at a time; its default where None."""

    @property
    def rows_a_step(self) -> int:
        return self.size.rollout if self.task == "rollout" else self.size.batch

    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Job:
        data = json.loads(text)
        lengths = {k: tuple(v) if isinstance(v, list) else v for k, v in data["size"].pop("lengths").items()}
        return cls(**{**data, "size": Size(**data["size"], lengths=Lengths(**lengths))})


def write(job: Job, seed: int = 0) -> None:
    """The models and the rows of a job, into its folder."""
    folder = Path(job.folder)
    config, scalar = job.size.config(), job.size.config()
    scalar.num_labels = 1
    tokenizer = make_tokenizer(job.size.vocab)
    torch.manual_seed(seed)
    with torch.device(job.device):
        policy = AutoModelForCausalLM.from_config(config)
        reward = AutoModelForSequenceClassification.from_config(scalar)
        reference = AutoModelForCausalLM.from_config(config)  # not the policy itself: DPO's first loss says something
    for name, model in (("policy", policy), ("reward", reward), ("reference", reference)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = make_rows(job.rows_a_step * job.steps, job.size, seed)
    (folder / "rows.json").write_text(json.dumps(rows))


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token n is the word "wn"; words are parted by spaces."""
    words = {"<pad>": PAD, "<unk>": UNKNOWN, "<eos>": END, **{f"w{i}": i for i in range(FIRST, vocab)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_rows(count: int, size: Size, seed: int) -> list[dict[str, list[int]]]:
    """Rows of prompt, reply and another reply, as ids."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(FIRST, size.vocab) for _ in range(rng.randint(low, high))]

    def reply() -> list[int]:
        return [*words(*size.lengths.reply)[:-1], END]

    return [{"prompt": words(*size.lengths.prompt), "reply": reply(), "other": reply()} for _ in range(count)]


def read_rows(job: Job) -> list[dict[str, list[int]]]:
    return json.loads((Path(job.folder) / "rows.json").read_text())


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def stops_by_chance(model: PreTrainedModel, size: Size) -> PreTrainedModel:
    """The same model with a fixed bias on its head: the end token comes with probability 1 / `stop` at every
    position (the other logits of a random model are small), the pad token never, since TRL takes it for padding."""
    head = model.get_output_embeddings()
    bias = torch.zeros(size.vocab, dtype=head.weight.dtype, device=head.weight.device)
    bias[END] = math.log(size.vocab / (size.lengths.stop - 1))
    bias[PAD] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model
