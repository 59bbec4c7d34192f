"""Each phase learns a thing with a known answer, and a broken phase would not."""

from __future__ import annotations

import json

import pytest
import torch

from tests.models_made import make_model, make_tokenizer
from tests.toy import QUESTIONS, constant, metrics, results, rows, run
from trueup.records import Completion, Prompt, UserError

PPO = {
    "model": "sft/final",
    "scorer": "reward/final",
    "prompts": "prompts.jsonl",
    "audit": "toyrules:gold",
    "batch": 32,
    "sampling": {"max_tokens": 20},
    "optim": {"lr": 1e-3},
    "critic_optim": {"lr": 1e-3},
}


def test_sft_teaches_the_base_model_to_stop_and_to_answer(toy):
    before = results(
        run(
            toy,
            {
                "base": {
                    "phase": "generate",
                    "model": "base",
                    "prompts": "prompts.jsonl",
                    "sampling": {"max_tokens": 20},
                }
            },
        )["base"]
    )
    after = json.loads((toy / "sft" / "results.json").read_text())
    assert before["end_rate"] < 0.2 < 0.8 < after["end_rate"]
    said = {json.loads(line)["completion"] for line in (toy / "sft" / "samples.jsonl").read_text().splitlines()}
    assert {"the sky is blue.", "yes please"} <= said


def test_sft_loss_counts_the_reply_alone(toy, tmp_path):
    """Questions of pure noise: were the prompt trained on, the loss could not come near that of two fixed answers."""
    loss = json.loads((toy / "sft" / "results.json").read_text())["best_validation_loss"]
    tokens = 6  # an answer is about so long, and its choice costs ln 2
    assert loss < 2 * 0.693 / tokens


def test_the_reward_model_finds_a_planted_preference(toy):
    found = json.loads((toy / "reward" / "results.json").read_text())
    assert found["accuracy"] >= 0.95 and found["clean"]["clear_accuracy"] >= 0.95
    assert set(found["by_category"]) == {"a", "b"}
    assert found["normalization"]["n"] == 512


def test_flipped_labels_teach_the_opposite(toy):
    flipped = [
        {"prompt": q, "chosen": "yes please", "rejected": "the sky is blue.", "gold_margin": -1.0} for q in QUESTIONS
    ]
    rows(toy / "flipped.jsonl", flipped)
    stage = run(
        toy,
        {
            "flipped": {
                "phase": "reward",
                "model": "sft/final",
                "data": "flipped.jsonl",
                "held_out": 0.2,
                "sampling": {"max_tokens": 20},
                "train": {"batch": 8, "optim": constant(1e-3)},
            }
        },
    )["flipped"]
    assert results(stage)["accuracy"] >= 0.95
    assert results(stage)["clean"]["clear_accuracy"] <= 0.05


def test_ties_teach_nothing_and_weights_count(toy):
    train = {"batch": 8, "optim": constant(1e-3)}
    fair = {"chosen": "the sky is blue.", "rejected": "yes please"}
    rows(toy / "ties.jsonl", [{"prompt": q, **fair, "label": 0.5} for q in QUESTIONS])
    rows(
        toy / "weights.jsonl",
        [{"prompt": q, **fair, "weight": 1.0} for q in QUESTIONS]
        + [{"prompt": q, "chosen": fair["rejected"], "rejected": fair["chosen"], "weight": 0.05} for q in QUESTIONS],
    )
    keys = {"phase": "reward", "model": "sft/final", "held_out": 0.2, "sampling": {"max_tokens": 20}, "train": train}
    ties = run(toy, {"ties": {**keys, "data": "ties.jsonl"}})["ties"]
    assert results(ties)["best_validation_loss"] == pytest.approx(0.6931, abs=0.02)
    weights = run(toy, {"weights": {**keys, "data": "weights.jsonl"}})["weights"]
    shown = [json.loads(line) for line in (weights.folder / "samples.jsonl").read_text().splitlines()]
    blue = [r["score"] for r in shown if "blue" in r["completion"]]
    yes = [r["score"] for r in shown if "yes" in r["completion"]]
    assert sum(blue) / len(blue) > sum(yes) / len(yes) + 0.5


