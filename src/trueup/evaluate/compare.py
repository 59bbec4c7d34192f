"""Models side by side on held-out prompts: scores, win rates with intervals, KL, length, end-of-sequence rate.

In order: every model answers every prompt, once at the training temperature and once greedily; the gold scorer (where
one is known) and the proxy score the answers; a judge compares each model with the baseline; KL to the reference is
exact along the sampled answers. The judge of win rates is the gold scorer, or a held-out reward model trained on
other prompts; never the proxy that PPO optimized. Intervals are 95% bootstraps over prompts.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from trueup.config import Config, Seed, display, named
from trueup.data.batches import completion_batch
from trueup.data.chat import Chat, describe
from trueup.data.files import Data, sources
from trueup.data.prepare import prompts as prepare_prompts
from trueup.data.readers import read_prompts
from trueup.engine.mesh import Mesh
from trueup.engine.rows import exact_kl
from trueup.engine.sampler import Sampler, Sampling
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.math import bootstrap_interval
from trueup.models.load import context_length, load_policy
from trueup.models.net import Net
from trueup.records import Comparison, Completion, Prompt, UserError, write_json
from trueup.run import TRAINED, Run
from trueup.scorers import Spec, make_scorer

WHAT = "compares the models on prompts that no stage has seen: a rising score alone proves nothing"
VERSION = 1
Tables = dict[str, dict[str, dict[str, Any]]]
"""Model -> mode -> figures."""
Answers = dict[str, dict[str, list[Completion]]]
"""Model -> mode -> an answer to each prompt."""


class EvaluateConfig(Config):
    """Models side by side on held-out prompts."""

    models: dict[str, str]
    """Name -> folder, in the order of the table."""
    prompts: Data
    """Each distinct prompt is answered once, whatever its data set's weight."""
    gold: Spec | None = None
    """A known gold score."""
    proxy: Spec | None = None
    """The reward model that PPO optimized: reported beside gold, never the judge of win rates."""
    judge: JudgeSpec | None = None
    """Who decides win rates: gold where it is known, else this: a held-out reward model, say."""
    baseline: str = named("sft")
    """The model that win rates are against."""
    reference: str = named("sft")
    """The model that KL is measured from."""
    limit: int = Field(0, ge=0)
    """At most so many prompts; 0 takes all."""
    sampling: Sampling = Sampling(max_tokens=64)
    greedy: bool = True
    """Answer a second time at temperature 0."""
    seed: Seed = 0
    shown: int = display(3, ge=0)
    """Prompts in the closing table with all models' answers."""


