"""Stages walked through on models without weights, by the phases' own code: memory by moment, operations, disk."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedModel

from trueup.data.batches import Order, completion_batch, pair_completions, text_batch
from trueup.data.chat import Chat, Encoded
from trueup.engine.footprint import CACHE, OPTIMIZER, Footprint
from trueup.engine.learner import Learner
from trueup.engine.mesh import Mesh
from trueup.engine.rows import MICRO_TOKENS, exact_kl, forward
from trueup.engine.sampler import Sampler, Sampling, _Run
from trueup.models.linear import COMPILED
from trueup.models.load import load_policy, load_scalar
from trueup.models.lora import Base, adapted, merged
from trueup.models.net import Net
from trueup.models.roles import Models, models_of
from trueup.models.weightless import weightless
from trueup.phases import dpo, ppo, reward, sft
from trueup.plan.rows import LOOKED_AT, WORD, Rows, rows_of, text_of
from trueup.plan.standins import Folders
from trueup.recipe import Stage
from trueup.records import Completion, Message, Preference, Prompt, Thumb
from trueup.scorers.ensemble import is_ensemble, read_ensemble

T = TypeVar("T")


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
class Walk:
    """What walking through a stage needs, and gathers."""

    stage: Stage
    config: Any
    rows: Rows
    estimate: Estimate
    mesh: Mesh = field(default_factory=Mesh)

    def vocab(self) -> int:
        config = getattr(self.config, "member", self.config)
        name = config.model if hasattr(config, "model") else next(iter(config.models.values()))
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


def _cycled(rows: Sequence[T], count: int) -> list[T]:
    """So many rows, from the first on again where there are not as many."""
    return list(islice(cycle(rows), count))


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
) -> tuple[int, int]:
    """The steps, validation, and the best weights loaded again; returns how many steps and validations there are."""
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
    validations = steps // max(1, round(config.validate_every * walk.rows.total / config.batch)) + 1
    if held := round(walk.rows.total * walk.config.held_out):
        rows = _whole(_cycled(walk.rows.lengths, held), budget)
        before = footprint.flops
        with footprint.moment() as found:
            learner.forward(batch_of(rows))
        out.moments["validation"] = found
        out.operations += (footprint.flops - before) / sum(map(sum, rows)) * mean * held * validations
        if not adapted(learner.net.model):
            with footprint.moment() as found:
                _again(footprint, learner.net.model, walk.config.model)
            out.moments["the best weights loaded again"] = found
    return steps, validations


def _again(footprint: Footprint, model: Any, name: str) -> None:
    """A second copy of a model's weights, for a moment: merged ones too where it has an adapter."""
    with footprint.counting("weights: as saved"):
        kept = [merged(model)] if adapted(model) else []
        kept.append(load_policy(name) if model.can_generate() else load_scalar(name, seed=0).model)
    footprint.restart()  # what making a model takes for a moment, loading one does not
    del kept
    gc.collect()


