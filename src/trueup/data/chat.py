"""Conversations to token ids and back, by the tokenizer's own chat template.

What is trained is found by rendering, never by `{% generation %}` marks: the text of a conversation up to a reply
(with the generation prompt) must be a prefix of the text with the reply; the rest is the reply's segment, and the
end token is the one that the template puts right after the content. Ids are prompt ids + reply ids + end, each
tokenized once.

    "User: Hi\\nAssistant:"  +  " Hello"  +  "<eos>"
     prompt ids, mask False      mask True     mask True (the end token)

Where the tokenizer has no template, PLAIN is used, and saved with the model. Where a template is not
prefix-stable (it rewrites earlier turns), only the last turn can be trained, and that is counted. A template that
thinks writes an empty thought before a reply that has none, and drops the thoughts of earlier turns (Qwen3): what it
writes is what is trained.
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
QUESTION: Message = {"role": "user", "content": "question"}
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
    rewritten: int = 0
    """Conversations whose last reply the template does not write as it is: it leaves a thought out, say."""
    embeddings: int | None = None
    """How many tokens the model has embeddings for, where that is known; a tokenizer may have more."""
    end_id: int = field(init=False)
    pad_id: int = field(init=False)
    _asked: str = field(init=False, default="")
    """A question with the generation prompt after it, in which replies are written."""
    _prefix: str = field(init=False, default="")
    """What the template puts between the generation prompt and the content: a space, nothing, or an empty thought."""
    _suffix: str = field(init=False, default="")
    """What it puts after the content: the end token, and perhaps a line's end."""
    _end_text: str = field(init=False, default="")
    _before_end: str = field(init=False, default="")
    """What it puts between the content and the end token: Llama 2's has a space there."""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            if self.tokenizer.eos_token is None:
                raise UserError("the tokenizer has neither a chat template nor an end-of-sequence token")
            self.tokenizer.chat_template, self.plain = PLAIN, True
        self._asked = self._render([QUESTION], True)
        tail = self._tail([QUESTION], PROBE, self._asked)
        if tail is None or PROBE not in tail:
            raise UserError("the chat template does not keep the prompt in front of the reply")
        self._prefix, self._suffix = tail.split(PROBE, 1)
        suffix_ids = self._ids(self._suffix)
        if not suffix_ids:
            raise UserError("the chat template puts no end token after the assistant's content")
        special = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self.end_id = next((i for i in suffix_ids if i in special), suffix_ids[0])
        self._end_text = str(self.tokenizer.decode([self.end_id]))
        self._before_end = self._suffix.partition(self._end_text)[0] if self._end_text in self._suffix else ""
        written = self._ids(self._render([QUESTION, {"role": "assistant", "content": PROBE}], False))
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

    def _tail(self, messages: Sequence[Message], reply: str, before: str | None = None) -> str | None:
        """The reply's segment as the template writes it, or None where the template is not prefix-stable."""
        before = self._render(messages, True) if before is None else before
        whole = self._render([*messages, {"role": "assistant", "content": reply}], False)
        return whole[len(before) :] if whole.startswith(before) else None

    def _written(self, tail: str | None) -> str | None:
        """A reply's segment without what the template puts after the content; None where it ends otherwise."""
        return tail.removesuffix(self._suffix) if tail is not None and tail.endswith(self._suffix) else None

    def _ids(self, text: str) -> list[int]:
        # not verbose: what is too long is counted, by the limit that holds
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def user_opener(self) -> str:
        """What the template writes before a user's second turn, "User:" say: an answer that holds it speaks for the
        user. Empty where the template writes nothing there, or refuses or rewrites the conversation."""
        said: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            before = self._render(said, False)
            whole = self._render([*said, {"role": "user", "content": PROBE}], False)
        except UserError:
            return ""
        return whole[len(before) :].partition(PROBE)[0].strip() if whole.startswith(before) else ""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation with the generation prompt; a BOS only where the template writes one."""
        return self._ids(self._render(messages, True))

    def prompt_length(self, prompt: Prompt) -> int:
        """How many tokens a prompt has."""
        return len(self.prompt_ids(prompt.messages))

    def reply_ids(self, reply: str, ended: bool = True) -> list[int]:
        """A reply's tokens as the template writes it, the end token after them unless it was cut."""
        reply = reply.strip()
        plain = self._prefix + reply
        written = self._written(self._tail([QUESTION], reply, self._asked)) or plain
        opening = self._prefix.split()[:1]
        if opening and reply.startswith(opening[0]) and written == plain:
            written = reply  # a thought that was never closed: the template takes it for an answer, we do not
        return self._ids(written + self._before_end * ended) + [self.end_id] * ended

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
        found = self._turns(messages, turns)
        if found is None and len(turns) > 1:
            self.last_turn_only += 1
            found = self._turns(messages, turns[-1:])
        if found is None:  # the template rewrites what stands before the reply: our own segment
            ids = self.prompt_ids(demonstration.prompt.messages)
            reply = self.reply_ids(demonstration.reply)
            return Encoded(ids + reply, [False] * len(ids) + [True] * len(reply))
        encoded, written = found
        self.rewritten += "".join(demonstration.reply.split()) not in "".join(written.split())
        return encoded

    def _turns(self, messages: Sequence[Message], turns: Sequence[int]) -> tuple[Encoded, str] | None:
        """The conversation with loss on `turns`, and the last of them as the template writes it."""
        written: str | None = ""
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # what is already in ids, as the template writes it
        for turn in turns:
            before = self._render(messages[:turn], True)
            written = self._written(self._tail(messages[:turn], messages[turn]["content"].strip(), before))
            if written is None or not before.startswith(text):
                return None
            between, reply = self._ids(before[len(text) :]), [*self._ids(written + self._before_end), self.end_id]
            ids += between + reply
            mask += [False] * len(between) + [True] * len(reply)
            # the end token is in ids; what the template writes after it opens the next stretch
            text = before + written + self._before_end + self._end_text
        return Encoded(ids, mask), str(written)


def _embeddings(folder: str) -> int | None:
    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None  # a tokenizer alone


def describe(prompt: Prompt) -> dict[str, Any]:
    """What samples.jsonl says of a prompt."""
    earlier = [dict(m) for m in prompt.messages[:-1]]
    return {"prompt": prompt.text, "category": prompt.category, **({"earlier": earlier} if earlier else {})}
