"""Best of n: of several answers to a prompt the one that a scorer likes best. No training, and a yardstick for it.

In order: sample `n` answers to each prompt, score them; the expected score, and gold where it is known, of the best of
1, 2, 4, ... n over all subsets of the samples (Nakano et al. 2021); how far from the policy that is, by the bound
log n - (n - 1)/n and, since answers repeat, by the samples themselves; and the best answers as demonstrations, on which
`trueup sft` does rejection sampling. Not in it: training; the formulas (math).

    completions.jsonl  every answer with its score        best.jsonl  prompt and completion: the best of n
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import prompts_to_answer
from trueup.engine.answers import answers, completion_rows
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampling
from trueup.math import best_of_n, best_of_n_bound, best_of_n_kl
from trueup.models.load import context_length
from trueup.records import UserError, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "samples many answers and keeps the best by the score: what a policy could gain without training"
VERSION = 1


class BestOfNConfig(Config):
    """Best of n."""

    model: str
    prompts: Data
    """Prompts; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    scorer: Spec
    """Who says which is best: a reward model's folder, `module:function`, an `http://` address, or a weighted sum."""
    audit: Spec | None = None
    """Another scorer, only measured on the best: a gold score where one is known."""
    n: int = Field(16, gt=1)
    """Answers a prompt. Estimates for an n near this have a larger error: they rest on few subsets."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 takes all."""
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    seed: Seed = 0
    chunk: int = display(512, gt=0)
    """Completions sampled at once: no more than these are lost to a kill."""
    show: int = display(16, ge=0)
    """Prompts whose best and worst answers are written down."""


def run_phase(config: BestOfNConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    if config.sampling.greedy:
        raise UserError("best of n needs answers that differ: sampling.greedy must be false")
    chat = Chat.load(config.model)
    limit = min(config.max_prompt, context_length(config.model) - 1)
    found = prompts_to_answer(config.prompts, chat.prompt_length, limit, run.say, seed=config.seed)
    prompts = found.train[: config.limit or None]
    specs = {"score": config.scorer, "audit": config.audit}
    answered = answers(
        {config.model: chat},
        prompts,
        config.n,
        config.sampling,
        run,
        mesh,
        scorers={name: make_scorer(spec, mesh) for name, spec in specs.items() if spec is not None},
        seed=config.seed,
        chunk=config.chunk,
    )

    score = torch.tensor([[a["score"] for a in row] for row in answered], dtype=torch.float64)
    # An answer that was cut by length teaches not to stop: it is nobody's best while another one ended.
    ended = torch.tensor([[a["stop"] != "length" for a in row] for row in answered])
    order = torch.where(ended, score, -torch.inf)
    best = order.argmax(1).tolist()
    kept = [i for i, whole in enumerate(ended.any(1).tolist()) if whole]
    if mesh.is_main:
        write_jsonl(run.folder / "completions.jsonl", completion_rows(prompts, answered))
        write_jsonl(
            run.folder / "best.jsonl",
            [
                {
                    "prompt": [dict(m) for m in prompts[i].messages],
                    "completion": answered[i][best[i]]["text"].strip(),
                    "score": answered[i][best[i]]["score"],
                    "category": prompts[i].category,
                }
                for i in kept
            ],
        )
    worst = torch.where(ended, score, torch.inf).argmin(1).tolist()
    for i in kept[: config.show]:
        sides = {f"best of {config.n}": answered[i][best[i]], f"worst of {config.n}": answered[i][worst[i]]}
        rows = [
            {**describe(prompts[i]), "completion": a["text"], "stop": a["stop"], "side": side, "score": a["score"]}
            for side, a in sides.items()
        ]
        run.show(0, rows)
    mesh.barrier()

    # 1, 2, 4, ... and n itself
    ns = sorted({2**k for k in range(config.n.bit_length())} | {config.n})
    proxy, kl = best_of_n(order, score, ns), best_of_n_kl(order, ns)
    audit = torch.tensor([[a.get("audit", 0.0) for a in row] for row in answered], dtype=torch.float64)
    gold = best_of_n(order, audit, ns).mean(0).tolist() if config.audit is not None else [None] * len(ns)
    distinct_answers = sum(len({tuple(a["ids"]) for a in row}) for row in answered) / (len(prompts) * config.n)
    bound = "a bound: answers repeat" if distinct_answers < 1 else "exact: no two answers are alike"
    curve = [
        {"n": n, "score": p, "audit": g, "kl_bound": best_of_n_bound(n), "kl": k}
        for n, p, g, k in zip(ns, proxy.mean(0).tolist(), gold, kl.mean(0).tolist(), strict=True)
    ]
    for row in curve:
        told = f"audit {row['audit']:6.3f}  " if row["audit"] is not None else ""
        far = f"KL {row['kl']:.2f}, log n - (n-1)/n {row['kl_bound']:.2f}"
        run.say(f"best of {row['n']:4}: score {row['score']:6.3f}  {told}{far}")
    run.say(f"{distinct_answers:.0%} of a prompt's answers are distinct; log n - (n-1)/n is {bound}")
    return {
        "prompts": len(prompts),
        "n": config.n,
        **found.results(),
        "best": len(kept),
        "curve": curve,
        "distinct": distinct_answers,
        "kl_bound_is_exact": distinct_answers == 1,
        "end_rate": float(ended.double().mean()),
    }
