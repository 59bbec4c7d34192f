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
# thinks as Qwen3's does: earlier thoughts are dropped, what follows the last question has one, an empty one if need be
THINKING = """
{%- set last = namespace(question=0) -%}
{%- for m in messages -%}
  {%- if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m['content'] %}{% set thought = '' -%}
  {%- if m['role'] == 'assistant' and '</think>' in content -%}
    {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + m['role'] + '\\n' -}}
  {%- if m['role'] == 'assistant' and loop.index0 > last.question -%}
    {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
  {%- endif -%}
  {{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
EMPTY = "<think>\n\n</think>\n\n"
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


def test_a_template_that_thinks_writes_an_empty_thought_where_there_is_none():
    chat = Chat(make_tokenizer(template=THINKING))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<|im_end|>"
    one = Demonstration(Prompt.of("Hello"), "yes")
    encoded = chat.encode(one)
    assert text(chat, encoded) == f"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n{EMPTY}yes<|im_end|>"
    assert trained(chat, encoded).replace("|", "") == f"{EMPTY}yes<im_end>"
    prompt, reply = chat.prompt_ids(one.prompt.messages), chat.reply_ids("yes")
    assert encoded.ids == prompt + reply and chat.decode(reply) == "yes"
    assert chat.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")  # the model writes the thought itself


def test_a_reply_with_its_own_thought_is_trained_as_it_is():
    chat = Chat(make_tokenizer(template=THINKING))
    said = "<think>\nso so\n</think>\n\nyes"
    encoded = chat.encode(Demonstration(Prompt.of("Hello"), said))
    assert trained(chat, encoded).replace("|", "") == f"{said}<im_end>"
    reply = chat.reply_ids(said)
    assert chat.tokenizer.decode(reply) == f"{said}<|im_end|>" and chat.decode(reply) == said
    assert encoded.ids[-len(reply) :] == reply and chat.rewritten == 0
    loose = "<think>so so</think>yes"  # the template writes a thought its own way, and so do we
    assert chat.tokenizer.decode(chat.reply_ids(loose)) == f"{said}<|im_end|>"
    assert chat.encode(Demonstration(Prompt.of("Hello"), loose)).ids == encoded.ids
    for cut in ("<think>\nso", "<think>\nso so\n</think>\n\nye"):  # where sampling stopped: no thought is put before it
        assert chat.tokenizer.decode(chat.reply_ids(cut, ended=False)) == cut
    assert chat.tokenizer.decode(chat.reply_ids("<think>\nso")) == "<think>\nso<|im_end|>"


def test_earlier_thoughts_are_dropped_and_the_last_turn_alone_is_trained():
    chat = Chat(make_tokenizer(template=THINKING))
    turns = list(TWO_TURNS.prompt.messages)
    turns[1] = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHow are you?"}
    encoded = chat.encode(Demonstration(Prompt(tuple(turns)), "good"))
    assert chat.last_turn_only == 1
    assert text(chat, encoded) == (
        "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\nHow are you?<|im_end|>\n"
        f"<|im_start|>user\nI am fine<|im_end|>\n<|im_start|>assistant\n{EMPTY}good<|im_end|>"
    )
    assert trained(chat, encoded).replace("|", "") == f"{EMPTY}good<im_end>"


def test_a_reply_that_the_template_rewrites_is_counted():
    forgets = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].strip()")
    chat = Chat(make_tokenizer(template=forgets))
    encoded = chat.encode(Demonstration(Prompt.of("Hello"), "<think>hm</think> yes"))
    assert trained(chat, encoded).replace("|", "") == "yes<im_end>" and chat.rewritten == 1
    chat.encode(Demonstration(Prompt.of("Hello"), " yes\n"))  # the space around it does not count
    assert chat.rewritten == 1


def test_a_space_before_the_end_token_is_no_end_token():
    """Llama 2's template: content, a space, the end token."""
    chat = Chat(make_tokenizer(template=PLAIN.replace("{{ eos_token }}", " {{ eos_token }}")))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<eos>"
    encoded = chat.encode(TWO_TURNS)
    assert trained(chat, encoded).replace("|", "") == " How are you? <eos> good <eos>"
    assert chat.reply_ids("good") == encoded.ids[-len(chat.reply_ids("good")) :]
    assert chat.tokenizer.decode(chat.reply_ids("good", ended=False)) == " good"


def test_a_system_message_is_in_the_prompt_and_never_in_the_loss():
    system = {"role": "system", "content": "Be kind"}
    for template in (None, CHATML, THINKING):
        chat = Chat(make_tokenizer(template=template))
        plain = trained(chat, chat.encode(TWO_TURNS))
        encoded = chat.encode(Demonstration(Prompt((system, *TWO_TURNS.prompt.messages)), TWO_TURNS.reply))
        assert "Be kind" in text(chat, encoded) and trained(chat, encoded) == plain
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="the chat template refuses this conversation: no system role"):
        Chat(make_tokenizer(template=refusing)).prompt_ids([system, *TWO_TURNS.prompt.messages])
