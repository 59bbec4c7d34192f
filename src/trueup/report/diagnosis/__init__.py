"""Which stage is at fault: a run's own records in, findings out, the likely cause first. No torch, no model is run.

In order: for each stage, in the recipe's order, what stopped it, then its phase's rules (`RULES`), each of which reads
one or two figures and says what they mean and which key to change. A fault that an earlier stage explains is left to
that stage. Every threshold and its reason is in docs/diagnose.md. Not in it: how figures are measured (phases), how
they are drawn (`page`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trueup.records import safe
from trueup.report.diagnosis.evaluate import evaluate
from trueup.report.diagnosis.finding import ERROR, NOTE, ORDER, WARNING, Finding, Say
from trueup.report.diagnosis.labels import critique, generate, judge, reward, route
from trueup.report.diagnosis.ppo import ppo
from trueup.report.diagnosis.sft import sft
from trueup.report.read import ABSENT, DONE, RunData, Stage

__all__ = ["ERROR", "NOTE", "WARNING", "Finding", "diagnose", "diagnosis_table"]


def diagnose(run: RunData) -> list[Finding]:
    """Errors first, then warnings, then notes; within each by the stages' order, causes before their consequences."""
    found = [f for stage in run.stages for f in (*stopped(stage), *_of_phase(run, stage))]
    return sorted(found, key=lambda f: ORDER[f.severity])


def _of_phase(run: RunData, stage: Stage) -> Iterator[Finding]:
    rules = RULES.get(stage.phase)
    if rules and (stage.metrics or stage.results):
        yield from rules(run, stage)


def stopped(stage: Stage) -> Iterator[Finding]:
    """Why a stage did not end: its manifest says so where its process could."""
    say, error = Say(stage), str(stage.manifest.get("error") or "")
    if stage.status in (DONE, ABSENT):
        return
    if "self-check" in error:
        yield say(
            ERROR,
            "self-check",
            "PPO’s self-check failed at step 0, nothing was trained",
            error.partition("failed: ")[2] or error,
            "Sampler, trained network and reference must say the same of the same tokens, and the score must sit on "
            "the end token; else every later figure is wrong.",
            "Not a matter of settings: a custom scorer or model code that changes weights, or another model under the "
            "name of ~reference or ~model.",
        )
    elif error.startswith("FloatingPointError"):
        rates = "~optim.lr, ~critic_optim.lr" if stage.phase == "ppo" else "~train.optim.lr"
        yield say(
            ERROR,
            "not-finite",
            "a figure became infinite or not a number",
            error.partition(": ")[2],
            "One such value spreads through all weights.",
            f"lower {rates}",
        )
    elif error and not error.startswith("KeyboardInterrupt"):
        yield say(
            ERROR, "stopped", "the stage stopped", error, "What comes after it is missing.", "as the message says"
        )
    else:
        steps = f"{len(stage.metrics)} steps logged" if stage.metrics else "no step logged"
        why = "It was interrupted, or is still at work."
        yield say(NOTE, "unfinished", "the stage is not finished", steps, why, "the same command goes on from there")


RULES: dict[str, Callable[[RunData, Stage], Iterator[Finding]]] = {
    "sft": sft,
    "generate": generate,
    "critique": critique,
    "judge": judge,
    "ai-feedback": judge,
    "route": route,
    "reward": reward,
    "ppo": ppo,
    "evaluate": evaluate,
}


def diagnosis_table(run: RunData, found: Sequence[Finding]) -> Group:
    """Findings one below another, then what was looked at. Texts are data: no markup in them is obeyed."""
    parts: list[Any] = []
    for number_, finding in enumerate((f for f in found if f.severity != NOTE), 1):
        table = Table(box=None, show_header=False, title_justify="left", padding=(0, 1))
        table.title = Text(
            f"{number_}. {finding.severity.upper()}  {finding.stage}: {safe(finding.what)}", style="bold"
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in (("figure", finding.figure), ("why", finding.why), ("change", finding.change)):
            table.add_row(label, Text(safe(text)))
        table.add_row("more", Text(f"docs/diagnose.md, {finding.name}"))
        parts.append(table)
    for finding in found:
        if finding.severity == NOTE:
            line = f"note  {finding.stage}: {finding.what} ({finding.figure}); {finding.change}"
            parts.append(Text(safe(line), style="dim"))
    looked = [s.name for s in run.stages if s.phase in RULES and (s.metrics or s.results)]
    serious = sum(f.severity != NOTE for f in found)
    what = f"{serious} finding{'s' if serious > 1 else ''}" if serious else "nothing is wrong by the records"
    parts.append(Text(safe(f"{what}; looked at: {', '.join(looked) or 'no stage, none has records yet'}")))
    parts += [Text(safe(f"left out: {problem}"), style="dim") for problem in run.problems]
    return Group(*parts)
