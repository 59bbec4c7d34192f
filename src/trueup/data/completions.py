"""`completions.jsonl`, as the phase `generate` writes it: a prompt and its answers a row; and the pairs they make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trueup.data.files import raw_rows
from trueup.records import Comparison, Completion, Prompt, UserError

Answer = dict[str, Any]
EXPECTED = "expected a completions.jsonl of `trueup generate`: prompt (messages), completions [{text, stop}]"


def read_completions(path: str | Path) -> list[tuple[dict[str, Any], Prompt, list[Answer]]]:
    """(row, prompt, answers) of each row. Raises UserError naming file, line and what is wrong."""
    return [_row(f"{path}, {place}", row) for place, row in raw_rows(path)]


def _row(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], Prompt, list[Answer]]:
    if missing := [key for key in ("prompt", "completions") if key not in row]:
        found = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where}: no column '{missing[0]}', found {found}; {EXPECTED}")
    messages, answers, meta = row["prompt"], row["completions"], row.get("meta") or {}
    spoken = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not spoken or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise UserError(f"{where}: column 'prompt' holds no messages; {EXPECTED}")
    if not isinstance(answers, list) or not all(
        isinstance(a, dict) and isinstance(a.get("text"), str) and a.get("stop") in ("eos", "stop", "length")
        for a in answers
    ):
        raise UserError(f"{where}: column 'completions' holds no answers; {EXPECTED}")
    if not isinstance(meta, dict):
        raise UserError(f"{where}: column 'meta' is no object; {EXPECTED}")
    return row, Prompt(tuple(messages), {"category": row.get("category"), **meta}), answers


def pairs_of(
    path: str | Path, limit: int = 0, rng: np.random.Generator | None = None
) -> tuple[list[Comparison], Counter[str]]:
    """Pairs of each prompt's completions, (1, 2), (3, 4), ..., the order of showing random; and what is left out.
    `limit` 0 takes all."""
    rng = rng or np.random.default_rng(0)
    out: list[Comparison] = []
    dropped: Counter[str] = Counter()
    for _, prompt, said in read_completions(path):
        answers = [Completion(c["text"], c["stop"]) for c in said]
        if len(answers) % 2:
            dropped["answers without a partner"] += 1
        for a, b in zip(answers[::2], answers[1::2], strict=False):
            if a.text == b.text:
                dropped["both answers the same"] += 1
            elif limit and len(out) == limit:
                dropped["over the limit"] += 1
            else:
                out.append(Comparison(prompt, (a, b) if rng.random() < 0.5 else (b, a)))
    return out, dropped


def pairs_to_judge(path: str | Path, limit: int, rng: np.random.Generator) -> tuple[list[Comparison], Counter[str]]:
    """`pairs_of`; raises UserError where there are none."""
    comparisons, dropped = pairs_of(path, limit, rng)
    if not comparisons:
        raise UserError(f"{path}: no prompt has two different completions")
    return comparisons, dropped
