"""The memory benchmark runs, and says what it is for: with adapters PPO holds one base."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
def test_it_measures_whole_and_adapted_ppo(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
    memory = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = memory
    spec.loader.exec_module(memory)
    memory.make(tmp_path, width=1024, layers=1)
    for mode in ("whole", "lora, gradient checkpointing"):
        memory.measure(tmp_path, mode, rows=4, tokens=4)
    whole, lora = (line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert float(lora[2]) < 0.5 * float(whole[2]) and float(lora[3]) < float(whole[3])
