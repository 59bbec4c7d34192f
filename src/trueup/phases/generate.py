"""Sample completions: n answers to each prompt, with their scores where a scorer is given, written as JSONL.

Rows of `completions.jsonl`: prompt (messages), category, meta, completions [{text, stop, ids, logprobs, score}].
Not in it: any judgement of pairs (phase `judge`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import prompts as prepare_prompts
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import context_length, load_policy
from trueup.records import UserError, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "samples answers: raters need several answers to one prompt to compare"
VERSION = 2


class GenerateConfig(Config):
    """Sample completions from a model."""

    model: str
    prompts: Data
    """Prompts; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    scorer: Spec | None = None
    n: int = Field(1, gt=0)
    """Completions a prompt."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 takes all."""
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    seed: Seed = 0
    chunk: int = display(512, gt=0)
    """Completions sampled at once: no more than these are lost to a kill."""


def run_phase(config: GenerateConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    chat = Chat.load(config.model)
    limit = min(config.max_prompt, context_length(config.model) - 1)
    found = prepare_prompts(config.prompts, chat.prompt_length, limit, seed=config.seed, distinct=False)
    run.say(f"{found.found.note()}; {found.counted()}")
    if not found.train:
        raise UserError(f"{found.names}: every prompt has more than {limit} tokens (max_prompt, or the context)")
    prompts = found.train[: config.limit or None]
    sampler = Sampler.speaking(chat, load_policy(config.model, device=mesh.device), mesh)
    scorer = make_scorer(config.scorer, mesh) if config.scorer else None

    asked = [p for p in prompts for _ in range(config.n)]

    def answer(index: range) -> list[dict[str, Any]]:
        part = [asked[i] for i in index]
        ids = [chat.prompt_ids(p.messages) for p in part]
        answers = sampler.sample(ids, config.sampling, seed=config.seed, step=0, index=index)
        scores = scorer.score(part, answers).value if scorer else [None] * len(part)
        return [
            {"text": c.text, "stop": c.stop, "ids": list(c.ids), "logprobs": list(c.logprobs)}
            | ({} if s is None else {"score": float(s)})
            for c, s in zip(answers, scores, strict=True)
        ]

    answers = run.journaled("completions", len(asked), config.chunk, answer)
    if mesh.is_main:
        write_jsonl(
            run.folder / "completions.jsonl",
            [
                {
                    "prompt": [dict(m) for m in p.messages],
                    "category": p.category,
                    "meta": dict(p.meta),
                    "completions": answers[i * config.n : (i + 1) * config.n],
                }
                for i, p in enumerate(prompts)
            ],
        )
        shown = list(zip(asked, answers, strict=True))[:50]
        run.show(0, [{**describe(p), "completion": a["text"], "stop": a["stop"]} for p, a in shown])
    mesh.barrier()
    return {
        "prompts": len(prompts),
        "completions": len(answers),
        **found.results(),
        "end_rate": sum(a["stop"] != "length" for a in answers) / len(answers),
        "length": sum(len(a["ids"]) for a in answers) / len(answers),
    }
