"""A constitution: principles, and how to ask for a verdict, a critique and a revision. A YAML file; no torch.

name: mine
ask: |-                         the question; {conversation}, {a}, {b} and {question} are filled in
  ...
verdict: "The better reply is:" what the letter follows
think: "Let us think it through:"   what a chain of thought follows, where one is asked for
criticize: |-                   what a critique follows; {conversation}, {reply} and {request} are filled in
  ...
revise: |-                      and after the critique, what a revision follows; {request}
  ...
stop: ["\nRevision request:"]   where a critique or a revision ends
principles:
  - name: honest
    weight: 1                   of being drawn, and in the mean over all
    categories: []              of prompts that it is for; all where none is named
    question: "Which reply ...?"    a text, or several of which one is drawn; or, in its place,
    likely: "..."                   a text with {reply} in it: the reply that is more likely to stand there is better
    critique: "..."             requests, for critique and revision; both or none
    revision: "..."
examples:                       shown before the question, each with its own principle
  - {conversation: "...", a: "...", b: "...", principle: honest, thought: "...", better: A}
revisions:                      shown before a request for a critique
  - {conversation: "...", reply: "...", principle: honest, critique: "...", revision: "..."}
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from trueup.config import Config, parse, read_yaml
from trueup.records import Comparison, Message, Prompt, UserError

BUILT_IN = Path(__file__).parent / "constitutions"
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda x: (x,) if isinstance(x, str) else x), Field(min_length=1)]
MARKS = {
    "ask": ("conversation", "a", "b", "question"),
    "criticize": ("conversation", "reply", "request"),
    "revise": ("request",),
}
"""What is filled into each template."""
_ASKED = re.compile(r"\{(conversation|prompt)\}")


class Principle(Config):
    """One principle: what is asked about a pair, or a text in which the better reply is the more likely one."""

    name: str = Field(min_length=1)
    question: Texts = ()
    likely: str = ""
    """A text that holds `{reply}` once, after `{conversation}` or `{prompt}`, the last message alone. Two replies are
    as good as each is likely there, with what follows it (Fu et al. 2023, GPTScore)."""
    temperature: float = Field(1.0, gt=0)
    """Of `likely`: the difference in log-probs, nats, that makes the odds of a verdict e to one."""
    weight: float = Field(1.0, gt=0)
    categories: tuple[str, ...] = ()
    critique: str = ""
    revision: str = ""


class Example(Config):
    """A question with its answer, shown before."""

    conversation: str
    a: str
    b: str
    principle: str
    better: Literal["A", "B"]
    thought: str = ""


class Revised(Config):
    """A reply, a critique of it and a better reply, shown before."""

    conversation: str
    reply: str
    principle: str
    critique: str
    revision: str


class Constitution(Config):
    """A constitution."""

    name: str
    ask: str
    verdict: str = "The better reply is:"
    think: str = "Let us think it through:"
    criticize: str = "{conversation}\n\nAssistant: {reply}\n\nCritique request: {request}\n\nCritique:"
    revise: str = "\n\nRevision request: {request}\n\nRevision:"
    stop: tuple[str, ...] = ("\n\nCritique request:", "\n\nRevision request:", "\n\nUser:", "\n\nAssistant:")
    principles: tuple[Principle, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()
    revisions: tuple[Revised, ...] = ()

    def applying(self, category: str | None) -> list[Principle]:
        """The principles that concern a prompt's category."""
        return [p for p in self.principles if not p.categories or category in p.categories]

    def drawn(self, comparison: Comparison, seed: int) -> list[Principle]:
        """One of those that apply, by weight; the draw depends on the seed and the content, not on the order shown."""
        return one_of(self.applying(comparison.prompt.category), _rng(comparison, seed, "principle"))

    def mending(self, prompt: Prompt, reply: str, seed: int) -> Principle | None:
        """The principle under which a reply is criticized and revised: one of those that apply and have both requests,
        by weight; None where there is none."""
        found = [p for p in self.applying(prompt.category) if p.critique]
        drawn = one_of(found, random.Random("\x1f".join([str(seed), "revision", prompt.id, reply])))
        return drawn[0] if drawn else None

    def question(self, comparison: Comparison, principle: Principle, *, swapped: bool, seed: int) -> str:
        """What is asked of a pair under a principle, up to where the answer begins."""
        first, second = (c.text for c in comparison.completions[:: -1 if swapped else 1])
        wording = _rng(comparison, seed, principle.name).choice(principle.question)
        return fill(
            self.ask, conversation=conversation(comparison.prompt.messages), a=first, b=second, question=wording
        )

    def weighed(self, comparison: Comparison, principle: Principle) -> tuple[str, str]:
        """The text of `likely` before the reply and after it."""
        before, after = principle.likely.split("{reply}")
        messages = comparison.prompt.messages
        return fill(before, conversation=conversation(messages), prompt=messages[-1]["content"]), after

    def criticism(self, talk: str, reply: str, principle: Principle) -> str:
        """What a critique of a reply follows."""
        return fill(self.criticize, conversation=talk, reply=reply, request=principle.critique)

    def revising(self, principle: Principle) -> str:
        """What, after that and the critique, a revision follows."""
        return fill(self.revise, request=principle.revision)

    def revised(self) -> str:
        """The examples of revisions; nothing where there is none."""
        by_name, out = {p.name: p for p in self.principles}, ""
        for one in self.revisions:
            principle = by_name[one.principle]
            asked = self.criticism(one.conversation, one.reply, principle)
            out += f"{asked} {one.critique}{self.revising(principle)} {one.revision}\n\n"
        return out

    def shown(self, *, thought: bool) -> str:
        """The examples, each with its verdict; nothing where there is none."""
        by_name = {p.name: p for p in self.principles}
        blocks = []
        for one in self.examples:
            question = by_name[one.principle].question[0]
            text = fill(self.ask, conversation=one.conversation, a=one.a, b=one.b, question=question)
            thinking = f"\n{self.think} {one.thought}" if thought else ""
            blocks.append(f"{text}{thinking}\n{self.verdict} ({one.better})\n\n")
        return "".join(blocks)


