"""A constitution: principles, and how to ask for a verdict, a critique and a revision. A YAML file; no torch.

name: mine
ask: |-                         the question; {conversation}, {a}, {b} and {question} are filled in
  ...
verdict: "The better reply is:" what the letter follows
think: "Let us think it through:"   what a chain of thought follows, where one is asked for
principles:
  - name: honest
    weight: 1                   of being drawn, and in the mean over all
    categories: []              of prompts that it is for; all where none is named
    question: "Which reply ...?"    a text, or several of which one is drawn
    critique: "..."             requests, for critique and revision
    revision: "..."
examples:                       shown before the question, each with its own principle
  - {conversation: "...", a: "...", b: "...", principle: honest, thought: "...", better: A}
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from trueup.config import Config, parse, read_yaml
from trueup.records import Comparison, Message, UserError

BUILT_IN = Path(__file__).parent / "constitutions"
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda x: (x,) if isinstance(x, str) else x), Field(min_length=1)]
MARKS = ("{conversation}", "{a}", "{b}", "{question}")


class Principle(Config):
    """One principle."""

    name: str = Field(min_length=1)
    question: Texts
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


class Constitution(Config):
    """A constitution."""

    name: str
    ask: str
    verdict: str = "The better reply is:"
    think: str = "Let us think it through:"
    principles: tuple[Principle, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()

    def applying(self, category: str | None) -> list[Principle]:
        """The principles that concern a prompt's category."""
        return [p for p in self.principles if not p.categories or category in p.categories]

    def drawn(self, comparison: Comparison, seed: int) -> list[Principle]:
        """One of those that apply, by weight; the draw depends on the seed and the content, not on the order shown."""
        found = self.applying(comparison.prompt.category)
        return found and self._rng(comparison, seed, "principle").choices(found, [p.weight for p in found])

    def question(self, comparison: Comparison, principle: Principle, *, swapped: bool, seed: int) -> str:
        """What is asked of a pair under a principle, up to where the answer begins."""
        first, second = (c.text for c in comparison.completions[:: -1 if swapped else 1])
        wording = self._rng(comparison, seed, principle.name).choice(principle.question)
        return self.fill(conversation(comparison.prompt.messages), first, second, wording)

    def fill(self, talk: str, a: str, b: str, question: str) -> str:
        """In one pass: what a model wrote may hold the marks, too."""
        values = dict(zip(MARKS, (talk, a, b, question), strict=True))
        out, rest = "", self.ask
        while rest:
            at, mark = min(((rest.find(m), m) for m in MARKS if m in rest), default=(len(rest), ""))
            out, rest = out + rest[:at] + values.get(mark, ""), rest[at + len(mark) :]
        return out

    def shown(self, *, thought: bool) -> str:
        """The examples, each with its verdict; nothing where there is none."""
        by_name = {p.name: p for p in self.principles}
        blocks = []
        for one in self.examples:
            text = self.fill(one.conversation, one.a, one.b, by_name[one.principle].question[0])
            thinking = f"\n{self.think} {one.thought}" if thought else ""
            blocks.append(f"{text}{thinking}\n{self.verdict} ({one.better})\n\n")
        return "".join(blocks)

    def _rng(self, comparison: Comparison, seed: int, what: str) -> random.Random:
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
    if missing := [mark for mark in MARKS if mark not in found.ask]:
        raise UserError(f"{path}: key 'ask' lacks {', '.join(missing)}, which the question is made of")
    names = [p.name for p in found.principles]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two principles are named '{twice}'")
    for one in found.examples:
        if one.principle not in names:
            raise UserError(f"{path}: an example is of principle '{one.principle}'; principles: {', '.join(names)}")
    return found
