"""Two gloo processes under torchrun give what one gives: losses, weights, outputs, samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import two_processes

pytestmark = pytest.mark.long
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).parents[2]


def run(command: list[str], out: Path) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.engine.two_processes", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    with pytest.MonkeyPatch.context() as patch:
        for name in DISTRIBUTED:
            patch.delenv(name, raising=False)
        two_processes.main(str(folder / "one.pt"))
    one, two = torch.load(folder / "one.pt", weights_only=False), run(torchrun, folder / "two.pt")
    assert (one["world"], two["world"]) == (1, 2)
    return one, two


@pytest.mark.parametrize("kind", ["policy", "reward", "adapter"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_is_the_same(both: tuple[dict[str, Any], dict[str, Any]], precision: str, kind: str) -> None:
    one, two = both
    name = f"{precision} {kind}"
    # bfloat16 rounds its products differently in another micro-batch; float32 sums keep that to the last digits.
    near = 1e-6 if precision == "fp32" else 5e-3
    for a, b in zip(one[f"{name} losses"], two[f"{name} losses"], strict=True):
        assert b == pytest.approx(a, rel=2e-6 if precision == "fp32" else 2e-2)
    assert two[f"{name} norms"] == pytest.approx(one[f"{name} norms"], rel=1e-5 if precision == "fp32" else 2e-2)
    for key, weight in one[f"{name} weights"].items():
        assert (weight - two[f"{name} weights"][key]).abs().max() < near, key


def test_outputs_are_gathered_in_order(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = both
    for name in ("fp32 policy", "fp32 reward"):
        for key, value in one[f"{name} forward"].items():
            assert value.shape == two[f"{name} forward"][key].shape
            assert (value - two[f"{name} forward"][key]).abs().max() < 1e-5


def test_samples_are_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = both
    assert [c.ids for c in one["samples"]] == [c.ids for c in two["samples"]]
    assert len({c.ids for c in one["samples"]}) == 11


def test_what_the_main_process_was_told_all_know(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = both
    assert len(one["asked"]) == 1 and len(two["asked"]) == 2
    assert two["asked"][0] == two["asked"][1]


def test_what_the_main_process_fails_at_fails_in_all(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The others would wait for its answer for ever."""
    one, two = both
    assert one["failed"][0].startswith("'falls' failed: ValueError: down (")
    assert two["failed"] == one["failed"] * 2
