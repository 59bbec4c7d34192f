"""A local model answers: the log-probs of (A) and (B) after the question, or of two replies. Only thoughts are
sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trueup.config import Config
from trueup.data.batches import pair_completions
from trueup.data.chat import Chat
from trueup.engine.rows import forward
from trueup.engine.sampler import Sampler, Sampling
from trueup.judges.asking import Answer, Question, Written
from trueup.models.load import context_length, load_policy
from trueup.models.net import Net

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh


class Local(Config):
    """A model on this machine."""

    model: str
    """A folder or Hub name: the model itself, or any other language model."""
    chat: bool = False
    """Put the question as a user's message through the chat template; a pretrained model is asked in plain text."""
    max_tokens: int = 128
    """Of a chain of thought."""
    micro_tokens: int = 8192


class LocalModel:
    """See the head of the file."""

    def __init__(self, config: Local, mesh: Mesh, seed: int = 0) -> None:
        self.config, self.mesh, self.seed = config, mesh, seed
        folder = Path(config.model)  # of a long path what tells it apart: a rater's name stands in every row
        self.name = "/".join(folder.parts[-2:]) if folder.is_dir() else config.model
        self.talk = Chat.load(config.model)
        self.net = Net(load_policy(config.model, device=mesh.device), "policy")
        self.room = context_length(config.model)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """p = P(A) / (P(A) + P(B)), each to the power of 1 / temperature; unreadable where the question does not fit
        into the context."""
        thoughts = self._thoughts(questions)
        pairs, fits, temperatures = [], [], []
        for question, thought in zip(questions, thoughts, strict=True):
            if question.replies:
                both = [self._with_reply(question, reply.strip()) for reply in question.replies]
            else:
                head = f"\n{question.think}{thought}\n" if question.think else "\n"
                # Together with what comes before: where a token ends depends on what follows it.
                both = [self._ids(question.text, f"{head}{question.verdict} ({letter})") for letter in "AB"]
            least = min(map(len, both))  # where one reply begins with all of the other
            shared = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), least)
            fits.append(max(map(len, both)) <= self.room)
            if fits[-1]:
                pairs.append((both[0][:shared], [ids[shared:] for ids in both]))
                temperatures.append(question.temperature)
        found = iter(torch.sigmoid(self._odds(pairs) / torch.tensor(temperatures)).tolist())
        return [
            Answer(next(found), thought.strip()) if fit else Answer(None, f"longer than {self.room} tokens")
            for fit, thought in zip(fits, thoughts, strict=True)
        ]

    def write(
        self, texts: Sequence[str], *, max_tokens: int, stop: tuple[str, ...], seed: int, index: Sequence[int]
    ) -> list[Written]:
        """Sampled at temperature 1. A text that leaves no room in the context is followed by nothing, not ended."""
        sampler = Sampler.speaking(self.talk, self.net.model, self.mesh)
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        ids = [self._ids(text, "") for text in texts]
        said = sampler.sample(ids, sampling, seed=seed, index=index)
        return [Written(c.text.strip(), c.ended, fits=len(i) < self.room) for c, i in zip(said, ids, strict=True)]

    def _thoughts(self, questions: Sequence[Question]) -> list[str]:
        """What the model thinks, up to a line break where it stops by itself."""
        wanted = [i for i, q in enumerate(questions) if q.think]
        ids = [self._ids(questions[i].text, f"\n{questions[i].think}") for i in wanted]
        out = [""] * len(questions)
        if not ids:
            return out
        sampler = Sampler.speaking(self.talk, self.net.model, self.mesh)
        sampling = Sampling(max_tokens=self.config.max_tokens)
        own = [int(questions[i].hash[:7], 16) for i in wanted]  # a thought does not depend on what else is asked
        for i, said in zip(wanted, sampler.sample(ids, sampling, seed=self.seed, index=own), strict=True):
            thought = said.text.split(questions[i].verdict)[0].strip()
            out[i] = f" {thought}" if thought else ""
        return out

    def _ids(self, question: str, after: str) -> list[int]:
        if self.config.chat:
            opening = self.talk.prompt_ids([{"role": "user", "content": question}])
            return [*opening, *self.talk.tokenizer(after.lstrip("\n"), add_special_tokens=False)["input_ids"]]
        return list(self.talk.tokenizer(question + after)["input_ids"])

    def _with_reply(self, question: Question, reply: str) -> list[int]:
        """A reply in its place; as an assistant's, with its end token, where questions are a user's."""
        if self.config.chat:
            return [*self._ids(question.text, ""), *self.talk.reply_ids(reply)]
        return self._ids(question.text, reply + question.verdict)

    def _odds(self, pairs: Sequence[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
        """log P(A) - log P(B), [N]."""
        if not pairs:
            return torch.zeros(0)
        batch = pair_completions(pairs, self.talk.pad_id)
        with torch.inference_mode():
            logprobs = forward(self.net, batch, self.mesh, micro_tokens=self.config.micro_tokens)["logprobs"]
        a, b = logprobs.double().sum(-1).cpu().unbind(1)
        return a - b
