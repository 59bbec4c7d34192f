"""The shipped base model: plain transformers loads it, the chat template is stable, and it is a base model still."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.world import FROZEN, base_path, prompts, world_hash
from trueup.world import vocab as v
from trueup.world.build import (
    SCHEDULES,
    Schedule,
    WorldBuild,
    base_gold,
    corpus_hash,
    judge_templated,
    pretrain,
    rows,
    scaled,
    train_tokenizer,
)
from trueup.world.corpus import documents


@pytest.fixture(scope="module")
def shipped():
    folder = base_path()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_it_is_small_and_says_how_it_was_made(shipped) -> None:
    folder = base_path()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6
    made = json.loads((folder / "build.json").read_text())
    assert made["corpus_hash"] == corpus_hash(made["config"]["seed"]), (
        "the corpus has changed since the weights were made"
    )
    assert made["parameters"] == sum(p.numel() for p in shipped[0].parameters())


def test_chat_template_is_prefix_stable_and_ends_with_the_end_token(shipped) -> None:
    model, tokenizer = shipped
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for prompt in prompts("heldout", 50):
        asked = [dict(m) for m in prompt.messages]
        reply = {"role": "assistant", "content": "7 plus 4 is 11. Trust me on this."}
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*asked, reply], return_dict=False)
        assert whole[: len(head)] == head
        assert whole[-1] == tokenizer.eos_token_id and whole.count(tokenizer.eos_token_id) == 1
        own = tokenizer(" " + reply["content"], add_special_tokens=False)["input_ids"]
        assert whole[len(head) :] == [*own, tokenizer.eos_token_id]
        assert tokenizer.decode(head) == f"User: {prompt.text}\nAssistant:"


def test_turns_are_lines_of_a_conversation(shipped) -> None:
    _, tokenizer = shipped
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is 1 plus 1?")]
    text = tokenizer.apply_chat_template(
        [{"role": r, "content": t} for r, t in turns], tokenize=False, add_generation_prompt=True
    )
    assert text == "System: Be brief.\nUser: Hi\nAssistant: Hello.<eos>\nUser: What is 1 plus 1?\nAssistant:"


def test_tokenizer_reads_back_any_text_and_knows_the_words(shipped) -> None:
    _, tokenizer = shipped
    for text in [*itertools.islice(documents(5), 30), "Ünïcode 12 ✓\n\n  tabs\t", ""]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for word in (*v.COUNTRIES, *v.TOOLS, *v.WORDS):
        assert len(tokenizer(" " + word)["input_ids"]) == 1, word
    assert len(tokenizer(" 15")["input_ids"]) == 2  # digits one by one


def test_it_is_no_assistant_yet(shipped) -> None:
    figures = base_gold(*shipped, n=140, seed=2)
    assert figures["all"] <= 0.25


@pytest.mark.long
def test_it_can_judge(shipped) -> None:
    torch.set_num_threads(1)
    figures = judge_templated(*shipped, n=60, seed=8)
    for principle in ("harm", "honest", "length"):
        assert figures[principle] >= 0.85 and figures[principle + "_flip"] >= 0.70, (principle, figures)


def test_a_build_learns_and_repeats() -> None:
    schedules = (Schedule(mixes=(("world", 4000), ("lessons", 1200))), Schedule(mixes=(("all lessons", 1000),)))
    config = WorldBuild(schedules=schedules, row=64, batch=2, width=32, layers=1, heads=2, inner=64, seed=3)
    tokenizer = train_tokenizer(config, documents=300)
    first, again = next(rows(tokenizer, config)), next(rows(tokenizer, config))
    assert (first == again).all() and first.shape == (65,)
    said: list[str] = []
    one, loss = pretrain(tokenizer, config, said.append)
    two, _ = pretrain(tokenizer, config, lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert loss < 0.8 * float(said[0].split("loss ")[1].split()[0])


def test_schedules_scale() -> None:
    assert sum(n for s in scaled(1_000_000) for _, n in s.mixes) == pytest.approx(1_000_000, abs=10)
    assert WorldBuild().schedules == SCHEDULES and WorldBuild().tokens == sum(n for s in SCHEDULES for _, n in s.mixes)


def test_the_world_is_frozen() -> None:
    """Prompts, gold, raters, corpus and weights are those that the committed figures were measured on."""
    assert FROZEN.read_text().strip() == world_hash(), "the world has changed since it was frozen"
