"""A toy with a known answer: half of the demonstrations say that the sky is blue, half say yes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models_made import make_model
from trueup.recipe import load_recipe, run_recipe

QUESTIONS = [f"what is the colour of {a}{b}?" for a in "abcdefgh" for b in "abcdefgh"]
RULES = '''
from pathlib import Path

import numpy as np
from trueup.records import Scores, Verdict

def blue(prompts, completions):
    return [1.0 if "blue" in c.text else 0.0 for c in completions]

class Gold:
    name = "blue"
    def score(self, prompts, completions):
        return Scores(np.array(blue(prompts, completions)))

def gold():
    return Gold()

class Shy(Gold):
    """Notes what it is asked, and breaks off before it is asked more often than the file `patience` says."""
    name = "shy"
    def score(self, prompts, completions):
        asked = Path("asked.txt").read_text().splitlines() if Path("asked.txt").exists() else []
        asked += [f"{p.text} {c.text!r}" for p, c in zip(prompts, completions)]
        if Path("patience").exists() and len(asked) > int(Path("patience").read_text()):
            raise KeyboardInterrupt
        Path("asked.txt").write_text("\\n".join(asked))
        return super().score(prompts, completions)

def shy():
    return Shy()

class Curt:
    name = "curt"
    def judge(self, comparisons):
        return []

def curt():
    return Curt()

def meddling(prompts, completions):
    """Moves the policy's weights between sampling and learning, which the self-check must notice."""
    import gc
    from transformers import PreTrainedModel
    for thing in gc.get_objects():
        if issubclass(type(thing), PreTrainedModel) and thing.name_or_path == "sft/final":
            thing.get_input_embeddings().weight.data.mul_(1.1)
    return blue(prompts, completions)

def broken(prompts, completions):
    return [float("nan") for _ in completions]

def short(prompts, completions):
    return [-len(c.text) / 100 for c in completions]
'''


def constant(lr: float) -> dict:
    """Few steps: no warm-up, no decay."""
    return {"lr": lr, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}


def rows(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def make_toy(folder: Path) -> Path:
    """Fills `folder` with base/, demos, prompts and pairs as .jsonl, toyrules.py, and a trained sft/ and reward/."""
    make_model(folder / "base")
    rows(
        folder / "demos.jsonl",
        [{"prompt": q, "completion": answer} for q in QUESTIONS * 4 for answer in ("the sky is blue.", "yes please")],
    )
    rows(folder / "prompts.jsonl", [{"prompt": q, "category": "ab"[i % 2]} for i, q in enumerate(QUESTIONS)])
    rows(
        folder / "pairs.jsonl",
        [
            {
                "prompt": q,
                "chosen": "the sky is blue.",
                "rejected": "yes please",
                "category": "ab"[i % 2],
                "gold_margin": 1.0,
            }
            for i, q in enumerate(QUESTIONS * 2)
        ],
    )
    (folder / "toyrules.py").write_text(RULES)
    stages = run(
        folder,
        {
            "sft": {
                "model": "base",
                "data": "demos.jsonl",
                "held_out": 0.15,
                "sampling": {"max_tokens": 20},
                "train": {"epochs": 6, "batch": 16, "optim": constant(3e-3)},
            },
            "reward": {
                "model": "@sft/final",
                "data": "pairs.jsonl",
                "held_out": 0.2,
                "sampling": {"max_tokens": 20},
                "train": {"epochs": 2, "batch": 8, "optim": constant(1e-3)},
            },
        },
        name="made",  # no test runs anything under this name
    )
    for name, stage in stages.items():
        (folder / name).symlink_to(stage.folder)
    return folder


def run(folder: Path, stages: dict, name: str = "toy") -> dict:
    """Run stages in `folder` as the command line would; paths are relative to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = load_recipe({"name": name, "device": "cpu", "stages": stages})
        return {s.name: s for s in run_recipe(recipe, folder / "runs")}


def results(stage) -> dict:
    return json.loads((stage.folder / "results.json").read_text())


def metrics(stage) -> list[dict]:
    return [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
