"""Score completions: a scorer's number for every answer of a `completions.jsonl`, written beside it.

Not in it: sampling (phase `generate`), verdicts on pairs (phase `judge`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trueup.config import Config
from trueup.data.chat import describe
from trueup.data.completions import read_completions
from trueup.engine.mesh import Mesh
from trueup.records import Completion, UserError, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "gives every answer its score"
VERSION = 1


class ScoreConfig(Config):
    """Score completions."""

    completions: str
    """A `completions.jsonl` of phase `generate`."""
    scorer: Spec
    """A reward model's folder, `module:function`, an `http://` address, a weighted sum {scorer: weight}, or an ensemble
    {ensemble: FOLDER, combine: wco}."""


def run_phase(config: ScoreConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    found = read_completions(config.completions)
    rows = [row for row, _, _ in found]
    flat = [(prompt, answer) for _, prompt, answers in found for answer in answers]
    if not flat:
        raise UserError(f"{config.completions}: holds no completions")
    scorer = make_scorer(config.scorer, mesh)
    completions = [Completion(a["text"], a["stop"]) for _, a in flat]
    scores = scorer.score([p for p, _ in flat], completions)
    for i, (_, answer) in enumerate(flat):
        answer["score"] = float(scores.value[i])
        parts = {k: None if np.isnan(v[i]) else float(v[i]) for k, v in scores.parts.items()}
        answer |= {"parts": parts} if parts else {}
        answer |= {} if scores.disagreement is None else {"disagreement": float(scores.disagreement[i])}
    if mesh.is_main:
        write_jsonl(run.folder / "completions.jsonl", rows)
        known = ("stop", "score", "disagreement")
        run.show(0, [{**describe(p), "completion": a["text"], **{k: a[k] for k in known if k in a}} for p, a in flat])
    mesh.barrier()
    value = scores.value
    run.say(f"{len(value)} completions scored by {scorer.name}: mean {value.mean():.3f}, s.d. {value.std():.3f}")
    return {
        "completions": len(value),
        "score": float(value.mean()),
        "score_std": float(np.std(value)),
        **({} if scores.disagreement is None else {"disagreement": float(scores.disagreement.mean())}),
        "parts": {k: float(v[~np.isnan(v)].mean()) for k, v in scores.parts.items() if not np.isnan(v).all()},
    }
