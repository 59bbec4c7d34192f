"""What is exported loads with plain transformers, answers as the run's model does, and says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.phases.test_learning import PPO
from tests.toy import QUESTIONS, run
from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.export import export, push
from trueup.models.load import load_policy
from trueup.records import Completion, Prompt, UserError
from trueup.scorers.reward_model import RewardModel

STAGES = {
    "ppo": {**PPO, "steps": 2, "lora": {"r": 4}, "optim": {"lr": 1e-2}},
    "evaluate": {
        "models": {"sft": "sft/final", "ppo": "@ppo/final"},
        "prompts": "prompts.jsonl",
        "gold": "toyrules:gold",
        "limit": 12,
        "sampling": {"max_tokens": 20},
    },
}


@pytest.fixture(scope="module")
def made(toy) -> tuple[Path, Path]:
    """The run's folder and its export, asked for from another folder than that of the run."""
    stages = {name: {**keys, "prompts": str(toy / "prompts.jsonl")} for name, keys in STAGES.items()}
    stage = run(toy, stages, name="exported")["ppo"]
    return stage.folder, export(stage.folder.parent)


def card_of(folder: Path) -> tuple[dict, str]:
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_plain_transformers_answers_the_same_greedily(made):
    stage, folder = made
    assert folder == stage.parent / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = Chat.load(stage / "final")
    sampler = Sampler.speaking(chat, load_policy(stage / "final"), Mesh())
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS[:6]]
    ours = sampler.sample([chat.prompt_ids(p) for p in prompts], Sampling(max_tokens=20, greedy=True), seed=0)
    for prompt, completion in zip(prompts, ours, strict=True):
        inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tuple(out.tolist()) == completion.ids
    assert any(c.stop == "eos" for c in ours)


def test_the_files_are_the_models_and_a_card(made):
    stage, folder = made
    assert {p.name for p in folder.iterdir()} == {p.name for p in (stage / "final").iterdir()} - {"adapter"} | {
        "README.md"
    }
    assert (folder / "model.safetensors").read_bytes() == (stage / "final/model.safetensors").read_bytes()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == Chat.load(folder).end_id


def test_the_card_tells_the_whole_line_from_the_records(made):
    stage, folder = made
    header, text = card_of(folder)
    assert header["pipeline_tag"] == "text-generation" and "trueup" in header["tags"] and "base_model" not in header
    assert "sft -> reward -> ppo" in text and "Base model: base" in text
    for said in (
        "demos.jsonl; 432 rows to train on",
        "pairs.jsonl",
        "prompts.jsonl",
        "win rate against sft",
        "the gold score",
    ):
        assert said in text, said
    found = json.loads(next(stage.parent.glob("evaluate-*/results.json")).read_text())["models"]["ppo"]["sampled"]
    assert f"{100 * found['win_rate']:.0f}% [" in text and "not held out" in text
    blocks = [yaml.safe_load(b.split("```")[0]) for b in text.split("```yaml\n")[1:]]
    assert [next(iter(b)) for b in blocks] == ["sft", "reward", "ppo"]
    assert blocks[2]["ppo"]["lora"]["r"] == 4 and blocks[2]["ppo"]["model"] == "sft/final"
    assert str(stage.parents[2]) not in text, "a folder of this machine"


def test_a_run_without_a_policy_exports_its_reward_model_and_the_card_says_how_to_score(toy, monkeypatch):
    stages = {"reward": {"model": "sft/final", "data": "pairs.jsonl", "sampling": {"max_tokens": 20}}}
    stages["reward"]["train"] = {"epochs": 1, "batch": 16}
    stage = run(toy, stages, name="scorer")["reward"]
    folder = export(stage.folder.parent)
    _, text = card_of(folder)
    code = text.split("```python\n")[1].split("```")[0].replace('"user", "content": "..."', '"user", "content": "Hi"')
    monkeypatch.chdir(folder)
    said: dict = {}
    exec(code.replace('"assistant", "content": "..."', '"assistant", "content": "the sky is blue."'), said)
    ours = RewardModel(str(stage.folder / "final"), Mesh()).score([Prompt.of("Hi")], [Completion("the sky is blue.")])
    assert said["score"] == pytest.approx(ours.value[0], abs=1e-4)


def test_without_an_evaluation_the_card_says_so(toy):
    header, text = card_of(export(toy / "reward", toy / "out-reward"))
    assert header["pipeline_tag"] == "text-classification"
    assert "not compared with another one" in text and "orders 100% [" in text
    model = AutoModelForSequenceClassification.from_pretrained(toy / "out-reward")
    assert model.config.num_labels == 1 and not torch.isnan(model.score.weight).any()


def test_an_export_is_replaced_and_nothing_else_is(made, tmp_path):
    stage, folder = made
    (folder / "stale").write_text("")
    assert export(stage) == stage / "export" and export(stage, folder) == folder
    assert not (folder / "stale").exists()
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="would be replaced"):
        export(stage, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_has_no_record_or_is_not_done_is_refused(toy):
    with pytest.raises(UserError, match="no record of how it was made"):
        export(toy / "base")
    with pytest.raises(UserError, match="neither a run"):
        export(toy / "nowhere")
    folder = run(toy, {"sft": {"model": "sft/final", "data": "demos.jsonl", "train": {"epochs": 0.1}}}, name="half")[
        "sft"
    ].folder
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, "status": "stopped"}))
    with pytest.raises(UserError, match="not done"):
        export(folder)


@pytest.mark.parametrize("name, said", [("someone/model", "someone/model: "), ("not a name", "not a name: ")])
def test_a_push_that_fails_is_told_in_one_line_and_leaves_the_export(made, monkeypatch, name, said):
    _, folder = made
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError) as error:
        push(folder, name)
    assert said in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)
    assert (folder / "README.md").exists()
