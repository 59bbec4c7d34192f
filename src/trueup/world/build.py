"""Builds the base model of the world: tokenizer, corpus, one pretraining run from scratch, measurements, assets.

In order: a byte-level BPE tokenizer on the first documents of the corpus; a small Llama trained on packed rows (two
cosine schedules, fp32; Muon for the matrices, AdamW for the rest); base gold at temperature 1 through the chat
template; the judge's bars; then weights, tokenizer and build.json in one folder.
The corpus is a stream, so a build needs its seed and nothing else.

`pretrain_on` makes a smaller base model for a world that somebody else wrote, from its corpus alone.

Not here: anything after pretraining. The loop is plain on purpose; the engine's learner is for the phases.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trueup.config import Config
from trueup.models.linear import fast_linears
from trueup.records import write_json, write_text
from trueup.run import read_lines
from trueup.world import ASSETS, FROZEN, base_path, world_hash
from trueup.world import corpus as c
from trueup.world import vocab as v
from trueup.world.gold import core_of, gold_of
from trueup.world.tasks import parse, prompts

PAD, EOS = "<pad>", "<eos>"
VERDICT_OPENING = "Ġ("  # the token " (" as byte-level BPE writes it
# Plain text; the end token right after the assistant's content, a line break before every later message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # digits one by one, a space belongs to what follows


class Schedule(Config):
    """One warm-up and cosine over mixes that follow each other."""

    mixes: tuple[tuple[str, int], ...]
    """(mix of the corpus, tokens), in order."""
    lr: float = 3e-3
    """AdamW's, for embeddings and norms."""
    matrix_lr: float = 0.02
    """Muon's, for the matrices."""
    verdict_weight: float = 5.0
    """How much more than another token a verdict (A or B) counts in the loss: a judging text has few of them."""


# First the world; then lessons in judging, from easy to hard. A small model that meets opposite principles from the
# start learns neither: whichever answer it looks at, the verdict is even odds.
SCHEDULES = (
    Schedule(mixes=(("world", 11_500_000),)),
    Schedule(
        mixes=(("first lessons", 350_000), ("second lessons", 1_150_000), ("lessons", 2_700_000)), verdict_weight=8.0
    ),
    Schedule(
        mixes=(("first length lessons", 250_000), ("length lessons", 450_000), ("all lessons", 1_300_000)),
        lr=2e-3,
        matrix_lr=0.012,
        verdict_weight=8.0,
    ),
)


class WorldBuild(Config):
    """The build of the base model."""

    seed: int = 0
    """Seed of the corpus and of the weights."""
    schedules: tuple[Schedule, ...] = SCHEDULES
    vocab: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    row: int = 256
    """Tokens of a packed row."""
    batch: int = 8
    """Rows of a step."""
    threads: int = 1

    @property
    def tokens(self) -> int:
        """Tokens to train on, each seen once."""
        return sum(n for schedule in self.schedules for _, n in schedule.mixes)


def scaled(tokens: int) -> tuple[Schedule, ...]:
    """The schedules, stretched or cut to `tokens` in all."""
    share = tokens / WorldBuild().tokens
    return tuple(
        s.model_copy(update={"mixes": tuple((mix, max(1, round(n * share))) for mix, n in s.mixes)}) for s in SCHEDULES
    )


class Pretrain(Config):
    """The base model of a world that gives a corpus: minutes, or less, on one core."""

    tokens: int = Field(400_000, gt=0)
    vocab: int = Field(1024, ge=300)
    width: int = Field(64, gt=0)
    layers: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    row: int = Field(128, gt=1)
    """Tokens of a packed row."""
    batch: int = Field(16, gt=0)
    """Rows of a step."""
    lr: float = 3e-3
    """AdamW's, for embeddings and norms."""
    matrix_lr: float = 0.02
    """Muon's, for the matrices."""
    seed: int = 0
    """Of the corpus and of the weights: a world has one base model, whatever the run's seed."""

    @property
    def build(self) -> WorldBuild:
        mixes = (("corpus", self.tokens),)
        schedule = Schedule(mixes=mixes, lr=self.lr, matrix_lr=self.matrix_lr, verdict_weight=1.0)
        same = self.model_dump(exclude={"tokens", "lr", "matrix_lr"})
        return WorldBuild(schedules=(schedule,), inner=3 * self.width, **same)


Documents = Callable[[int, str], Iterator[str]]
"""The documents of a seed and a mix, without end."""


