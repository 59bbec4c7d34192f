"""Every phase with an adapter: it learns, the base stays as it was and is held once, and a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.test_lora import storages
from tests.phases.test_learning import PPO
from tests.toy import QUESTIONS, constant, metrics, rows, run
from trueup.data.chat import Chat
from trueup.models.lora import Base, Lora, adapted, fingerprint, own
from trueup.models.roles import load_reward
from trueup.phases import ppo
from trueup.records import UserError

LORA = {"r": 8, "alpha": 16}
SFT = {
    "phase": "sft",
    "model": "sft/final",
    "data": "answers.jsonl",
    "held_out": 0.15,
    "lora": LORA,
    "sampling": {"max_tokens": 20},
    "train": {"epochs": 8, "batch": 8, "optim": constant(5e-3)},
}
REWARD = {
    "phase": "reward",
    "model": "sft/final",
    "data": "pairs.jsonl",
    "held_out": 0.2,
    "lora": LORA,
    "sampling": {"max_tokens": 20},
    "train": {"epochs": 2, "batch": 8, "optim": constant(3e-3)},
}
ON_ONE_BASE = {**PPO, "phase": "ppo", "scorer": "lora-reward/final", "lora": LORA}


@pytest.fixture(scope="module")
def lora_toy(toy):
    """The toy with demonstrations of another answer, and a reward model that is an adapter on the SFT model."""
    rows(toy / "answers.jsonl", [{"prompt": q, "completion": "y is blue."} for q in QUESTIONS])
    (toy / "lora-reward").symlink_to(run(toy, {"reward": REWARD}, name="lora-reward")["reward"].folder)
    return toy


def players_of(toy, mesh, **keys) -> ppo.Players:
    paths = {"model": "sft/final", "scorer": "lora-reward/final", **keys}
    config = ppo.PPOConfig(
        **{k: v for k, v in {**ON_ONE_BASE, "prompts": "", "audit": None}.items() if k != "phase"}
        | {k: str(toy / v) for k, v in paths.items()}
    )
    return ppo.gather_players(config, mesh, Chat.load(config.model))


def only_layers_moved(made: Path, start: Path) -> bool:
    """Whether of the start's weights those of the adapted layers are others in `made`, and no others."""
    plain, base = (load_file(folder / "model.safetensors") for folder in (made, start))
    moved = {key for key in plain.keys() & base.keys() if not torch.equal(plain[key], base[key])}
    return bool(moved) and all(key.endswith("_proj.weight") for key in moved)


def test_sft_with_an_adapter_learns(lora_toy):
    stage = run(lora_toy, {"sft": SFT}, name="lora-sft")["sft"]
    said = [json.loads(line)["completion"] for line in (stage.folder / "samples.jsonl").read_text().splitlines()]
    assert said.count("y is blue.") > 0.7 * len(said)  # the start never says that
    assert only_layers_moved(stage.folder / "final", lora_toy / "sft/final")
    adapter = stage.folder / "final/adapter"
    assert {p.name for p in (stage.folder / "best").iterdir()} == {p.name for p in adapter.iterdir()}
    start = AutoModelForCausalLM.from_pretrained(lora_toy / "sft/final")
    assert json.loads((adapter / "base.json").read_text())["sha256"] == fingerprint(start.base_model)


def test_a_reward_adapter_finds_the_planted_preference_and_its_head_is_kept(lora_toy):
    folder = lora_toy / "lora-reward"
    assert json.loads((folder / "results.json").read_text())["accuracy"] >= 0.95
    head = load_file(folder / "final/adapter/adapter_model.safetensors")["base_model.model.score.weight"]
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    assert torch.equal(plain.score.weight, head)
    base = Base(str(lora_toy / "sft/final"), Lora())
    one, other = load_reward(folder / "final", base), load_reward(folder / "final")
    assert adapted(one.model) and not adapted(other.model)
    assert (one.mean, one.std) == (other.mean, other.std) and one.std != 1
    batch = {"ids": torch.arange(12).view(2, 6), "lengths": torch.tensor([6, 4])}
    assert (one(batch)["scores"] - other(batch)["scores"]).abs().max() < 1e-4


