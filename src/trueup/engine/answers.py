"""Answers to prompts, a chunk at a time and each chunk on the disk before the next: so a stage that only samples goes
on where it was cut off. Rows are those of `completions.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import load_policy
from trueup.records import Completion, Prompt, Scorer
from trueup.run import Run

Answer = dict[str, Any]
"""text, stop, ids, logprobs, and a number for each scorer's name."""


def answers(
    speakers: Mapping[str, Chat],
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    run: Run,
    mesh: Mesh,
    *,
    scorers: Mapping[str, Scorer],
    seed: int,
    chunk: int,
    mixed: float = 0.0,
) -> list[list[Answer]]:
    """`n` answers to each prompt, with what each scorer says of them under its name.

    speakers: a model and its template, or two: to a share `mixed` of the prompts, drawn by the seed, the second gives
    every second answer, and each answer carries its model's name (`model`)."""
    samplers = [Sampler.speaking(chat, load_policy(name, device=mesh.device), mesh) for name, chat in speakers.items()]
    asked = [p for p in prompts for _ in range(n)]
    both = np.random.default_rng([seed, 1]).random(len(prompts)) < (mixed if len(speakers) > 1 else 0)
    speaker = [int(both[i // n]) * (i % n % 2) for i in range(len(asked))]

    def answer(index: range) -> list[Answer]:
        said: dict[int, Completion] = {}
        for number, (name, chat) in enumerate(speakers.items()):
            own = [i for i in index if speaker[i] == number]
            ids = [chat.prompt_ids(asked[i].messages) for i in own]
            said |= zip(own, samplers[number].sample(ids, sampling, seed=seed, index=own, version=name), strict=True)
        part, found = [asked[i] for i in index], [said[i] for i in index]
        rows: list[Answer] = [
            {"text": c.text, "stop": c.stop, "ids": list(c.ids), "logprobs": list(c.logprobs)}
            | ({"model": c.version} if len(speakers) > 1 else {})
            for c in found
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
