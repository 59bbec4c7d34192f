"""Scorers that ask something of somebody else's: a Python function, sync or async, or a server.

Asked once, in the main process, whatever the number of processes: an answer may differ each time, and a function may
look at all rows at once. Several that only wait (coroutines) wait at the same time.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.faults import told
from trueup.records import Completion, Prompt, Scorer, Scores, UserError

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh

Answers = Sequence[float | None]
"""A number a row; None where the scorer does not apply."""


class Asked:
    """`ask(prompts, completions)` gives the answers, or a coroutine that does, which `waits` tells."""

    def __init__(
        self,
        name: str,
        ask: Callable[[Sequence[Prompt], Sequence[Completion]], Answers | Coroutine[Any, Any, Answers]],
        mesh: Mesh,
        *,
        waits: bool,
    ) -> None:
        self.name, self.ask, self.mesh, self.waits = name, ask, mesh, waits

    def start(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Callable[[], Scores]:
        """Begins to wait, if it waits; calling what is returned gives the scores, NaN where it does not apply."""
        answers: Callable[[], Any] = functools.partial(self.ask, prompts, completions)
        if self.waits and self.mesh.is_main:
            answers = asyncio.run_coroutine_threadsafe(answers(), loop()).result

        def checked() -> np.ndarray:
            """In the main process alone, so that a failure there is known to every process."""
            with told(f"'{self.name}'"):
                found = answers()
            return numbers(self.name, found, len(completions))

        return lambda: Scores(self.mesh.from_main(checked))

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        found = self.start(prompts, completions)()
        refuse_gaps(self.name, found.value, prompts)
        return found


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """One event loop for all, in a thread of its own: clients that a function keeps belong to the loop that they were
    made in, and a notebook has a loop of its own running here."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


class Own:
    """A scorer that somebody else wrote: what it raises, and anything but B finite values, is told in one line."""

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.scorer, self.spec, self.name = scorer, name, scorer.name

    def start(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Callable[[], Scores]:
        return lambda: self._ask(prompts, completions)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        found = self._ask(prompts, completions)
        refuse_gaps(self.spec, found.value, prompts)
        return found

    def _ask(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        with told(f"'{self.spec}'"):
            found = self.scorer.score(prompts, completions)
        if not isinstance(found, Scores):
            raise UserError(f"'{self.spec}' must return Scores, got {type(found).__name__}")
        value = numbers(self.spec, [None if one != one else one for one in found.value], len(completions))
        return Scores(value, found.parts)


def start(scorer: Scorer, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Callable[[], Scores]:
    """As `Asked.start`, of any scorer."""
    if isinstance(scorer, Asked | Own):
        return scorer.start(prompts, completions)
    return lambda: scorer.score(prompts, completions)


def numbers(name: str, answers: Any, count: int) -> np.ndarray:
    """The answers as [count] float64, None as NaN. Raises UserError for anything else."""
    if not isinstance(answers, Iterable) or isinstance(answers, str | dict):
        raise UserError(f"'{name}' must return {count} numbers, got {type(answers).__name__}")
    answers = list(answers)
    try:
        value = np.array([np.nan if one is None else float(one) for one in answers])
        given = np.array([one is not None for one in answers], dtype=bool)
    except (TypeError, ValueError):
        wrong = next(one for one in answers if one is not None and not _is_number(one))
        raise UserError(f"'{name}' must return {count} numbers, got {type(wrong).__name__} among them") from None
    if len(value) != count or not np.isfinite(value[given]).all():
        bad = f"{len(value)} of them" if len(value) != count else f"{value[given][~np.isfinite(value[given])][0]}"
        raise UserError(f"'{name}' must return {count} finite numbers (None where it does not apply), got {bad}")
    return value


def _is_number(one: Any) -> bool:
    try:
        float(one)
    except (TypeError, ValueError):
        return False
    return True


def refuse_gaps(name: str, value: np.ndarray, prompts: Sequence[Prompt]) -> None:
    """Every completion needs a score: raises UserError naming the first prompt without one."""
    gaps = np.isnan(value).nonzero()[0]
    if len(gaps):
        text = prompts[gaps[0]].text.replace("\n", " ")[:80]
        raise UserError(f"'{name}' applies to {len(value) - len(gaps)} of {len(value)} completions; not to '{text}'")
