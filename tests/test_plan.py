"""`trueup plan`: what is done and due, what it will take, and that what it says is so."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.models_made import make_model
from tests.toy import constant, rows
from trueup import plan as planning
from trueup.cli import app
from trueup.engine.footprint import ACTIVATIONS, GRADIENTS, OPTIMIZER, Footprint
from trueup.models.load import load_policy, load_scalar
from trueup.models.weightless import weightless
from trueup.plan import walks
from trueup.plan.standins import Folders
from trueup.recipe import load_recipe, resolve, run_recipe
from trueup.records import UserError

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "plan.py"


def say(*args: str):
    return CliRunner().invoke(app, ["plan", *args])


def fake(*shape: int) -> torch.Tensor:
    from trueup.models.weightless import making

    with making():
        return torch.empty(*shape)


# what is held


def test_a_linear_layer_by_hand():
    """Weight [30, 20] and input [50, 20] in float32: the output is 50 x 30 x 4 = 6000 bytes, its sum 4; backward adds
    the gradient of the weight, 2400 bytes, and of the output, which is a view of one number."""
    with weightless(), Footprint(vocab=7) as held:
        weight, x = nn.Parameter(fake(30, 20)), fake(50, 20)
        for tensor, part in ((weight, "weights"), (x, "input")):
            held.hold(tensor, part, again=True)
        weight.register_post_accumulate_grad_hook(held._gradient)
        assert held.now["weights"] == 2400 and held.now["input"] == 4000
        y = nn.functional.linear(x, weight)
        assert held.now[ACTIVATIONS] == 6000 and held.flops == 2 * 50 * 20 * 30
        total = y.sum()
        assert held.now[ACTIVATIONS] == 6004
        total.backward()
        assert held.now[GRADIENTS] == 2400
        del y, total
        assert held.now[ACTIVATIONS] == 0 and held.total == 2400 + 4000 + 2400


def test_the_highest_moment_is_kept_and_what_is_freed_is_not():
    with weightless(), Footprint(vocab=5) as held:
        x = fake(10, 10)
        held.hold(x, "input")
        with held.moment() as found:
            big = x.repeat(10, 1)
            del big
            x.repeat(2, 1)
        assert sum(found.values()) == 400 + 4000 and held.total == 400
        with held.moment() as found:
            x[:, :5].clone()
        assert found["logits"] == 200


def test_a_step_holds_weights_gradients_and_two_means(tiny):
    from trueup.engine.learner import Learner, Optim
    from trueup.models.net import Net
    from trueup.phases.sft import sft_loss

    with weightless(), Footprint(vocab=320) as held:
        model = load_policy(tiny)
        size = 4 * sum(p.numel() for p in model.parameters())
        buffers = sum(b.numel() * b.itemsize for b in model.buffers())
        learner = Learner(Net(model, "policy"), Optim(), steps=1)
        held.weights(model, "weights")
        walks._warm(held, learner)
        learner.forward_backward(walks._texts([[9], [7]]), sft_loss)
        assert held.now["weights"] == size + buffers
        assert held.now[GRADIENTS] == size and held.now[OPTIMIZER] == 2 * size
        learner.step()
        assert held.now[GRADIENTS] == 0
    assert sum(p.numel() for p in load_policy(tiny).parameters()) * 4 == size  # real again outside


def test_only_a_config_is_read(tmp_path, tiny):
    shutil.copy(tiny / "config.json", tmp_path / "config.json")
    with weightless():
        assert load_policy(tmp_path).config.vocab_size == load_scalar(tmp_path, seed=0).model.config.vocab_size
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
@pytest.mark.parametrize("case", ["sft", "dpo", "ppo"])
def test_the_plan_is_what_is_measured(tmp_path, case):
    spec = importlib.util.spec_from_file_location("plan_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    for size in "TS":
        benchmark.make(tmp_path / size, size)
    planned, _ = benchmark.predict(tmp_path, "S", case)
    held = benchmark.measured(tmp_path, "S", case, MALLOC_MMAP_THRESHOLD_="1000000")
    assert abs(planned / held - 1) <= 0.15, (planned, held)


# a recipe


def small(folder: Path) -> dict:
    """A recipe of three stages on a tiny model and files in `folder`."""
    make_model(folder / "base")
    rows(folder / "demos.jsonl", [{"prompt": f"say {i}", "completion": "yes please"} for i in range(40)])
    rows(folder / "pairs.jsonl", [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(40)])
    rows(folder / "prompts.jsonl", [{"prompt": f"say {i} of {i}"} for i in range(40)])
    train = {"epochs": 1, "batch": 8, "optim": constant(1e-3)}
    sampling = {"max_tokens": 6}
    return {
        "name": "small",
        "device": "cpu",
        "stages": {
            "sft": {"model": "base", "data": "demos.jsonl", "train": train, "sampling": sampling, "held_out": 0.2},
            "reward": {
                "model": "@sft/final",
                "data": "pairs.jsonl",
                "train": train,
                "sampling": sampling,
                "normalize_samples": 8,
            },
            "ppo": {
                "model": "@sft/final",
                "scorer": "@reward/final",
                "prompts": "prompts.jsonl",
                "batch": 8,
                "steps": 2,
                "missing_eos_samples": 4,
                "sampling": sampling,
            },
        },
    }


@pytest.mark.long
def test_done_and_due_and_the_time_that_earlier_runs_took(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)
    before = planning.plan(load_recipe(data), tmp_path / "runs", rate=1e12)
    assert [p.state for p in before] == ["due"] * 3 and not (tmp_path / "runs").exists()
    for p in before:
        assert p.seconds == p.estimate.operations / 1e12 > 0 and "estimate" in p.known_from
    stages = run_recipe(load_recipe({**data, "stages": {"sft": data["stages"]["sft"]}}), tmp_path / "runs")
    took = json.loads((stages[0].folder / "manifest.json").read_text())["seconds"]
    sft, reward, _ = planning.plan(load_recipe(data), tmp_path / "runs", rate=1e12)
    assert (sft.state, sft.seconds, sft.estimate) == ("done", took, None) and reward.state == "due"
    twice = load_recipe({**data, "name": "twice"}, ["sft.train.epochs=2"])
    again = planning.plan(twice, tmp_path / "runs", rate=1e12)[0]
    assert again.state == "due" and again.known_from == "by earlier runs"
    assert again.seconds == pytest.approx(2 * took, rel=0.3)  # epochs are whole batches
    other = load_recipe({**data, "name": "other"}, ["sft.lora.r=2"])
    assert "estimate" in planning.plan(other, tmp_path / "runs", rate=1e12)[0].known_from


@pytest.mark.long
def test_parts_add_up_and_a_shared_base_is_held_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)
    whole = planning.plan(load_recipe(data), tmp_path / "runs", rate=1e12)[2].estimate
    update = whole.moments["the update"]
    names = {"policy", "reference", "critic", "reward model"}
    assert {k.partition(": ")[2] for k in update if k.startswith("weights")} == names
    assert len({update[f"weights: {n}"] for n in ("policy", "reference")}) == 1
    judge = "ppo.watch.judge={constitution: default, model: base}"
    watched = planning.plan(load_recipe(data, [judge]), tmp_path / "runs", rate=1e12)[2].estimate.moments["the update"]
    assert watched.pop("weights: judge") == update["weights: policy"] and watched == update
    keys = ["reward.lora.r=2", "ppo.lora.r=2"]
    lora = planning.plan(load_recipe(data, keys), tmp_path / "runs", rate=1e12)[2].estimate.moments["the update"]
    one = update["weights: reference"]
    assert lora["weights: base"] == one
    assert sum(v for k, v in lora.items() if k.startswith("weights")) < 1.5 * one < 3.9 * one
    apart = ["reward.lora.r=2", "reward.train.precision=bf16", "ppo.lora.r=2"]  # then the bases are two
    two = planning.plan(load_recipe(data, apart), tmp_path / "runs", rate=1e12)[2].estimate.moments["the update"]
    assert sum(v for k, v in two.items() if k.startswith("weights")) > 1.9 * one


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_dpo_holds_its_reference_only_where_it_is_asked(tmp_path, monkeypatch, loss):
    monkeypatch.chdir(tmp_path)
    base = small(tmp_path)["stages"]["reward"]
    rows(tmp_path / "thumbs.jsonl", [{"prompt": f"say {i}", "completion": "yes", "label": i < 9} for i in range(40)])
    keys = {"data": "pairs.jsonl" if loss == "sigmoid" else "thumbs.jsonl", "held_out": 0.2, "samples": 4}
    stage = {"model": "base", "loss": loss, "train": base["train"], "sampling": base["sampling"], **keys}

    def moments(**more):
        recipe = load_recipe({"name": "dpo", "device": "cpu", "stages": {"dpo": {**stage, **more}}})
        return planning.plan(recipe, tmp_path / "runs", rate=1e12)[0].estimate

    whole = moments()
    held = {name for name, parts in whole.moments.items() if parts.get("weights: reference")}
    assert held == {"the reference's log-probs", "their KL"}
    step = whole.moments["a training step"]
    assert step[OPTIMIZER] == pytest.approx(2 * step["weights: policy"], rel=0.01)
    assert len(whole.moments) == 7 and len(moments(samples=0).moments) == 5
    cache = [moments(samples=n).moments["answers at validation"]["KV cache"] for n in (4, 8, 80)]
    assert cache[0] < cache[1] == cache[2]  # no more prompts are held out
    shared = moments(lora={"r": 2}).moments
    assert not any(parts.get("weights: reference") for parts in shared.values())


@pytest.mark.long
def test_checkpointing_and_a_smaller_micro_batch_take_less(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)

    def step(*keys: str) -> int:
        sft = load_recipe({**data, "stages": {"sft": data["stages"]["sft"]}}, keys)
        return sum(planning.plan(sft, tmp_path / "runs", rate=1e12)[0].estimate.moments["a training step"].values())

    plain = step()
    assert step("sft.train.optim.gradient_checkpointing=true") < plain
    assert step("sft.train.optim.micro_tokens=20") < plain


@pytest.mark.long
def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)
    recipe = load_recipe({**data, "stages": {"sft": data["stages"]["sft"]}})
    (stage,) = resolve(recipe, tmp_path / "runs")
    folders = Folders([stage], tmp_path / "places")
    (tmp_path / "places").mkdir()
    whole = walks.estimate(stage, folders)
    memory = int(
        whole.moments["a training step"][ACTIVATIONS] * 0.6 + 4 * whole.moments["a training step"]["weights: policy"]
    )
    found = planning.largest(stage, folders, whole, memory)
    keys = ["train", "optim", "micro_tokens"]

    def peak(tokens: int) -> int:
        return walks.estimate(planning._with(stage, keys, tokens), folders).peak

    assert 0 < found < whole.micro[2] and peak(found) <= memory < peak(round(found * 1.3))
    assert planning.largest(stage, folders, whole, 10 * whole.peak) == whole.micro[2]
    assert planning.largest(stage, folders, whole, 1000) == 0


@pytest.mark.long
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)
    Path("small.yaml").write_text(json.dumps(data))
    shown = say("small.yaml", "--memory", "1GB", "--rate", "1")
    assert shown.exit_code == 0, shown.output
    assert "40 rows" in shown.output or "tokens on average" in shown.output
    assert "all" in shown.output and "fit in one micro-batch" in shown.output and "due:" in shown.output
    Path("one.yaml").write_text(json.dumps({**data, "stages": {"sft": data["stages"]["sft"]}}))
    none = say("one.yaml", "--memory", "1KB", "--rate", "1")
    assert "does not fit into 1.0 KB" in none.output


@pytest.mark.long
def test_an_ensemble_is_so_many_reward_models_trained_in_turn_and_held_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = small(tmp_path)
    stages = data["stages"]
    stages["reward"]["held_out"] = 0.2
    stages["ensemble"] = {"members": 3, "average": True, "member": stages["reward"]}
    stages |= {"against": {**stages["ppo"], "phase": "ppo", "scorer": "@ensemble/final"}}
    stages["listed"] = {
        **stages["against"],
        "scorer": {"ensemble": [*map("@ensemble/final/member-{}".format, (0, 2)), "m:f"]},
    }
    stages["again"] = {**stages["ppo"], "phase": "ppo", "critic": "@against/critic"}
    found = {p.stage.name: p.estimate for p in planning.plan(load_recipe(data), tmp_path / "runs", rate=1e12)}
    one, three = found["reward"], found["ensemble"]
    [scored] = set(three.moments) - set(one.moments)
    assert {n: m for n, m in three.moments.items() if n != scored} == one.moments
    weights = one.moments["a training step"]["weights: reward model"]
    members = {f"weights: member{more}": weights for more in ("", " 2", " 3")}
    assert three.moments[scored].items() >= members.items()
    assert 3 * one.operations < three.operations < 3.3 * one.operations  # more by what it takes to measure them
    assert three.disk["final/"] == three.disk["the members once more"] == 3 * one.disk["final/"]
    assert three.disk["average/"] == one.disk["final/"]
    assert three.disk["checkpoints, to go on from"] == one.disk["checkpoints, to go on from"]
    assert three.micro == ("ensemble.member.train.optim.micro_tokens", *one.micro[1:])
    update, against, listed = (found[n].moments["the update"] for n in ("ppo", "against", "listed"))
    more = {f"weights: reward model {i}": weights for i in (2, 3)}
    assert against == update | more and listed == update | {"weights: reward model 2": weights}
    assert found["against"].operations > found["ppo"].operations
    assert found["again"].moments["the update"] == update
    planned = planning.plan(load_recipe(data, ["ensemble.average=false"]), tmp_path / "runs", memory=10**9, rate=1e12)
    assert planned[3].largest == planned[3].estimate.micro[2]
    # One that is made is read as it is; gathered members are only held.
    run_recipe(load_recipe({**data, "stages": {n: stages[n] for n in ("sft", "ensemble")}}), tmp_path / "runs")
    [made] = (tmp_path / "runs").glob("small/ensemble-*/final")
    gathered = {"members": [f"{made}/member-0", f"{made}/member-2"], "member": stages["reward"]}
    stages = {"sft": stages["sft"], "ensemble": gathered, "ppo": {**stages["ppo"], "scorer": str(made)}}
    after = planning.plan(load_recipe({**data, "stages": stages}), tmp_path / "runs", rate=1e12)
    assert after[2].estimate.moments["the update"] == against
    assert list(after[1].estimate.moments) == [scored] and after[1].estimate.disk == {"final/": 2 * one.disk["final/"]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sft.model=Qwen/Qwen3-0.6B-Base"], "plan downloads nothing"),
        (["sft.model=nowhere"], "nowhere: no such folder"),
        (["sft.data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["sft.max_length=2"], "every row has more than 2 tokens"),
        (["sft.model=empty"], "empty: no config.json in this folder"),
        (["sft.modle=base"], "did you mean 'model'"),
        (["ppo.scorer={ensemble: base, combine: wco}"], "base: no ensemble.json in this folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    recipe = load_recipe(small(tmp_path), keys)
    with pytest.raises(UserError) as error:
        planning.plan(recipe, tmp_path / "runs", rate=1e12)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("512MB", 512e6), ("1.5 TB", 1.5e12), ("2GiB", 2**31), ("100", 100)]
)
def test_sizes(text, size):
    assert planning.memory_of(text) == size


@pytest.mark.parametrize("text", ["much", "", "1.2.3GB", "GB"])
def test_a_size_that_is_none(text):
    with pytest.raises(UserError, match="expected a size"):
        planning.memory_of(text)
