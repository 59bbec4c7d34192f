"""The benchmarks run, and their arithmetic is right. What they measure is no test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    """Modules as a script in benchmarks/ imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    # by hand: 1 - 2 (1 + n + ...) / 2^n, as many terms as values are left out on a side, the extreme one among them
    [(9, 2, 8, 1 - 2 * 10 / 512), (7, 1, 7, 1 - 2 / 128), (6, 1, 6, 1 - 2 / 64), (4, 1, 4, 1 - 2 / 16), (1, 1, 1, 0.0)],
)
def test_the_interval_of_a_median(load, n, low, high, coverage):
    values = [float(i) for i in range(n, 0, -1)]
    assert load("against_trl").interval(values) == (low, high, pytest.approx(coverage))


def test_what_is_missed_is_said(load):
    driver = load("against_trl")
    good = {"task": "sft", "size": "S", "ratio_wall": 1.9, "interval_wall": [1.63, 2.0], "loss_difference": 9e-6}
    assert driver.verdicts([good, {**good, "size": "M", "interval_wall": [0.5, 2.0]}]) == []
    slow, other = {**good, "interval_wall": [1.61, 2.0]}, {**good, "loss_difference": 2e-5}
    assert [line.split(":")[0] for line in driver.verdicts([slow, other])] == ["sft at S", "sft at S"]


@pytest.mark.parametrize("task", ["sft", "reward", "dpo", "ppo", "rollout"])
def test_our_side_takes_steps(load, tmp_path, task):
    gate, setting, side = (load(f"sides.{name}") for name in ("gate", "setting", "with_trueup"))
    job = setting.Job.of(setting.Job(task, str(tmp_path), setting.SIZES["T"], steps=2, ppo_epochs=2).json())
    setting.write(job)
    counted = gate.CountGate(1, 1, lambda: None)
    side.run(job, counted)
    (step,) = counted.measured
    assert step["samples"] == job.rows_a_step and step["tokens"] > job.rows_a_step
    assert set(step["losses"]) == {"ppo": {"policy_loss", "value_loss"}, "rollout": set()}.get(task, {"loss"})


def test_rollouts_are_as_long_as_stated(load, tmp_path):
    setting, side = load("sides.setting"), load("sides.with_trueup")
    lengths = setting.Lengths((4, 12), (4, 12), stop=8, limit=16)
    size = setting.Size(2, 32, 2, 64, 128, 4, lengths=lengths, rollout=512)
    job = setting.Job("rollout", str(tmp_path), size, steps=1)
    setting.write(job)
    stopping = 1 - 1 / 8
    assert side.Rollout(job).step(0)["length"] == pytest.approx(8 * (1 - stopping**16), rel=0.08)


def test_flops_are_those_of_the_products(load):
    gpu, setting = load("gpu"), load("sides.setting")
    size = setting.Size(3, 32, 4, 48, 128, 4, kv_heads=2)
    model = AutoModelForCausalLM.from_config(size.config())
    inside = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
    assert gpu.weights(size) == inside
    # two rows; one token of each meets the head: 2 N T, causal scores and mixing 2 d T^2 a layer, 2 V d
    want = 2 * inside * 30 + 3 * 2 * 32 * (10**2 + 20**2) + 2 * 2 * 128 * 32
    assert gpu.forward_flops(size, [10, 20], 2) == want
    assert gpu.weights(gpu.QWEN) == pytest.approx(0.358e9, rel=0.01)


@pytest.mark.long
def test_gpu_script_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--steps", "1", "--warmup", "1", "--part-steps", "1"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--peak", "1e11", "--out", tmp_path], cwd=ROOT, env=env, check=True)
    results = {r["task"]: r for r in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert set(results) == {"sft", "reward", "ppo"}
    for found in results.values():
        assert found["trueup"]["tokens_per_second"] > 0 and 0 < found["trueup"]["utilization"] < 1
        assert sum(found["shares"].values()) == pytest.approx(1)
    assert set(results["ppo"]["shares"]) == {"generate", "score", "logprobs", "update"}
    assert (tmp_path / "results.md").read_text().count("\n") == 5


@pytest.mark.long
def test_a_worker_answers_step_by_step(load, tmp_path):
    driver, setting = load("against_trl"), load("sides.setting")
    job = setting.Job("sft", str(tmp_path), setting.SIZES["T"], steps=2)
    setting.write(job)
    with driver.Worker(Path(sys.executable), driver.OURS, "steps", job, None) as worker:
        assert worker.answer()["ready"]
        first, second = worker.step(), worker.step()
    assert worker.process.returncode == 0
    assert second["losses"]["loss"] != first["losses"]["loss"] and first["cpu"] > 0 and first["wall"] > 0
