"""PPO's promises that are not about learning: its checks, its critic's start, what it keeps."""

from __future__ import annotations

import pytest
import torch

from tests.phases.test_learning import PPO
from tests.toy import metrics, results, run
from trueup.data.chat import Chat
from trueup.phases import ppo
from trueup.records import Prompt
from trueup.world import base_path, prompts

KEYS = {**PPO, "phase": "ppo", "steps": 1}


def players_of(toy, mesh, **keys) -> ppo.Players:
    paths = {"model": str(toy / "sft/final"), "scorer": str(toy / "reward/final"), "prompts": "none", "audit": None}
    config = ppo.PPOConfig(**{**PPO, **paths, **keys})
    return ppo.gather_players(config, mesh, Chat.load(config.model))


def test_a_batch_beyond_the_token_budget_passes_the_self_check(toy):
    """Policy and reference go through the model in the same parts, so that equal weights give a KL of 0."""
    small = {**KEYS, "optim": {"lr": 1e-3, "micro_tokens": 150}, "critic_optim": {"lr": 1e-3, "micro_tokens": 90}}
    assert metrics(run(toy, {"parts": small})["parts"])[0]["kl"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_base_model_passes_the_self_check(tmp_path, mesh, precision):
    from trueup.run import Run

    config = ppo.PPOConfig(
        model=str(base_path()), scorer="trueup.world:gold", prompts="", precision=precision, missing_eos_score=0.0
    )
    players = ppo.gather_players(config, mesh, Chat.load(config.model))
    rollout = ppo.make_rollout(config, players, prompts("ppo", 12), 0, 0.1)
    ppo.self_check(config, Run(tmp_path, name="check"), players, rollout, 0.1)
    assert float(rollout.k1.abs().max()) == 0
    rollout.sampled_logprobs = torch.roll(rollout.sampled_logprobs, 1, dims=1)
    with pytest.raises(ppo.CheckFailed, match="ratio"):
        ppo.self_check(config, Run(tmp_path, name="check"), players, rollout, 0.1)


@pytest.mark.parametrize(
    "scorer, start",
    [
        ("{toy}/reward/final", True),
        ({"{toy}/reward/final": 1.0, "toyrules:short": 5.0}, True),
        ("toyrules:blue", False),
    ],
)
def test_the_critic_starts_as_the_reward_model_that_counts_most(toy, mesh, monkeypatch, scorer, start):
    from trueup.models.roles import load_reward

    monkeypatch.chdir(toy)
    full = {k.format(toy=toy): v for k, v in scorer.items()} if isinstance(scorer, dict) else scorer.format(toy=toy)
    critic = players_of(toy, mesh, scorer=full).critic.net
    reward = load_reward(toy / "reward/final")
    same = all(
        torch.equal(a, b) for a, b in zip(critic.model.parameters(), reward.model.parameters(), strict=True)
    ) and (critic.mean, critic.std) == (reward.mean, reward.std)
    assert same == start
    if not start:  # the policy's own body, a fresh head
        policy = dict(players_of(toy, mesh).policy.net.model.base_model.named_parameters())
        assert all(torch.equal(p, policy[name]) for name, p in critic.model.base_model.named_parameters())


def test_where_all_samples_score_alike_a_missing_end_still_costs(toy, mesh, monkeypatch):
    monkeypatch.chdir(toy)
    (toy / "constant.py").write_text("def one(prompts, completions):\n    return [1.0 for _ in completions]\n")
    players = players_of(toy, mesh, scorer="constant:one")
    config = ppo.PPOConfig(**{**PPO, "model": "", "missing_eos_samples": 4})
    assert ppo.score_of_the_unended(config, players, [Prompt.of("what is the colour of aa?")]) == 0.0


def test_validation_has_one_yardstick_though_the_coefficient_moves(toy):
    still = {"optim": {"lr": 1e-12}, "critic_optim": {"lr": 1e-12}, "reference": "base", "kl_coef": 0.1}
    moving = {**still, "adaptive_kl": {"target": 0.01, "horizon": 32}, "held_out": 0.3, "validate_every": 1}
    log = metrics(run(toy, {"still": {**KEYS, **moving, "steps": 3}})["still"])
    assert log[2]["kl_coef"] > 1.3 * log[0]["kl_coef"]
    assert len({row["validation"] for row in log}) == 1


def test_patience_ends_ppo_and_the_results_are_those_of_the_kept_policy(toy):
    keys = {"steps": 30, "held_out": 0.3, "validate_every": 1, "patience": 3, "kl_coef": 0.05, "optim": {"lr": 2e-3}}
    stage = run(toy, {"patient": {**KEYS, **keys}})["patient"]
    log, found = metrics(stage), results(stage)
    assert len(log) == found["best_step"] + 1 + 3 < 30
    assert found["score"] == log[found["best_step"] + 1]["score"]
    kept, last = (stage.folder / name / "model.safetensors" for name in ("best/critic", "critic"))
    from safetensors.torch import load_file

    a, b = load_file(kept), load_file(last)
    assert all(torch.equal(a[k], b[k]) for k in a)
