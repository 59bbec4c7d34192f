"""The whole pipeline on two processes gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toy import QUESTIONS, metrics, rows, run

STAGES = {
    "sft": {
        "model": "base",
        "data": "demos.jsonl",
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 16},
    },
    "answers": {
        "phase": "generate",
        "model": "sft/final",
        "prompts": "prompts.jsonl",
        "n": 4,
        "sampling": {"max_tokens": 20},
    },
    "comparisons": {"phase": "judge", "completions": "@answers/completions.jsonl", "judge": "toyrules:gold"},
    "reward": {
        "model": "sft/final",
        "data": "@comparisons/comparisons.jsonl",
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 8},
    },
    "ppo": {
        "model": "sft/final",
        "scorer": "reward/final",
        "prompts": "prompts.jsonl",
        "batch": 16,
        "steps": 3,
        "sampling": {"max_tokens": 20},
    },
    "adapter": {
        "phase": "reward",
        "model": "sft/final",
        "data": "pairs.jsonl",
        "lora": {"r": 4},
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 8},
    },
    "one-base": {
        "phase": "ppo",
        "model": "sft/final",
        "scorer": "@adapter/final",
        "prompts": "prompts.jsonl",
        "lora": {"r": 4},
        "batch": 16,
        "steps": 2,
        "sampling": {"max_tokens": 20},
    },
    "dpo": {
        "model": "sft/final",
        "data": "@comparisons/comparisons.jsonl",
        "samples": 16,
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 8},
    },
    "kto": {
        "phase": "dpo",
        "loss": "kto",
        "model": "sft/final",
        "data": "thumbs.jsonl",
        "lora": {"r": 4},
        "samples": 16,
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 8},
    },
    "evaluate": {
        "models": {"sft": "sft/final", "ppo": "@ppo/final"},
        "prompts": "prompts.jsonl",
        "gold": "toyrules:gold",
        "sampling": {"max_tokens": 20},
    },
}


@pytest.mark.long
def test_torchrun_on_two_processes_equals_one(toy):
    rows(
        toy / "thumbs.jsonl",
        [{"prompt": q, "completion": c, "label": c != "yes"} for q in QUESTIONS for c in ("the sky is blue.", "yes")],
    )
    one = run(toy, STAGES, name="one-process")
    (toy / "two.yaml").write_text(json.dumps({"name": "two-processes", "device": "cpu", "stages": STAGES}))
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29731",
            "-m",
            "trueup",
            "run",
            "two.yaml",
        ],
        cwd=toy,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2/10" in done.stdout and done.stdout.count("1/10 sft") == 1  # only the main process speaks
    for name, stage in one.items():
        (other,) = (toy / "runs" / "two-processes").glob(f"{name}-*")
        if (other / "final").exists():
            a, b = (load_file(f / "final" / "model.safetensors") for f in (stage.folder, other))
            assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a), name
    same = {
        "ppo": ("score", "kl", "policy_loss", "value_loss", "entropy", "length"),
        "dpo": ("loss", "margin", "accuracy", "chosen_logprobs", "grad_norm"),
        "kto": ("loss", "baseline", "chosen_reward", "rejected_reward", "grad_norm"),
    }
    for stage, names in same.items():
        (log,) = (toy / "runs/two-processes").glob(f"{stage}-*/metrics.jsonl")
        for a, b in zip(metrics(one[stage]), map(json.loads, log.open()), strict=True):
            # At DPO's first step the policy is the reference: a margin's sign, and so the accuracy, is rounding's.
            for name in set(names) - ({"accuracy"} if stage == "dpo" and a["step"] == 0 else set()):
                assert a[name] == pytest.approx(b[name], abs=2e-3), (stage, name)
