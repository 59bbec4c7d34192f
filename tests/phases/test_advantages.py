"""One loop, four kinds of advantages, the KL penalty in two places: each learns, and is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.phases.test_learning import PPO
from tests.phases.test_ppo import players_of
from tests.toy import QUESTIONS, metrics, results, rows, run
from trueup.phases import ppo
from trueup.records import Prompt, UserError

KEYS = {**PPO, "phase": "ppo"}
GROUPS = {"rloo": 4, "grpo": 4, "reinforce": 1, "gae": 1}


def gold(log: list[dict], last: int = 4) -> float:
    return sum(row["audit"] for row in log[-last:]) / last


@pytest.mark.parametrize(
    "advantage, kl_in",
    [("rloo", "reward"), ("rloo", "loss"), ("grpo", "loss"), ("reinforce", "reward"), ("gae", "loss")],
)
def test_it_writes_what_the_scorer_likes(toy, advantage, kl_in):
    keys = {"advantage": advantage, "samples": GROUPS[advantage], "kl_in": kl_in, "kl_coef": 0.02, "steps": 15}
    stage = run(toy, {"learns": {**KEYS, **keys, "scorer": "toyrules:blue"}})["learns"]
    log = metrics(stage)
    assert log[0]["audit"] < 0.75 and gold(log) >= 0.85
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0.3
    critic = advantage == "gae"
    assert (stage.folder / "critic").exists() == critic
    assert ({"value_loss", "critic_lr", "value", "explained_variance"} & set(log[0]) != set()) == critic
    assert ("kl_loss" in log[0]) == (kl_in == "loss") and ("flat_groups" in log[0]) == (GROUPS[advantage] > 1)
    assert ("baseline" in log[0]) == (advantage == "reinforce")
    if kl_in == "loss":
        assert 0 < log[-1]["kl_loss"] < 0.2


@pytest.mark.parametrize("advantage, kl_in", [("rloo", "loss"), ("gae", "loss"), ("rloo", "reward")])
def test_a_large_kl_coefficient_holds_it_back(toy, advantage, kl_in):
    keys = {"advantage": advantage, "samples": GROUPS[advantage], "kl_in": kl_in, "kl_coef": 20.0, "steps": 12}
    log = metrics(run(toy, {"held": {**KEYS, **keys}})["held"])
    assert gold(log) < 0.75 and log[-1]["kl"] < 1.0


def made(toy, mesh, samples: int, kl_coef: float = 0.1, **keys) -> tuple[ppo.PPOConfig, ppo.Players, ppo.Rollout]:
    """A rollout of two prompts, against a reference that is another model, so that KL is not 0."""
    players = players_of(toy, mesh, samples=samples, reference=str(toy / "base"), **keys)
    config = ppo.PPOConfig(**{**PPO, "model": "", "samples": samples, **keys})
    asked = [Prompt.of(q) for q in QUESTIONS[:2] for _ in range(samples)]
    return config, players, ppo.make_rollout(config, players, asked, 0, kl_coef)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("advantage, scale", [("rloo", True), ("grpo", True), ("grpo", False), ("reinforce", True)])
def test_every_token_of_a_completion_has_its_advantage_over_its_group(toy, mesh, advantage, scale, kl_in):
    config, players, rollout = made(toy, mesh, 4, advantage=advantage, scale_rewards=scale, kl_in=kl_in)
    assert len({c.text for c in rollout.completions[:4]}) > 1  # one prompt, four draws
    players.baseline.value = 0.25
    found = ppo.estimate_advantages(config, players, rollout)
    assert set(found) == {"advantages"} and ("ref_logprobs" in rollout.batch) == (kl_in == "loss")
    penalty = 0.1 if kl_in == "reward" else 0.0
    rewards = [float(s - penalty * k.sum()) for s, k in zip(rollout.scores, rollout.k1, strict=True)]
    for i, (row, mask) in enumerate(zip(found["advantages"], rollout.batch["mask"], strict=True)):
        others = [r for j, r in enumerate(rewards) if j // 4 == i // 4 and j != i]
        mean = (sum(others) + rewards[i]) / 4
        spread = math.sqrt(sum((r - mean) ** 2 for r in (*others, rewards[i])) / 3) if scale else 1 - 1e-4
        expected = {
            "rloo": rewards[i] - sum(others) / 3,
            "grpo": (rewards[i] - mean) / (spread + 1e-4),
            "reinforce": rewards[i] - 0.25,
        }
        assert row[mask].tolist() == pytest.approx([expected[advantage]] * int(mask.sum()), abs=1e-4)
        assert not row[~mask].any()


def test_what_is_logged_is_score_less_penalty_wherever_the_penalty_is(toy, mesh):
    rollouts = [made(toy, mesh, 2, advantage="rloo", kl_in=place)[2] for place in ("reward", "loss")]
    assert torch.equal(rollouts[0].rewards, rollouts[1].rewards)


def test_flat_groups_are_counted(toy):
    (toy / "flatrules.py").write_text(
        "def ab(prompts, completions):\n"
        "    first = [p.text.split()[-1][0] == 'a' for p in prompts]\n"
        "    return [float(i) if f else 1.0 for i, f in enumerate(first)]\n"
    )
    rows(toy / "two.jsonl", [{"prompt": QUESTIONS[0]}, {"prompt": QUESTIONS[8]}])
    keys = {"scorer": "flatrules:ab", "prompts": "two.jsonl", "advantage": "rloo", "samples": 4, "batch": 8, "steps": 1}
    log = metrics(run(toy, {"flat": {**KEYS, **keys, "missing_eos_score": 1.0}})["flat"])
    assert log[0]["flat_groups"] == 0.5


def test_the_best_policy_is_kept_without_a_critic(toy):
    keys = {"advantage": "grpo", "samples": 4, "steps": 4, "held_out": 0.3, "validate_every": 2}
    stage = run(toy, {"kept": {**KEYS, **keys}})["kept"]
    values = {row["step"]: row["validation"] for row in metrics(stage) if "validation" in row}
    assert results(stage)["best_step"] == max(values, key=values.get)
    assert not (stage.folder / "best" / "critic").exists()


def test_interrupted_it_goes_on_with_its_baseline(toy):
    (toy / "stoprules.py").write_text(
        "import itertools, pathlib\n"
        "CALLS = itertools.count()\n"
        "def blue(prompts, completions):\n"
        "    if pathlib.Path('stop').exists() and next(CALLS) == 5:\n"
        "        raise KeyboardInterrupt\n"
        "    return [3.0 + ('blue' in c.text) for c in completions]\n"
    )
    keys = {**KEYS, "scorer": "stoprules:blue", "advantage": "reinforce", "kl_in": "loss", "steps": 7}
    keys |= {"save_every": 2, "keep": {"share": 1}}
    whole = run(toy, {"cut": keys}, name="whole-baseline")["cut"]
    (toy / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run(toy, {"cut": keys}, name="cut-baseline")
    cut = run(toy, {"cut": keys}, name="cut-baseline")["cut"]
    a, b = (
        [{k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))} for row in metrics(stage)]
        for stage in (whole, cut)
    )
    assert a == b and 3 < a[-1]["baseline"] < 4


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"advantage": "rloo"}, "samples must be 2 or more"),
        ({"advantage": "grpo", "samples": 1}, "advantage=grpo compares completions of one prompt"),
        ({"advantage": "rloo", "samples": 3}, r"batch \(32\) must be a multiple of samples \(3\)"),
        ({"minibatches": 3}, r"batch \(32\) must be a multiple of minibatches \(3\)"),
        ({"advantage": "reinforce", "critic": "reward/final"}, "advantage=reinforce has no critic"),
    ],
)
def test_choices_that_do_not_fit_are_told_in_one_line(toy, keys, said):
    with pytest.raises(UserError, match=said) as error:
        run(toy, {"bad": {**KEYS, **keys}})
    assert "\n" not in str(error.value)
