"""Do ensembles hold against over-optimization? Studies over paired seeds.

    python scripts/ensembles.py planted --seeds 0 1 2 3 4 5 6 7    five raters, each with an exploit of his own
    python scripts/ensembles.py trained --seeds 0 1                the same, by reward models trained on them
    python scripts/ensembles.py world --seeds 0 1                  the built-in world, whose raters' errors are shared
    python scripts/ensembles.py world --world myworld --draw 1000  another world; a draw that nobody developed on

In each: SFT, an ensemble of five reward models (in `planted` the raters themselves), then PPO at KL coefficient .05
against each member alone, and against the mean, the median, the worst case (wco) and uwo of all. Gold at the end is the
mean over the last tenth of PPO's steps; single is the mean over the five runs of members alone. Headroom units:
differences of gold over 1 - SFT's gold.

    planted   passes where wco and uwo, less mean and less single, are each at least .3
    trained   is reported, not gated
    world     passes where wco and uwo less single are above -.05 (non-inferior)

The 95% interval decides, over paired seeds and by the rule of the study's gates: Student's t where there are fewer than
6, resampled from there; one seed decides nothing.

From the root of the repository. Every stage is kept in RUNS, goes on where it was stopped and is not done twice;
`--only` runs some conditions now, `--table` says what there is. A cell (one PPO run) takes about a quarter of a minute
in `planted`, and took 2 to 3 minutes in `world`, a seed 27, of one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import planted  # noqa: E402
from scripts.seeds import given_of, label, over_all, over_seeds, parser_of, shown  # noqa: E402
from trueup.evaluate.overoptimization import outcome  # noqa: E402
from trueup.recipe import load_recipe, manifest, resolve, run_recipe  # noqa: E402

MEMBERS = 5
COMBINED = ("mean", "median", "wco", "uwo")
SINGLES = tuple(f"single-{i}" for i in range(MEMBERS))
CONDITIONS = (*SINGLES, *COMBINED)
KL_COEF, PENALTY = 0.05, 0.5
Stages = dict[str, dict[str, Any]]


def constant(lr: float) -> dict[str, Any]:
    return {"lr": lr, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}


def planted_stages(seed: int, runs: Path) -> Stages:
    """Everything up to PPO, and what all PPO runs share under the name `ppo`."""
    stages = trained_stages(seed, runs)
    del stages["ensemble"]
    return stages


def trained_stages(seed: int, runs: Path) -> Stages:
    from tests.models_made import make_model

    folder = runs / f"planted-{seed}" / "data"  # the very data in both
    if not (folder / "pairs.jsonl").exists():
        make_model(folder / "base", seed=seed)
        planted.write(folder, seed)
    short = {"max_tokens": 20}
    return {
        "sft": {
            "model": str(folder / "base"),
            "data": str(folder / "demos.jsonl"),
            "sampling": short,
            "train": {"epochs": 8, "batch": 16, "optim": constant(3e-3)},
        },
        "answers": {
            "phase": "generate",
            "model": "@sft/final",
            "prompts": str(folder / "prompts.jsonl"),
            "n": 16,
            "sampling": short,
        },
        "start": {"phase": "score", "completions": "@answers/completions.jsonl", "scorer": "scripts.planted:gold"},
        "ensemble": {
            "members": MEMBERS,
            "raters": 1 / MEMBERS,
            "member": {
                "model": "@sft/final",
                "data": str(folder / "pairs.jsonl"),
                "sampling": short,
                "train": {"epochs": 6, "batch": 16, "optim": constant(1e-3)},
            },
        },
        "ppo": {
            "phase": "ppo",
            "model": "@sft/final",
            "prompts": str(folder / "prompts.jsonl"),
            "audit": "scripts.planted:gold",
            "steps": 40,
            "batch": 32,
            "sampling": short,
            "optim": constant(1e-3),
            "critic_optim": constant(1e-3),
        },
    }


def world_stages(seed: int, runs: Path, given: Sequence[str] = ()) -> Stages:
    stages = dict(load_recipe("world", [f"seed={seed}", *given]).stages)
    ppo = {k: v for k, v in stages.pop("ppo").items() if k != "scorer"}
    member = {k: v for k, v in stages.pop("reward").items() if k != "phase"}
    prompts = stages.pop("evaluate")["prompts"]
    stages |= {
        "held": {"phase": "generate", "model": "@sft/final", "prompts": prompts, "n": 4},
        "start": {"phase": "score", "completions": "@held/completions.jsonl", "scorer": "@world:gold"},
        "ensemble": {"members": MEMBERS, "bootstrap": True, "member": member},
        "ppo": {"phase": "ppo", **ppo},
    }
    return stages


PLANTED = {"planted": planted_stages, "trained": trained_stages}


def recipe_of(world: str, seed: int, runs: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """`given`: keys of the recipe's world, `world.name=myworld`."""
    stages = PLANTED[world](seed, runs) if world in PLANTED else world_stages(seed, runs, given)
    ppo = {**stages.pop("ppo"), "kl_coef": KL_COEF}
    if world == "planted":
        members = [f"scripts.planted:rater_{i}" for i in range(MEMBERS)]
        whole: str | list[str] = members
    else:
        members, whole = [f"@ensemble/final/member-{i}" for i in range(MEMBERS)], "@ensemble/final"
    for name, member in zip(SINGLES, members, strict=True):
        stages[name] = {**ppo, "scorer": member}
    for name in COMBINED:
        stages[name] = {**ppo, "scorer": {"ensemble": whole, "combine": name, "penalty": PENALTY}}
    return {"name": f"{label(world, given)}-{seed}", "seed": seed, "device": "cpu", "stages": stages}