def fill(template: str, **values: str) -> str:
    """In one pass: what a model wrote may hold the marks, too."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda m: values[m[0][1:-1]], template)


def one_of(among: list[Principle], rng: random.Random) -> list[Principle]:
    """One, by weight; none of none."""
    return among and rng.choices(among, [p.weight for p in among])


def _rng(comparison: Comparison, seed: int, what: str) -> random.Random:
    texts = sorted(c.text for c in comparison.completions)
    return random.Random("\x1f".join([str(seed), what, comparison.prompt.id, *texts]))


def conversation(messages: Sequence[Message]) -> str:
    """`User: ...`, `Assistant: ...`, a line each."""
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def read_constitution(source: str) -> Constitution:
    """From a YAML file, or a built-in one by its name. Raises UserError naming file, key and what was expected."""
    path = Path(source)
    if not path.exists() and (BUILT_IN / f"{source}.yaml").exists():
        path = BUILT_IN / f"{source}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.yaml")))
        raise UserError(f"constitution {source}: no such file; expected YAML, or one of the built-in ones: {known}")
    found = parse(Constitution, read_yaml(path), str(path))
    for key, marks in MARKS.items():
        if missing := [f"{{{mark}}}" for mark in marks if f"{{{mark}}}" not in getattr(found, key)]:
            raise UserError(f"{path}: key '{key}' lacks {', '.join(missing)}, which its text is made of")
    for principle in found.principles:
        if bool(principle.question) == bool(principle.likely):
            raise UserError(f"{path}: principle '{principle.name}' needs one of the keys 'question' and 'likely'")
        before = principle.likely.split("{reply}")[0]
        if principle.likely and (principle.likely.count("{reply}") != 1 or not _ASKED.search(before)):
            raise UserError(
                f"{path}: principle '{principle.name}': key 'likely' needs {{reply}} once, and before it "
                "{conversation} or {prompt}"
            )
        if bool(principle.critique) != bool(principle.revision):
            has, lacks = ("critique", "revision") if principle.critique else ("revision", "critique")
            raise UserError(f"{path}: principle '{principle.name}' has a {has} request and no {lacks} request")
    names = [p.name for p in found.principles]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two principles are named '{twice}'")
    by_name = {p.name: p for p in found.principles}
    examples: tuple[Example | Revised, ...] = (*found.examples, *found.revisions)
    for one in examples:
        if one.principle not in by_name:
            raise UserError(f"{path}: an example is of principle '{one.principle}'; principles: {', '.join(names)}")
    for example in found.examples:
        if not by_name[example.principle].question:
            raise UserError(f"{path}: an example is of principle '{example.principle}', which asks no question")
    for shown in found.revisions:
        if not by_name[shown.principle].critique:
            raise UserError(f"{path}: a revision is shown under '{shown.principle}', which has no critique request")
    return found
