"""Conversations to token ids and back, by the tokenizer's own chat template.

What is trained is found by rendering, never by `{% generation %}` marks: the text of a conversation up to a reply
(with the generation prompt) must be a prefix of the text with the reply; the rest is the reply's segment, and the
end token is the one that the template puts right after the content. Ids are prompt ids + reply ids + end, each
tokenized once.

    "User: Hi\\nAssistant:"  +  " Hello"  +  "<eos>"
     prompt ids, mask False      mask True     mask True (the end token)

Where the tokenizer has no template, PLAIN is used, and saved with the model. Where a template is not
prefix-stable (it rewrites earlier turns), only the last turn can be trained, and that is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from trueup.records import Demonstration, Message, Prompt, UserError, is_local

PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Assistant: {{ m['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROBE = "reply"


@dataclass
class Encoded:
    """One conversation as tokens: `ids`, and `mask` True where the loss counts (replies and their end token)."""

    ids: list[int]
    mask: list[bool]


@dataclass
class Chat:
    """A tokenizer with its chat template. `end_id` ends a reply; `pad_id` never equals it."""

    tokenizer: PreTrainedTokenizerBase
    plain: bool = False
    last_turn_only: int = 0
    """Conversations of which only the last turn could be trained, because the template rewrites earlier ones."""
    embeddings: int | None = None
    """How many tokens the model has embeddings for, where that is known; a tokenizer may have more."""
    end_id: int = field(init=False)
    pad_id: int = field(init=False)
    _prefix: str = field(init=False, default="")
    """What the template puts between the generation prompt and the content: a space, as a rule, or nothing."""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            if self.tokenizer.eos_token is None:
                raise UserError("the tokenizer has neither a chat template nor an end-of-sequence token")
            self.tokenizer.chat_template, self.plain = PLAIN, True
        user: Message = {"role": "user", "content": "question"}
        tail = self._tail([user], PROBE)
        if tail is None or PROBE not in tail:
            raise UserError("the chat template does not keep the prompt in front of the reply")
        self._prefix, suffix = tail.split(PROBE, 1)
        suffix_ids = self._ids(suffix)
        if not suffix_ids:
            raise UserError("the chat template puts no end token after the assistant's content")
        self.end_id = suffix_ids[0]
        written = self._ids(self._render([user, {"role": "assistant", "content": PROBE}], False))
        if beyond := [i for i in written if not self._known(i)]:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise UserError(
                f"the chat template writes '{token}' (id {beyond[0]}), but the model has {self.embeddings} embeddings"
            )
        self.pad_id = self._choose_pad()

    @classmethod
    def load(cls, folder: str | Path) -> Chat:
        """The tokenizer of a model folder (or Hub name). Raises UserError where there is none."""
        name = str(folder)
        if is_local(name) and not any(
            (Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")
        ):
            what = "no tokenizer here (expected tokenizer.json)" if Path(name).is_dir() else "no such folder"
            raise UserError(f"{name}: {what}; a model folder in Hugging Face layout is needed")
        try:
            return cls(AutoTokenizer.from_pretrained(name), embeddings=_embeddings(name))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no tokenizer could be loaded: {str(error).splitlines()[0]}") from None

    def _known(self, token: int) -> bool:
        return self.embeddings is None or token < self.embeddings

    def _choose_pad(self) -> int:
        """A pad that is not the end token: the tokenizer's own, the unknown token, or any other special one."""
        tok = self.tokenizer
        for candidate in (tok.pad_token_id, tok.unk_token_id, tok.bos_token_id, *tok.all_special_ids):
            if candidate is not None and candidate != self.end_id and self._known(candidate):
                tok.pad_token = tok.convert_ids_to_tokens(candidate)
                return int(candidate)
        return 0 if self.end_id != 0 else 1  # masks come from lengths: any id may stand in the padding

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template raises whatever its author chose
            raise UserError(f"the chat template refuses this conversation: {error}") from None
        return str(text)

    def _tail(self, messages: Sequence[Message], reply: str) -> str | None:
        """The reply's segment as the template writes it, or None where the template is not prefix-stable."""
        before = self._render(messages, True)
        whole = self._render([*messages, {"role": "assistant", "content": reply}], False)
        return whole[len(before) :] if whole.startswith(before) else None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation with the generation prompt; a BOS only where the template writes one."""
        return self._ids(self._render(messages, True))

    def reply_ids(self, reply: str, ended: bool = True) -> list[int]:
        """A reply's tokens, the end token after them unless it was cut."""
        return self._ids(self._prefix + reply.strip()) + ([self.end_id] if ended else [])

    def decode(self, ids: Sequence[int]) -> str:
        """A completion's text as it was written: without the end token and what the template puts before the content,
        but with the whitespace around it, in which a stop string may end."""
        ids = list(ids)
        if ids and ids[-1] == self.end_id:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False)).removeprefix(self._prefix)

    def encode(self, demonstration: Demonstration) -> Encoded:
        """A demonstration: loss on every assistant turn and its end token where the template is prefix-stable."""
        messages = [*demonstration.prompt.messages, Message(role="assistant", content=demonstration.reply)]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        encoded = self._every_turn(messages, turns)
        if encoded is None:
            self.last_turn_only += 1
            encoded = self._every_turn(messages, turns[-1:])
        if encoded is None:  # the template rewrites even the last turn (it strips thoughts, say): our own segment
            ids = self.prompt_ids(demonstration.prompt.messages)
            reply = self.reply_ids(demonstration.reply)
            encoded = Encoded(ids + reply, [False] * len(ids) + [True] * len(reply))
        return encoded

    def _every_turn(self, messages: Sequence[Message], turns: Sequence[int]) -> Encoded | None:
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # what is already in ids, as the template writes it
        for turn in turns:
            before = self._render(messages[:turn], True)
            tail = self._tail(messages[:turn], messages[turn]["content"])
            if tail is None or not before.startswith(text):
                return None
            between = self._ids(before[len(text) :])
            content = messages[turn]["content"].strip()
            reply = self.reply_ids(content)
            ids += between + reply
            mask += [False] * len(between) + [True] * len(reply)
            # the end token is in ids; what the template writes after it opens the next stretch
            end_text = str(self.tokenizer.decode([self.end_id]))
            at = tail.find(end_text, tail.find(content) + len(content))
            if at < 0:
                return None
            text = before + tail[: at + len(end_text)]
        return Encoded(ids, mask)


def _embeddings(folder: str) -> int | None:
    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None  # a tokenizer alone


def describe(prompt: Prompt) -> dict[str, Any]:
    """What samples.jsonl says of a prompt."""
    earlier = [dict(m) for m in prompt.messages[:-1]]
    return {"prompt": prompt.text, "category": prompt.category, **({"earlier": earlier} if earlier else {})}
