"""The supervised loop that SFT and the reward model share: epochs of shuffled rows, validation, the best kept.

In order: batch, forward and backward, step; now and then validate and keep the best; checkpoint. A run that was
cut off goes on from its last checkpoint and sees the very batches that it would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from trueup.config import Config, display
from trueup.data.batches import Batch, Order
from trueup.engine.learner import Learner, LossFn, NotFinite, Optim
from trueup.engine.mesh import Mesh
from trueup.models.net import Net, Precision
from trueup.records import start_of
from trueup.run import Best, Keep, Run

T = TypeVar("T")


class Training(Config):
    """How a supervised stage trains."""

    epochs: float = Field(2.0, gt=0)
    """How often every row is seen."""
    batch: int = Field(32, gt=0)
    """Rows of one optimizer step, over all processes."""
    optim: Optim = Optim()
    precision: Precision = "fp32"
    """bf16 computes in bfloat16 and keeps fp32 masters."""
    validate_every: float = Field(0.5, gt=0)
    """Validate after this share of an epoch; the best weights are kept."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one; 0 never stops early."""
    save_every: int = display(50, gt=0)
    """Steps between checkpoints to go on from."""
    keep: Keep = display(Keep())
    """Which of them stay, and how much of the time they may take."""


def fit(
    run: Run,
    net: Net,
    mesh: Mesh,
    config: Training,
    rows: Sequence[T],
    *,
    seed: int,
    make_batch: Callable[[Sequence[T]], Batch],
    loss_fn: LossFn,
    validate: Callable[[Learner], Mapping[str, float]] | None,
    save: Callable[[Path], object],
    load: Callable[[Path], object],
    text_of: Callable[[T], str] | None = None,
    before: Callable[[Learner, Batch], Batch] | None = None,
) -> dict[str, Any]:
    """Trains `net` on `rows`; afterwards it holds the best weights by `validation_loss`, or the last ones.

    `save` and `load` write and read the model's weights as a folder; `validate` returns figures, among them
    `validation_loss` (lower is better); without it the last weights stay. `text_of` tells a row to who looks for the
    one that a loss fails on. `before` adds to a batch what couples rows.
    """
    order = Order(len(rows), config.batch, seed)
    steps = order.steps(config.epochs)
    every = max(1, round(config.validate_every * len(rows) / config.batch))
    learner = Learner(net, config.optim, mesh, steps=steps, precision=config.precision)
    run.reserve(config.keep, state=state_bytes(learner), model=model_bytes(net))
    best = Best(run, patience=config.patience)
    if folder := run.resume():
        best.load_state(load_state(folder, learner=learner)["best"])

    for step in run.steps(steps, watch=("loss", "validation_loss", "accuracy")):
        began = time.monotonic()
        chosen = [rows[i] for i in order.at(step)]
        batch = make_batch(chosen)
        if before:
            batch = before(learner, batch)
        try:
            losses = learner.forward_backward(batch, loss_fn)
            metrics = {**{name.removeprefix("metric/"): value for name, value in losses.items()}, **learner.step()}
        except NotFinite as error:
            if text_of is None or not error.rows:
                raise
            raise FloatingPointError(f"{error}: the first is {start_of(text_of(chosen[error.rows[0]]))}") from None
        metrics |= {"tokens": int(batch["lengths"].sum()), "seconds": time.monotonic() - began}
        last, better = step + 1 == steps, False
        if validate and ((step + 1) % every == 0 or last):
            figures = dict(validate(learner))
            if "validation_loss" in figures:
                better = best.offer(step, figures["validation_loss"], save)
            metrics |= figures
        run.log(step, **metrics)
        if not last:
            state = state_writer({"learner": learner}, best=best.state())
            run.checkpoint(step + 1, state, every=config.save_every, best=better)
        if best.stop:
            run.say(f"stopped early: no better validation loss since step {best.step}")
            break
    mesh.barrier()
    if best.step is not None:
        load(run.folder / "best")
    return {"steps": step + 1, "rows": len(rows), "best_step": best.step, "best_validation_loss": best.value}


def state_writer(parts: Mapping[str, Any], **extra: Any) -> Callable[[Path], object]:
    """A writer of `state.pt`: each part's `state()`, and what else must come back on resume."""

    def write(folder: Path) -> None:
        with open(folder / "state.pt", "wb") as file:  # to a path torch writes by itself, and hides the system's reason
            torch.save({**{k: p.state() for k, p in parts.items()}, "extra": extra}, file)

    return write


def state_bytes(*learners: Learner | None) -> int:
    """What a checkpoint takes on the disk: master and Adam's two means of all that learns."""
    parameters = [p for one in learners if one for p in one.net.parameters() if p.requires_grad]
    return sum(3 * p.numel() * p.element_size() for p in parameters)


def model_bytes(net: Net) -> int:
    """What its folder takes on the disk, merged."""
    return sum(p.numel() * p.element_size() for p in net.parameters())


def load_state(folder: Path, **parts: Any) -> dict[str, Any]:
    """Loads each part from a checkpoint; returns the extra."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state(state[name])
    extra: dict[str, Any] = state["extra"]
    return extra


def masked_sum(values: Tensor, mask: Tensor) -> float:
    """Sum of the masked entries in float64."""
    return float(torch.where(mask, values.double(), 0.0).sum())
