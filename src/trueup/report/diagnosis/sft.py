"""Supervised fine-tuning: does it learn, does it stop, does it follow the format, has it memorized?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trueup.agreement import wilson
from trueup.report.diagnosis.finding import (
    ENDS,
    ERROR,
    NOTE,
    WARNING,
    Finding,
    Say,
    samples,
    too_long,
)
from trueup.report.figures import ends, num, percent, running_mean, short
from trueup.report.read import RunData, Stage, number


def sft(run: RunData, stage: Stage) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    loss, validation = stage.curve("loss")[1], stage.curve("validation_loss")[1]
    diverged = _diverged(loss)
    if diverged:
        yield say(
            ERROR,
            "diverged",
            "training diverged",
            diverged,
            "Steps are so large that they undo one another, and what the base model knew is lost on the way.",
            f"~train.optim.lr={short((number(stage.config, 'train', 'optim', 'lr') or 0) / 10)} or lower, with "
            "~train.optim.warmup=0.05",
        )
        return
    slow, end = _undertrained(loss, validation), number(r, "end_rate")
    top = wilson(end, samples(stage))[1] if end is not None else 1.0  # nobody looked: it may well end
    if slow:
        yield say(
            ERROR if top < 0.5 else WARNING if top < ENDS else NOTE,
            "undertrained",
            "training ended before it had learned",
            slow + (f"; {percent(end)} of its answers end by themselves" if end is not None else ""),
            "What it has not learned yet is the base model’s: to go on with any text, and not to stop.",
            "more ~train.epochs, or a higher ~train.optim.lr",
        )
    yield from _sft_answers(stage, bool(slow))
    risen = validation[-1] - min(validation) if validation else 0.0
    copied, recurring = number(r, "copied"), number(r, "recurring") or 0.0
    by_heart = copied is not None and wilson(copied, samples(stage))[0] > recurring + 0.25
    if validation and risen > 0.05 * min(validation) and loss and ends(loss)[1] < min(validation):
        figure = (
            f"held-out loss {num(min(validation))} at its lowest, {num(validation[-1])} at the end; training loss "
            f"{num(ends(loss)[1])}"
        )
        if copied is not None:
            figure += f"; {percent(copied)} of the answers are a demonstration’s own words"
        yield say(
            WARNING,
            "memorized",
            "it memorized its demonstrations",
            figure,
            "After the lowest point it learned the rows themselves. The weights of that point were kept, the time "
            "after it was spent for nothing.",
            "fewer ~train.epochs, or ~train.patience=2; more demonstrations",
        )
    elif by_heart:
        yield say(
            WARNING,
            "memorized",
            "it answers in its demonstrations’ own words",
            f"{percent(copied)} of the answers repeat a trained reply; of held-out replies {percent(recurring)}",
            "It recites instead of answering, and PPO has nothing to choose from.",
            "fewer ~train.epochs, a lower ~train.optim.lr; ~held_out=0.05 keeps the best weights",
        )
    elif r and not validation:
        yield say(
            NOTE,
            "nothing-held-out",
            "nothing was held out",
            "no validation loss",
            "Whether it memorizes cannot be seen, and the best weights cannot be kept.",
            "~held_out=0.05",
        )
    yield from too_long(stage)


def _diverged(loss: Sequence[float]) -> str:
    """Said where the loss ends above its start, leaps far over it, or climbs back by half of what was gained."""
    if len(loss) < 10:
        return ""
    smooth = np.asarray(running_mean(loss, max(3, len(loss) // 10 | 1)))
    start, low, end = loss[0], float(smooth.min()), ends(loss)[1]
    figure = f"training loss {num(start)} at the start, {num(low)} at its lowest, {num(max(loss))} at its highest, "
    figure += f"{num(end)} at the end"
    climbed = end - low > 0.5 * (start - low) + 0.1
    return figure if end > start or max(loss[1:]) > 1.5 * start or climbed else ""


def _undertrained(loss: Sequence[float], validation: Sequence[float]) -> str:
    if len(loss) < 2:
        return ""
    start, end = loss[0], ends(loss)[1]
    falling = len(validation) > 1 and validation[-2] - validation[-1] > 0.05 * validation[-1]
    figure = f"training loss {num(start)} → {num(end)}"
    if falling:
        figure += f"; held-out loss still falls, {num(validation[-2])} → {num(validation[-1])} in the last interval"
    return figure if falling or end > 0.95 * start else ""


def _sft_answers(stage: Stage, slow: bool) -> Iterator[Finding]:
    """Whether it stops, and follows the format."""
    say, r, n = Say(stage), stage.results, samples(stage)
    end = number(r, "end_rate")
    speaks, beyond = number(r, "speaks_for_user"), number(r, "beyond_max_tokens") or 0.0
    runs_on = speaks is not None and n > 0 and wilson(speaks, n)[0] > 0.02
    if runs_on:
        yield say(
            ERROR if (speaks or 0) > 0.2 else WARNING,
            "speaks-for-user",
            "its answers go on with the user’s next turn",
            f"{percent(speaks)} of {num(n, 0)} answers hold what the template writes before a user’s turn",
            "The demonstrations’ replies hold whole conversations as text, or another template’s marks: it imitates "
            "them, and a reward model then scores a dialogue with itself.",
            "split such rows of ~data into `messages`, or cut the replies at the mark; more ~train.epochs where only "
            "the base model does this",
        )
    if end is None or not n or wilson(end, n)[1] >= ENDS:
        return
    figure = f"{percent(end)} of {num(n, 0)} answers end by themselves"
    severity = ERROR if end < 0.5 else WARNING
    if beyond > (1 - end) / 2:
        yield say(
            severity,
            "max-tokens",
            "answers are cut before they can end",
            f"{figure}; {percent(beyond)} of the held-out demonstrations are longer than {_tokens(stage)} tokens",
            "Raters would compare fragments, and PPO would punish answers for a limit.",
            "a higher ~sampling.max_tokens, and in the stages after it",
        )
    elif not runs_on and not slow:
        yield say(
            severity,
            "no-end",
            "the model does not stop",
            figure,
            "It fits the replies but not the token after them: the demonstrations’ replies run on, or the end token of "
            "the template is not the one that was trained. The reward model and PPO both read the score there.",
            "the replies in ~data, and the chat template of ~model",
        )


def _tokens(stage: Stage) -> str:
    return num(number(stage.config, "sampling", "max_tokens"), 0)
