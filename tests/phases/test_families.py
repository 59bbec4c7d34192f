"""Every family with every kind of tokenizer goes the whole way: SFT, reward model, PPO with its self-check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.data.test_chat import CHATML
from tests.models import tiny
from tests.models_made import make_tokenizer
from tests.toy import QUESTIONS, metrics, rows, run
from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.records import Completion, Prompt
from trueup.scorers.reward_model import RewardModel

WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def pad_is_eos():
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adds_bos():
    """Puts a BOS before every text by itself, and so does its template."""
    tokenizer = make_tokenizer(bos=True, template=WITH_BOS)
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


KINDS = {
    "llama": lambda: make_tokenizer(pad=False, bos=True),
    "qwen2": lambda: make_tokenizer(pad=False, template=CHATML),
    "qwen3": lambda: make_tokenizer(template=CHATML),
    "neox": pad_is_eos,
    "gpt2": pad_is_eos,
    "gemma": adds_bos,
    "gemma2": adds_bos,
    "gemma3": lambda: make_tokenizer(pad=False),
    "mistral-window": lambda: make_tokenizer(pad=False, bos=True, template=CHATML),
}


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> tuple[str, Path, dict]:
    """A random model of the family with its tokenizer, and what the stages made of it."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    tokenizer = KINDS[name]()
    config = tiny.ALL[name]()
    config.vocab_size, config.pad_token_id, config.bos_token_id = len(tokenizer), None, None
    setattr(config, "n_positions" if name == "gpt2" else "max_position_embeddings", 128)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows(folder / "demos.jsonl", [{"prompt": q, "completion": "the sky is blue."} for q in QUESTIONS[:32]])
    rows(folder / "pairs.jsonl", [{"prompt": q, "chosen": "blue.", "rejected": "yes"} for q in QUESTIONS[:32]])
    short = {"sampling": {"max_tokens": 6}, "train": {"epochs": 1, "batch": 8}}
    stages = {
        "sft": {"model": "base", "data": "demos.jsonl", "held_out": 0.2, "samples": 4, **short},
        "reward": {"model": "@sft/final", "data": "pairs.jsonl", "normalize_samples": 8, "held_out": 0.2, **short},
        "ppo": {
            "model": "@sft/final",
            "scorer": "@reward/final",
            "prompts": "demos.jsonl",
            "steps": 2,
            "batch": 8,
            "missing_eos_samples": 8,
            "sampling": {"max_tokens": 6},
        },
    }
    return name, folder, run(folder, stages)


def test_it_goes_the_whole_way_and_plain_transformers_loads_it(family):
    """The self-check of PPO is fatal where sampler and training path disagree; KL starts at exactly 0."""
    name, _, stages = family
    log = metrics(stages["sft"])
    assert log[-1]["validation_loss"] < log[1]["validation_loss"]
    assert metrics(stages["ppo"])[0]["kl"] == 0
    for stage, auto in (
        ("sft", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("ppo", AutoModelForCausalLM),
    ):
        final = stages[stage].folder / "final"
        config = auto.from_pretrained(final).config
        chat = Chat.load(final)
        assert config.eos_token_id == chat.end_id != chat.pad_id == config.pad_token_id
        assert AutoTokenizer.from_pretrained(final).chat_template == chat.tokenizer.chat_template
    assert (name in tiny.PACKED) or (name in tiny.PADDED)


def test_an_end_token_is_never_taken_for_padding(family):
    """score(x) != score(x + end), for us beside other rows, and for plain transformers alone and padded."""
    _, _, stages = family
    folder = stages["reward"].folder / "final"
    scorer = RewardModel(str(folder), Mesh())
    prompt = Prompt.of(QUESTIONS[0])
    texts = [Completion("the sky", "eos"), Completion("the sky", "length"), Completion("the sky is blue. yes", "eos")]
    whole, cut, _ = together = scorer.score([prompt] * 3, texts).value
    assert abs(whole - cut) > 1e-4
    alone = [scorer.score([prompt], [c]).value[0] for c in texts]
    assert alone == pytest.approx(list(together), abs=1e-4)

    chat, plain = scorer.chat, AutoModelForSequenceClassification.from_pretrained(folder).eval()
    figures = json.loads((folder / "config.json").read_text())["trueup"]
    ids = torch.tensor([chat.prompt_ids(prompt.messages) + chat.reply_ids("the sky")])
    padded = torch.nn.functional.pad(ids, (0, 3), value=plain.config.pad_token_id)
    real = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    with torch.no_grad():
        raw = [plain(input_ids=ids).logits.item(), plain(input_ids=padded, attention_mask=real).logits.item()]
    assert [(r - figures["score_mean"]) / figures["score_std"] for r in raw] == pytest.approx([whole] * 2, abs=1e-3)


def test_a_bos_stands_where_the_template_writes_it_and_only_there(family):
    _, folder, _ = family
    chat = Chat.load(folder / "base")
    prompt = chat.prompt_ids([{"role": "user", "content": "Hello"}])
    wanted = int("bos_token" in chat.tokenizer.chat_template)
    assert (prompt + chat.reply_ids("yes")).count(chat.tokenizer.convert_tokens_to_ids("<bos>")) == wanted
