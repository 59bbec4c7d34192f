"""Answers to prompts, a chunk at a time and each chunk on the disk before the next: so a stage that only samples goes
on where it was cut off. Rows are those of `completions.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import load_policy
from trueup.records import Prompt, Scorer
from trueup.run import Run

Answer = dict[str, Any]
"""text, stop, ids, logprobs, and a number for each scorer's name."""


def answers(
    model: str,
    chat: Chat,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    run: Run,
    mesh: Mesh,
    *,
    scorers: Mapping[str, Scorer],
    seed: int,
    chunk: int,
) -> list[list[Answer]]:
    """`n` answers to each prompt, with what each scorer says of them under its name."""
    sampler = Sampler.speaking(chat, load_policy(model, device=mesh.device), mesh)
    asked = [p for p in prompts for _ in range(n)]

    def answer(index: range) -> list[Answer]:
        part = [asked[i] for i in index]
        ids = [chat.prompt_ids(p.messages) for p in part]
        found = sampler.sample(ids, sampling, seed=seed, step=0, index=index)
        rows: list[Answer] = [
            {"text": c.text, "stop": c.stop, "ids": list(c.ids), "logprobs": list(c.logprobs)} for c in found
        ]
        for name, scorer in scorers.items():
            for row, value in zip(rows, scorer.score(part, found).value, strict=True):
                row[name] = float(value)
        return rows

    rows = run.journaled("completions", len(asked), chunk, answer)
    return [rows[i * n : (i + 1) * n] for i in range(len(prompts))]


def completion_rows(prompts: Sequence[Prompt], answered: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """What `completions.jsonl` holds: a row for each prompt."""
    return [
        {
            "prompt": [dict(m) for m in p.messages],
            "category": p.category,
            "meta": dict(p.meta),
            "completions": list(found),
        }
        for p, found in zip(prompts, answered, strict=True)
    ]
