"""Is a refreshed reward model better than a first one, and than one with as many labels at once? Gate G9.

    python scripts/refresh.py world --seeds 0 1 2 3 4 5 6 7        the built-in world
    python scripts/refresh.py world --world myworld --draw 1000    another world; a draw that nobody developed on

For each seed the recipe `refresh`, whose PPO starts from SFT again in each round; and its control, one round whose
reward model learns from as many comparisons as the last round's, all of the SFT model's answers, by the same people.
Gold grades the last policy of each PPO on fresh answers to held-out prompts. Headroom units: differences of gold over
1 - SFT's gold.

    G9    passes where the last round less the first is above 0, and the last round less the control above -.05

The 95% interval over paired seeds decides, by the rule of the study's gates. Printed beside it, by round: labels spent,
the reward model's accuracy on the held-out comparisons of earlier rounds and of its own, KL from SFT, gold.

From the root of the repository. Every stage is kept in RUNS, goes on where it was stopped and is not done twice;
`--table` says what there is. A seed took 16 minutes of one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.seeds import given_of, label, over_all, over_seeds, parser_of, shown  # noqa: E402
from trueup.evaluate.overoptimization import outcome, worst  # noqa: E402
from trueup.recipe import Recipe, Stage, load_recipe, resolve, run_recipe  # noqa: E402
from trueup.report.closing import accuracies  # noqa: E402

MARGIN = 0.05
SPARE = 1.2
"""Prompts of the control over those of all rounds: as many comparisons as theirs are drawn from what they give."""
ONE = "one round"
Figures = dict[str, dict[str, float]]
"""Of a seed: `sft`, each round by its number, and the control -> what was measured."""


def recipe_of(world: str, seed: int, given: Sequence[str] = ()) -> Recipe:
    """The rounds, and what grades them."""
    recipe = load_recipe("refresh", [f"seed={seed}", *given])
    stages = {name: dict(keys) for name, keys in recipe.stages.items()}
    prompts = stages.pop("evaluate")["prompts"]
    for name in recipe.rounds["comparisons"]:  # the same people in every round, as in the control
        stages[name]["seed"] = seed
    graded = {"phase": "trace", "start": "@sft/final", "prompts": prompts, "gold": "@world:gold"}
    graded |= {"limit": 512, "samples": 4}
    stages["versions-start"] = {**graded, "proxy": "@reward/final"}
    for name in recipe.rounds["ppo"]:
        stages[f"versions-{name}"] = {**graded, "proxy": stages[name]["scorer"], "training": f"@{name}"}
    update = {"name": f"refresh-{label(world, given)}-{seed}", "device": "cpu", "stages": stages}
    return recipe.model_copy(update=update)


def with_control(recipe: Recipe, pairs: int) -> Recipe:
    """The control beside the rounds: one round whose reward model learns from `pairs` comparisons."""
    stages = recipe.stages
    prompts = sum(stages[name]["limit"] for name in recipe.rounds["answers"])
    answers, data = "@answers-one/completions.jsonl", "@comparisons-one/comparisons.jsonl"
    versions = {"proxy": "@reward-one/final", "training": "@ppo-one"}
    one = {
        "answers-one": {**stages["answers"], "limit": round(SPARE * prompts)},
        "comparisons-one": {**stages["comparisons"], "completions": answers, "store": None},
        "reward-one": {**stages["reward"], "phase": "reward", "data": data, "limit": pairs},
        "ppo-one": {**stages["ppo"], "phase": "ppo", "scorer": "@reward-one/final"},
        "versions-ppo-one": {**stages["versions-start"], **versions},
    }
    return recipe.model_copy(update={"stages": {**stages, **one}})


def results(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage.folder / "results.json").read_text(encoding="utf-8"))
    return found


def one_seed(world: str, runs: Path, given: Sequence[str], run: bool, seed: int) -> Figures:
    """Runs what is not done, and reads what is."""
    recipe = recipe_of(world, seed, given)
    if run:
        run_recipe(recipe, runs)
    last = {stage.name: stage for stage in resolve(recipe, runs)}[recipe.rounds["reward"][-1]]
    if last.done:
        recipe = with_control(recipe, results(last)["rows"])
    if run:
        run_recipe(recipe, runs)
    return figures(recipe, {stage.name: results(stage) for stage in resolve(recipe, runs) if stage.done})


def figures(recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> Figures:
    """What the results of the stages that are done say."""
    out: Figures = {}
    if "versions-start" in done:
        out["sft"] = {"gold": done["versions-start"]["gold"]}
    rounds = zip(*(recipe.rounds[name] for name in ("comparisons", "reward", "ppo")), strict=True)
    named = {str(k): names for k, names in enumerate(rounds, 1)}
    labels = 0
    for name, (judged, reward, ppo) in {**named, ONE: ("comparisons-one", "reward-one", "ppo-one")}.items():
        if not {judged, reward, f"versions-{ppo}"} <= done.keys():
            continue
        learned, version = done[reward], done[f"versions-{ppo}"]
        earlier, own = accuracies(learned)
        labels = done[judged]["comparisons"] + (0 if name == ONE else labels)
        out[name] = {"labels": labels, "learned from": learned["rows"]}
        if earlier is not None:
            out[name]["accuracy, earlier"] = earlier
        out[name] |= {"accuracy, own": own, "kl": version["kl"], "gold": version["gold"]}
    return out


MEASURES = ("labels", "learned from", "accuracy, earlier", "accuracy, own", "kl", "gold")


def table(found: Mapping[int, Figures]) -> str:
    """Means over seeds by round; gold by seed; the two paired differences, and the gate."""
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    names = sorted((n for n in names if n.isdigit()), key=int) + [ONE] * (ONE in names)
    lines = ["| round | " + " | ".join(MEASURES) + " | seeds |", "|---|" + "---|" * (len(MEASURES) + 1)]
    for name in ["sft", *names]:
        rows = [of[name] for of in found.values() if name in of]
        cells = [[row[key] for row in rows if row.get(key) is not None] for key in MEASURES]
        means = [f"{np.mean(c):.{3 * (i > 1)}f}" if c else "" for i, c in enumerate(cells)]
        lines.append(f"| {name} | {' | '.join(means)} | {len(rows)} |")
    lines += ["", "| gold | " + " | ".join(f"seed {s}" for s in found) + " |", "|---|" + "---|" * len(found)]
    for name in ["sft", *names]:
        each = [f"{of[name]['gold']:.3f}" if name in of else "" for of in found.values()]
        lines.append(f"| {name} | {' | '.join(each)} |")
    lines += [
        "",
        "| paired difference, headroom units | mean | 95% interval | seeds | gate | |",
        "|---|---|---|---|---|---|",
    ]
    last, said = next((name for name in reversed(names) if name != ONE), "1"), []
    for other, bar in (("1", 0.0), (ONE, -MARGIN)):
        rows = [of for of in found.values() if last != "1" and {"sft", last, other} <= of.keys()]
        gains = [(of[last]["gold"] - of[other]["gold"]) / (1 - of["sft"]["gold"]) for of in rows]
        span = over_seeds(gains) if gains else None
        said.append(outcome(span, bar, above=True))
        mean, interval = (f"{np.mean(gains):+.3f}", shown(span)) if gains else ("", "not measured")
        lines.append(f"| round {last} - {other} | {mean} | {interval} | {len(gains)} | > {bar:g} | {said[-1]} |")
    return "\n".join([*lines, "", f"G9: {worst(said)}"])


def main() -> None:
    parser = parser_of(__doc__, ["world"], seeds=8)
    arguments = parser.parse_args()
    world, runs, given = arguments.world, arguments.runs, given_of(parser, arguments)
    one = partial(one_seed, world, runs, given, not arguments.table)
    settings = recipe_of(world, 0, given).stages
    print(table(over_all(arguments, runs / f"refresh-{label(world, given)}.json", settings, one)))


if __name__ == "__main__":
    main()
