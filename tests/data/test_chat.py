"""What is trained and where a reply ends, on templates that differ."""

from __future__ import annotations

import pytest

from tests.models_made import make_tokenizer
from trueup.data.chat import PLAIN, Chat
from trueup.records import Demonstration, Prompt, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# rewrites earlier assistant turns once a later one follows, as templates that strip thoughts do
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' and not loop.last %}[cut]{% else %}{{ m['content'] }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TWO_TURNS = Demonstration(
    Prompt(
        (
            {"role": "user", "content": "Hello there!"},
            {"role": "assistant", "content": "How are you?"},
            {"role": "user", "content": "I am fine"},
        )
    ),
    "good",
)


def trained(chat: Chat, encoded) -> str:
    return "|".join(chat.tokenizer.decode([t]) for t, m in zip(encoded.ids, encoded.mask, strict=True) if m)


def text(chat: Chat, encoded) -> str:
    return chat.tokenizer.decode(encoded.ids)


def test_plain_template_is_used_where_there_is_none():
    chat = Chat(make_tokenizer())
    assert chat.plain and chat.tokenizer.chat_template == PLAIN
    assert chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "Hello"}])) == "User: Hello\nAssistant:"
    assert chat.tokenizer.decode(chat.reply_ids("yes")) == " yes<eos>"
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<eos>"


def test_loss_counts_replies_and_their_end_tokens_only():
    chat = Chat(make_tokenizer())
    encoded = chat.encode(TWO_TURNS)
    assert (
        text(chat, encoded) == "User: Hello there!\nAssistant: How are you?<eos>\nUser: I am fine\nAssistant: good<eos>"
    )
    assert trained(chat, encoded).replace("|", "") == " How are you?<eos> good<eos>"
    assert chat.last_turn_only == 0


def test_the_end_token_is_the_templates_own():
    chat = Chat(make_tokenizer(template=CHATML))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<|im_end|>"  # not the tokenizer's eos
    encoded = chat.encode(TWO_TURNS)
    assert text(chat, encoded) == chat.tokenizer.apply_chat_template(
        [*TWO_TURNS.prompt.messages, {"role": "assistant", "content": "good"}], tokenize=False
    ).removesuffix("\n")
    assert trained(chat, encoded).replace("|<|im_end|>", "<|im_end|>").endswith("<|im_end|>")
    assert encoded.mask[-1] and encoded.ids[-1] == chat.end_id


def test_a_template_that_rewrites_earlier_turns_trains_the_last_and_counts_it():
    chat = Chat(make_tokenizer(template=FORGETFUL))
    encoded = chat.encode(TWO_TURNS)
    assert chat.last_turn_only == 1
    assert trained(chat, encoded).replace("|", "") == "good<eos>"
    assert "[cut]" in text(chat, encoded)


def test_prompt_plus_reply_is_the_encoded_demonstration():
    for template in (None, CHATML):
        chat = Chat(make_tokenizer(template=template))
        one = Demonstration(Prompt.of("what is the colour of the sky?"), "the sky is blue.")
        encoded = chat.encode(one)
        prompt, reply = chat.prompt_ids(one.prompt.messages), chat.reply_ids(one.reply)
        assert encoded.ids == prompt + reply
        assert encoded.mask == [False] * len(prompt) + [True] * len(reply)
        assert chat.decode(reply) == one.reply and chat.decode(reply[:-1]) == one.reply


def test_pad_never_equals_the_end_token():
    for pad in (True, False):
        chat = Chat(make_tokenizer(pad=pad, bos=True))
        assert chat.pad_id != chat.end_id
    same = make_tokenizer(pad=False, bos=True)
    same.pad_token = same.eos_token
    assert Chat(same).pad_id != Chat(same).end_id


def test_tokens_that_the_model_does_not_know_are_not_used():
    tokenizer = make_tokenizer(pad=False)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})  # as some come with one that has no embedding
    assert tokenizer.pad_token_id == known
    chat = Chat(tokenizer, embeddings=known)
    assert chat.pad_id < known and chat.pad_id != chat.end_id
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    with pytest.raises(UserError, match=f"'<new>' .*the model has {known} embeddings"):
        Chat(tokenizer, embeddings=known)


def test_templates_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match="no end token"):
        Chat(
            make_tokenizer(
                template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}"
            )
        )
    with pytest.raises(UserError, match="in front of the reply"):
        Chat(make_tokenizer(template="{{ messages | length }} {{ messages[-1]['content'] }}"))
    with pytest.raises(UserError, match="no such folder"):
        Chat.load("/nowhere/at/all")
