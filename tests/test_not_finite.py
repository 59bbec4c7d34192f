"""Losses, gradients and scores that are no numbers: the stage stops, says where, and keeps its last checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.toy import QUESTIONS, rows
from tests.toy import run as run_stages
from trueup.data.batches import Order
from trueup.records import UserError
from trueup.run import Best, Run

TRAIN = {"epochs": 1, "batch": 16, "save_every": 1, "keep": {"share": 1}, "optim": {"lr": 1e-3}}
PPO = {
    "phase": "ppo",
    "model": "sft/final",
    "scorer": "reward/final",
    "prompts": "prompts.jsonl",
    "batch": 16,
    "steps": 4,
    "sampling": {"max_tokens": 20},
    "save_every": 1,
    "keep": {"share": 1},
    "missing_eos_score": -3.0,
}


def told(folder: Path, stages: dict, name: str) -> str:
    with pytest.raises(UserError) as error:
        run_stages(folder, stages, name=name)
    assert "\n" not in str(error.value)
    return str(error.value)


def kept(folder: Path, name: str) -> tuple[Path, list[int]]:
    (made,) = (folder / "runs" / name).glob("*-*")
    assert json.loads((made / "manifest.json").read_text())["status"] == "stopped"
    assert not (made / "final").exists() and not list(made.glob(".*"))
    return made, [int(p.name.partition("-")[2]) for p in made.glob("checkpoint-*")]


def late(rows: int, batch: int) -> int:
    """A seed with which the last row is in no batch before the third."""
    return next(s for s in range(99) if all(rows - 1 not in Order(rows, batch, s).at(step) for step in (0, 1)))


def poisoned(source: Path, out: Path, token: str) -> Path:
    """The model, but the input embedding of one token is NaN: it fails on the rows that hold the token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(token)] = float("nan")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_sft_on_a_row_that_the_model_fails_on(toy):
    poisoned(toy / "base", toy / "poisoned", "$")
    demos = [{"prompt": q, "completion": "yes please"} for q in QUESTIONS]
    rows(toy / "one-bad.jsonl", [*demos, {"prompt": "what does it cost in $?", "completion": "nothing"}])
    keys = {"model": "poisoned", "data": "one-bad.jsonl", "held_out": 0, "seed": late(65, 16), "train": TRAIN}
    said = told(toy, {"sft": keys}, "nan-sft")
    made, (last,) = kept(toy, "nan-sft")
    assert f"stage 'sft', step {last}: loss 'loss' is nan in 1 of 16 rows, weights unchanged" in said
    assert "what does it cost in $?" in said and f"checkpoint-{last} is kept" in said and last > 0
    state = torch.load(made / f"checkpoint-{last}" / "state.pt")["learner"]
    assert all(v.isfinite().all() for k, v in state.items() if k.startswith("adam"))
    assert len((made / "metrics.jsonl").read_text().splitlines()) == last


def test_a_reward_model_on_a_pair_whose_loss_is_infinite(toy):
    pairs = [{"prompt": q, "chosen": "the sky is blue.", "rejected": "yes please"} for q in QUESTIONS]
    rows(toy / "far.jsonl", [*pairs, {**pairs[0], "prompt": "how far?", "margin": 2.9e38, "weight": 100}])
    keys = {"model": "sft/final", "data": "far.jsonl", "held_out": 0, "seed": late(65, 8)}
    keys["train"] = {**TRAIN, "batch": 8}
    said = told(toy, {"reward": keys}, "nan-reward")
    _, (last,) = kept(toy, "nan-reward")
    assert f"stage 'reward', step {last}: loss 'loss' is inf in 1 of 8 rows" in said and "'how far?'" in said


def test_ppo_whose_policy_diverges(toy):
    said = told(toy, {"ppo": {**PPO, "optim": {"lr": 1e30}}}, "nan-ppo")
    assert re.match(
        r"stage 'ppo', step 0: (loss 'policy_loss' is nan in 8 of 8 rows|gradient of \S+ is not finite)", said
    )
    assert said.endswith("weights unchanged; no checkpoint yet")
    assert kept(toy, "nan-ppo")[1] == []


def test_ppo_on_a_prompt_that_the_policy_fails_on(toy):
    poisoned(toy / "sft" / "final", toy / "poisoned-sft", "$")
    rows(toy / "costs.jsonl", [*({"prompt": q} for q in QUESTIONS[:40]), {"prompt": "what does it cost in $?"}])
    keys = {**PPO, "model": "poisoned-sft", "prompts": "costs.jsonl", "batch": 8, "steps": 9, "seed": late(41, 8)}
    said = told(toy, {"ppo": keys}, "nan-prompt")
    _, steps = kept(toy, "nan-prompt")
    assert "the policy's logprobs are not finite in 1 of 8 rows: the first answers 'what does it cost in $?'" in said
    assert f"step {max(steps)}: " in said and f"checkpoint-{max(steps)} is kept" in said


def test_ppo_whose_reward_model_is_damaged(toy):
    from safetensors.torch import load_file, save_file

    broken = toy / "broken-reward"
    broken.mkdir()
    for file in (toy / "reward" / "final").iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = told(toy, {"ppo": {**PPO, "scorer": "broken-reward"}}, "nan-scorer")
    assert said.startswith("broken-reward: its score is nan for an answer to 'what is the colour of")


def test_a_validation_figure_that_is_no_number_is_not_the_best(tmp_path):
    with Run(tmp_path / "r", name="r") as run:
        best = Best(run)
        for bad in (float("nan"), float("-inf")):
            with pytest.raises(FloatingPointError, match="validation figure"):
                best.offer(0, bad, lambda folder: None)
        assert best.value is None and not (tmp_path / "r" / "best").exists()
