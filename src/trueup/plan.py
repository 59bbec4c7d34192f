"""What a recipe will take before it runs: stages, done or due, time, disk, and memory by part.

In order: the recipe's keys say what is done (`recipe.resolve`); every stage that trains or answers is walked through on
models without weights (`models.weightless`), by the phase's own code, with rows as long as the data's; the highest sum
of what is held is its peak (`engine.footprint`). Models that no stage has made yet have the architecture of what they
are made from. Time is what earlier runs of the same shape took, where there are such, and otherwise operations over
a measured rate. Not in it: what the allocator keeps of freed memory, and a GPU's own context (docs/plan.md).
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from trueup.config import parse
from trueup.data.batches import Order, text_batch
from trueup.data.chat import Chat, Encoded
from trueup.data.files import Source, sources
from trueup.data.prepare import encode_pair
from trueup.data.readers import read_demonstrations, read_preferences, read_prompts, select_by_prompt, split_by_prompt
from trueup.engine.footprint import CACHE, OPTIMIZER, Footprint
from trueup.engine.learner import Learner
from trueup.engine.mesh import Mesh
from trueup.engine.rows import MICRO_TOKENS, forward
from trueup.engine.sampler import Sampler, Sampling, _Run
from trueup.models.linear import COMPILED, product
from trueup.models.load import context_length, load_policy, load_scalar
from trueup.models.lora import ADAPTER, Base, Lora, adapted, merged
from trueup.models.net import Net, Precision
from trueup.models.roles import models_of
from trueup.models.weightless import weightless
from trueup.named import CALLABLE
from trueup.phases import ppo, reward, sft
from trueup.recipe import Recipe, Stage, manifest, resolve
from trueup.records import Completion, Message, Prompt, UserError, is_local, write_json
from trueup.run import read_lines, size_of

LOOKED_AT = 2000
"""Rows of a file that are tokenized to know their lengths."""
A_TOKEN = 4
"""Characters of a token, where no tokenizer is at hand."""
ENSEMBLE = "plan knows no ensembles yet; plan with one of its reward models as the scorer"
WORD = " good"
"""What stands for text of a known length."""


@dataclass
class Rows:
    """The lengths of a stage's rows. `made`: how they are known, for who reads the plan."""

    lengths: list[list[int]]  # of each row, its sequences: one, or chosen and rejected
    total: int
    made: str
    prompts: list[Prompt] = field(default_factory=list)
    shared: float = 0.0
    """Of pairs: the prompt's share of the shorter row."""


@dataclass
class Estimate:
    """A stage's memory at its moments, by part, in bytes; its work in operations; its disk in bytes."""

    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    operations: float = 0.0
    disk: dict[str, int] = field(default_factory=dict)
    rows: str = ""
    micro: tuple[str, int, int] | None = None
    """The key of the micro-batch, its tokens, and the most that any step could fill it with."""

    @property
    def peak(self) -> int:
        return max((sum(parts.values()) for parts in self.moments.values()), default=0)

    @property
    def at(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))


@dataclass
class Planned:
    stage: Stage
    state: str
    seconds: float | None = None
    known_from: str = ""
    estimate: Estimate | None = None
    largest: int | None = None


# the models as they will be