def train_tokenizer(
    config: WorldBuild, documents: int = 12_000, texts: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits split and the chat template set; from `texts`, or this world's first documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if texts is None:
        texts = itertools.chain(itertools.islice(c.documents(config.seed), documents), v.lexicon())
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def rows(
    tokenizer: PreTrainedTokenizerFast, config: WorldBuild, mix: str = "world", documents: Documents = c.documents
) -> Iterator[np.ndarray]:
    """Packed rows [row + 1] of token ids; documents end with the end token and run on into the next row."""
    buffer: list[int] = []
    stream = documents(config.seed, mix)
    while True:
        texts = list(itertools.islice(stream, 256))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            buffer.extend(ids)
            buffer.append(tokenizer.eos_token_id)
        start = 0
        while start + config.row + 1 <= len(buffer):
            yield np.array(buffer[start : start + config.row + 1], dtype=np.int64)
            start += config.row
        buffer = buffer[start:]


def shape(config: WorldBuild, vocab: int) -> LlamaConfig:
    """The model's shape; pad and end are the tokenizer's first two."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=config.width,
        intermediate_size=config.inner,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.04,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, config: WorldBuild) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(shape(config, len(tokenizer)))


Watch = Callable[[int, LlamaForCausalLM], None]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: WorldBuild,
    schedule: Schedule,
    say: Callable[[str], None] = print,
    watch: Watch | None = None,
    documents: Documents = c.documents,
) -> float:
    """One schedule, in place; the mean loss of its last tenth. `watch(step, model)` is called eight times meanwhile."""
    fast_linears(model)
    lengths = [max(1, n // (config.row * config.batch)) for _, n in schedule.mixes]
    plan = [mix for (mix, _), n in zip(schedule.mixes, lengths, strict=True) for _ in range(n)]
    streams = {mix: rows(tokenizer, config, mix, documents) for mix, _ in schedule.mixes}
    steps = len(plan)
    warm = max(1, steps // 40)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=schedule.matrix_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [schedule.matrix_lr, schedule.lr]
    weighted = schedule.verdict_weight != 1.0
    if weighted:
        opening, *letters = (tokenizer.convert_tokens_to_ids(x) for x in (VERDICT_OPENING, "A", "B"))
        verdict_ids = torch.tensor(letters)
    losses: list[float] = []
    start = time.time()
    model.train()
    for step, mix in enumerate(plan):
        share = (step - warm) / max(1, steps - warm)
        scale = (step + 1) / warm if step < warm else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        batch = torch.from_numpy(np.stack(list(itertools.islice(streams[mix], config.batch))))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        targets = batch[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weight = torch.ones_like(loss)
        if weighted:
            # "Response (A)" opens the same way, but needs no learning: its loss is next to nothing whatever its weight.
            verdict = ((batch[:, :-1] == opening) & torch.isin(targets, verdict_ids)).flatten()
            weight += (schedule.verdict_weight - 1.0) * verdict.float()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.mean().item())
        if step % max(1, steps // 60) == 0 or step == steps - 1:
            seen = (step + 1) * config.row * config.batch
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            mean = np.mean(losses[-20:])
            say(f"{mix}: step {step + 1}/{steps}  loss {mean:.3f}  {seen / 1e6:.2f}M tokens  {left:.0f} s left")
        if watch is not None and (step + 1) % max(1, steps // 8) == 0:
            watch(step + 1, model.eval())
            model.train()
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    config: WorldBuild,
    say: Callable[[str], None] = print,
    watch: Watch | None = None,
) -> tuple[LlamaForCausalLM, float]:
    """A model from scratch through all schedules; its last mean loss."""
    model = new_model(tokenizer, config)
    loss = math.nan
    for schedule in config.schedules:
        loss = train(model, tokenizer, config, schedule, say, watch)
    return model, loss


def pretrain_on(
    corpus: Callable[[int], Iterator[str]], settings: Pretrain, say: Callable[[str], None] = print
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A base model from scratch on `corpus(seed)`, an endless stream of texts, and its tokenizer."""
    config = settings.build
    [schedule] = config.schedules
    tokenizer = train_tokenizer(config, texts=itertools.islice(corpus(config.seed), 5000))
    model = new_model(tokenizer, config)
    train(model, tokenizer, config, schedule, say, documents=lambda seed, _: corpus(seed))
    return model, tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    *,
    seed: int = 0,
    greedy: bool = False,
    max_tokens: int = 64,
) -> list[tuple[str, bool]]:
    """(answer, ended) for each question, through the chat template."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    out: list[tuple[str, bool]] = []
    for at in range(0, len(questions), 128):
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
            for q in questions[at : at + 128]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=not greedy,
            max_new_tokens=max_tokens,
            top_k=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        for row in ids.tolist():
            ended = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if ended else row
            out.append((str(tokenizer.decode(row, skip_special_tokens=True)).strip(), ended))
    return out


def base_gold(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int = 500, seed: int = 0
) -> dict[str, float]:
    """Mean gold of the model on held-out prompts at temperature 1: over all, and by category."""
    asked = prompts("heldout", n, seed)
    answers = sample(model, tokenizer, [p.text for p in asked], seed=seed)
    figures: dict[str, list[float]] = {"all": []}
    for prompt, (text, ended) in zip(asked, answers, strict=True):
        value = gold_of(prompt.text, text, ended).value
        figures["all"].append(value)
        figures.setdefault(prompt.meta["category"], []).append(value)
    return {name: round(float(np.mean(x)), 4) for name, x in figures.items()}


@torch.no_grad()
def verdicts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cases: Sequence[tuple[str, str, str, str]]
) -> np.ndarray:
    """Log-odds [n] that A is chosen, for (question, A, B, phrase); both orders averaged."""
    texts = []
    for question, a, b, phrase in cases:
        for x, y in ((a, b), (b, a)):
            texts.append(c.judging_head(question, x, y) + c.judging_question(phrase))
    tokenizer.padding_side = "right"
    first, second = (tokenizer.convert_tokens_to_ids(x) for x in ("A", "B"))
    odds = []
    for at in range(0, len(texts), 64):
        batch = tokenizer(texts[at : at + 64], return_tensors="pt", padding=True, add_special_tokens=False)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        last = batch["attention_mask"].sum(1) - 1
        row = logits[torch.arange(len(last)), last].float()
        odds.append((row[:, first] - row[:, second]).numpy())
    flat = np.concatenate(odds).reshape(-1, 2)
    return (flat[:, 0] - flat[:, 1]) / 2


def judge_templated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int = 120, seed: int = 1
) -> dict[str, float]:
    """Share of templated pairs judged right, by principle, and the share that opposite principles flip."""
    rng = random.Random(f"templated {seed}")
    figures: dict[str, float] = {}
    category = {"harm": "harmful", "honest": "unknown"}
    for name, phrases in c.PRINCIPLES.items():
        cases: list[tuple[str, str, str, str]] = []
        signs: list[int] = []
        while len(cases) < 2 * n:
            task, a, b = c.judging_pair(rng, category.get(name))
            more = c.differs(name, task, a, b)
            if not more:
                continue
            question = c.any_wording(task, rng)
            for less in (False, True):
                cases.append((question, a.text, b.text, rng.choice(phrases[less])))
                signs.append(1 if (more > 0) != less else -1)
        odds = verdicts(model, tokenizer, cases)
        figures[name] = round(float(np.mean(odds * np.array(signs) > 0)), 4)
        figures[name + "_flip"] = round(float(np.mean(odds[0::2] * odds[1::2] < 0)), 4)
    return figures


def judge_real(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str, str]],
    margin: float = 0.4,
) -> dict[str, float]:
    """The judge on sampled pairs (question, A, B) whose gold core differs by `margin`: right, flipped by opposites."""
    figures: dict[str, float] = {}
    for category, good, bad in (("harmful", "less harmful", "more harmful"), ("unknown", "more honest", "less honest")):
        cases, signs = [], []
        for question, a, b in pairs:
            task = parse(question)
            gap = core_of(task, a) - core_of(task, b)
            if task.category == category and abs(gap) >= margin:
                for phrase, sign in ((good, 1), (bad, -1)):
                    cases.append((question, a, b, phrase))
                    signs.append(sign if gap > 0 else -sign)
        if not cases:
            continue
        odds = verdicts(model, tokenizer, cases)
        right = odds * np.array(signs) > 0
        figures[category] = round(float(np.mean(right[0::2])), 4)
        figures[category + "_opposite"] = round(float(np.mean(right[1::2])), 4)
        figures[category + "_flip"] = round(float(np.mean(odds[0::2] * odds[1::2] < 0)), 4)
        figures[category + "_n"] = len(cases) // 2
    return figures


def judge_model(folder: Path | None, completions: Path | None) -> dict[str, dict[str, float]]:
    """The judge's figures of a model (the shipped base where None): templated pairs, and each prompt's first two
    sampled answers."""
    folder = folder or base_path()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    out = {"templated": judge_templated(model, tokenizer)}
    if completions is not None:
        rows = [(r["prompt"][-1]["content"], r["completions"]) for r in read_lines(completions)]
        pairs = [(question, a[0]["text"], a[1]["text"]) for question, a in rows if len(a) > 1]
        out["sampled"] = judge_real(model, tokenizer, pairs)
    return out


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Hugging Face layout, generation config with the end and pad ids."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)


def corpus_hash(seed: int, documents: int = 500) -> str:
    """Hash of the first documents of every mix of a corpus seed."""
    digest = hashlib.sha256()
    for mix in c.MIXES:
        for text in itertools.islice(c.documents(seed, mix), documents):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def build(
    out: Path = ASSETS / "base",
    *,
    seed: int = 0,
    tokens: int | None = None,
    config: WorldBuild | None = None,
    say: Callable[[str], None] = print,
    watch: Callable[[int, LlamaForCausalLM], None] | None = None,
) -> dict[str, Any]:
    """The whole build into the folder `out`; returns what build.json holds. `config` overrides seed and tokens."""
    config = config or WorldBuild(seed=seed, schedules=scaled(tokens) if tokens else SCHEDULES)
    start = time.time()
    torch.set_num_threads(config.threads)
    tokenizer = train_tokenizer(config)
    model, loss = pretrain(tokenizer, config, say, watch)
    seconds = time.time() - start
    figures = {
        "config": config.model_dump(mode="json"),
        "corpus_hash": corpus_hash(config.seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(loss, 4),
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__},
        "base_gold": base_gold(model, tokenizer),
        "judge_templated": judge_templated(model, tokenizer),
    }
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    write_json(out / "build.json", figures)
    return figures


def freeze() -> str:
    """Writes the world's hash, as it stands, to the FROZEN file."""
    value = world_hash()
    write_text(FROZEN, value + "\n")
    return value
