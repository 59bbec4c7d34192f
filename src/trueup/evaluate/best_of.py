"""Best of n: what the best of n samples by the proxy is worth by gold, for each n, and how far it is from the policy.

In order: read samples that gold has scored (phases `generate` and `score`), score the distinct ones by the proxy, and
for each prompt and n the expected proxy and gold of the best by proxy, without bias, and the KL of best-of-n's own
discrete distribution, ties counted; log n - (n - 1)/n is written beside it, a bound where answers repeat. Written as
`best_of.parquet`, one row a prompt and n. The samples' mean and s.d. are the units of every curve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch

from trueup.config import Config
from trueup.data.completions import read_completions
from trueup.engine.mesh import Mesh
from trueup.math import best_of_n, best_of_n_bound, best_of_n_kl
from trueup.records import Completion, Prompt, Scorer, Stop, UserError
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "asks what the best of n answers by the proxy is worth by gold"
VERSION = 1
MEASURES = ("gold", "proxy", "kl", "bound", "distinct")


class BestOfConfig(Config):
    """Best of n by a proxy, worth by gold."""

    completions: str
    """A `completions.jsonl` of phase `score`, with gold's score of each answer and as many answers to every prompt."""
    proxy: Spec
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """How many answers the best is taken of."""


def run_phase(config: BestOfConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    found_rows = read_completions(config.completions)
    rows, prompts = [row for row, _, _ in found_rows], [prompt for _, prompt, _ in found_rows]
    most, fewest = max(config.ns), min((len(row["completions"]) for row in rows), default=0)
    if fewest < most or len({len(row["completions"]) for row in rows}) > 1:
        raise UserError(f"{config.completions}: {fewest} answers to a prompt; ns asks for {most} of every prompt")
    if any("score" not in answer for row in rows for answer in row["completions"]):
        raise UserError(f"{config.completions}: answers without a score; score them by gold first: trueup score")
    gold = torch.tensor([[a["score"] for a in row["completions"]] for row in rows], dtype=torch.float64)
    proxy = score_distinct(rows, prompts, make_scorer(config.proxy, mesh))
    ns = list(config.ns)
    found = {
        "gold": best_of_n(proxy, gold, ns),
        "proxy": best_of_n(proxy, proxy, ns),
        "kl": best_of_n_kl(proxy, ns),
        "bound": torch.tensor([best_of_n_bound(n) for n in ns], dtype=torch.float64).expand(len(rows), -1),
        "distinct": torch.tensor([[distinct_share(texts(row), n) for n in ns] for row in rows], dtype=torch.float64),
    }
    table: dict[str, Any] = {"n": ns * len(rows), "prompt": [i for i in range(len(rows)) for _ in ns]}
    table |= {name: found[name].flatten().tolist() for name in MEASURES}
    if mesh.is_main:
        parquet.write_table(pa.table(table), run.folder / "best_of.parquet")
        for j, n in enumerate(ns):
            run.log(n, **{name: float(found[name][:, j].mean()) for name in MEASURES})
        run.show(most, best_answers(rows, proxy, gold))
    mesh.barrier()
    return {
        "prompts": len(rows),
        "samples": proxy.shape[1],
        "units": {
            name: {"mean": float(values.mean()), "std": float(values.std()), "n": values.numel()}
            for name, values in (("gold", gold), ("proxy", proxy))
        },
        "correlation": float(np.corrcoef(proxy.flatten(), gold.flatten())[0, 1]),
    }


def texts(row: dict[str, Any]) -> list[tuple[str, Stop]]:
    return [(a["text"], a["stop"]) for a in row["completions"]]


def score_distinct(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], scorer: Scorer) -> torch.Tensor:
    """Scores [P, N]; an answer that a prompt got more than once is scored once."""
    distinct = dict.fromkeys((i, *key) for i, row in enumerate(rows) for key in texts(row))
    asked = {key: place for place, key in enumerate(distinct)}
    value = scorer.score([prompts[i] for i, _, _ in asked], [Completion(text, stop) for _, text, stop in asked]).value
    return torch.tensor(
        [[value[asked[i, *key]] for key in texts(row)] for i, row in enumerate(rows)], dtype=torch.float64
    )


def distinct_share(answers: Sequence[Any], n: int) -> float:
    """Expected share of distinct ones among n of these answers, drawn without replacement."""
    total = len(answers)
    whole = log_choose(total, n)
    absent = (math.exp(log_choose(total - c, n) - whole) if total - c >= n else 0.0 for c in Counter(answers).values())
    return sum(1 - a for a in absent) / n


def log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def best_answers(rows: Sequence[dict[str, Any]], proxy: torch.Tensor, gold: torch.Tensor) -> list[dict[str, Any]]:
    """Of each prompt the answer that the proxy likes best of all."""
    best = proxy.argmax(1).tolist()
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            "category": row.get("category"),
            "completion": row["completions"][j]["text"],
            "stop": row["completions"][j]["stop"],
            "gold": float(gold[i, j]),
            "proxy": float(proxy[i, j]),
        }
        for i, (row, j) in enumerate(zip(rows, best, strict=True))
    ]
