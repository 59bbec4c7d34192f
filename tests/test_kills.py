"""Every stage, killed again and again at any moment, ends where it would have ended."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_recipe import ANSWERS, EVALUATE, GENERATE, JUDGE, PPO, SFT, WATCHED, finished, killed, same_end
from tests.toy import run

pytestmark = pytest.mark.long

STAGES = {
    "sft": {**SFT, "train": {**SFT["train"], "epochs": 3, "save_every": 5}},
    "reward": {
        "phase": "reward",
        "model": "sft/final",
        "data": "pairs.jsonl",
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 3, "batch": 8, "save_every": 5, "keep": {"share": 1}},
    },
    "ppo": {**WATCHED, "steps": 12},
    "lora": {**PPO, "phase": "ppo", "steps": 12, "lora": {"r": 4}},
    "dpo": {
        "phase": "dpo",
        "model": "sft/final",
        "data": "pairs.jsonl",
        "samples": 16,
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 3, "batch": 8, "save_every": 5},
    },
    "best-of-n": {
        "phase": "best-of-n",
        "model": "sft/final",
        "prompts": "prompts.jsonl",
        "scorer": "reward/final",
        "n": 8,
        "chunk": 16,
        "sampling": {"max_tokens": 20},
    },
    "generate": {**GENERATE, "n": 8, "chunk": 16, "scorer": "reward/final"},
    "judge": {**JUDGE, "completions": "answers/completions.jsonl", "judge": "reward/final", "chunk": 2},
    "evaluate": {
        **EVALUATE,
        "models": {"base": "base", "sft": "sft/final", "again": "sft/final", "reference": "base"},
        "judge": "reward/final",
        "proxy": "toyrules:gold",
    },
}
KILLS = 3


@pytest.fixture(scope="module")
def world(toy: Path) -> Path:
    """The toy, with answers to judge."""
    (toy / "answers").symlink_to(run(toy, {"answers": ANSWERS}, name="answers")["answers"].folder)
    return toy


def soon(seconds: float) -> Callable[[Path], bool]:
    """So long after this process began to work on the stage."""
    before, began = time.time(), 0.0

    def moment(made: Path) -> bool:
        nonlocal began
        record = made / "manifest.json"
        if not began and record.exists() and record.stat().st_mtime > before:
            began = time.monotonic()
        return bool(began) and time.monotonic() - began >= seconds

    return moment


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_it_ends_where_the_uninterrupted_stage_ends(world, stage):
    keys, rng = STAGES[stage], random.Random(stage)
    whole = run(world, {stage: keys}, name=f"unkilled-{stage}")[stage].folder
    takes = json.loads((whole / "manifest.json").read_text())["seconds"]
    kills = 0
    for _ in range(KILLS):
        kills += killed(world, stage, keys, f"killed-{stage}", soon(rng.uniform(0, 2 * takes / KILLS)))
    assert kills, "killed too late to test anything"
    same_end(whole, finished(world, stage, keys, f"killed-{stage}"))


def writing(nth: int) -> Callable[[Path], bool]:
    """While a checkpoint is being written: the `nth` that is seen."""
    seen: set[str] = set()

    def moment(made: Path) -> bool:
        seen.update(p.name for p in made.glob(".checkpoint-*.tmp"))
        return len(seen) >= nth

    return moment


@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluate"])
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(world, stage):
    keys = STAGES[stage]
    whole = run(world, {stage: keys}, name=f"unkilled-{stage}")[stage].folder
    for attempt in range(6):  # the checkpoint may be whole before the kill comes
        if not killed(world, stage, keys, f"half-{stage}-{attempt}", writing(2)):
            continue
        made = next((world / "runs" / f"half-{stage}-{attempt}").glob(f"{stage}-*"))
        half_written = any(made.glob(".checkpoint-*.tmp"))
        assert any(made.glob("checkpoint-*")), "the checkpoint before went too early"
        same_end(whole, finished(world, stage, keys, f"half-{stage}-{attempt}"))
        if half_written:
            return
    pytest.fail("no kill came while a checkpoint was written")
