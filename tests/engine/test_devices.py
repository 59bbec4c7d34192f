"""The device that the mesh chooses gives what a CPU gives, by the same code."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_learner import batch_of, bt, pairs_of, regress, two
from tests.models import tiny
from trueup.engine.learner import Learner, Optim
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.net import Net


@pytest.mark.parametrize(
    ("kind", "loss_fn", "make"),
    [("policy", two, batch_of), ("critic", regress, batch_of), ("reward", bt, pairs_of)],
    ids=["policy", "critic", "reward"],
)
def test_learning(kind, loss_fn, make) -> None:  # type: ignore[no-untyped-def]
    runs = []
    for mesh in (Mesh(), Mesh.from_env("auto")):
        model = tiny.policy() if kind == "policy" else tiny.scalar()
        one = Learner(Net(model, kind), Optim(lr=1e-3, eps=1e-3, micro_tokens=40), mesh, steps=4)
        losses = []
        for step in range(3):
            losses.append(sum(one.forward_backward(make(seed=step), loss_fn).values()))
            one.step()
        other = Learner(Net(model, kind), Optim(), mesh, steps=4)
        other.load_state({name: value.cpu() for name, value in one.state().items()})
        outputs = next(iter(other.forward(make()).values()))
        assert outputs.device.type == mesh.device.type
        runs.append((losses, outputs.cpu()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert (runs[0][1] - runs[1][1]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_sampling(name: str) -> None:
    runs = []
    for mesh in (Mesh(), Mesh.from_env("auto")):
        model = tiny.policy(name).to(mesh.device)  # type: ignore[arg-type]
        one = Sampler(model, end_id=tiny.END, decode=str, mesh=mesh, slots=3)
        prompts = [[5 + i] * (1 + i % 5) for i in range(8)]
        settings = Sampling(max_tokens=7, top_k=9, top_p=0.9)
        runs.append(one.sample(prompts, settings, seed=1))
    assert [c.ids for c in runs[0]] == [c.ids for c in runs[1]]


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert Mesh.from_env("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
