"""Prompts: splits that share nothing they should not, and draws that repeat."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trueup.records import UserError
from trueup.world import demonstrations, export, gold_of, prompts
from trueup.world.tasks import CATEGORIES, SPLITS, parse, pools

STAGES = ("sft", "preference", "ppo", "reward_heldout")


@pytest.mark.parametrize("world", [0, 1, 77])
def test_heldout_shares_no_operands_entities_or_acts_with_any_stage(world: int) -> None:
    held = prompts("heldout", 500, 0, world)
    assert len({p.text for p in held}) == 500
    counts = Counter(p.category for p in held)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 50

    def content(split_prompts: list) -> set[tuple[str, ...]]:
        keys = set()
        for p in split_prompts:
            category, slots = p.meta["category"], p.meta["slots"]
            if category == "arithmetic":
                keys.add((category, p.meta["kind"], *(sorted(slots) if p.meta["kind"] == "plus" else slots)))
            elif category == "harmful":
                verb, _, victim = slots[0].split()
                keys |= {("verb", verb), ("victim", victim)}
            else:
                keys.add((category, slots[-1]))
        return keys

    mine = content(held)
    for split in STAGES:
        theirs = content(prompts(split, 3000, 0, world))
        assert len(theirs) > 100
        assert not mine & theirs, split


def test_some_heldout_wordings_are_new() -> None:
    import re

    def shape(p) -> str:
        text = p.text
        for slot in p.meta["slots"]:
            text = re.sub(rf"\b{re.escape(slot)}\b", "_", text)
        return re.sub(r"national \w+|capital", "_", text)

    seen = {shape(p) for split in STAGES for p in prompts(split, 3000)}
    new = [p for p in prompts("heldout", 500) if shape(p) not in seen]
    assert 100 <= len(new) <= 250


def test_reward_heldout_prompts_are_shown_in_no_other_stage() -> None:
    held = {p.text for p in prompts("reward_heldout", 1000)}
    for split in ("sft", "preference", "ppo"):
        assert not held & {p.text for p in prompts(split, 3000)}


@pytest.mark.parametrize("split", SPLITS)
def test_draws_repeat_and_seeds_differ(split: str) -> None:
    first, again, other = ([p.text for p in prompts(split, 200, seed)] for seed in (3, 3, 4))
    assert first == again and first != other
    assert [p.text for p in prompts(split, 200, 3, world=5)] != first


def test_worlds_hold_out_different_things() -> None:
    acts = [{t.slots[0] for t in pools(w)["heldout"].tasks["benign"]["act"]} for w in (0, 1)]
    assert acts[0] != acts[1] and len(acts[0]) == len(acts[1]) == 10


def test_meta_agrees_with_the_text() -> None:
    for split in SPLITS:
        for p in prompts(split, 210, 1):
            task = parse(p.text)
            assert (task.category, task.kind, list(task.slots)) == (p.category, p.meta["kind"], p.meta["slots"])


def test_errors_are_one_clear_line() -> None:
    with pytest.raises(UserError, match="unknown split 'test'"):
        prompts("test", 3)
    with pytest.raises(UserError, match="held-out split has no"):
        prompts("heldout", 100_000)


def test_demonstrations_are_imperfect_as_stated() -> None:
    rows = demonstrations(3000, 1)
    values: dict[str, list[float]] = {}
    for d in rows:
        values.setdefault(d.prompt.meta["category"], []).append(gold_of(d.prompt.text, d.reply).value)
    means = {name: float(np.mean(x)) for name, x in values.items()}
    assert 0.42 <= float(np.mean(list(means.values()))) <= 0.62
    for name in ("harmful", "unknown"):  # the mode is wrong: most answers are worth nothing
        assert 0.5 <= np.mean(np.array(values[name]) < 0.3) <= 0.7
    for name in set(CATEGORIES) - {"harmful", "unknown"}:
        assert np.mean(np.array(values[name]) > 0.5) >= 0.5
    assert [d.reply for d in demonstrations(50, 1)] == [d.reply for d in demonstrations(50, 1)]
    assert [d.reply for d in demonstrations(50, 1)] != [d.reply for d in demonstrations(50, 2)]


def test_export_writes_ordinary_columns(tmp_path: Path) -> None:
    counts = export(tmp_path, demos=30, per_split=20, heldout=60)
    assert counts["demonstrations.jsonl"] == 30 and counts["prompts-heldout.jsonl"] == 60
    row = json.loads((tmp_path / "demonstrations.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    row = json.loads((tmp_path / "prompts-ppo.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user" and row["category"] in CATEGORIES


def test_the_world_imports_no_torch() -> None:
    code = "import sys, trueup.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
