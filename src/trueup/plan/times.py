"""How long a stage will take: by earlier runs of the same shape, or by the rate of one large product."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trueup.models.linear import product
from trueup.plan.standins import Folders
from trueup.recipe import Stage, manifest
from trueup.records import UserError
from trueup.run import read_lines


def measured_rate() -> float:
    """Multiplications and additions a second of one large float32 product on this machine's CPU."""
    a, b = torch.randn(2048, 1024), torch.randn(2048, 1024)
    product(a, b)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 0.3:
        product(a, b)
        count += 1
    return 2 * 2048 * 1024 * 2048 * count / (time.monotonic() - began)


def earlier(stage: Stage, folders: Folders, runs: Path) -> float | None:
    """Seconds by the latest finished stage of the same phase and shape: its seconds a unit of work, times the work."""
    mine = _work(stage.phase, stage.config.model_dump(), None)
    if mine is None:
        return None
    shape = _shape(stage.phase, stage.config.model_dump(), folders.of)
    found: tuple[str, float] | None = None
    for record in runs.glob("*/*/manifest.json"):
        before = manifest(record.parent)
        if before.get("status") != "done" or before.get("phase") != stage.phase:
            continue
        config = json.loads((record.parent / "config.json").read_text(encoding="utf-8"))["config"]
        try:
            same = _shape(stage.phase, config, lambda name: name) == shape
        except (UserError, OSError, ValueError, KeyError):
            continue
        work = _work(stage.phase, config, record.parent)
        if same and work and (found is None or before["finished"] > found[0]):
            found = (before["finished"], before["seconds"] / work)
    return None if found is None else found[1] * mine


def _shape(phase: str, config: Mapping[str, Any], of: Callable[[str], str]) -> Any:
    """What must be the same for times to be comparable."""
    model = config.get("model") or next(iter(config.get("models", {}).values()))
    text = AutoConfig.from_pretrained(of(model)).get_text_config()
    trained = config.get("train") or config
    optim = trained.get("optim") or {}
    return json.dumps(
        [
            [getattr(text, k, None) for k in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")],
            config.get("lora"),
            trained.get("precision"),
            optim.get("gradient_checkpointing"),
            config.get("data") or config.get("prompts"),
            config.get("advantage"),
        ],
        sort_keys=True,
        default=str,
    )


def _work(phase: str, config: Mapping[str, Any], folder: Path | None) -> float | None:
    """Units of work, the same for stages on the same data; of a finished stage what it did, stops before the end
    included."""
    if phase in ("sft", "reward", "dpo"):
        epochs = float(config["train"]["epochs"])
        if folder is None:
            return epochs
        done = len(read_lines(folder / "metrics.jsonl"))
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("rows")
        return done * config["train"]["batch"] / rows if rows and done else None
    if phase == "ppo":
        steps = config["steps"] if folder is None else len(read_lines(folder / "metrics.jsonl"))
        return float(steps * config["batch"] * (1 + config["epochs"]) * config["sampling"]["max_tokens"])
    if phase in ("generate", "evaluate"):
        each = config.get("n", 1) * len(config.get("models") or "x") * (2 if config.get("greedy") else 1)
        return float(each * config["sampling"]["max_tokens"]) if not config.get("limit") else None
    return None
