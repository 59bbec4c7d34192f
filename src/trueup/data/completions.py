"""`completions.jsonl`, as the phase `generate` writes it: a prompt and its answers a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trueup.data.files import raw_rows
from trueup.records import Prompt, UserError

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