class Folders:
    """A place where every model of a recipe has a folder with its config and a tokenizer, made or not."""

    def __init__(self, stages: Sequence[Stage], at: Path) -> None:
        self.stages, self.at = {str(s.folder): s for s in stages}, at
        self.known: dict[str, str] = {}
        self.plain: set[str] = set()
        """Stand-ins whose tokenizer is one of ours, since none is at hand."""

    def of(self, name: str, trained: bool = False) -> str:
        """The stand-in of a model's folder or Hub name. Raises UserError where its shape cannot be known."""
        if name not in self.known:
            self.known[name] = str(self._make(name))
        return self.known[name]

    def _make(self, name: str) -> Path:
        stage = next((s for folder, s in self.stages.items() if name == folder or name.startswith(f"{folder}/")), None)
        target = self.at / f"model-{len(self.known)}"
        target.mkdir()
        if stage is None or (Path(name) / "config.json").is_file():
            config = _read_config(name)
            self._known_adapter(Path(name) / ADAPTER, config, target)
            source = name if _has_tokenizer(name) else None
        elif stage.phase == "world":
            from trueup.world.stage import base_shape

            config, source = base_shape(stage.config)  # type: ignore[arg-type]
        elif stage.phase == "ensemble":
            raise UserError(f"{name}: {ENSEMBLE}")
        else:
            start = self.of(stage.config.model)  # type: ignore[attr-defined]
            if stage.phase == "ppo" and Path(name).name == "critic":
                start = self.of(critic_of(stage.config) or stage.config.model)  # type: ignore[attr-defined]
            config, source = AutoConfig.from_pretrained(start), start
            if stage.phase == "reward":
                self._adapter(stage, start, target)
                config.num_labels = 1
                classes: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
                config.architectures = [classes.__name__]
        config.save_pretrained(target)
        if source is None:
            _word_tokenizer(config).save_pretrained(target)
            self.plain.add(str(target))
        else:
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
                if is_local(source) and (Path(source) / file).is_file():
                    shutil.copy(Path(source) / file, target / file)
            if not is_local(source):
                Chat.load(source).tokenizer.save_pretrained(target)
            if source in self.plain:
                self.plain.add(str(target))
        return target

    def _adapter(self, stage: Stage, start: str, target: Path) -> None:
        """An adapter's record, by which PPO knows whether it stands on the same weights."""
        config: Any = stage.config
        if config.lora:
            self._record(start, config.lora, config.train.precision, target)

    def _known_adapter(self, adapter: Path, config: PreTrainedConfig, target: Path) -> None:
        if (adapter / "base.json").is_file():
            about, made = (json.loads((adapter / f).read_text()) for f in ("base.json", "adapter_config.json"))
            try:
                start = self.of(about["model"])
            except UserError:
                return  # its base is not to be found here: it stands alone
            lora = Lora(r=made["r"], alpha=made["lora_alpha"], quantize=about["quantize"])
            lora = lora.model_copy(update={"targets": tuple(made["target_modules"])})
            self._record(start, lora, "bf16" if config.dtype is torch.bfloat16 else "fp32", target)

    def _record(self, start: str, lora: Lora, precision: Precision, target: Path) -> None:
        with weightless():
            made: Any = Base(start, lora, precision=precision).scalar(0)
        record = made.base_model.peft_config["default"]
        write_json(target / ADAPTER / "base.json", made._trueup_base)
        write_json(
            target / ADAPTER / "adapter_config.json",
            {"r": record.r, "lora_alpha": record.lora_alpha, "target_modules": sorted(record.target_modules)},
        )

    def config(self, stage: Stage) -> Any:
        """The stage's config with stand-ins for its models, and nothing for scorers that are no models."""
        data = stage.config.model_dump()
        for key in ("model", "reference", "critic"):
            if data.get(key) and "models" not in data:  # there a reference is one of the models
                data[key] = self.of(data[key])
        if "models" in data:
            data["models"] = {name: self.of(folder) for name, folder in data["models"].items()}
        for key in ("scorer", "audit", "gold", "proxy", "judge"):
            if data.get(key):
                data[key] = self._scorer(data[key])
        for key in ("judge", "heldout") if data.get("watch") else ():
            data["watch"][key] = self._scorer(data["watch"][key]) if data["watch"][key] else None
        if stage.phase == "ppo":
            data["scorer"] = data["scorer"] or "trueup.plan:nothing"
        return parse(type(stage.config), data, f"stage '{stage.name}'")

    def _scorer(self, spec: Any) -> Any:
        if isinstance(spec, Mapping) and ("use" in spec or "constitution" in spec):
            return None
        if isinstance(spec, Mapping) and "ensemble" in spec:
            raise UserError(f"{spec['ensemble']}: {ENSEMBLE}")
        if isinstance(spec, Mapping):
            return {self.of(one): weight for one, weight in spec.items() if _is_model(one)} or None
        return self.of(spec) if _is_model(spec) else None


def _is_model(spec: str) -> bool:
    """Whether a scorer or judge is a reward model: no function, server, rule or file of verdicts."""
    elsewhere = spec.startswith(("http://", "https://")) or spec == "length" or spec.endswith(".jsonl")
    return not elsewhere and not CALLABLE.match(spec)


def critic_of(config: Any) -> str | None:
    """The reward model that a PPO config's critic starts from, as `ppo.make_critic` finds it."""
    spec = config.critic or config.scorer
    weights = spec if isinstance(spec, Mapping) else {spec: 1.0}
    return max((one for one in weights if _is_model(one)), key=lambda one: abs(weights[one]), default=None)


def nothing(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """A scorer that holds no model."""
    return [0.0 for _ in completions]


def _read_config(name: str) -> PreTrainedConfig:
    local = is_local(name)
    if local and not (Path(name) / "config.json").is_file():
        what = "no config.json in this folder" if Path(name).is_dir() else "no such folder"
        raise UserError(f"{name}: {what}; plan needs a model's config.json, and nothing else of it")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise UserError(f"{name}: not a model's config: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"{name}: not in the local cache, and plan downloads nothing; fetch what it reads with "
            f"'hf download {name} config.json tokenizer.json tokenizer_config.json', or name a folder with config.json"
        ) from None


def _has_tokenizer(name: str) -> bool:
    if is_local(name):
        return (Path(name) / "tokenizer.json").is_file() or (Path(name) / "tokenizer_config.json").is_file()
    try:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def _word_tokenizer(config: PreTrainedConfig) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=WORDS
    )


