"""A run's folder as the phases write it, with plausible figures and hostile texts. No model is run.

python -m tests.report.make_run FOLDER [--no-gold] [--stop-at ppo]
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ["world", "sft", "answers", "comparisons", "reward", "judge", "ppo", "evaluate"]
PHASE = {"answers": "generate", "comparisons": "judge", "judge": "reward"}
CATEGORIES = ["arithmetic", "facts", "harmful", "lists", "lookalike", "strings", "unknown"]
GOLD = "trueup.world:gold"
VERSIONS = {
    "trueup": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "numpy": "2.4.6",
    "commit": "0123abc",
}

HOSTILE = [
    "</script><script>window.pwned = 1; alert(1)</script>",
    '<img src=x onerror="window.pwned = 2">',
    '<a href="javascript:window.pwned=3">click</a> {{ 7*7 }} {% raw %} ${7*7}',
    "<!-- <script> ]]> &lt;b&gt; &amp; ' \" `",
    "long " * 3000,
    "word" * 2000,
    "\u202eright to left override\u202c and \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji, combining a\u0301\u0302\u0303",
    "line\u2028separator\u2029paragraph\x85next\x0bline\x0c",
    "\x1b[31mred\x1b[0m \x00 nul \x07 bell",
    "",
    "lone surrogate \ud800 here",
    "__proto__ constructor <svg onload=window.pwned=4>",
]
EVIL_CATEGORY = '<img src=x onerror="window.pwned=5"><b>bold</b>'
ANSWERS = {
    "base": "What is the capital of France? And of Spain?",
    "sft": "The capital is Paris, I think. Maybe Lyon.",
    "ppo": "The capital of France is Paris.",
}


def make_run(
    folder: Path,
    *,
    stages: tuple[str, ...] = tuple(STAGES),
    gold: bool = True,
    hostile: bool = True,
    stop_at: str | None = None,
    steps: int = 60,
    prompts: int = 140,
    seed: int = 0,
) -> Path:
    """Writes `folder` (runs/NAME) and returns it. Stages after `stop_at` are not started; that one is unfinished.

    Without `gold`, the audit and the judge of win rates are a second reward model (stage "judge").
    """
    rng = np.random.default_rng(seed)
    named = [s for s in stages if not (gold and s == "judge")]
    folders = {s: f"{s}-{zlib.crc32(s.encode()):010x}" for s in named}
    path = {s: str(folder / f) for s, f in folders.items()}
    write(
        folder / "recipe.json",
        {
            "recipe": {
                "name": folder.name,
                "seed": seed,
                "device": "auto",
                "stages": {s: {"phase": PHASE.get(s, s)} for s in named},
            },
            "stages": folders,
        },
    )
    makers = {
        "world": world,
        "sft": sft,
        "answers": answers,
        "comparisons": comparisons,
        "reward": reward,
        "judge": reward,
        "ppo": ppo,
        "evaluate": evaluate,
    }
    going = True
    for i, name in enumerate(named):
        if not going:
            break
        going = name != stop_at
        config, results, metrics, samples = makers[name](rng, path, gold, hostile, steps, prompts)
        stage = folder / folders[name]
        phase = PHASE.get(name, name)
        key = folders[name].rpartition("-")[2]
        write(stage / "config.json", {"phase": phase, "name": name, "key": key, "config": config})
        write(
            stage / "manifest.json",
            {
                "phase": phase,
                "name": name,
                "key": key,
                "status": "done" if going else "running",
                "parents": {},
                "started": f"2026-01-01T10:{i:02d}:00+00:00",
                "seconds": [3.1, 48.0, 20.5, 2.2, 61.0, 60.0, 171.0, 39.0][STAGES.index(name)],
                "versions": VERSIONS,
                "processes": 1,
                "device": "cpu",
            },
        )
        cut = len(metrics) if going else len(metrics) // 2
        lines(stage / "metrics.jsonl", metrics[:cut])
        lines(stage / "samples.jsonl", samples if going else samples[: len(samples) // 2])
        if going:
            write(stage / "results.json", results)
    return folder


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """As the run directory writes them: not ASCII, so that U+2028 stands in the file as it is."""
    if rows:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def category(i: int, hostile: bool) -> str:
    return EVIL_CATEGORY if hostile and i % 29 == 5 else CATEGORIES[i % len(CATEGORIES)]


def prompt(i: int, hostile: bool) -> dict[str, Any]:
    text = HOSTILE[i % len(HOSTILE)] if hostile and i % 4 == 0 else f"What is the capital of country {i}?"
    earlier = (
        [{"role": "user", "content": "<b>hello</b>"}, {"role": "assistant", "content": "hi"}] if i % 10 == 3 else None
    )
    return {"prompt": text, "category": category(i, hostile), **({"earlier": earlier} if earlier else {})}


def said(name: str, i: int, hostile: bool) -> str:
    return HOSTILE[(i // 3 + len(name)) % len(HOSTILE)] if hostile and i % 3 == 0 else f"{ANSWERS[name]} ({i})"


def world(rng: Any, path: Any, *_: Any) -> Any:
    return {"seed": 0, "demonstrations": 3000}, {"files": {"base": "base"}, "world": "0f1e2d"}, [], []


def decay(rng: Any, n: int, start: float, end: float, noise: float) -> list[float]:
    return [end + (start - end) * math.exp(-4 * i / n) + noise * float(rng.normal()) for i in range(n)]


def supervised(rng: Any, n: int, start: float, end: float, *, pairs: bool) -> list[dict[str, Any]]:
    rows = []
    for i, loss in enumerate(decay(rng, n, start, end, 0.03 * start)):
        row = {
            "step": i,
            "loss": loss,
            "grad_norm": 0.6 + 0.1 * float(rng.random()),
            "lr": 7e-4 * (1 + math.cos(math.pi * i / n)) / 2,
            "tokens": int(rng.integers(800, 1200)),
            "seconds": 0.2 + 0.02 * float(rng.random()),
        }
        if pairs:
            row["center"] = 0.002 * float(rng.random())
        if i % 20 == 19 or i == n - 1:
            row["validation_loss"] = loss + 0.02
            if pairs:
                row["accuracy"] = 0.76 - 0.3 * math.exp(-4 * i / n)
        rows.append(row)
    return rows


def sft(rng: Any, path: Any, gold: bool, hostile: bool, *_: Any) -> Any:
    config = {
        "model": "base",
        "data": "demonstrations.jsonl",
        "seed": 0,
        "train": {"epochs": 2.0, "optim": {"lr": 7e-4}},
    }
    results = {
        "steps": 180,
        "rows": 2850,
        "best_step": 159,
        "best_validation_loss": 0.612,
        "dropped": {},
        "too_long": 3,
        "end_rate": 0.984,
        "length": 12.4,
    }
    samples = [
        {"step": 180, **prompt(i, hostile), "completion": said("sft", i, hostile), "stop": "eos"} for i in range(64)
    ]
    return config, results, supervised(rng, 180, 2.4, 0.6, pairs=False), samples


def answers(rng: Any, path: Any, gold: bool, hostile: bool, *_: Any) -> Any:
    samples = [
        {"step": 0, **prompt(i, hostile), "completion": said("sft", i, hostile), "stop": "eos"} for i in range(50)
    ]
    return (
        {"model": path.get("sft", "sft"), "n": 2},
        {"prompts": 3000, "completions": 6000, "end_rate": 0.98, "length": 12.0},
        [],
        samples,
    )


def comparisons(rng: Any, path: Any, gold: bool, hostile: bool, *_: Any) -> Any:
    results = {
        "comparisons": 2711,
        "asked": 2590,
        "asked_twice": 259,
        "dropped": {"both answers the same": 410},
        "judge": "pool of 13 raters",
        **({"label_accuracy": 0.78} if gold else {}),
    }
    samples = [
        {
            "step": 0,
            **prompt(i, hostile),
            "completion": said("sft", i + j, hostile),
            "side": side,
            "pair": i,
            "rater": f"rater-{i}",
        }
        for i in range(25)
        for j, side in enumerate(("chosen", "rejected"))
    ]
    return {"judge": {"use": "trueup.world:raters", "name": "pool"}}, results, [], samples


def reward(rng: Any, path: Any, gold: bool, hostile: bool, *_: Any) -> Any:
    reliability = [
        {"lower": b / 10, "upper": (b + 1) / 10, "n": n, "confidence": b / 10 + 0.05, "observed": b / 10 + 0.02}
        for b, n in zip(range(5, 10), (70, 64, 52, 41, 44), strict=True)
    ]
    known = [*CATEGORIES, *([EVIL_CATEGORY] if hostile else [])]
    results = {
        "steps": 150,
        "rows": 2430,
        "best_step": 119,
        "best_validation_loss": 0.52,
        "dropped": {},
        "too_long": 0,
        "normalization": {"score_mean": 0.1, "score_std": 1.4, "n": 512},
        "accuracy": 0.745,
        "longer_wins": 0.58,
        "agreement": 0.73,
        "ceiling": 0.84,
        "pairs": 271,
        "calibration_error": 0.031,
        "reliability": reliability,
        "by_category": {c: {"accuracy": 0.6 + 0.05 * i, "pairs": 38 - i} for i, c in enumerate(known)},
        "by_margin": [
            {"from": 0.4 * b, "to": 0.4 * (b + 1), "accuracy": 0.55 + 0.09 * b, "pairs": 54} for b in range(5)
        ],
        "clean": {"accuracy": 0.83, "pairs": 240, "clear_margin": 0.4, "clear_accuracy": 0.91, "clear_pairs": 130}
        if gold
        else None,
    }
    samples = [
        {
            "step": 150,
            **prompt(i, hostile),
            "completion": said("sft", i + j, hostile),
            "stop": "eos",
            "side": side,
            "pair": i,
            "score": float(rng.normal()),
        }
        for i in range(32)
        for j, side in enumerate(("chosen", "rejected"))
    ]
    return (
        {"model": path.get("sft", "sft"), "data": "comparisons.jsonl", "seed": 0},
        results,
        supervised(rng, 150, 0.72, 0.5, pairs=True),
        samples,
    )


def ppo(rng: Any, path: Any, gold: bool, hostile: bool, steps: int, *_: Any) -> Any:
    config = {
        "model": f"{path.get('sft', 'sft')}/final",
        "scorer": f"{path.get('reward', 'reward')}/final",
        "prompts": "prompts.jsonl",
        "reference": None,
        "audit": GOLD if gold else f"{path['judge']}/final" if "judge" in path else None,
        "steps": steps,
        "batch": 64,
        "kl_coef": 0.3,
        "seed": 0,
    }
    metrics, samples = [], []
    for i in range(steps):
        t = i / steps
        kl = 2.2 * (1 - math.exp(-3 * t)) + 0.12 * float(rng.normal()) * (i > 0)
        score = 1.6 * (1 - math.exp(-3 * t)) + 0.08 * float(rng.normal())
        row = {
            "policy_loss": -0.01 + 0.004 * float(rng.normal()),
            "entropy": 0.62 - 0.25 * t,
            "clip_fraction": 0.08 + 0.02 * float(rng.random()),
            "approx_kl": 0.006,
            "policy_grad_norm": 0.5 + 0.2 * float(rng.random()),
            "policy_lr": 3e-4,
            "value_loss": 0.5 * math.exp(-4 * t) + 0.1,
            "critic_grad_norm": 2 * math.exp(-4 * t) + 0.5,
            "critic_lr": 3e-4,
            "epochs": 2,
            "seconds_generate": 0.9 + 0.1 * float(rng.random()),
            "seconds_score": 0.15,
            "seconds_logprobs": 0.4,
            "seconds_update": 1.3,
            "score": score,
            "score_std": 1 - 0.4 * t,
            "kl": kl,
            "kl_k3": max(kl, 0) * 1.05,
            "kl_coef": 0.3,
            "reward": score - 0.3 * kl,
            "value": score - 0.2,
            "explained_variance": 0.7 - 0.6 * math.exp(-6 * t),
            "length": 12 + 3 * t + 0.3 * float(rng.normal()),
            "end_rate": min(1.0, 0.98 + 0.02 * t),
            "peak_memory_mb": 900.0,
        }
        row |= {f"score/{c}": score + 0.1 * j for j, c in enumerate(CATEGORIES)}
        if config["audit"]:
            row["audit"] = 0.52 + 0.22 * (1 - math.exp(-4 * t)) + 0.015 * float(rng.normal())
            row |= {f"audit/{c}": row["audit"] + 0.02 * j for j, c in enumerate(CATEGORIES)}
        if i == 7:
            row["explained_variance"] = float("nan")
        metrics.append({"step": i, **row})
        samples += [
            {
                "step": i,
                **prompt(3 * i + j, hostile),
                "completion": said("ppo", 3 * i + j, hostile),
                "stop": "length" if j == 2 else "eos",
                "score": score,
                "kl": kl,
                "total": score - 0.3 * kl,
                **({"audit": row["audit"]} if config["audit"] else {}),
            }
            for j in range(3)
        ]
    results = {
        "steps": steps,
        "best_step": None,
        "missing_eos_score": -4.2,
        **{k: metrics[-1].get(k) for k in ("score", "audit", "kl", "length")},
    }
    return config, results, metrics, samples


def evaluate(rng: Any, path: Any, gold: bool, hostile: bool, steps: int, prompts: int) -> Any:
    level = {"base": 0.14, "sft": 0.52, "ppo": 0.74}
    tables: dict[str, Any] = {}
    samples = []
    asked = [prompt(i, hostile) for i in range(prompts)]
    difficulty = 0.25 * rng.normal(size=prompts)
    for name, mean in level.items():
        tables[name] = {}
        for mode, better in (("sampled", 0.0), ("greedy", 0.06)):
            values = np.clip(mean + better + difficulty + 0.1 * rng.normal(size=prompts), 0, 1)
            scores = 3 * (values - 0.5)
            kls = {"base": 21.0, "sft": 0.0, "ppo": 1.8}[name] * (1 + 0.2 * rng.normal(size=prompts))
            f: dict[str, Any] = {
                "length": {"base": 60, "sft": 12.4, "ppo": 14.8}[name],
                "end_rate": {"base": 0.1, "sft": 0.98, "ppo": 1.0}[name],
                "surprise": 7.1,
                "distinct": 0.81,
            }
            for key, column in (("gold", values), ("score", scores)):
                if key == "score" or gold:
                    f[key] = float(column.mean())
                    groups: dict[str, list[float]] = {}
                    for p, v in zip(asked, column, strict=True):
                        groups.setdefault(p["category"], []).append(float(v))
                    f[f"{key}_by_category"] = {c: float(np.mean(v)) for c, v in sorted(groups.items())}
            if gold:
                f["gold_interval"] = [f["gold"] - 0.02, f["gold"] + 0.02]
            if mode == "sampled":
                f |= {"kl": float(kls.mean()), "kl_interval": [float(kls.mean()) * 0.95, float(kls.mean()) * 1.05]}
            if name != "sft" and (gold or "judge" in path):
                f |= {
                    "win_rate": {"base": 0.06, "ppo": 0.71}[name],
                    "win_rate_interval": {"base": [0.04, 0.08], "ppo": [0.66, 0.76]}[name],
                    "judged": prompts,
                }
            tables[name][mode] = f
            for i, p in enumerate(asked):
                row = {
                    "step": ["base", "sft", "ppo"].index(name) * 2 + (mode == "greedy"),
                    **p,
                    "model": name,
                    "mode": mode,
                    "completion": said(name, i, hostile),
                    "stop": "length" if name == "base" else "eos",
                    **({"gold": float(values[i])} if gold else {}),
                    "score": float(scores[i]),
                }
                samples.append(row | ({"kl": float(kls[i])} if mode == "sampled" else {}))
    shown = [0, 1, 3] if hostile else [1, 2, 3]
    examples = [
        {**asked[i], "answers": {n: {m: said(n, i, hostile) for m in ("sampled", "greedy")} for n in level}}
        for i in shown
    ]
    judge = GOLD if gold else f"{path['judge']}/final" if "judge" in path else None
    results = {
        "models": tables,
        "examples": examples,
        "prompts": prompts,
        "baseline": "sft",
        "reference": "sft",
        "judge": judge,
        "gold": GOLD if gold else None,
        "temperature": 1.0,
        "categories": sorted({p["category"] for p in asked}),
    }
    config = {
        "models": {"base": "base", "sft": f"{path.get('sft', 'sft')}/final", "ppo": f"{path.get('ppo', 'ppo')}/final"},
        "prompts": "heldout.jsonl",
        "gold": GOLD if gold else None,
        "proxy": f"{path.get('reward', 'reward')}/final",
        "judge": None if gold else judge,
        "baseline": "sft",
        "reference": "sft",
    }
    return config, results, [], samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-gold", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--stop-at")
    a = parser.parse_args()
    print(make_run(a.folder, gold=not a.no_gold, hostile=not a.plain, stop_at=a.stop_at))
