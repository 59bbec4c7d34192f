"""Sample completions: n answers to each prompt, with their scores where a scorer is given, written as JSONL.

Rows of `completions.jsonl`: prompt (messages), category, meta, completions [{text, stop, ids, logprobs, score}]. With
`against`, every second answer to some prompts comes from another model; each then carries its model's name (`model`).
Not in it: any judgement of pairs (phase `judge`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import prompts_to_answer
from trueup.engine.answers import answers, completion_rows
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampling
from trueup.models.load import context_length
from trueup.records import Prompt, UserError, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "samples answers: raters need several answers to one prompt to compare"
VERSION = 2


class GenerateConfig(Config):
    """Sample completions from a model."""

    model: str
    against: str | None = None
    """Another model, such as the one that training began with: on a share of the prompts it gives every second answer,
    so that pairs compare the two."""
    against_share: float = Field(0.5, ge=0, le=1)
    prompts: Data
    """Prompts; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    scorer: Spec | None = None
    n: int = Field(1, gt=0)
    """Completions a prompt."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 takes all."""
    draw: bool = False
    """The prompts in an order drawn by the seed, so that `limit` takes others in each round."""
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    seed: Seed = 0
    chunk: int = display(512, gt=0)
    """Completions sampled at once: no more than these are lost to a kill."""


def run_phase(config: GenerateConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    if config.against and config.n % 2:
        raise UserError(f"against={config.against} gives every second answer: n must be even, not {config.n}")
    speakers = {name: Chat.load(name) for name in (config.model, config.against) if name}
    limit = min(config.max_prompt, *(context_length(name) - 1 for name in speakers))

    def length(prompt: Prompt) -> int:
        return max(chat.prompt_length(prompt) for chat in speakers.values())

    found = prompts_to_answer(config.prompts, length, limit, run.say, seed=config.seed, distinct=False)
    order = np.random.default_rng(config.seed).permutation(len(found.train)) if config.draw else range(len(found.train))
    prompts = [found.train[i] for i in order][: config.limit or None]
    scorers = {"score": make_scorer(config.scorer, mesh)} if config.scorer else {}
    answered = answers(
        speakers,
        prompts,
        config.n,
        config.sampling,
        run,
        mesh,
        scorers=scorers,
        seed=config.seed,
        chunk=config.chunk,
        mixed=config.against_share,
    )
    flat = [a for row in answered for a in row]
    if mesh.is_main:
        write_jsonl(run.folder / "completions.jsonl", completion_rows(prompts, answered))
        shown = [(p, a) for p, row in zip(prompts, answered, strict=True) for a in row][:50]
        run.show(0, [{**describe(p), "completion": a["text"], "stop": a["stop"]} for p, a in shown])
    mesh.barrier()
    return {
        "prompts": len(prompts),
        "completions": len(flat),
        **found.results(),
        "end_rate": sum(a["stop"] != "length" for a in flat) / len(flat),
        "length": sum(len(a["ids"]) for a in flat) / len(flat),
    }