def run_phase(config: EvaluateConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    for key in ("baseline", "reference"):
        if (name := getattr(config, key)) not in config.models:
            raise UserError(f"evaluate: {key}={name} is not among the models ({', '.join(config.models)})")
    chats = {name: Chat.load(path) for name, path in config.models.items()}
    rooms = {name: context_length(path) - 1 for name, path in config.models.items()}

    def beyond(prompt: Prompt) -> int:
        """By how many tokens it is too long for one of the models."""
        return max(chat.prompt_length(prompt) - rooms[name] for name, chat in chats.items())

    found = prepare_prompts(config.prompts, beyond, 0, seed=config.seed)
    prompts = list(dict.fromkeys(found.train))[: config.limit or None]
    run.say(
        f"{found.found.note()}, {len(found.records)} distinct; {found.too_long} beyond a model's context; "
        f"{len(prompts)} are answered"
    )
    if not prompts:
        raise UserError(f"{found.names}: no prompt fits into every model's context")
    gold = make_scorer(config.gold, mesh) if config.gold else None
    proxy = make_scorer(config.proxy, mesh) if config.proxy else None
    spec = config.gold if config.gold is not None else config.judge
    judge = make_judge(spec, mesh, seed=config.seed) if spec is not None else None  # type: ignore[arg-type]
    if judge is not None and spec != config.gold and (climbed := scored_by(spec) & optimized(config)):
        raise UserError(f"evaluate: the judge of win rates must not be what was optimized: {', '.join(climbed)}")

    seen = seen_in_training(config.models, prompts)
    for path, count in seen.items():
        if count:
            run.say(f"{count} of the {len(prompts)} prompts are in {path}, which a model here was trained on")

    modes = {"sampled": config.sampling}
    if config.greedy:
        modes["greedy"] = config.sampling.model_copy(update={"greedy": True})
    order = sorted(config.models, key=lambda name: name != config.baseline)  # the baseline's answers come first
    tables: Tables = {name: {} for name in config.models}
    answers: Answers = {name: {} for name in config.models}
    if folder := run.resume():
        tables, answers = load_cells(folder)
    reference = Net(
        load_policy(config.models[config.reference], device=mesh.device), "policy", config.sampling.temperature
    )
    cells = [(name, mode) for name in order for mode in modes]
    for step in run.steps(len(cells), watch=("gold", "kl", "length")):
        name, mode = cells[step]
        chat, model = chats[name], load_policy(config.models[name], device=mesh.device)
        ids = [chat.prompt_ids(p.messages) for p in prompts]
        sampler = Sampler.speaking(chat, model, mesh)
        answers[name][mode] = found_answers = sampler.sample(ids, modes[mode], seed=config.seed, step=0)
        figures, columns = measure(prompts, found_answers, gold, proxy)
        if mode == "sampled" and chat.tokenizer.get_vocab() == chats[config.reference].tokenizer.get_vocab():
            batch = completion_batch(ids, [c.ids for c in found_answers], chat.pad_id)
            kl = exact_kl(Net(model, "policy", config.sampling.temperature), reference, batch, mesh).sum(1).double()
            columns["kl"] = kl.tolist()
            figures |= {"kl": float(kl.mean()), "kl_interval": interval(kl, config.seed)}
        if judge is not None and name != config.baseline:
            wins = win_share(judge, prompts, found_answers, answers[config.baseline][mode])
            if not wins:
                raise UserError(f"evaluate: judge '{judge.name}' abstained on every prompt for model '{name}'")
            figures |= {
                "win_rate": float(np.mean(wins)),
                "win_rate_interval": interval(wins, config.seed),
                "judged": len(wins),
            }
        if gold is not None:
            figures["gold_interval"] = interval(columns["gold"], config.seed)
        tables[name][mode] = figures
        run.live.update({k: v for k, v in figures.items() if isinstance(v, float)})
        run.show(
            step,
            [
                {
                    **describe(p),
                    "model": name,
                    "mode": mode,
                    "completion": c.text,
                    "stop": c.stop,
                    **{k: v[i] for k, v in columns.items()},
                }
                for i, (p, c) in enumerate(zip(prompts, found_answers, strict=True))
            ],
        )
        if step + 1 < len(cells):
            run.checkpoint(step + 1, partial(save_cells, tables, answers))
    chosen = pick_examples(prompts, config.shown)
    examples = [
        {**describe(prompts[i]), "answers": {n: {m: answers[n][m][i].text for m in modes} for n in config.models}}
        for i in chosen
    ]
    return {
        "models": tables,
        "examples": examples,
        "prompts": len(prompts),
        "seen_in_training": seen,
        "baseline": config.baseline,
        "reference": config.reference,
        "judge": judge.name if judge else None,
        "gold": gold.name if gold else None,
        "temperature": config.sampling.temperature,
        "categories": sorted({p.category for p in prompts if p.category}),
    }


def save_cells(tables: Tables, answers: Answers, folder: Path) -> None:
    said = {name: {mode: [asdict(c) for c in modes[mode]] for mode in modes} for name, modes in answers.items()}
    write_json(folder / "cells.json", {"tables": tables, "answers": said})


def load_cells(folder: Path) -> tuple[Tables, Answers]:
    state = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    for modes in state["answers"].values():
        for mode, rows in modes.items():
            modes[mode] = [Completion(**{**c, "ids": tuple(c["ids"]), "logprobs": tuple(c["logprobs"])}) for c in rows]
    return state["tables"], state["answers"]


def scored_by(spec: Any, bases: Sequence[Path] = (Path(),)) -> set[str]:
    """What a scorer or judge asks: folders as they really are below any of `bases`, `module:function` as written; an
    ensemble, and its members."""
    if isinstance(spec, Mapping):
        asked = spec.get("use") or spec.get("ensemble") or list(spec)
        return {name for one in ([asked] if isinstance(asked, str) else asked) for name in scored_by(one, bases)}
    found = [(base / spec).resolve() for base in bases if (base / spec).exists()]
    return {str(path) for folder in found for path in (folder, *folder.glob("member-*"))} or {str(spec)}


def optimized(config: EvaluateConfig) -> set[str]:
    """What any of the models was trained against: the proxy, and the scorers that their own runs name, seen from where
    they ran and, since a project may have been moved, from each folder around them."""
    found = scored_by(config.proxy) if config.proxy is not None else set()
    for folder in config.models.values():
        made_by = Path(folder).resolve().parent / "config.json"
        if made_by.is_file():
            record = json.loads(made_by.read_text(encoding="utf-8"))
            scorer = (record.get("config") or {}).get("scorer")
            bases = [Path(record.get("directory", "")), *made_by.parents]
            found |= scored_by(scorer, bases) if scorer is not None else set()
    return found


def seen_in_training(models: Mapping[str, str], prompts: Sequence[Prompt]) -> dict[str, int]:
    """Training file -> how many of `prompts` it holds, for every file that the models, and the models they were made
    from and against, name in their own runs' records. A file that is gone, or not readable here, is left out."""
    found: dict[str, int] = {}
    asked, todo, known = set(prompts), [str(folder) for folder in models.values()], set()
    while todo:
        folder = Path(todo.pop()).resolve()
        made_by = folder.parent / "config.json"
        if folder in known or not made_by.is_file():
            continue
        known.add(folder)
        record = json.loads(made_by.read_text(encoding="utf-8"))
        keys, base = record.get("config") or {}, Path(record.get("directory", ""))
        scorer = keys.get("scorer")
        parents = [keys.get("model"), *(scorer if isinstance(scorer, Mapping) else [scorer])]
        todo += [str(base / p) for p in parents if isinstance(p, str)]
        named = ("data", "prompts") if record.get("phase") in TRAINED else ()
        read = [source for name in named if keys.get(name) for source in sources(keys[name])]
        files = [str(base / source.path) for source in read]
        for path in set(files) - set(found):
            with contextlib.suppress(UserError):
                found[path] = len(asked & set(read_prompts(path).records))
    return found


def measure(
    prompts: Sequence[Prompt], answers: Sequence[Completion], gold: Any, proxy: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """A model's figures over the prompts, and its scores per prompt. `surprise`: -log-prob of a whole answer, whose
    mean over samples is the entropy per answer in nats."""
    columns: dict[str, list[float]] = {}
    figures: dict[str, Any] = {
        "length": float(np.mean([len(c.ids) for c in answers])),
        "end_rate": float(np.mean([c.ended for c in answers])),
        "surprise": float(np.mean([-sum(c.logprobs) for c in answers])),
        "distinct": len({c.text for c in answers}) / len(answers),
    }
    for name, scorer in (("gold", gold), ("score", proxy)):
        if scorer is None:
            continue
        scored = scorer.score(prompts, answers)
        values = scored.value
        if scored.disagreement is not None:
            columns["disagreement"] = scored.disagreement.tolist()
            figures["disagreement"] = float(scored.disagreement.mean())
        columns[name] = [float(v) for v in values]
        figures[name] = float(np.mean(values))
        groups: dict[str, list[float]] = defaultdict(list)
        for prompt, value in zip(prompts, columns[name], strict=True):
            if prompt.category:
                groups[prompt.category].append(value)
        figures[f"{name}_by_category"] = {c: float(np.mean(v)) for c, v in sorted(groups.items())}
    return figures, columns


def win_share(
    judge: Any, prompts: Sequence[Prompt], answers: Sequence[Completion], baseline: Sequence[Completion]
) -> list[float]:
    """Per prompt, the probability that the answer beats the baseline's: both orders asked and averaged; where the
    judge abstains in either order, the prompt is left out. Ties count one half."""
    rows = list(zip(prompts, answers, baseline, strict=True))
    ahead = verdicts_of(judge, [Comparison(p, (a, b)) for p, a, b in rows])
    behind = verdicts_of(judge, [Comparison(p, (b, a)) for p, a, b in rows])
    return [(x.p + 1 - y.p) / 2 for x, y in zip(ahead, behind, strict=True) if x.p is not None and y.p is not None]


def interval(values: Any, seed: int) -> list[float]:
    """95% percentile bootstrap of the mean over prompts."""
    low, high = bootstrap_interval(torch.as_tensor(values, dtype=torch.float64), seed=seed)
    return [float(low), float(high)]


def pick_examples(prompts: Sequence[Prompt], count: int) -> list[int]:
    """The first prompt of as many different categories, spread over the list of categories."""
    first: dict[str | None, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt.category, i)
    rows = [first[c] for c in sorted(first, key=str)]
    if len(rows) < count:
        rows += [i for i in range(len(prompts)) if i not in rows][: count - len(rows)]
    return [rows[i * len(rows) // count] for i in range(count)] if count else []
