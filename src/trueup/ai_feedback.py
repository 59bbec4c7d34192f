"""Feedback from an AI: pairs of a model's answers, judged by a constitution, as comparisons with soft labels.

In order (Bai et al. 2022, Constitutional AI, section 4): sample answers, pair them, let a model say under the
constitution which is better; the comparisons stand beside people's, in the store too, and go with them into the reward
model or into DPO, by category and weight:

    data: [{path: people.jsonl, categories: [fact, list]}, {path: "@feedback/comparisons.jsonl", weight: 2}]

It is the phases `generate` and `judge` one after the other, in one stage; their files lie in its folder.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.files import Data
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampling
from trueup.phases import generate, judge
from trueup.run import Run
from trueup.scorers import Spec

WHAT = "lets a model compare answers under a constitution: labels without people"
VERSION = 1


class AIFeedbackConfig(Config):
    """Pairs of a model's answers, judged by a constitution."""

    model: str
    """The policy: whose answers are judged."""
    against: str | None = None
    """Another model, such as the one before it was fine-tuned on revisions: on a share of the prompts it gives every
    second answer. A policy that always refuses teaches a reward model nothing of what it would be to comply."""
    against_share: float = Field(0.5, ge=0, le=1)
    prompts: Data
    """Prompts; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    constitution: str = "default"
    """A YAML file, or a built-in one by its name."""
    by: dict[str, Any] | None = None
    """Who judges: {model: MODEL}, {model: MODEL, chat: true} for an assistant, or {endpoint: URL, model: NAME}, and the
    other keys of a judge with a constitution (principles, orders, thought, ...); `model` itself, as an assistant, where
    not said."""
    n: int = Field(2, gt=1)
    """Answers a prompt; each two make a pair."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 takes all."""
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    store: str | None = display(None)
    """A preference store to which the verdicts are appended, of kind `ai`."""
    humans: str | None = None
    """A file of comparisons that people have judged: the judge is measured on it, refused where it is worse than one
    person, and its probabilities are scaled."""
    force: bool = False
    """Label with a judge that is worse than one person."""
    audit: Spec | None = None
    """A known gold score, only to measure the labels with."""
    seed: Seed = 0
    chunk: int = display(256, gt=0)
    """Answers sampled, and comparisons asked, at once: no more than these are lost to a kill."""


def run_phase(config: AIFeedbackConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in AIFeedbackConfig.model_fields}
    own = {name: given.pop(name) for name in ("constitution", "by", "store", "humans", "force", "audit")}
    by = own.pop("by") or {"model": config.model, "chat": True}
    sampled = generate.run_phase(generate.GenerateConfig(**given), run, mesh)
    labelled = judge.JudgeConfig(
        completions=str(run.folder / "completions.jsonl"),
        judge={"constitution": own.pop("constitution"), **by},
        overlap=0,  # the same model would say the same again
        seed=config.seed,
        chunk=config.chunk,
        **own,
    )
    return {**judge.run_phase(labelled, run, mesh), "sampled": sampled}
