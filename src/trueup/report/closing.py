"""The closing table and the examples side by side, for the terminal. The report shows the same figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from trueup.records import safe
from trueup.report.figures import NONE, bracket, num, percent, title_of
from trueup.report.headline import models_of
from trueup.report.read import RunData, number, pair


def closing_table(results: Mapping[str, Any]) -> Table:
    """Models x {gold at T=1 and greedy, win rate against the baseline, KL, length, ends}, 95% intervals in brackets.

    Says in its caption who judged the win rates, and what a dash stands for.
    """
    baseline = str(results.get("baseline", ""))
    gold = results.get("gold")
    table = Table(
        box=box.SIMPLE_HEAD,
        title=_title(results),
        title_justify="left",
        caption=_caption(results),
        caption_justify="left",
    )
    table.add_column("model")
    for name in (
        f"gold T={num(number(results, 'temperature'), 1).removesuffix('.0')}",
        "gold greedy",
        f"win rate vs {title_of(baseline)}",
        "KL nats",
        "length",
        "ends",
    ):
        table.add_column(name, justify="right")
    for name, modes in models_of(results).items():
        sampled, greedy = modes.get("sampled", {}), modes.get("greedy", {})
        table.add_row(
            Text(title_of(name)),
            *(
                Text(cell)
                for cell in (
                    _cell(num(number(sampled, "gold")), bracket(pair(sampled, "gold_interval"))) if gold else "no gold",
                    _cell(num(number(greedy, "gold")), bracket(pair(greedy, "gold_interval"))) if gold else "no gold",
                    "baseline"
                    if name == baseline
                    else _cell(
                        percent(number(sampled, "win_rate")), bracket(pair(sampled, "win_rate_interval"), 0, scale=100)
                    ),
                    num(number(sampled, "kl"), 1),
                    num(number(sampled, "length"), 0),
                    percent(number(sampled, "end_rate")),
                )
            ),
        )
    return table


ROUND = ("round", "labels", "accuracy, earlier", "accuracy, own", "PPO's KL", "score", "gold")


def rounds(run: RunData) -> list[tuple[str, ...]]:
    """`ROUND` of a run whose reward model is refreshed: labels spent so far, the reward model's accuracy on held-out
    comparisons of earlier rounds and of its own, and its PPO's KL, score and gold. Empty without rounds."""
    stages = {stage.name: stage for stage in run.stages}
    found: dict[str, list[dict[str, Any]]] = {}
    for names in (run.recipe.get("rounds") or {}).values():
        made = [stages[name] for name in names if name in stages]
        if made and made[0].results:
            found[made[0].phase] = [stage.results for stage in made]
    labels, rows = 0, []
    for i, reward in enumerate(found.get("reward", ())):
        judged, routed, ppo = (found[p][i] if i < len(found.get(p, ())) else {} for p in ("judge", "route", "ppo"))
        labels += judged.get("comparisons", 0) + routed.get("labels", 0)  # of a router's, people's alone
        figures = (*accuracies(reward), ppo.get("kl"), ppo.get("score"), ppo.get("audit"))
        rows.append((str(i + 1), str(labels), *(num(figure) for figure in figures)))
    return rows


def accuracies(reward: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Of a round's reward model: on the held-out comparisons of earlier rounds, where there are any, and of its own."""
    *before, own = (reward.get("by_data") or {"": reward}).values()
    pairs = sum(part["pairs"] for part in before)
    right = sum(part["accuracy"] * part["pairs"] for part in before if part["pairs"])
    return right / pairs if pairs else None, own.get("accuracy")


def rounds_table(run: RunData) -> Table | None:
    if not (rows := rounds(run)):
        return None
    table = Table(box=box.SIMPLE_HEAD, title="Round by round", title_justify="left")
    for name in ROUND:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _title(results: Mapping[str, Any]) -> Text:
    prompts = number(results, "prompts")
    return Text(f"{num(prompts, 0)} prompts, 95% intervals" if prompts else "The models", style="bold")


def _caption(results: Mapping[str, Any]) -> Text:
    judge, gold = results.get("judge"), results.get("gold")
    apart = any(number(m, "sampled", "score") is not None for m in models_of(results).values())
    who = f"Win rates judged by {judge}" + (
        ", the gold score." if gold else ", which is not the proxy." if apart else "."
    )
    text = who if judge else "No judge was named, so there are no win rates."
    return Text(text if gold else f"No gold score is known for these prompts. {text}", style="dim")


def _cell(value: str, interval: str) -> str:
    return value if value == NONE or not interval else f"{value} {interval}"


def examples_table(results: Mapping[str, Any], mode: str = "sampled") -> Group:
    """The examples with every model's answer, side by side. Texts are data: no markup in them is obeyed."""
    parts: list[Any] = []
    names = list(models_of(results))
    for example in results.get("examples") or []:
        answers = example.get("answers") or {}
        title = Text(f"{example['category']}: " if example.get("category") else "", style="dim")
        title.append(safe(str(example.get("prompt", ""))), style="bold not dim")
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", expand=True)
        for name in names:
            table.add_column(Text(title_of(name)), ratio=1, overflow="fold")
        table.add_row(*(_answer(answers.get(name), mode) for name in names))
        parts.append(table)
    return Group(*parts)


def _answer(modes: Any, mode: str) -> Text:
    text = modes.get(mode) if isinstance(modes, Mapping) else None
    if text is None:
        return Text(NONE, style="dim")
    return Text(safe(text)) if text else Text("(empty)", style="dim")
