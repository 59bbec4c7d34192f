"""Rows are shared out whole, evenly, and the same way everywhere."""

from __future__ import annotations

import torch

from trueup.engine.mesh import Mesh


def test_every_row_once_and_balanced() -> None:
    costs = torch.randint(1, 100, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = Mesh(rank=1, world=4).shard(costs)
    assert sorted(row for share in shares for row in share) == list(range(37))
    loads = [sum(costs[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert shares == Mesh(rank=3, world=4).shard(costs)


def test_fewer_rows_than_ranks() -> None:
    assert Mesh(world=4).shard([5, 9]) == [[1], [0], [], []]
    assert Mesh(world=2).shard([]) == [[], []]


def test_one_process_gathers_in_global_order() -> None:
    mesh = Mesh()
    shares = mesh.shard([3, 9, 5])
    assert shares == [[1, 2, 0]]
    values = torch.tensor([[10.0, 1], [20, 2], [30, 3]])
    assert mesh.gather_rows(values[shares[0]], shares).equal(values)
    assert mesh.gather_objects(["b", "c", "a"], shares) == ["a", "b", "c"]
    assert mesh.from_main(lambda: "told") == "told"
    assert mesh.is_main and mesh.sum(torch.tensor([2.0])).item() == 2.0


def test_from_env_without_torchrun(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Mesh.from_env("cpu") == Mesh()