def figures(world: str, seed: int, runs: Path, given: Sequence[str] = ()) -> dict[str, float]:
    """sft gold, and for each condition that is done: gold, kl, score, disagreement at the end."""
    out: dict[str, float] = {}
    for stage in resolve(load_recipe(recipe_of(world, seed, runs, given)), runs):
        if manifest(stage.folder).get("status") != "done":
            continue
        if stage.name == "start":
            out["sft"] = json.loads((stage.folder / "results.json").read_text())["score"]
        if stage.name in CONDITIONS:
            rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
            last = rows[-max(1, len(rows) // 10) :]
            for key in ("audit", "kl", "score", "disagreement"):
                if key in rows[0]:
                    out[f"{stage.name} {key}"] = float(np.mean([row[key] for row in last]))
            if "disagreement" in rows[0]:
                out[f"{stage.name} disagreement at the start"] = float(np.mean([r["disagreement"] for r in rows[:3]]))
    return out


def table(world: str, rows: dict[int, dict[str, float]]) -> str:
    """Gold by seed and condition; then paired differences with their intervals, and the gate."""
    lines = ["| gold | " + " | ".join(f"seed {s}" for s in rows) + " | mean |", "|---|" + "---|" * (len(rows) + 1)]
    gold: dict[str, dict[int, float]] = {}
    for seed, row in rows.items():
        found = {name: row[f"{name} audit"] for name in CONDITIONS if f"{name} audit" in row}
        singles = [found[name] for name in SINGLES if name in found]
        for name in COMBINED:
            if name in found:
                gold.setdefault(name, {})[seed] = found[name]
        if len(singles) == MEMBERS:
            gold.setdefault("single", {})[seed] = float(np.mean(singles))
        if "sft" in row:
            gold.setdefault("sft", {})[seed] = row["sft"]
    for name in ("sft", "single", *COMBINED):
        if name in gold:
            cells = [f"{gold[name][s]:.3f}" if s in gold[name] else "" for s in rows]
            lines.append(f"| {name} | {' | '.join(cells)} | {np.mean(list(gold[name].values())):.3f} |")
    for key in ("kl", "disagreement at the start", "disagreement"):
        for name in COMBINED:
            cells = [row.get(f"{name} {key}") for row in rows.values()]
            if any(c is not None for c in cells):
                each = ["" if c is None else f"{c:.2f}" for c in cells]
                mean = np.mean([c for c in cells if c is not None])
                lines.append(f"| {key}, {name} | {' | '.join(each)} | {mean:.2f} |")
    lines += [
        "",
        "| paired difference, headroom units | mean | 95% interval | seeds | gate | |",
        "|---|---|---|---|---|---|",
    ]
    pairs = [(a, b) for a in ("wco", "uwo", "median", "mean") for b in ("single", "mean") if a != b]
    for a, b in pairs:
        seeds = [s for s in rows if all(s in gold.get(name, {}) for name in (a, b, "sft"))]
        if not seeds:
            continue
        gain = [(gold[a][s] - gold[b][s]) / (1 - gold["sft"][s]) for s in seeds]
        found = over_seeds(gain)
        gated = a in ("wco", "uwo") and (world == "planted" or (world == "world" and b == "single"))
        bar = (0.3 if world == "planted" else -0.05) if gated else None
        verdict = "" if bar is None else outcome(found, bar, above=True)
        gate = "" if bar is None else f"> {bar:g}"
        lines.append(f"| {a} - {b} | {np.mean(gain):+.3f} | {shown(found)} | {len(seeds)} | {gate} | {verdict} |")
    return "\n".join(lines)


def one_seed(world: str, runs: Path, given: Sequence[str], only: list[str], run: bool, seed: int) -> dict[str, float]:
    """Runs what is not done, and reads what is."""
    if run:
        whole = recipe_of(world, seed, runs, given)
        kept = {name: keys for name, keys in whole["stages"].items() if name not in CONDITIONS or name in only}
        run_recipe(load_recipe({**whole, "stages": kept}), runs)
    return figures(world, seed, runs, given)


def main() -> None:
    parser = parser_of(__doc__, [*PLANTED, "world"], seeds=8)
    parser.add_argument("--only", nargs="*", default=list(CONDITIONS), choices=CONDITIONS, help="conditions to run now")
    arguments = parser.parse_args()
    world, runs, given = arguments.world, arguments.runs, given_of(parser, arguments)
    settings = recipe_of(world, 0, runs, given)["stages"] if world == "world" else {}
    one = partial(one_seed, world, runs, given, arguments.only, not arguments.table)
    print(table(world, over_all(arguments, runs / f"ensembles-{label(world, given)}.json", settings, one)))


if __name__ == "__main__":
    main()