def test_ppo_learns_on_one_base_which_stays_as_it_was(lora_toy):
    stage = run(lora_toy, {"ppo": {**ON_ONE_BASE, "steps": 14, "kl_coef": 0.05}}, name="lora-ppo")["ppo"]
    log = metrics(stage)
    assert log[0]["audit"] < 0.65 and sum(row["audit"] for row in log[-4:]) / 4 > 0.8
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0.3
    assert all(only_layers_moved(stage.folder / made, lora_toy / "sft/final") for made in ("final", "critic"))
    adapter = load_file(stage.folder / "critic/adapter/adapter_model.safetensors")
    assert "base_model.model.score.weight" in adapter
    AutoModelForSequenceClassification.from_pretrained(stage.folder / "critic")


def test_in_ppo_the_base_is_in_memory_once(lora_toy, mesh):
    players = players_of(lora_toy, mesh)
    nets = [players.policy.net, players.critic.net, players.reference, players.scorer.net]
    base = players.reference.model
    mine = {p.untyped_storage().data_ptr() for net in nets for p in own(net.model).values()}
    affine = {b.untyped_storage().data_ptr() for net in nets for b in (net.mean, net.std)}
    assert storages(*nets) == storages(base) | mine | affine
    sampler = players.sampler.model
    assert sampler is players.policy.net.model


def test_the_critic_starts_as_the_reward_models_adapter(lora_toy, mesh):
    players = players_of(lora_toy, mesh)
    critic, scorer = players.critic.net, players.scorer.net
    assert (critic.mean, critic.std) == (scorer.mean, scorer.std) and critic.std != 1
    theirs = own(scorer.model)
    assert all(torch.equal(p, theirs[name]) and p is not theirs[name] for name, p in own(critic.model).items())
    assert any(p.any() for name, p in theirs.items() if "lora_B" in name)


def test_a_whole_reward_model_is_shared_with_the_critic(lora_toy, mesh):
    players = players_of(lora_toy, mesh, scorer="reward/final")
    critic, scorer = players.critic.net, players.scorer.net
    assert adapted(critic.model) and not adapted(scorer.model)
    mine = {p.untyped_storage().data_ptr() for p in own(critic.model).values()}
    assert storages(critic.model) - mine <= storages(scorer.model)


@pytest.mark.parametrize(
    "keys",
    [
        {"precision": "bf16"},
        {"lora": {**LORA, "quantize": "nf4"}},
        {"scorer": "toyrules:blue"},
        {"reference": "base"},
        {"advantage": "rloo", "samples": 4},
        {"optim": {"lr": 3e-3, "gradient_checkpointing": True}, "held_out": 0.3, "validate_every": 1},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_every_choice_runs(lora_toy, keys):
    stage = run(lora_toy, {"ppo": {**ON_ONE_BASE, "steps": 2, **keys}}, name="lora-choices")["ppo"]
    log = metrics(stage)
    assert all(isinstance(v, int | float) and v == v for row in log for v in row.values())
    assert (log[0]["kl"] == 0) == ("reference" not in keys)
    AutoModelForCausalLM.from_pretrained(stage.folder / "final")


def test_a_checkpoint_holds_only_what_learns(lora_toy, mesh):
    players = players_of(lora_toy, mesh)
    for learner in (players.policy, players.critic):
        names = {name.removeprefix("param.") for name in learner.state() if name.startswith("param.")}
        assert names == {f"model.{name}" for name in own(learner.net.model)}


def test_an_adapter_on_a_reward_model_is_refused_for_a_policy(lora_toy):
    with pytest.raises(UserError, match="language model is needed"):
        run(lora_toy, {"sft": {**SFT, "model": "reward/final"}}, name="bad")