def test_ppo_writes_what_the_scorer_likes(toy):
    stage = run(toy, {"ppo": {**PPO, "steps": 12, "kl_coef": 0.05}})["ppo"]
    log = metrics(stage)
    assert log[0]["audit"] < 0.75 and log[-1]["audit"] >= 0.9
    assert log[-1]["score"] > log[0]["score"] + 0.3
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[-1]["kl"] > 0.3
    assert {
        "entropy",
        "clip_fraction",
        "value_loss",
        "explained_variance",
        "policy_grad_norm",
        "kl_k3",
        "reward",
        "length",
        "end_rate",
        "seconds_generate",
        "seconds_update",
    } <= set(log[0])


def test_a_large_kl_coefficient_holds_it_back(toy):
    held = metrics(run(toy, {"held": {**PPO, "phase": "ppo", "steps": 12, "kl_coef": 20.0}})["held"])
    assert held[-1]["kl"] < 0.1 and held[-1]["audit"] < 0.85


def test_ppo_on_a_callable_without_a_reward_model(toy):
    stage = run(toy, {"rule": {**PPO, "phase": "ppo", "scorer": "toyrules:blue", "steps": 15, "kl_coef": 0.02}})["rule"]
    assert metrics(stage)[-1]["audit"] >= 0.9


