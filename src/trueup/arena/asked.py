"""Models compared blindly: which pairs people are asked. What follows from their answers is in `arena.standings`.

Every model answers the same prompts; each prompt and pair of models is one comparison. A random part of them is put
into the queue for people, in random order, so that however far the raters get, what they judged is a random sample; a
judge may be asked about all of them. Who answered what is kept beside the item and never shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from trueup.config import Config, Seed
from trueup.data.completions import read_completions
from trueup.label.files import Coin
from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.store import Asked, Store

ORIGIN = "arena: "


class ArenaConfig(Config):
    """How models are compared by people."""

    prompts: str | None = None
    """Prompts that no model was trained on. Needed unless every RUN is a completions.jsonl."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 for all."""
    comparisons: int = Field(300, ge=1)
    """Comparisons that people are asked, drawn from all prompts and pairs of models."""
    raters: int = Field(1, ge=1)
    """People that each of them is asked of."""
    share: float = Field(0.55, gt=0.5, lt=1)
    """Of the comparisons that are no ties, the share won by the better model that is worth finding."""
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    seed: Seed = 0


def answers_of(runs: Sequence[Path], config: ArenaConfig, place: str, device: str, folder: Path) -> dict[str, Path]:
    """Each model's name and its answers: a completions.jsonl as it is; else sampled, once, from the run's model."""
    named = {_name(run): run for run in runs}
    if len(named) < len(runs) or len(runs) < 2:
        raise UserError(
            f"--arena: two or more models with names of their own are needed, not {', '.join(map(str, runs))}"
        )
    models = {name: run for name, run in named.items() if run.suffix != ".jsonl"}
    if not models:
        return named
    from trueup.chat import find_model
    from trueup.recipe import load_recipe, run_recipe

    if not config.prompts:
        raise UserError("--arena: arena.prompts=PROMPTS.jsonl is needed, with prompts that no model was trained on")
    sampling = {"max_tokens": config.max_tokens, "temperature": config.temperature}
    keys = {"phase": "generate", "prompts": config.prompts, "limit": config.limit, "sampling": sampling}
    stages = {name: {**keys, "model": str(find_model(run))} for name, run in models.items()}
    recipe = {"name": f"arena-{Path(place).stem}", "seed": config.seed, "device": device, "stages": stages}
    made = {stage.name: stage.folder / "completions.jsonl" for stage in run_recipe(load_recipe(recipe), folder)}
    return {name: made.get(name, run) for name, run in named.items()}


def _name(run: Path) -> str:
    inside = run.name in ("completions.jsonl", "final")
    return run.parent.name if inside else run.name.removesuffix(".jsonl")


def ask_arena(store: Store, answers: Mapping[str, Path], config: ArenaConfig) -> str:
    """Puts the comparisons into the store; what to tell whoever asked. The same call again changes nothing; with
    more comparisons or raters it adds what is missing."""
    from trueup.math import decisive_pairs

    said: dict[str, dict[str, tuple[Prompt, Completion]]] = {}
    for name, path in answers.items():
        rows = read_completions(path)
        said[name] = {p.id: (p, Completion(a[0]["text"], a[0]["stop"])) for _, p, a in rows if a}
    shared = [key for key in said[next(iter(said))] if all(key in of for of in said.values())]
    if not shared:
        raise UserError(f"--arena: {', '.join(map(str, answers.values()))} answer no prompt in common")
    asked, coin = list[Asked](), Coin(config.seed)
    for key in shared:
        prompt = next(iter(said.values()))[key][0]
        by: dict[tuple[Completion, Completion], list[list[str]]] = {}  # who answers alike shares a comparison
        for one, two in itertools.combinations(said, 2):
            first, second = sorted((one, two), key=lambda name: coin(key, said[name][key][1].text))
            shown = said[first][key][1], said[second][key][1]
            by.setdefault(shown, []).append([first, second])
        for shown, pairs in by.items():
            order = coin(key, *(a.text for a in shown))
            asked.append(Asked(Comparison(prompt, shown), 0, order, meta={"pairs": pairs}))
    apart = sorted((a for a in asked if len({*a.comparison.completions}) > 1), key=lambda a: -a.priority)
    chosen = {id(a) for a in apart[: config.comparisons]}
    queue = [replace(a, wanted=config.raters) if id(a) in chosen else a for a in asked]
    origin = ORIGIN + ", ".join(said)
    new = store.ask(queue, origin)
    many, left = math.comb(len(said), 2), sum(len(of) - len(shared) for of in said.values())
    need, of_models = decisive_pairs(config.share), f"{many} pair{'s' * (many > 1)} of models"
    lines = [
        f"{origin}: {len(shared)} prompts, {of_models}, {len(asked)} comparisons, {new} of them new; "
        f"{len(asked) - len(apart)} of two equal answers, which are ties",
        f"people are asked {len(chosen)} of them, drawn at random",
        f"to tell from chance that one of two models wins {config.share:.0%} of the comparisons that are no ties takes "
        f"{need} of those (80% power, 95% two-sided); for {of_models} {need * many}",
    ]
    if left:
        lines.append(f"{left} answers left out: another model has none to that prompt")
    return "\n".join(lines)