def _untrained(walk: Walk, footprint: Footprint, models: Models, role: str) -> PreTrainedModel:
    """What training starts from: with an adapter the shared base, whose weights have their name."""
    start = models.untrained()
    if not walk.config.lora:
        footprint.weights(start, f"weights: {role}")
    return start


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
    steps, _ = _fit(walk, footprint, learner, _texts, sft.sft_loss)
    del learner
    gc.collect()
    _save(walk, footprint, model, config.model)
    if config.samples and config.held_out:
        lengths = [max(1, n // 3) for (n,) in walk.rows.lengths]
        sampler = Sampler(model, end_id=2, decode=str)
        asked = _cycled(lengths, config.samples)
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
    steps, _ = _fit(walk, footprint, learner, partial(_pairs, shared=walk.rows.shared), loss)
    del learner
    gc.collect()
    if config.normalize_samples:
        start = _untrained(walk, footprint, models, "policy")
        lengths = [max(1, min(pair) // 2) for pair in walk.rows.lengths]
        asked = _cycled(lengths, config.normalize_samples)
        _sample(
            walk, footprint, Sampler(start, end_id=2, decode=str), asked, config.sampling, "samples to normalize by"
        )
        _score(walk, footprint, net, [n + config.sampling.max_tokens for n in asked])
        del start
        gc.collect()
    _save(walk, footprint, model, config.model)
    _disk(walk, {"reward": model}, {"final": model}, best=config.held_out > 0, shown=2 * config.samples, steps=steps)


def _walk_ensemble(walk: Walk, footprint: Footprint) -> None:
    """A reward model after another; then all of them, to be measured together."""
    config, out = walk.config, walk.estimate
    count = config.members if isinstance(config.members, int) else len(config.members)
    models = config.members if isinstance(config.members, list) else cycle(config.starts or [config.member.model])
    if isinstance(config.members, int):
        _walk_reward(replace(walk, config=config.member), footprint)
        gc.collect()
        out.operations *= count
        average = {"average/": out.disk["final/"]} if config.average else {}
        # Checkpoints go when a member is done; and `final/` holds each member once more.
        out.disk |= {name: size * count for name, size in out.disk.items() if not name.startswith("checkpoints")}
        out.disk |= {"the members once more": out.disk["final/"], **average}
        key, budget, full = out.micro or ("", 0, 0)
        out.micro = (key.replace(".", ".member.", 1), budget, full)
    nets = [Net(load_scalar(model, seed=0).model, "reward") for model in islice(models, count)]
    for i, net in enumerate(nets):
        footprint.weights(net.model, "weights: member" + (f" {i + 1}" if i else ""))
    if not isinstance(config.members, int):
        out.disk["final/"] = sum(p.numel() * p.dtype.itemsize for net in nets for p in net.model.parameters())
    if held := round(walk.rows.total * config.member.held_out):
        lengths = [n for pair in _cycled(walk.rows.lengths, held) for n in pair]
        for net in nets:
            _score(walk, footprint, net, lengths, "the members measured together")


def _walk_dpo(walk: Walk, footprint: Footprint) -> None:
    config, out = walk.config, walk.estimate
    models = models_of(config.model, config.lora, precision=config.train.precision, device=walk.mesh.device)
    start = _untrained(walk, footprint, models, "reference")
    budget, rows = config.train.optim.micro_tokens, walk.rows
    pairs = [(*row, *row)[:2] for row in rows.lengths]  # a thumb comes with a reply to another prompt
    some = _whole(pairs, budget)
    before = footprint.flops
    with footprint.moment() as found:
        batch = pair_completions([(row.prompt, row.replies) for row in _answered(some, rows.shared)], 0)
        forward(Net(start, "policy"), batch, walk.mesh, micro_tokens=budget, bf16=config.train.precision == "bf16")
    out.moments["the reference's log-probs"] = found
    each = (footprint.flops - before) / sum(map(sum, some))
    out.operations += each * sum(map(sum, pairs)) / len(pairs) * rows.total
    del start
    gc.collect()
    model = models.policy(config.seed)
    _parts(footprint, models, policy=model)
    learner = Learner(Net(model, "policy"), config.train.optim, steps=1, precision=config.train.precision)
    batch_of = partial(_preferences, config, learner, shared=rows.shared)
    steps, validations = _fit(walk, footprint, learner, batch_of, dpo.loss_of(config))
    del batch_of
    if answered := min(config.samples, round(rows.total * config.held_out) or rows.total):
        lengths = [max(1, round(min(row) * (rows.shared or 0.5))) for row in rows.lengths]  # 0: of assumed rows
        asked = _cycled(lengths, answered)
        began = out.operations
        _sample(walk, footprint, Sampler(model, end_id=2, decode=str), asked, config.sampling, "answers at validation")
        start = _untrained(walk, footprint, models, "reference")
        tokens = config.sampling.max_tokens
        asked = [n for (n,) in _whole([[n + tokens] for n in asked], MICRO_TOKENS)]
        batch = completion_batch([[3] * (n - tokens) for n in asked], [[3] * tokens for _ in asked], 0)
        before = footprint.flops
        with footprint.moment() as found:
            exact_kl(Net(model, "policy"), Net(start, "policy"), batch, walk.mesh)
        out.moments["their KL"] = found
        out.operations += (footprint.flops - before) / len(asked) * answered
        out.operations = began + (out.operations - began) * validations
        del start
    del learner
    gc.collect()
    _save(walk, footprint, model, config.model)
    shown = config.show * validations
    _disk(walk, {"policy": model}, {"final": model}, best=config.held_out > 0, shown=shown, steps=steps)
    out.disk["the reference's log-probs"] = 50 * 2 * rows.total


def _preferences(
    config: dpo.DPOConfig, learner: Learner, rows: Sequence[Sequence[int]], *, shared: float
) -> dict[str, torch.Tensor]:
    """DPO's batch of rows of these lengths; of thumbs with what their baseline takes."""
    answered = _answered(rows, shared)
    if config.loss != "kto":
        return dpo.batch_of(answered, 0)
    return dpo.with_baseline(learner, dpo.thumb_batch(answered, 0))


def _answered(rows: Sequence[Sequence[int]], shared: float) -> list[dpo.Row]:
    """DPO's rows of these lengths, prompt included, which is this share of the shorter sequence. A row of one is a
    thumb, and its reply to another prompt as long as its own."""
    prompt, said = Prompt((Message(role="user", content=WORD),)), Completion(WORD, "eos")
    out = []
    for row in rows:
        record = Thumb(prompt, said, True) if len(row) == 1 else Preference(prompt, said, said)
        opening = min(max(1, int(min(row) * shared)), min(row) - 1)
        replies = [[3 + i] * (n - opening) for i, n in enumerate((*row, *row)[:2])]
        out.append(dpo.Row([3] * opening, replies, record, [0.0, 0.0]))
    return out


def _score(walk: Walk, footprint: Footprint, net: Net, lengths: Sequence[int], moment: str = "scoring") -> None:
    rows = _whole([[n] for n in lengths], MICRO_TOKENS)
    before = footprint.flops
    with footprint.moment() as found:
        ids = torch.full((len(rows), max(map(max, rows))), 3)
        forward(net, {"ids": ids, "lengths": torch.tensor(rows)[:, 0]}, walk.mesh)
    walk.estimate.moments[moment] = found
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
        judge = getattr(watcher.judge, "scorer", None) or getattr(watcher.judge, "answerer", None)
        audits |= {"held-out reward model": watcher.heldout, "judge": judge}
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
    first = _cycled(lengths, config.missing_eos_samples)
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
    several = [one for one, _ in getattr(scorer, "scorers", [])] + list(getattr(scorer, "members", {}).values())
    return [net for one in several for net in _nets(one)]


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
    nets = [Net(load_scalar(one).model, "reward") for spec in scorers for one in _scored_by(spec)]
    for net in nets:
        footprint.weights(net.model, "weights: reward models")
    asked = _cycled(lengths, count)
    before = out.operations
    _sample(walk, footprint, Sampler(held[0], end_id=2, decode=str), asked, config.sampling, "sampling")
    for net in nets:
        _score(walk, footprint, net, [n + config.sampling.max_tokens for n in asked])
    times = len(compared) * (2 if getattr(config, "greedy", False) else 1)
    out.operations = before + (out.operations - before) * times
    out.disk["answers"] = count * times * (200 + 5 * config.sampling.max_tokens)


def _scored_by(spec: Any) -> list[str]:
    """The reward models of a stand-in's spec."""
    if isinstance(spec, Mapping) and "ensemble" in spec:
        spec = spec["ensemble"]
    if isinstance(spec, str) and is_ensemble(spec):
        return [f"{spec}/{name}" for name in read_ensemble(spec).members]
    return [spec] if isinstance(spec, str) else list(spec)


WALKS: dict[str, Callable[[Walk, Footprint], None]] = {
    "sft": _walk_sft,
    "reward": _walk_reward,
    "ensemble": _walk_ensemble,
    "dpo": _walk_dpo,
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