WORDS = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} {{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
)


# the data


def text_of(chat: Chat, tokens: int) -> str:
    """A text of about so many tokens."""
    each = len(chat._ids(WORD * 64)) / 64
    return (WORD * max(1, round(tokens / each))).strip()


def rows_of(stage: Stage, folders: Folders) -> Rows:
    """The rows of a stage's data, by the phase's own reading where the file is there; else as long as the phase's
    limits let them be."""
    config: Any = stage.config
    model = folders.of(config.model if hasattr(config, "model") else next(iter(config.models.values())))
    chat, context = Chat.load(model), context_length(model)
    plain = model in folders.plain

    def long(ids: list[int], text: str) -> int:
        return max(1, len(text) // A_TOKEN) if plain else len(ids)

    opening: list[int] = []
    listed = sources(getattr(config, "data", None) or config.prompts)
    if far := [s.path for s in listed if not is_local(s.path)]:
        limit = min(getattr(config, "max_length", getattr(config, "max_prompt", 512)), context)
        return _assumed(far[0], [limit] * (2 if stage.phase == "reward" else 1))
    to_come = [s.path for s in listed if any(s.path.startswith(f"{folder}/") for folder in folders.stages)]

    def records(read: Callable[[Source], Any]) -> list[Any] | None:
        """None where a stage of the recipe has yet to make one of the data sets."""
        try:
            return [record for source in listed for record in read(source).records]
        except UserError:
            if to_come:
                return None
            raise

    if stage.phase == "sft":
        limit = min(config.max_length, context)
        if (found := records(read_demonstrations)) is None:
            return _assumed(to_come[-1], [limit])
        train, _ = split_by_prompt(found, config.held_out, lambda d: d.prompt)
        some = train[:LOOKED_AT]
        sizes = [
            [long(chat.encode(d).ids if not plain else [], "".join(m["content"] for m in d.prompt.messages) + d.reply)]
            for d in some
        ]
    elif stage.phase == "reward":
        limit = min(config.max_length, context)
        if (found := records(read_preferences)) is None:
            return _assumed(to_come[-1], [limit, limit])
        train, _ = split_by_prompt(
            select_by_prompt(found, config.part, lambda p: p.prompt), config.held_out, lambda p: p.prompt
        )
        some = train[:LOOKED_AT]
        sizes = []
        for p in some:
            pair = encode_pair(chat, p)
            before = "".join(m["content"] for m in p.prompt.messages)
            sizes.append([long(pair.chosen, before + p.chosen.text), long(pair.rejected, before + p.rejected.text)])
            opening.append(long(pair.chosen[: pair.prompt], before))
    else:
        limit = min(getattr(config, "max_prompt", context), context - 1)
        if (found := records(read_prompts)) is None:
            return _assumed(to_come[-1], [min(limit, 512)])
        train = list(dict.fromkeys(found))
        some = train[:LOOKED_AT]
        sizes = [[long(chat.prompt_ids(p.messages), "".join(m["content"] for m in p.messages))] for p in some]
    kept = [(size, record) for size, record in zip(sizes, some, strict=True) if max(size) <= limit]
    if not kept:
        raise UserError(f"stage '{stage.name}': every row has more than {limit} tokens")
    weight = sum(s.weight for s in listed) / len(listed)  # of data sets of like size
    total = round(weight * len(train) * len(kept) / len(sizes))
    mean = sum(map(sum, sizes)) / len(sizes)
    how = f"{total} rows of {mean:.0f} tokens on average" + (", four characters a token" if plain else "")
    if len(train) > len(some):
        how += f" (the first {len(some)} were looked at)"
    known = [record for _, record in kept] if stage.phase not in ("sft", "reward") and not plain else []
    shared = sum(opening) / max(1, sum(map(min, sizes)))
    return Rows([size for size, _ in kept], total, how, known, shared)  # type: ignore[arg-type]


ASSUMED = 10_000
"""Rows of a data set that cannot be read here."""


def _assumed(name: str, lengths: list[int]) -> Rows:
    short = "/".join(Path(name).parts[-2:])
    each = f"{lengths[0]} tokens" + (" on either side" if len(lengths) == 2 else "")
    return Rows([lengths], ASSUMED, f"{short} is not here: assumed are {ASSUMED} rows as long as they may be, {each}")


# a stage, walked through


@dataclass
class Walk:
    """What walking through a stage needs, and gathers."""

    stage: Stage
    config: Any
    rows: Rows
    estimate: Estimate
    mesh: Mesh = field(default_factory=Mesh)

    def vocab(self) -> int:
        name = self.config.model if hasattr(self.config, "model") else next(iter(self.config.models.values()))
        return int(AutoConfig.from_pretrained(name).get_text_config().vocab_size)


def estimate(stage: Stage, folders: Folders) -> Estimate:
    """Memory, operations and disk of a stage. Raises UserError where a model's shape or all rows cannot be known."""
    out = Estimate()
    if stage.phase not in WALKS:
        return out
    config = folders.config(stage)
    rows = rows_of(stage, folders)
    out.rows = rows.made
    walk = Walk(stage, config, rows, out)
    footprint = Footprint(walk.vocab())
    try:
        with weightless(), footprint:
            WALKS[stage.phase](walk, footprint)
            if footprint.compiles:  # rows differ from batch to batch, so that the shapes it keeps are soon all there
                for parts in out.moments.values():
                    parts["compiled products"] = COMPILED
    finally:
        gc.collect()
    return out


def _warm(footprint: Footprint, learner: Learner) -> None:
    """Brings the optimizer's state to life, as the first step does."""
    with footprint.counting(OPTIMIZER):
        for parameter in learner.net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        learner.step()


def _worst(walk: Walk, budget: int) -> list[list[int]]:
    """The rows of the step whose first micro-batch is the fullest, cut to two micro-batches: more do not hold more."""
    lengths, config = walk.rows.lengths, walk.config.train
    order = Order(len(lengths), config.batch, walk.config.seed)
    best: tuple[int, list[list[int]]] = (0, [])
    for step in range(min(order.steps(config.epochs), max(1, 4 * LOOKED_AT // config.batch))):
        chosen = sorted((lengths[i] for i in order.at(step)), key=sum, reverse=True)
        taken = _fill(chosen, budget)
        best = max(best, (sum(map(sum, chosen[:taken])), chosen), key=lambda one: one[0])
    first = _fill(best[1], budget)
    return best[1][:first] if first == len(best[1]) else best[1][: first + _fill(best[1][first:], budget)]


def _fill(rows: Sequence[Sequence[int]], budget: int) -> int:
    """How many of these rows, long ones first, one micro-batch takes."""
    tokens = 0
    for i, row in enumerate(rows):
        if i and tokens + sum(row) > budget:
            return i
        tokens += sum(row)
    return len(rows)


def _whole(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Rows that fill one micro-batch of a forward over all of `rows`."""
    ordered = sorted(map(list, rows), key=sum, reverse=True)
    return ordered[: _fill(ordered, budget)]


def _texts(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows of these lengths as an SFT batch; the prompt is taken to be a third of a row."""
    return text_batch([Encoded([3] * n, [i >= max(1, n // 3) for i in range(n)]) for (n,) in rows], 0)


def _pairs(rows: Sequence[Sequence[int]], shared: float) -> dict[str, torch.Tensor]:
    """Pairs of these lengths, which begin alike for this share of the shorter row."""
    one, lengths = torch.ones(len(rows)), torch.tensor(rows)
    ids = torch.full((len(rows), 2, int(lengths.max())), 3)
    column = torch.arange(ids.shape[2])
    ids[:, 1] += column >= (lengths.min(1).values * shared).long()[:, None]
    return {"ids": ids, "lengths": lengths, "label": one, "margin": one * 0, "weight": one}


def _fit(
    walk: Walk, footprint: Footprint, learner: Learner, batch_of: Callable[[Any], dict[str, torch.Tensor]], loss_fn: Any
) -> int:
    """The steps, validation, and the best weights loaded again; returns the steps."""
    config, out = walk.config.train, walk.estimate
    budget = config.optim.micro_tokens
    worst = _worst(walk, budget)
    steps = Order(walk.rows.total, config.batch, 0).steps(config.epochs)
    _warm(footprint, learner)
    before = footprint.flops
    with footprint.moment() as found:
        learner.forward_backward(batch_of(worst), loss_fn)
        learner.step()
    out.moments["a training step"] = found
    each = (footprint.flops - before) / sum(map(sum, worst))
    mean = sum(map(sum, walk.rows.lengths)) / len(walk.rows.lengths)
    out.operations += each * mean * steps * config.batch
    full = sum(sorted(map(sum, walk.rows.lengths), reverse=True)[: config.batch])
    out.micro = (f"{walk.stage.name}.train.optim.micro_tokens", budget, full)
    if held := round(walk.rows.total * walk.config.held_out):
        every = max(1, round(config.validate_every * walk.rows.total / config.batch))
        rows = _whole((walk.rows.lengths * (held // len(walk.rows.lengths) + 1))[:held], budget)
        before = footprint.flops
        with footprint.moment() as found:
            learner.forward(batch_of(rows))
        out.moments["validation"] = found
        out.operations += (footprint.flops - before) / sum(map(sum, rows)) * mean * held * (steps // every + 1)
        if not adapted(learner.net.model):
            with footprint.moment() as found:
                _again(footprint, learner.net.model, walk.config.model)
            out.moments["the best weights loaded again"] = found
    return steps


def _again(footprint: Footprint, model: Any, name: str) -> None:
    """A second copy of a model's weights, for a moment: merged ones too where it has an adapter."""
    with footprint.counting("weights: as saved"):
        kept = [merged(model)] if adapted(model) else []
        kept.append(load_policy(name) if model.can_generate() else load_scalar(name, seed=0).model)
    footprint.restart()  # what making a model takes for a moment, loading one does not
    del kept
    gc.collect()


def _save(walk: Walk, footprint: Footprint, model: Any, name: str) -> None:
    with footprint.moment() as found:
        _again(footprint, model, name)
    walk.estimate.moments["saving"] = found


def _sample(
    walk: Walk, footprint: Footprint, sampler: Sampler, prompts: Sequence[int], sampling: Sampling, moment: str
) -> None:
    """A decode step with all slots at their longest, and the prefill before. Work is counted for every prompt."""
    out = walk.estimate
    asked = [[3] * n for n in prompts]
    room = (sampler.room or 1 << 30) - max(prompts)
    run = _Run(sampler, asked, list(range(len(asked))), sampling, 0, 0, "")
    with torch.no_grad():
        slots = min(sampler.slots, len(asked), run._fitting())
        run._allocate(slots)
        some = sorted(range(len(asked)), key=lambda i: -len(asked[i]))[:slots]
        run._fill(some)
        for tensor in (*run.cache.keys, *run.cache.values):
            footprint.hold(tensor, CACHE, again=True)
        with footprint.moment() as found:
            run.active, run.lengths = [], []
            before = footprint.flops
            run._fill(some)
            filled = footprint.flops - before
            run.lengths = [min(n + sampling.max_tokens, n + room) for n in run.lengths]
            run.position[:] = torch.tensor(run.lengths) - 1
            before = footprint.flops
            run._choose(run.head(run._next_states(slots)), slots)
            decoded = footprint.flops - before
    out.moments[moment] = found
    out.operations += (filled + decoded * sampling.max_tokens) * len(asked) / slots


def _walk_sft(walk: Walk, footprint: Footprint) -> None:
    config = walk.config
    models = models_of(config.model, config.lora, precision=config.train.precision, device=walk.mesh.device)
    model = models.policy(config.seed)
    _parts(footprint, models, policy=model)
    learner = Learner(Net(model, "policy"), config.train.optim, steps=1, precision=config.train.precision)
    steps = _fit(walk, footprint, learner, _texts, sft.sft_loss)
    del learner
    gc.collect()
    _save(walk, footprint, model, config.model)
    if config.samples and config.held_out:
        lengths = [max(1, n // 3) for (n,) in walk.rows.lengths]
        sampler = Sampler(model, end_id=2, decode=str)
        asked = (lengths * (config.samples // len(lengths) + 1))[: config.samples]
        _sample(walk, footprint, sampler, asked, config.sampling, "samples at the end")
    _disk(walk, {"policy": model}, {"final": model}, best=config.held_out > 0, shown=config.samples, steps=steps)


def _walk_reward(walk: Walk, footprint: Footprint) -> None:
    config = walk.config
    models = models_of(config.model, config.lora, precision=config.train.precision, device=walk.mesh.device)
    model = models.scalar(config.seed)
    _parts(footprint, models, **{"reward model": model})
    net = Net(model, "reward")
    learner = Learner(net, config.train.optim, steps=1, precision=config.train.precision)
    loss = partial(reward.pair_loss, center=config.center)
    steps = _fit(walk, footprint, learner, partial(_pairs, shared=walk.rows.shared), loss)
    del learner
    gc.collect()
    if config.normalize_samples:
        start = models.untrained()
        if not config.lora:
            footprint.weights(start, "weights: policy")
        lengths = [max(1, min(pair) // 2) for pair in walk.rows.lengths]
        asked = (lengths * (config.normalize_samples // len(lengths) + 1))[: config.normalize_samples]
        _sample(
            walk, footprint, Sampler(start, end_id=2, decode=str), asked, config.sampling, "samples to normalize by"
        )
        _score(walk, footprint, net, [n + config.sampling.max_tokens for n in asked])
        del start
    _save(walk, footprint, model, config.model)
    _disk(walk, {"reward": model}, {"final": model}, best=config.held_out > 0, shown=2 * config.samples, steps=steps)


def _score(walk: Walk, footprint: Footprint, net: Net, lengths: Sequence[int]) -> None:
    rows = _whole([[n] for n in lengths], MICRO_TOKENS)
    before = footprint.flops
    with footprint.moment() as found:
        ids = torch.full((len(rows), max(map(max, rows))), 3)
        forward(net, {"ids": ids, "lengths": torch.tensor(rows)[:, 0]}, walk.mesh)
    walk.estimate.moments["scoring"] = found
    walk.estimate.operations += (footprint.flops - before) / sum(map(sum, rows)) * sum(lengths)


class Said:
    """Stands in for a sampler: answers as long as they may be."""

    def __init__(self, sampler: Sampler, text: str, tokens: int) -> None:
        self.room, self.text, self.tokens = sampler.room or 1 << 30, text, tokens

    def sample(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, **_: Any) -> list[Completion]:
        counts = [max(1, min(self.tokens, self.room - len(ids))) for ids in prompt_ids]
        return [Completion(self.text, "length", (3,) * n, (0.0,) * n) for n in counts]


def _walk_ppo(walk: Walk, footprint: Footprint) -> None:
    config, out, tokens = walk.config, walk.estimate, walk.config.sampling.max_tokens
    chat = Chat.load(config.model)
    players = ppo.gather_players(config, walk.mesh, chat)
    named = {"policy": players.policy.net.model, "reference": players.reference.model}
    named |= {"critic": players.critic.net.model} if players.critic else {}
    watcher = players.watcher
    audits = {"audit": players.audit}
    if watcher:
        audits |= {"held-out reward model": watcher.heldout, "judge": getattr(watcher.judge, "scorer", None)}
    for name, scorer in {"reward model": players.scorer, **audits}.items():
        for i, one in enumerate(_nets(scorer)):
            named[name if not i else f"{name} {i + 1}"] = one.model
    if config.lora:
        footprint.weights(players.reference.model, "weights: base")
    for name, model in named.items():
        footprint.weights(model, f"weights: {name}")
    learners = [one for one in (players.policy, players.critic) if one]

    lengths = [n for (n,) in walk.rows.lengths]
    order = Order(len(lengths), max(1, config.batch // config.samples), config.seed)
    taken = max(
        ([i for i in order.at(step) for _ in range(config.samples)] for step in range(min(config.steps, 200))),
        key=lambda rows: sum(lengths[i] for i in rows),
    )
    taken.sort(key=lambda i: -lengths[i])
    asked = [walk.rows.prompts[i] for i in taken] if walk.rows.prompts else [_prompt(chat, lengths[i]) for i in taken]
    first = [lengths[i % len(lengths)] for i in range(config.missing_eos_samples)]
    if config.missing_eos_score is None:
        _sample(walk, footprint, players.sampler, first, config.sampling, "the first samples")
        for net in _nets(players.scorer):
            _score(walk, footprint, net, [n + tokens for n in first])
    began = out.operations
    _sample(walk, footprint, players.sampler, [lengths[i] for i in taken], config.sampling, "sampling")
    sampled = out.operations - began
    # As many rows as the largest micro-batch takes, twice; more rows do not hold more.
    budget = max(2 * config.optim.micro_tokens, 2 * config.critic_optim.micro_tokens, MICRO_TOKENS)
    sizes = [[lengths[i] + tokens] for i in taken]
    count = -(-_fill(sizes, budget) // config.samples) * config.samples
    share = config.batch / count
    small = config.model_copy(
        update={"batch": count, "minibatches": 1, "epochs": 1, "missing_eos_score": 0.0, "target_kl": None}
    )
    players.sampler = Said(players.sampler, text_of(chat, tokens), tokens)  # type: ignore[assignment]
    for learner in learners:
        _warm(footprint, learner)
    began = footprint.flops
    with footprint.moment() as found:
        rollout = ppo.make_rollout(small, players, asked[:count], 0, config.kl_coef)
    rolled = footprint.flops - began
    out.moments["the rollout's log-probs and scores"] = found
    rollout.batch |= ppo.estimate_advantages(small, players, rollout)
    # An optimizer step takes a minibatch.
    part = max(1, min(count, config.batch // config.minibatches))
    batch = {name: value[:part] for name, value in rollout.batch.items()}
    rollout.batch = batch
    began = footprint.flops
    with footprint.moment() as found:
        ppo.update(small.model_copy(update={"batch": part}), players, rollout, 0, config.kl_coef)
    out.moments["the update"] = found
    updated = (footprint.flops - began) / part * config.batch * config.epochs
    out.operations += (sampled + rolled * share + updated) * config.steps - sampled
    per_step = config.batch // config.minibatches
    out.micro = (f"{walk.stage.name}.optim.micro_tokens", config.optim.micro_tokens, sum(map(sum, sizes[:per_step])))
    with footprint.moment() as found:
        _again(footprint, players.policy.net.model, config.model)
    out.moments["saving"] = found
    state = {"policy": named["policy"]} | ({"critic": named["critic"]} if players.critic else {})
    final = {"final": named["policy"]} | ({"critic": named["critic"]} if players.critic else {})
    _disk(walk, state, final, best=config.held_out > 0, shown=config.steps * config.show, steps=config.steps)


def _nets(scorer: Any) -> list[Net]:
    if hasattr(scorer, "net"):
        return [scorer.net]
    return [net for one, _ in getattr(scorer, "scorers", []) for net in _nets(one)]


def _prompt(chat: Chat, tokens: int) -> Prompt:
    empty = len(chat.prompt_ids([Message(role="user", content=WORD.strip())]))
    return Prompt((Message(role="user", content=text_of(chat, max(1, tokens - empty + 1))),), {})


def _walk_answers(walk: Walk, footprint: Footprint) -> None:
    """`generate` and `evaluate`: models that answer, and what scores the answers."""
    config, out = walk.config, walk.estimate
    compared = getattr(config, "models", None) or {"policy": config.model}
    lengths = [n for (n,) in walk.rows.lengths]
    count = min(walk.rows.total, config.limit or walk.rows.total) * getattr(config, "n", 1)
    held = [load_policy(next(iter(compared.values())))]
    footprint.weights(held[0], "weights: policy")
    if len(compared) > 1:
        held.append(load_policy(compared.get(config.reference, next(iter(compared.values())))))
        footprint.weights(held[1], "weights: reference")
    scorers = [one for key in ("scorer", "audit", "proxy", "gold", "judge") if (one := getattr(config, key, None))]
    nets = [Net(load_scalar(one).model, "reward") for spec in scorers for one in _folders(spec)]
    for net in nets:
        footprint.weights(net.model, "weights: reward models")
    asked = (lengths * (count // len(lengths) + 1))[:count]
    before = out.operations
    _sample(walk, footprint, Sampler(held[0], end_id=2, decode=str), asked, config.sampling, "sampling")
    for net in nets:
        _score(walk, footprint, net, [n + config.sampling.max_tokens for n in asked])
    times = len(compared) * (2 if getattr(config, "greedy", False) else 1)
    out.operations = before + (out.operations - before) * times
    out.disk["answers"] = count * times * (200 + 5 * config.sampling.max_tokens)


def _folders(spec: Any) -> list[str]:
    return list(spec) if isinstance(spec, Mapping) else [spec]


WALKS: dict[str, Callable[[Walk, Footprint], None]] = {
    "sft": _walk_sft,
    "reward": _walk_reward,
    "ppo": _walk_ppo,
    "generate": _walk_answers,
    "best-of-n": _walk_answers,
    "evaluate": _walk_answers,
}


def _parts(footprint: Footprint, models: Any, **named: Any) -> None:
    """Names the weights; those of a shared base are the base's."""
    if isinstance(models, Base):
        footprint.weights(models.model, "weights: base")
    for name, model in named.items():
        footprint.weights(model, f"weights: {name}")


def _disk(
    walk: Walk, learned: Mapping[str, Any], saved: Mapping[str, Any], *, best: bool, shown: int, steps: int
) -> None:
    """Bytes at the most: a checkpoint holds float32 masters and two means of what learns, and the one before it goes
    only when it is there."""
    own = sum(p.numel() for m in learned.values() for p in m.parameters() if p.requires_grad)
    whole = {name: sum(p.numel() for p in m.parameters()) for name, m in saved.items()}
    width = {name: m.dtype.itemsize for name, m in saved.items()}
    disk = walk.estimate.disk
    training = getattr(walk.config, "train", walk.config)
    kept = getattr(getattr(training, "keep", None), "last", 1) + 1
    disk["checkpoints, to go on from"] = 3 * 4 * own * min(kept, max(0, (steps - 1) // training.save_every))
    for name, size in whole.items():
        disk[f"{name}/"] = size * width[name]
    if best:
        disk["best/"] = 4 * own if any(map(adapted, saved.values())) else sum(disk[f"{name}/"] for name in whole)
    disk["samples and metrics"] = shown * (400 + 5 * walk.config.sampling.max_tokens) + steps * 1500


# the whole recipe


def plan(recipe: Recipe, runs: Path, *, memory: int | None = None, rate: float | None = None) -> list[Planned]:
    """Every stage of a recipe with what it takes. `memory`, bytes: the largest micro-batch within it is looked for;
    `rate`: operations a second, measured on this machine where None."""
    stages = resolve(recipe, runs)
    out: list[Planned] = []
    with tempfile.TemporaryDirectory() as place:
        folders = Folders(stages, Path(place))
        for stage in stages:
            before = manifest(stage.folder)
            planned = Planned(stage, "done" if stage.done else "due")
            out.append(planned)
            if stage.done:
                planned.seconds, planned.known_from = before.get("seconds"), "as it took"
                continue
            left = 1.0
            if checkpoints := sorted(int(p.name.split("-")[1]) for p in stage.folder.glob("checkpoint-[0-9]*")):
                planned.state = f"goes on after step {checkpoints[-1]}"
            planned.estimate = estimate(stage, folders)
            if checkpoints and (steps := _steps(stage, planned.estimate)):
                left = max(0.0, 1 - checkpoints[-1] / steps)
            if (seconds := _earlier(stage, folders, runs)) is not None:
                planned.seconds, planned.known_from = seconds * left, "by earlier runs"
            elif planned.estimate.operations:
                rate = rate or measured_rate()
                planned.seconds = planned.estimate.operations / rate * left
                planned.known_from = f"estimate: {planned.estimate.operations:.1e} operations at {rate:.1e} a second"
            if memory and planned.estimate.micro:
                planned.largest = largest(stage, folders, planned.estimate, memory)
    return out


def _steps(stage: Stage, found: Estimate) -> int:
    config: Any = stage.config
    if stage.phase == "ppo":
        return int(config.steps)
    total = int(found.rows.split(" rows")[0].split()[-1]) if " rows" in found.rows else 0
    return Order(total, config.train.batch, 0).steps(config.train.epochs) if total and hasattr(config, "train") else 0


def largest(stage: Stage, folders: Folders, found: Estimate, memory: int) -> int:
    """The most tokens of a micro-batch with which the stage stays within `memory`, 0 where none does; as many as a
    step has where all of them fit. Memory grows with the micro-batch by straight lines, so that a few trials do."""
    assert found.micro
    key, _, most = found.micro
    keys = key.split(".")[1:]

    def peak(tokens: int) -> int:
        return estimate(_with(stage, keys, tokens), folders).peak

    if (whole := peak(most)) <= memory:
        return most
    low, small = 1, peak(1)
    if small > memory:
        return 0
    high = most
    for turn in range(8):
        # By the line between the ends, and in the middle in turn: peaks are a line only in parts.
        share = (memory - small) / (whole - small) if turn % 2 == 0 and whole > small else 0.5
        guess = int(low + share * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        if guess <= low:
            break
        size = peak(guess)
        if size <= memory:
            low, small = guess, size
            if size > 0.95 * memory:
                break
        else:
            high, whole = guess, size
    return low


def _with(stage: Stage, keys: Sequence[str], value: int) -> Stage:
    """The stage with one key changed; PPO's critic follows its policy."""
    data = stage.config.model_dump()
    for path in [keys] + ([["critic_optim", *keys[1:]]] if keys[0] == "optim" else []):
        here = data
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value
    config = parse(type(stage.config), data, stage.name)
    return Stage(stage.name, stage.phase, stage.module, config, stage.key, stage.folder, stage.parents)


def measured_rate() -> float:
    """Multiplications and additions a second of one large float32 product on this machine's CPU."""
    a, b = torch.randn(2048, 1024), torch.randn(2048, 1024)
    product(a, b)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 0.3:
        product(a, b)
        count += 1
    return 2 * 2048 * 1024 * 2048 * count / (time.monotonic() - began)


def _earlier(stage: Stage, folders: Folders, runs: Path) -> float | None:
    """Seconds by the latest finished stage of the same phase and shape: its seconds a unit of work, times the work."""
    mine = _work(stage.phase, stage.config.model_dump(), None)
    if mine is None:
        return None
    shape = _shape(stage.phase, stage.config.model_dump(), folders.of)
    found: tuple[str, float] | None = None
    for record in runs.glob("*/*/manifest.json"):
        before = manifest(record.parent)
        if before.get("status") != "done" or before.get("phase") != stage.phase:
            continue
        config = json.loads((record.parent / "config.json").read_text(encoding="utf-8"))["config"]
        try:
            same = _shape(stage.phase, config, lambda name: name) == shape
        except (UserError, OSError, ValueError, KeyError):
            continue
        work = _work(stage.phase, config, record.parent)
        if same and work and (found is None or before["finished"] > found[0]):
            found = (before["finished"], before["seconds"] / work)
    return None if found is None else found[1] * mine


def _shape(phase: str, config: Mapping[str, Any], of: Callable[[str], str]) -> Any:
    """What must be the same for times to be comparable."""
    model = config.get("model") or next(iter(config.get("models", {}).values()))
    text = AutoConfig.from_pretrained(of(model)).get_text_config()
    trained = config.get("train") or config
    optim = trained.get("optim") or {}
    return json.dumps(
        [
            [getattr(text, k, None) for k in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")],
            config.get("lora"),
            trained.get("precision"),
            optim.get("gradient_checkpointing"),
            config.get("data") or config.get("prompts"),
            config.get("advantage"),
        ],
        sort_keys=True,
        default=str,
    )


def _work(phase: str, config: Mapping[str, Any], folder: Path | None) -> float | None:
    """Units of work, the same for stages on the same data; of a finished stage what it did, stops before the end
    included."""
    if phase in ("sft", "reward"):
        epochs = float(config["train"]["epochs"])
        if folder is None:
            return epochs
        done = len(read_lines(folder / "metrics.jsonl"))
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("rows")
        return done * config["train"]["batch"] / rows if rows and done else None
    if phase == "ppo":
        steps = config["steps"] if folder is None else len(read_lines(folder / "metrics.jsonl"))
        return float(steps * config["batch"] * (1 + config["epochs"]) * config["sampling"]["max_tokens"])
    if phase in ("generate", "evaluate"):
        each = config.get("n", 1) * len(config.get("models") or "x") * (2 if config.get("greedy") else 1)
        return float(each * config["sampling"]["max_tokens"]) if not config.get("limit") else None
    return None


def memory_of(text: str) -> int:
    """'24GB', '512MB', '1.5 TB' or '16GiB' as bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])?(i?)B?\s*", text, re.IGNORECASE)
    try:
        assert match
        number = float(match[1])
    except (AssertionError, ValueError):
        raise UserError(f"memory '{text}': expected a size such as 24GB or 512MB") from None
    return int(number * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


PARTS = ("gradients", "optimizer", "activations", "logits", "KV cache", "compiled products")


def lines(planned: Sequence[Planned], memory: int | None) -> list[str]:
    """The plan as it is printed."""
    out = [f"{'stage':12} {'phase':9} {'state':10} {'time':>8} {'disk':>8} {'memory':>8}"]
    for p in planned:
        e = p.estimate
        disk, peak = (size_of(sum(e.disk.values())), size_of(e.peak) if e.peak else "") if e else ("", "")
        state = p.state if len(p.state) <= 10 else "goes on"
        row = f"{p.stage.name:12} {p.stage.phase:9} {state:10} {duration(p.seconds):>8} {disk:>8} {peak:>8}"
        out.append(f"{row}  {p.known_from}".rstrip())
    due = [p for p in planned if p.estimate]
    known = [p.seconds for p in due if p.seconds is not None]
    if due:
        unknown = [p.stage.name for p in due if p.seconds is None]
        more = f", and {', '.join(unknown)} which nothing is known of" if unknown else ""
        space = sum(sum(p.estimate.disk.values()) for p in due if p.estimate)
        out.append(f"due: {duration(sum(known))}{more}; {size_of(space)} of disk")
    else:
        out.append("nothing is due")
    for p in due:
        assert p.estimate
        if not p.estimate.moments:
            continue
        out += ["", f"{p.stage.name}: {p.estimate.rows}"]
        if p.state.startswith("goes on"):
            out.append(f"  {p.state}")
        at = p.estimate.at
        for name, parts in p.estimate.moments.items():
            mark = "*" if name == at else " "
            weights = {k.partition(": ")[2] or k: v for k, v in parts.items() if k.startswith("weights")}
            said = [f"{k} {size_of(v)}" for k, v in weights.items()]
            rest = [f"{k} {size_of(parts[k])}" for k in PARTS if parts.get(k)]
            shown = [f"weights ({', '.join(said)})", *rest]
            out.append(f"  {mark} {size_of(sum(parts.values())):>7}  {name}: {', '.join(shown)}")
        if p.estimate.disk:
            out.append("    disk: " + ", ".join(f"{k} {size_of(v)}" for k, v in p.estimate.disk.items() if v))
        if memory and p.estimate.micro:
            out.append("  " + _fits(p, memory))
    return out


def _fits(p: Planned, memory: int) -> str:
    assert p.estimate and p.estimate.micro
    key, tokens, most = p.estimate.micro
    if not p.largest:
        return f"does not fit into {size_of(memory)} with any micro-batch; docs/models.md says what takes less"
    if p.largest == most:
        return f"{size_of(memory)}: all {most} tokens of a step fit in one micro-batch ({key}={tokens} now)"
    return f"{size_of(memory)}: the largest micro-batch that fits is {key}={p.largest} ({tokens} now)"