@pytest.mark.long
def test_a_reward_model_of_another_family_with_its_own_tokenizer(toy):
    tokenizer = make_tokenizer(
        template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    make_model(toy / "gpt2", tokenizer, family="gpt2")
    stages = run(
        toy,
        {
            "other": {
                "phase": "reward",
                "model": "gpt2",
                "data": "pairs.jsonl",
                "held_out": 0.2,
                "sampling": {"max_tokens": 20},
                "train": {"epochs": 3, "batch": 8, "optim": constant(1e-3)},
            },
            "mixed": {
                **PPO,
                "phase": "ppo",
                "scorer": {"@other/final": 1.0, "toyrules:short": 0.1},
                "steps": 20,
                "kl_coef": 0.05,
            },
        },
    )
    assert results(stages["other"])["accuracy"] >= 0.95
    assert metrics(stages["mixed"])[-1]["audit"] >= 0.9


def test_a_completion_without_its_end_gets_a_score_below_all_others(toy):
    cut = {**PPO, "phase": "ppo", "steps": 1, "sampling": {"max_tokens": 3}, "missing_eos_samples": 32}
    log = metrics(run(toy, {"cut": cut})["cut"])[0]
    assert log["end_rate"] < 0.7  # "the sky is blue." does not fit
    found = run(toy, {"cut": cut})["cut"]
    assert results(found)["missing_eos_score"] < min(
        json.loads(line)["score"] for line in (toy / "reward" / "samples.jsonl").read_text().splitlines()
    )
    shown = [json.loads(line) for line in (found.folder / "samples.jsonl").read_text().splitlines()]
    for row in shown:
        if row["stop"] == "length":
            assert row["score"] == pytest.approx(results(found)["missing_eos_score"], rel=1e-5)


@pytest.mark.parametrize(
    "keys, checked",
    [
        ({"adaptive_kl": {"target": 0.01, "horizon": 100}, "kl_coef": 0.1}, "kl_coef"),
        ({"target_kl": 1e-7, "epochs": 4, "optim": {"lr": 1e-3, "schedule": "linear"}}, "epochs"),
        ({"whiten_rewards": True}, None),
        ({"clip_value": None}, None),
        ({"entropy_coef": 0.01}, "entropy_bonus"),
        ({"precision": "bf16"}, None),
    ],
)
def test_every_choice_runs_and_does_what_it_says(toy, keys, checked):
    log = metrics(run(toy, {"choice": {**PPO, "phase": "ppo", "steps": 3, **keys}})["choice"])
    assert all(isinstance(v, int | float) and v == v for row in log for v in row.values())
    if checked == "kl_coef":
        assert log[1]["kl_coef"] < log[0]["kl_coef"] == 0.1  # KL 0 lies below the target
    if checked == "epochs":
        assert log[-1]["epochs"] < 4
        # 3 steps of 4 x 2 updates; the first two of a step were taken, and the rate falls with the step all the same
        assert [row["policy_lr"] for row in log] == pytest.approx([1e-3 * (1 - (8 * i + 0.5) / 24) for i in range(3)])
    if checked == "entropy_bonus":
        assert log[0]["entropy_bonus"] < 0


def test_ppo_keeps_the_best_on_held_out_prompts(toy):
    stage = run(toy, {"kept": {**PPO, "phase": "ppo", "steps": 6, "held_out": 0.3, "validate_every": 2}})["kept"]
    values = {row["step"]: row["validation"] for row in metrics(stage) if "validation" in row}
    assert set(values) == {1, 3, 5}
    assert results(stage)["best_step"] == max(values, key=values.get)


def test_early_stopping_of_sft(toy):
    stage = run(
        toy,
        {
            "early": {
                "phase": "sft",
                "model": "sft/final",
                "data": "demos.jsonl",
                "sampling": {"max_tokens": 20},
                "train": {"epochs": 20, "batch": 16, "patience": 2, "optim": {"lr": 3e-2}},
            }
        },
    )["early"]
    log = metrics(stage)
    assert len(log) < 20 * len(QUESTIONS) * 8 / 16 * 0.9
    assert results(stage)["best_validation_loss"] == min(r["validation_loss"] for r in log if "validation_loss" in r)


def test_the_self_check_is_fatal_when_sampler_and_training_path_disagree(toy, tmp_path, mesh):
    from trueup.data.chat import Chat
    from trueup.phases import ppo
    from trueup.run import Run

    config = ppo.PPOConfig(
        **{
            **PPO,
            "model": str(toy / "sft/final"),
            "scorer": str(toy / "reward/final"),
            "audit": None,
            "prompts": str(toy / "prompts.jsonl"),
        }
    )
    players = ppo.gather_players(config, mesh, Chat.load(config.model))
    rollout = ppo.make_rollout(config, players, [Prompt.of(q) for q in QUESTIONS[:8]], 0, 0.1)
    run_ = Run(tmp_path, name="check")
    ppo.self_check(config, run_, players, rollout, 0.1)  # healthy
    rollout.sampled_logprobs = rollout.sampled_logprobs * 1.001
    with pytest.raises(ppo.CheckFailed, match="ratio"):
        ppo.self_check(config, run_, players, rollout, 0.1)
    rollout = ppo.make_rollout(config, players, [Prompt.of(q) for q in QUESTIONS[:8]], 0, 0.1)
    rollout.k1 = rollout.k1 + 1e-3 * rollout.batch["mask"]
    with pytest.raises(ppo.CheckFailed, match="KL to the reference"):
        ppo.self_check(config, run_, players, rollout, 0.1)
    rollout = ppo.make_rollout(config, players, [Prompt.of(q) for q in QUESTIONS[:8]], 0, 0.1)
    rollout.rewards = torch.roll(rollout.rewards, 1, dims=1)
    with pytest.raises(ppo.CheckFailed, match="last token"):
        ppo.self_check(config, run_, players, rollout, 0.1)


def test_ppo_refuses_what_its_log_probs_would_not_match(toy):
    with pytest.raises(UserError, match="top_k"):
        run(toy, {"bad": {**PPO, "phase": "ppo", "sampling": {"top_k": 5}}})
    with pytest.raises(UserError, match="finite numbers"):
        run(toy, {"bad": {**PPO, "phase": "ppo", "scorer": "toyrules:broken", "steps": 1}})


def test_scorers_see_whether_an_answer_ended(toy, mesh):
    from trueup.scorers import make_scorer

    scorer = make_scorer(str(toy / "reward/final"), mesh)
    prompt = Prompt.of(QUESTIONS[0])
    whole, cut = scorer.score(
        [prompt, prompt], [Completion("yes please", "eos"), Completion("yes please", "length")]
    ).value
    assert whole != cut


def test_the_critic_is_saved(toy):
    from transformers import AutoModelForSequenceClassification

    stage = run(
        toy, {"cut": {**PPO, "phase": "ppo", "steps": 1, "sampling": {"max_tokens": 3}, "missing_eos_samples": 32}}
    )["cut"]
    AutoModelForSequenceClassification.from_pretrained(stage.folder / "critic")
