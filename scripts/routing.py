"""What does routing save? On the built-in world, over paired seeds: a budget of people's labels, routed or at random.

    python scripts/routing.py --seeds 0 1 2 3 4 5 6 7 --budget 300 --random 300 450 600 900

For each seed: SFT, pairs of its answers, which its base model judges under a constitution; then `routed` (people label
what the router sends them, the judge the rest) at the budget, and `random` (the same, but what people label is drawn
at random) at each budget of --random; from each a reward model, and with --ppo its PPO. The audit is the same in all of
them. Measured: labels spent; the share of labels that are in the gold score's order; the same of the reward model's
order, on pairs of other prompts whose gold differs; gold over the last tenth of PPO's steps. How many labels random
needs for what routed reaches is read off between its budgets, by lines. "People" are the world's simulated raters.

From the root of the repository. Every stage is kept in RUNS, goes on where it was stopped and is not done twice;
`--table` says what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trueup.math import bootstrap_interval  # noqa: E402
from trueup.recipe import load_recipe, manifest, resolve, run_recipe  # noqa: E402

FIGURES = {
    "labels": "people's labels",
    "right": "labels in gold's order",
    "clean": "reward model in gold's order",
    "gold": "gold after PPO",
}


def recipe_of(seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    given = dict(load_recipe("loop", [f"seed={seed}"]).stages)
    world = {**given["world"], "demonstrations": asked.demonstrations}
    sft, answers = given["sft"], {**given["answers"], "limit": asked.prompts}
    stages: dict[str, Any] = {"world": world, "sft": sft, "answers": answers}
    # What reward models are measured on: pairs of prompts that no other stage has, in the gold score's order.
    stages["held"] = {**answers, "prompts": "@world/prompts-reward_heldout.jsonl", "limit": asked.held}
    truth = {"use": "@world:raters", "name": "oracle"}
    stages["truth"] = {"phase": "judge", "completions": "@held/completions.jsonl", "judge": truth, "overlap": 0.0}
    common = {**given["route"], "phase": "route", "audit": asked.audit / asked.prompts, "store": None}
    for name, (how, budget) in conditions(asked).items():
        stages[f"route-{name}"] = {**common, "how": how, "budget": budget}
        data = f"@route-{name}/comparisons.jsonl"
        stages[f"reward-{name}"] = {**given["reward"], "phase": "reward", "data": data}
        known = {"data": "@truth/comparisons.jsonl", "judge": f"@reward-{name}/final"}
        stages[f"judged-{name}"] = {"phase": "judged", **known}
        if asked.ppo:
            ppo = {**given["ppo"], "phase": "ppo", "scorer": f"@reward-{name}/final"}
            stages[f"ppo-{name}"] = {**ppo, **({"steps": asked.steps} if asked.steps else {})}
    return {"name": f"routing-{seed}", "seed": seed, "device": "cpu", "stages": stages}


def conditions(asked: argparse.Namespace) -> dict[str, tuple[str, int]]:
    return {"routed": ("routed", asked.budget), **{f"random-{n}": ("random", n) for n in asked.random}}


def figures(seed: int, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Condition -> its figures, as far as they are there."""
    out: dict[str, dict[str, float]] = {name: {} for name in conditions(asked)}
    for stage in resolve(load_recipe(recipe_of(seed, asked)), asked.runs):
        phase, _, name = stage.name.partition("-")
        if name not in out or manifest(stage.folder).get("status") != "done":
            continue
        found = json.loads((stage.folder / "results.json").read_text())
        if phase == "route":
            out[name] |= {"labels": found["labels"], "right": found["gold"]["labels"]}
        elif phase == "judged":
            out[name]["clean"] = found["accuracy"]
        elif phase == "ppo":
            rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
            out[name]["gold"] = float(np.mean([row["audit"] for row in rows[-max(1, len(rows) // 10) :]]))
    return out


def needed(target: float, spent: Sequence[float], reached: Sequence[float]) -> float | None:
    """The labels at which the line through (spent, reached) first comes to `target`; None where it does not."""
    points = sorted(zip(spent, reached, strict=True))
    if points[0][1] >= target:
        return points[0][0]
    for (a, low), (b, high) in pairwise(points):
        if low < target <= high:
            return a + (target - low) / (high - low) * (b - a)
    return None


def pooled(spent: np.ndarray, reached: np.ndarray, resamples: int = 2000) -> tuple[float | None, ...]:
    """`needed` of the means over seeds, and the ends of its 95% interval by bootstrap over seeds. Both [seeds, 1 +
    budgets], routed first. None is beyond the largest budget."""
    rng, n = np.random.default_rng(0), len(spent)

    def of(rows: np.ndarray) -> float:
        x, y = spent[rows].mean(0), reached[rows].mean(0)
        found = needed(y[0], x[1:], y[1:])
        return math.inf if found is None else found

    drawn = sorted(of(rng.integers(n, size=n)) for _ in range(resamples))
    ends = (of(np.arange(n)), drawn[round(0.025 * resamples)], drawn[round(0.975 * resamples)])
    return tuple(None if x == math.inf else x for x in ends)


def labels(found: float | None, most: float) -> str:
    return f"more than {most:.0f}" if found is None else f"{found:.0f}"


def interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one seed"
    low, high = (float(x) for x in bootstrap_interval(torch.tensor(values), seed=0))
    return f"{low:+.3f} to {high:+.3f}"


def table(rows: dict[int, dict[str, dict[str, float]]], asked: argparse.Namespace) -> str:
    """Means over seeds; paired differences with intervals over seeds; labels that random needs."""
    names = list(conditions(asked))
    lines = [f"| | {' | '.join(FIGURES.values())} | seeds |", "|---|" + "---|" * (len(FIGURES) + 1)]
    for name in names:
        found = [row[name] for row in rows.values() if row[name]]
        cells = [[f[key] for f in found if key in f] for key in FIGURES]
        shown = ["" if not c else f"{np.mean(c):.0f}" if k == 0 else f"{np.mean(c):.3f}" for k, c in enumerate(cells)]
        lines.append(f"| {name} | {' | '.join(shown)} | {len(found)} |")
    lines += ["", "| routed less random, paired | figure | mean | 95% interval | seeds |", "|---|---|---|---|---|"]
    for name in names[1:]:
        for key in list(FIGURES)[1:]:
            gains = [r["routed"][key] - r[name][key] for r in rows.values() if key in r["routed"] and key in r[name]]
            if gains:
                lines.append(f"| {name} | {FIGURES[key]} | {np.mean(gains):+.3f} | {interval(gains)} | {len(gains)} |")
    lines += [
        "",
        "| labels that random needs for routed's | of the means | 95% interval | by seed |",
        "|---|---|---|---|",
    ]
    for key in list(FIGURES)[1:]:
        rest = [r for r in rows.values() if all(key in r[name] for name in names)]
        if rest:
            spent, reached = ([[r[n][k] for n in names] for r in rest] for k in ("labels", key))
            most = max(max(row[1:]) for row in spent)
            one, low, high = (labels(x, most) for x in pooled(np.array(spent), np.array(reached)))
            each = [needed(y[0], x[1:], y[1:]) for x, y in zip(spent, reached, strict=True)]
            lines.append(f"| {FIGURES[key]} | {one} | {low} to {high} | {', '.join(labels(x, most) for x in each)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--demonstrations", type=int, default=9000, help="for SFT")
    parser.add_argument("--prompts", type=int, default=2000, help="pairs")
    parser.add_argument("--audit", type=int, default=100, help="pairs that are labelled at random in every condition")
    parser.add_argument("--budget", type=int, default=400, help="labels of the routed condition, the audit's included")
    parser.add_argument("--random", type=int, nargs="+", default=[400, 600, 800, 1200], help="budgets of the control")
    parser.add_argument("--held", type=int, default=1000, help="prompts that reward models are measured on")
    parser.add_argument("--ppo", action="store_true", help="PPO for each reward model, too")
    parser.add_argument("--steps", type=int, default=0, help="of PPO; 0 for the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    if asked.audit > asked.prompts:
        parser.error("--audit cannot be more than --prompts")
    for seed in [] if asked.table else asked.seeds:
        run_recipe(load_recipe(recipe_of(seed, asked)), asked.runs)
    print(table({seed: figures(seed, asked) for seed in asked.seeds}, asked))


if __name__ == "__main__":
    main()
