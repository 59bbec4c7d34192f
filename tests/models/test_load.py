"""What is saved is what was in memory, plain transformers reads it, and a wrong folder is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.models import tiny
from trueup.models.load import assert_roundtrip, check_head, load_policy, load_scalar, save_model
from trueup.models.net import Net, prepare
from trueup.records import UserError

IDS = tiny.rows()["ids"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "<end>": tiny.END, "a": 2, "b": 3, "<unk>": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "neox", "gemma", "gemma2"])
def test_policy_round_trip(name: str, tmp_path: Path) -> None:
    model = prepare(tiny.policy(name))
    folder = save_model(model, tmp_path / "policy", tokenizer())
    assert_roundtrip(model, folder, IDS)
    again = load_policy(folder)
    assert_roundtrip(again, folder, IDS)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (plain(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max() < 1e-5
    assert any(file.suffix == ".safetensors" for file in folder.iterdir())
    assert not any(file.suffix in (".bin", ".pt") for file in folder.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma"])
def test_reward_round_trip_and_plain_reading(name: str, tmp_path: Path) -> None:
    """Plain transformers, given right-padded rows, reads the score at the token where we read it."""
    model = prepare(tiny.scalar(name))
    figures = {"score_mean": 0.3, "score_std": 2.0, "n": 8}
    folder = save_model(model, tmp_path / "reward", tokenizer(), extra_config={"trueup": figures})
    assert_roundtrip(model, folder, IDS)
    loaded = load_scalar(folder)
    assert not loaded.fresh and loaded.model.config.trueup == figures
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == tiny.PAD

    batch = tiny.rows()
    past = torch.arange(batch["ids"].shape[1])[None] >= batch["lengths"][:, None]
    ids = batch["ids"].masked_fill(past, tiny.PAD)
    ids[torch.arange(5), batch["lengths"] - 1] = tiny.END  # rows that end as ours do
    with torch.no_grad():
        ours = Net(loaded.model, "reward")({"ids": ids, "lengths": batch["lengths"]})["scores"]
        theirs = plain(input_ids=ids, attention_mask=(~past).long()).logits[:, 0]
    assert (ours - theirs).abs().max() < 1e-5


def test_tokenizer_template_and_generation_config_lie_beside(tmp_path: Path) -> None:
    folder = save_model(tiny.policy(), tmp_path / "policy", tokenizer(), end_id=7)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (7, tiny.PAD)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer().chat_template and again.encode("a b") == [2, 3]


def test_pad_must_not_be_the_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must differ"):
        save_model(tiny.scalar(), tmp_path / "reward", tokenizer(), pad_id=tiny.END)
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = save_model(tiny.policy(), tmp_path / "policy", tokenizer())
    (folder / "stale").write_text("")
    save_model(tiny.policy("gpt2"), folder, tokenizer())
    assert not (folder / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert load_policy(folder).config.model_type == "gpt2"


def test_round_trip_notices_one_changed_weight(tmp_path: Path) -> None:
    model = prepare(tiny.policy())
    folder = save_model(model, tmp_path / "policy", tokenizer())
    model.model.norm.weight.data[3] *= 1.0001
    with pytest.raises(RuntimeError, match="not what was in memory"):
        assert_roundtrip(model, folder, IDS)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_head(name: str, tmp_path: Path) -> None:
    policy = prepare(tiny.policy(name))
    folder = save_model(policy, tmp_path / "policy", tokenizer(), extra_config={"trueup": {"note": 1}})
    first, again, other = (load_scalar(folder, seed=seed) for seed in (3, 3, 4))
    assert first.fresh and not hasattr(first.model.config, "trueup")
    head = first.model.score.weight
    assert torch.equal(head, again.model.score.weight) and not torch.equal(head, other.model.score.weight)
    assert first.model.score.bias is None and head.shape == (1, 32)
    draws = torch.cat([load_scalar(folder, seed=s).model.score.weight.detach() for s in range(12)])
    assert abs(float(draws.std()) * 33**0.5 - 1) < 0.12
    with torch.no_grad():
        states = policy.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(states, first.model.base_model(input_ids=IDS).last_hidden_state)


def test_dropout_is_off(tmp_path: Path) -> None:
    """In train mode too, which a trainer around the model may set."""
    model = tiny.policy("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    net, batch = Net(model, "policy"), tiny.rows()
    first = net(batch)["logprobs"]
    assert torch.equal(first, net(batch)["logprobs"])
    net.train()
    assert torch.equal(first, net(batch)["logprobs"])


def one_line(call) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    policy = save_model(tiny.policy(), tmp_path / "policy", tokenizer())
    reward = save_model(tiny.scalar(), tmp_path / "reward", tokenizer())
    assert "no such folder" in one_line(lambda: load_policy(tmp_path / "nowhere"))
    assert "no config.json" in one_line(lambda: load_policy(tmp_path))
    assert "reward model" in one_line(lambda: load_policy(reward))
    assert "language model" in one_line(lambda: load_scalar(policy))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{")
    assert "not a model" in one_line(lambda: load_policy(tmp_path / "text"))
    (policy / "model.safetensors").unlink()
    assert str(policy) in one_line(lambda: load_policy(policy))
    assert str(policy) in one_line(lambda: load_scalar(policy, seed=0))
    (reward / "model.safetensors").write_bytes(b"junk")
    assert str(reward) in one_line(lambda: load_scalar(reward))


def test_missing_weights_and_labels_are_told(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny.PACKED["llama"]().to_dict(), "num_hidden_layers": 1})
    folder = save_model(LlamaForCausalLM(config), tmp_path / "policy")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"num_hidden_layers": 2}))
    assert "weights lack model.layers.1" in one_line(lambda: load_policy(folder))
    assert "weights lack model.layers.1" in one_line(lambda: load_scalar(folder, seed=0))
    config.num_labels = 3
    folder = save_model(LlamaForSequenceClassification(config), tmp_path / "three", end_id=2, pad_id=0)
    assert "3 labels" in one_line(lambda: load_scalar(folder))


def test_a_family_whose_logits_are_not_its_head_is_refused() -> None:
    """ModernBERT's decoder has a layer between the last hidden state and the vocabulary."""
    config = ModernBertDecoderConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    model = ModernBertDecoderForCausalLM(config).eval()
    assert "not supported" in one_line(lambda: check_head(model, "modernbert"))
    check_head(tiny.policy("cohere"), "cohere")
