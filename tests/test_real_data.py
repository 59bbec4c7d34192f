"""The world goes through the same door as everyone's data: SFT on self-instruct, a reward model on HH-RLHF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models_made import make_model
from tests.shared import SHARED, needs_shared
from tests.toy import constant, results, run

DEMONSTRATIONS, COMPARISONS = "data/self-instruct/seed_tasks.jsonl", "data/hh-rlhf/test.jsonl.gz"


@needs_shared(DEMONSTRATIONS, COMPARISONS)
@pytest.mark.long
def test_sft_and_reward_model_on_public_data(tmp_path):
    make_model(tmp_path / "base")
    stages = run(
        tmp_path,
        {
            "sft": {
                "model": "base",
                "data": str(SHARED / DEMONSTRATIONS),
                "max_length": 400,
                "train": {"epochs": 1, "batch": 16, "optim": constant(3e-3)},
                "sampling": {"max_tokens": 8},
            },
            "reward": {
                "model": "@sft/final",
                "data": str(SHARED / COMPARISONS),
                "max_length": 256,
                "held_out": 0.2,
                "normalize_samples": 64,
                "sampling": {"max_tokens": 8},
                "train": {"epochs": 1, "batch": 32, "optim": constant(1e-3)},
            },
        },
        name="public",
    )
    sft, reward = results(stages["sft"]), results(stages["reward"])
    log = [json.loads(line) for line in (stages["sft"].folder / "metrics.jsonl").open()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert sft["rows"] > 100 and sft["too_long"] > 0  # counted, not silent
    assert reward["pairs"] > 30 and 0 <= reward["accuracy"] <= 1 and 0.3 < reward["longer_wins"] < 0.7
    assert sum(reward["dropped"].values()) > 0 or reward["too_long"] > 0
    AutoModelForCausalLM.from_pretrained(stages["sft"].folder / "final")
    AutoModelForSequenceClassification.from_pretrained(stages["reward"].folder / "final", num_labels=1)


@needs_shared("vectors.json")
def test_the_vectors_are_the_published_ones():
    ours = json.loads((Path(__file__).parent / "math" / "vectors.json").read_text())
    assert ours == json.loads((SHARED / "vectors.json").read_text())
