"""What test_two_processes runs, under torchrun with two processes and alone: losses, weights and samples to a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import torch

from tests.engine.test_learner import batch_of, bt, pairs_of, two
from tests.models import tiny
from trueup.engine.learner import Learner, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.lora import Lora, adapt
from trueup.models.net import Net
from trueup.records import Completion, Prompt, UserError
from trueup.scorers.asked import Asked


async def who(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """An answer that differs in each process, and each time."""
    return [float(os.getpid()), time.monotonic()]


def falls(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    raise ValueError("down")


def work(mesh: Mesh) -> dict[str, object]:
    out: dict[str, object] = {"world": mesh.world}
    for precision in ("fp32", "bf16"):
        for kind, loss_fn, make in (("policy", two, batch_of), ("reward", bt, pairs_of), ("adapter", two, batch_of)):
            model = tiny.scalar() if kind == "reward" else tiny.policy()
            if kind == "adapter":
                adapt(model, Lora(r=4), "tiny", seed=0)
            optim = Optim(
                lr=1e-3,
                eps=1e-3,
                weight_decay=0.1,
                micro_tokens=25,
                warmup=0.4,
                schedule="cosine",
                gradient_checkpointing=kind == "adapter",
            )
            net = Net(model, "reward" if kind == "reward" else "policy")
            learner = Learner(net, optim, mesh, steps=5, precision=precision)  # type: ignore[arg-type]
            losses, norms = [], []
            for step in range(3):
                # 9 rows, then 7, then 1: the ranks get unlike shares, in the end one gets nothing.
                batch = make((9, 7, 1)[step], seed=step)
                losses.append(learner.forward_backward(batch, loss_fn))
                norms.append(learner.step()["grad_norm"])
            name = f"{precision} {kind}"
            out[f"{name} losses"], out[f"{name} norms"] = losses, norms
            out[f"{name} weights"] = {k: p.detach() for k, p in learner.net.named_parameters()}
            out[f"{name} forward"] = learner.forward(make(7, seed=9))
    sampler = Sampler(tiny.policy(), end_id=tiny.END, decode=str, mesh=mesh, slots=3)
    prompts = [[5 + i] * (1 + i % 4) for i in range(11)]
    out["samples"] = sampler.sample(prompts, Sampling(max_tokens=9), seed=4, step=2)
    scores = Asked("who", who, mesh, waits=True).score([Prompt.of("a"), Prompt.of("b")], [Completion("")] * 2)
    try:
        Asked("falls", falls, mesh, waits=False).score([Prompt.of("a")], [Completion("")])
    except UserError as error:
        failed = str(error)
    out["failed"] = mesh.gather_objects([failed], [[rank] for rank in range(mesh.world)])
    out["asked"] = mesh.gather_objects([scores.value.tolist()], [[rank] for rank in range(mesh.world)])
    return out


def main(path: str) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.from_env("cpu")
    out = work(mesh)
    if mesh.is_main:
        torch.save(out, path)
    mesh.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
