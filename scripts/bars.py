"""Measure the built-in world's bars: the demo's own recipe over seeds, and PPO on the gold score as a control.

    python scripts/bars.py --seeds 0 1 2 [--world 0] [--out docs/bars.md]

A bar holds when the mean over the seeds is at or beyond it and no seed is more than .05 short of it. Exits with 1 where
one does not hold. Runs are kept under runs/bars-SEED and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trueup.recipe import load_recipe, run_recipe

CONTROL = {
    "control": {
        "phase": "ppo",
        "model": "@sft/final",
        "scorer": "trueup.world:gold",
        "critic": "@reward/final",
        "prompts": "@world/prompts-ppo.jsonl",
        "audit": "trueup.world:gold",
    },
}
SLACK = 0.05


def measure(seed: int, world: int, runs: Path) -> dict[str, float]:
    """One seed's figures."""
    recipe = load_recipe("world", [f"seed={seed}", f"name=bars-{seed}", f"world.world={world}"])
    stages = {**recipe.stages, **CONTROL}
    stages["control"] = {**stages["ppo"], **CONTROL["control"], "kl_coef": 0.05}
    stages["evaluate"] = {**stages["evaluate"], "models": {**stages["evaluate"]["models"], "control": "@control/final"}}
    ordered = {name: stages[name] for name in (*[s for s in recipe.stages if s != "evaluate"], "control", "evaluate")}
    done = {s.name: s.folder for s in run_recipe(recipe.model_copy(update={"stages": ordered}), runs)}
    found = {name: json.loads((folder / "results.json").read_text()) for name, folder in done.items()}
    models, reward = found["evaluate"]["models"], found["reward"]
    gold = {name: (m["sampled"]["gold"], m["greedy"]["gold"]) for name, m in models.items()}
    audits = [json.loads(line)["audit"] for line in (done["control"] / "metrics.jsonl").read_text().splitlines()]
    fifth = max(1, len(audits) // 5)
    return {
        "base gold": gold["base"][0],
        "sft gold": gold["sft"][0],
        "sft gold, greedy": gold["sft"][1],
        "reward accuracy, noisy": reward["accuracy"],
        "reward accuracy, clear margin": reward["clean"]["clear_accuracy"],
        "rater agreement": reward["agreement"],
        "ppo gold": gold["ppo"][0],
        "ppo gold, greedy": gold["ppo"][1],
        "ppo gain": gold["ppo"][0] - gold["sft"][0],
        "ppo gain, greedy": gold["ppo"][1] - gold["sft"][1],
        "ppo KL": models["ppo"]["sampled"]["kl"],
        "ppo win rate": models["ppo"]["sampled"]["win_rate"],
        "sft nats an answer": models["sft"]["sampled"]["surprise"],
        "control gold": gold["control"][0],
        "control gold, last fifth - middle fifth": sum(audits[-fifth:]) / fifth
        - sum(audits[2 * fifth : 3 * fifth]) / fifth,
        "minutes": sum(
            json.loads((f / "manifest.json").read_text())["seconds"] for n, f in done.items() if n != "control"
        )
        / 60,
    }


BARS: dict[str, tuple[str, float]] = {
    "base gold": ("<=", 0.25),
    "sft gold": ("in", 0.0),
    "reward accuracy, noisy": (">=", 0.70),
    "reward accuracy, clear margin": (">=", 0.82),
    "ppo gain": (">=", 0.15),
    "ppo gold": (">=", 0.68),
    "ppo gain, greedy": (">=", 0.08),
    "ppo KL": ("<=", 3.0),
    "control gold, last fifth - middle fifth": (">=", 0.0),
}
SFT_RANGE = (0.40, 0.65)


def holds(name: str, values: list[float]) -> bool:
    """The mean at or beyond the bar, no seed more than SLACK short of it."""
    kind, bar = BARS[name]
    mean = sum(values) / len(values)
    if kind == "in":
        low, high = SFT_RANGE
        return low <= mean <= high and all(low - SLACK <= v <= high + SLACK for v in values)
    if kind == "<=":
        return mean <= bar and max(values) <= bar + SLACK
    return mean >= bar and min(values) >= bar - SLACK


def table(rows: dict[int, dict[str, float]]) -> str:
    seeds = list(rows)
    lines = [
        "| figure | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | bar | |",
        "|---|" + "---|" * (len(seeds) + 3),
    ]
    for name in next(iter(rows.values())):
        values = [rows[s][name] for s in seeds]
        bar, verdict = "", ""
        if name in BARS:
            kind, number = BARS[name]
            bar = f"{SFT_RANGE[0]:.2f} to {SFT_RANGE[1]:.2f}" if kind == "in" else f"{kind} {number:.2f}"
            verdict = "holds" if holds(name, values) else "**fails**"
        cells = " | ".join(f"{v:.3f}" for v in values)
        lines.append(f"| {name} | {cells} | {sum(values) / len(values):.3f} | {bar} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--world", type=int, default=0, help="the world's generator seed")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    rows: dict[int, Any] = {seed: measure(seed, arguments.world, arguments.runs) for seed in arguments.seeds}
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    failed = [name for name in BARS if not holds(name, [row[name] for row in rows.values()])]
    sys.exit(f"bars that do not hold: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
