"""`trueup ensemble`: members that differ as told, resumed one by one, used by PPO, their weights averaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.test_recipe import finished, killed, same_end
from tests.toy import QUESTIONS, constant, metrics, results, rows, run
from trueup.ensemble import EnsembleConfig, member_configs, shares_of_raters
from trueup.models.roles import average_weights, recorded
from trueup.records import Completion, Prompt, UserError
from trueup.scorers import make_scorer

MEMBER = {
    "model": "sft/final",
    "data": "rated.jsonl",
    "held_out": 0.2,
    "sampling": {"max_tokens": 20},
    "normalize_samples": 64,
    "train": {"epochs": 1, "batch": 8, "optim": constant(1e-3), "save_every": 4},
}
KEYS = {"members": 3, "bootstrap": True, "member": MEMBER}
SAID = [Completion("the sky is blue."), Completion("yes please"), Completion("the sky", "length")]


@pytest.fixture(scope="module")
def world(toy: Path) -> Path:
    pairs = [
        {"prompt": q, "chosen": "the sky is blue.", "rejected": "yes please", "rater": f"rater-{i % 4}"}
        for i, q in enumerate(QUESTIONS * 2)
    ]
    rows(toy / "rated.jsonl", pairs)
    return toy


@pytest.fixture(scope="module")
def made(world: Path):
    return run(world, {"ensemble": KEYS}, name="ensemble")["ensemble"]


def config(**keys) -> EnsembleConfig:
    return EnsembleConfig.model_validate({**KEYS, **keys})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def score(folder: Path, mesh) -> np.ndarray:
    return make_scorer(str(folder), mesh).score([Prompt.of(QUESTIONS[0])] * len(SAID), SAID).value


def test_members_have_their_own_seed_draw_start_and_raters():
    known = [f"rater-{i}" for i in range(4)]
    found = member_configs(config(seed=3, starts=["a", "b"], raters=0.5), known)
    assert [c.seed for c in found] == [3000, 3001, 3002]
    assert [c.model for c in found] == ["a", "b", "a"]
    assert all(c.bootstrap and c.head_seed is None and len(c.raters) == 2 for c in found)
    first, second, third = (set(c.raters) for c in found)
    assert first | second == set(known) and not first & second and third == first
    assert [c.head_seed for c in member_configs(config(seed=3, average=True), known)] == [3000, 3000, 3000]
    drawn = {shares_of_raters(config(seed=seed, raters=0.25), known)[0] for seed in range(8)}
    assert len(drawn) > 1  # another seed deals otherwise


def test_an_ensemble_is_a_folder_of_reward_models_that_scores_as_their_mean(world, made, mesh):
    final = made.folder / "final"
    names = ["member-0", "member-1", "member-2"]
    assert sorted(p.name for p in final.iterdir()) == ["ensemble.json", *names]
    tensors = [weights(final / name) for name in names]
    assert all(not torch.equal(tensors[i][k], tensors[j][k]) for i, j in ((0, 1), (1, 2)) for k in ("score.weight",))
    assert score(final, mesh) == pytest.approx(np.mean([score(final / name, mesh) for name in names], 0), abs=1e-6)
    found = results(made)
    assert found["accuracy"] >= 0.95 and len(found["members_accuracy"]) == 3 and found["disagreement"] > 0
    losses = [one["best_validation_loss"] for one in found["of"]]
    assert found["best"] == names[int(np.argmin(losses))]
    assert json.loads((final / "ensemble.json").read_text())["best"] == found["best"]
    shown = [json.loads(line) for line in (made.folder / "samples.jsonl").read_text().splitlines()]
    doubts = [(a["disagreement"] + b["disagreement"]) / 2 for a, b in zip(shown[::2], shown[1::2], strict=True)]
    assert doubts == sorted(doubts, reverse=True) and {row["side"] for row in shown[::2]} == {"chosen"}
    assert [row["step"] for row in metrics(made)] == list(range(len(metrics(made)))) and metrics(made)[0]["loss"] > 0


def test_a_bootstrap_draws_as_many_pairs_from_those_to_train_on(world, monkeypatch):
    from trueup.data.chat import Chat
    from trueup.phases.reward import RewardConfig, read_pairs

    monkeypatch.chdir(world)
    chat = Chat.load("sft/final")
    keys = {**MEMBER, "seed": 1}
    plain, drawn = (read_pairs(RewardConfig(**keys, bootstrap=b), chat) for b in (False, True))
    ids = [{p.preference.prompt.id for p in rows} for _, rows in (plain, drawn)]
    assert len(drawn[1]) == len(plain[1]) and ids[1] < ids[0]
    assert [p.chosen for p in drawn[0].held] == [p.chosen for p in plain[0].held]
    other = read_pairs(RewardConfig(**{**keys, "seed": 2}, bootstrap=True), chat)
    assert [p.preference.prompt.id for p in other[1]] != [p.preference.prompt.id for p in drawn[1]]
    heard = read_pairs(RewardConfig(**keys, raters=("rater-1",)), chat)
    assert {p.preference.rater for p in heard[1]} == {"rater-1"} and len(heard[0].held) == len(plain[0].held)
    with pytest.raises(UserError, match="no pair is by rater 'rater-9'; raters: rater-0, rater-1"):
        read_pairs(RewardConfig(**keys, raters=("rater-9",)), chat)


@pytest.mark.long
def test_killed_within_a_member_it_goes_on_from_there(world, made):
    def moment(folder: Path) -> bool:
        log = folder / "member-1" / "metrics.jsonl"
        return log.exists() and len(log.read_text().splitlines()) >= 6

    assert killed(world, "ensemble", KEYS, "cut", moment)
    (cut,) = (world / "runs" / "cut").glob("ensemble-*")
    first = (cut / "member-0" / "results.json").stat().st_mtime_ns
    assert (cut / "member-1" / "checkpoint-4").exists() and not (cut / "member-2").exists()
    same_end(made.folder, finished(world, "ensemble", KEYS, "cut"))
    assert (cut / "member-0" / "results.json").stat().st_mtime_ns == first


def test_ppo_reads_it_starts_its_critic_from_the_best_and_logs_disagreement(world, made, mesh, monkeypatch):
    final = str(made.folder / "final")
    keys = {
        "phase": "ppo",
        "model": "sft/final",
        "scorer": {"ensemble": final, "combine": "wco"},
        "prompts": "prompts.jsonl",
        "batch": 16,
        "steps": 2,
        "sampling": {"max_tokens": 20},
        "optim": {"lr": 1e-3},
    }
    stage = run(world, {"careful": keys}, name="careful")["careful"]
    log = metrics(stage)
    assert all(row["disagreement"] > 0 for row in log)
    shown = [json.loads(line) for line in (stage.folder / "samples.jsonl").read_text().splitlines()]
    prompts = [Prompt.of(row["prompt"]) for row in shown]
    again = make_scorer(keys["scorer"], mesh).score(prompts, [Completion(r["completion"], r["stop"]) for r in shown])
    assert [row["disagreement"] for row in shown] == pytest.approx(again.disagreement.tolist(), abs=1e-5)
    ended = [i for i, row in enumerate(shown) if row["stop"] == "eos"]
    assert [shown[i]["score"] for i in ended] == pytest.approx([again.value[i] for i in ended], abs=1e-5)
    # The critic's affine never learns: it is the best member's.
    best = recorded(f"{final}/{results(made)['best']}")
    assert recorded(stage.folder / "critic")["score_mean"] == pytest.approx(best["score_mean"], abs=1e-6)


def test_weights_are_averaged_of_members_of_one_start_alone(world, made, mesh, monkeypatch):
    monkeypatch.chdir(world)
    keys = {"average": True, "members": 3, "member": MEMBER}
    stage = run(world, {"warm": {"phase": "ensemble", **keys}}, name="warm")["warm"]
    members = [weights(stage.folder / "final" / f"member-{i}") for i in range(3)]
    average = weights(stage.folder / "average")
    for name, weight in average.items():
        torch.testing.assert_close(weight, sum(one[name] for one in members) / 3, rtol=0, atol=1e-6)
    assert not torch.equal(members[0]["score.weight"], members[1]["score.weight"])
    about = recorded(stage.folder / "average")
    assert about["n"] == 64 and about["start"] == recorded(stage.folder / "final" / "member-1")["start"]
    blue, yes, _ = score(stage.folder / "average", mesh)  # an ordinary reward model
    assert blue > yes + 1 and results(stage)["average"]["accuracy"] >= 0.95
    # `made`'s members have heads of their own
    with pytest.raises(UserError, match=r"member-1: started elsewhere \(\w{16}\) than .*member-0 \(\w{16}\)"):
        average_weights([made.folder / "final" / f"member-{i}" for i in range(3)])
    gathered = {"phase": "ensemble", **keys, "members": [str(made.folder / "final" / f"member-{i}") for i in range(2)]}
    with pytest.raises(UserError, match="started elsewhere"):
        run(world, {"gathered": gathered}, name="warm")


def test_reward_models_that_there_are_can_be_gathered(world, made, mesh):
    given = [str(made.folder / "final" / "member-2"), "reward/final"]
    keys = {"phase": "ensemble", "members": given, "member": MEMBER, "combine": "wco"}
    stage = run(world, {"gathered": keys}, name="gathered")["gathered"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        alone = [score(Path(one), mesh) for one in given]
    assert score(stage.folder / "final", mesh) == pytest.approx(np.minimum(*alone), abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"members": 0}, "members must be 1 or more"),
        ({"member": {**MEMBER, "seed": 4}}, "member.seed: each member has its own; set 'seed' itself"),
        ({"members": ["nowhere"]}, "nowhere: no reward model"),
        ({"average": True, "starts": ["sft/final", "base"]}, "'starts' names several"),
        ({"raters": 0.5, "member": {**MEMBER, "data": "pairs.jsonl"}}, "needs pairs by two or more raters"),
        ({"combine": "worst"}, "key 'combine'"),
        ({"member": {**MEMBER, "dat": 1}}, "unknown key 'member.dat'; did you mean 'member.data'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(world, keys, message):
    with pytest.raises(UserError, match=message) as error:
        run(world, {"ensemble": {**KEYS, **keys}}, name="refused")
    assert "\n" not in str(error.value)
    assert not list((world / "runs" / "refused").glob("*/member-*"))


@pytest.mark.long
def test_two_processes_make_what_one_makes(world):
    ppo = {
        "model": "sft/final",
        "scorer": {"ensemble": "@ensemble/final", "combine": "uwo"},
        "prompts": "prompts.jsonl",
        "batch": 16,
        "steps": 2,
        "sampling": {"max_tokens": 20},
    }
    stages = {"ensemble": {**KEYS, "members": 2, "average": True}, "ppo": ppo}
    one = run(world, stages, name="one")
    (world / "pair.yaml").write_text(json.dumps({"name": "pair", "device": "cpu", "stages": stages}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29741"]
    done = subprocess.run(
        [*torchrun, "-m", "trueup", "run", "pair.yaml"],
        cwd=world,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (ensemble,), (other,) = ((world / "runs" / "pair").glob(f"{name}-*") for name in stages)
    for part in ("final/member-0", "final/member-1", "average"):
        a, b = (weights(folder / part) for folder in (one["ensemble"].folder, ensemble))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a), part
    theirs = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(metrics(one["ppo"]), theirs, strict=True):
        for name in ("score", "kl", "disagreement", "value_loss"):
            assert a[name] == pytest.approx(b[name], abs=2e-3), name
