"""What a recipe will take before it runs: stages, done or due, time, disk, and memory by part.

In order: the recipe's keys say what is done (`recipe.resolve`); models that no stage has made yet get the architecture
of what they are made from (`standins`); the data's rows say how long (`rows`); every stage that trains or answers is
walked through on models without weights (`walks`), and the highest sum of what is held is its peak
(`engine.footprint`). Time (`times`) is what earlier runs of the same shape took, where there are such, and otherwise
operations over a measured rate. Not in it: what the allocator keeps of freed memory, and a GPU's own context
(docs/plan.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.config import parse
from trueup.data.batches import Order
from trueup.plan.standins import Folders
from trueup.plan.table import Planned, lines, memory_of
from trueup.plan.times import earlier, measured_rate
from trueup.plan.walks import Estimate, estimate
from trueup.recipe import Recipe, Stage, manifest, resolve

__all__ = ["Planned", "lines", "memory_of", "plan"]


def plan(recipe: Recipe, runs: Path, *, memory: int | None = None, rate: float | None = None) -> list[Planned]:
    """Every stage of a recipe with what it takes. `memory`, bytes: the largest micro-batch within it is looked for;
    `rate`: operations a second, measured on this machine where None."""
    stages = resolve(recipe, runs)
    out: list[Planned] = []
    with tempfile.TemporaryDirectory() as place:
        folders = Folders(stages, Path(place))
        for stage in stages:
            before = manifest(stage.folder)
            planned = Planned(stage, "done" if stage.done else "due")
            out.append(planned)
            if stage.done:
                planned.seconds, planned.known_from = before.get("seconds"), "as it took"
                continue
            left = 1.0
            if checkpoints := sorted(int(p.name.split("-")[1]) for p in stage.folder.glob("checkpoint-[0-9]*")):
                planned.state = f"goes on after step {checkpoints[-1]}"
            planned.estimate = estimate(stage, folders)
            if checkpoints and (steps := _steps(stage, planned.estimate)):
                left = max(0.0, 1 - checkpoints[-1] / steps)
            if (seconds := earlier(stage, folders, runs)) is not None:
                planned.seconds, planned.known_from = seconds * left, "by earlier runs"
            elif planned.estimate.operations:
                rate = rate or measured_rate()
                planned.seconds = planned.estimate.operations / rate * left
                planned.known_from = f"estimate: {planned.estimate.operations:.1e} operations at {rate:.1e} a second"
            if memory and planned.estimate.micro:
                planned.largest = largest(stage, folders, planned.estimate, memory)
    return out


def _steps(stage: Stage, found: Estimate) -> int:
    config: Any = stage.config
    if stage.phase == "ppo":
        return int(config.steps)
    total = int(found.rows.split(" rows")[0].split()[-1]) if " rows" in found.rows else 0
    return Order(total, config.train.batch, 0).steps(config.train.epochs) if total and hasattr(config, "train") else 0


def largest(stage: Stage, folders: Folders, found: Estimate, memory: int) -> int:
    """The most tokens of a micro-batch with which the stage stays within `memory`, 0 where none does; as many as a
    step has where all of them fit. Memory grows with the micro-batch by straight lines, so that a few trials do."""
    assert found.micro
    key, _, most = found.micro
    keys = key.split(".")[1:]

    def peak(tokens: int) -> int:
        return estimate(_with(stage, keys, tokens), folders).peak

    if (whole := peak(most)) <= memory:
        return most
    low, small = 1, peak(1)
    if small > memory:
        return 0
    high = most
    for turn in range(8):
        # By the line between the ends, and in the middle in turn: peaks are a line only in parts.
        share = (memory - small) / (whole - small) if turn % 2 == 0 and whole > small else 0.5
        guess = int(low + share * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        if guess <= low:
            break
        size = peak(guess)
        if size <= memory:
            low, small = guess, size
            if size > 0.95 * memory:
                break
        else:
            high, whole = guess, size
    return low


def _with(stage: Stage, keys: Sequence[str], value: int) -> Stage:
    """The stage with one key changed; PPO's critic follows its policy."""
    data = stage.config.model_dump()
    for path in [keys] + ([["critic_optim", *keys[1:]]] if keys[0] == "optim" else []):
        here = data
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value
    config = parse(type(stage.config), data, stage.name)
    return Stage(stage.name, stage.phase, stage.module, config, stage.key, stage.folder, stage.parents)
