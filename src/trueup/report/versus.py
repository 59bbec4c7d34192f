"""Runs side by side: the closing figures of each stage, where their configs differ, and their curves in one page.

In order: read the runs (`read`), line their stages up by name, flatten results and configs into rows of one cell a
run, draw each metric with a curve a run. Not in it: which run is better; figures of runs on other data do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group as Parts
from rich.table import Table
from rich.text import Text

from trueup.records import UserError, safe, write_text
from trueup.report.charts import SERIES, STEP, Chart, Group, figure, line
from trueup.report.figures import NONE, duration, short, title_of
from trueup.report.metrics import METRICS
from trueup.report.page import filled
from trueup.report.read import RunData, Stage, finite, number, read_run
from trueup.report.training import FIRST, THEN

GENERATOR = '<meta name="generator" content="trueup compare">'
MOST = len(SERIES)
NO_FIGURES = {"reliability", "examples", "by_margin", "dropped", "normalization", "rows"}
"""Results that are tables of their own, or counts that the config tells."""


@dataclass
class Rows:
    """A table: a name and a text a run in each row."""

    title: str
    rows: list[tuple[str, list[str]]] = field(default_factory=list)


@dataclass
class Comparison:
    """What is shown of the runs `names`."""

    names: list[str]
    figures: list[Rows]
    differences: list[Rows]
    curves: list[Group]
    problems: list[str]


def compare(folders: Sequence[Path]) -> Comparison:
    """Raises UserError where a folder holds no run, or there are fewer than two or more than eight of them."""
    if not 2 <= len(folders) <= MOST:
        raise UserError(f"compare takes 2 to {MOST} runs, got {len(folders)}")
    if len({f.resolve() for f in folders}) < len(folders):
        raise UserError("compare was given one run twice")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    stages = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    lined = [(name, [next((s for s in run.stages if s.name == name), None) for run in runs]) for name in stages]
    return Comparison(
        names,
        [table for name, of in lined if (table := _figures(name, of)).rows],
        [table for name, of in lined if (table := _differences(name, of, runs)).rows],
        [group for name, of in lined if (group := _curves(name, of, names)).charts],
        [f"{name}: {problem}" for name, run in zip(names, runs, strict=True) for problem in run.problems],
    )


def _figures(name: str, stages: Sequence[Stage | None]) -> Rows:
    """The numbers of results.json, and how long it took; of an evaluation those of each model."""
    found = [dict(_numbers(s.results)) if s else {} for s in stages]
    table = Rows(title_of(name))
    if any(s and s.status != "done" for s in stages):
        table.rows.append(("status", [s.status if s else NONE for s in stages]))
    for key in dict.fromkeys(k for one in found for k in one):
        table.rows.append((key, [short(one.get(key)) for one in found]))
    times = [number(s.manifest, "seconds") if s else None for s in stages]
    if any(times):
        table.rows.append(("time", [duration(t) for t in times]))
    return table


def _numbers(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if finite(value):
            yield name, float(value)
        elif isinstance(value, Mapping) and key not in NO_FIGURES and "by_category" not in key:
            yield from _numbers(value, "" if name == "models" else f"{name} ")


def _differences(name: str, stages: Sequence[Stage | None], runs: Sequence[RunData]) -> Rows:
    """The keys on which the configs differ. A path into a run's own stages counts as `@stage/path`."""
    flat = [dict(_flat(s.config, run)) if s and s.config else None for s, run in zip(stages, runs, strict=True)]
    keys = dict.fromkeys(k for one in flat if one for k in one)
    rows = [(k, [NONE if one is None else one.get(k, "not set") for one in flat]) for k in keys]
    known = [i for i, one in enumerate(flat) if one is not None]
    return Rows(title_of(name), [(k, cells) for k, cells in rows if len({cells[i] for i in known}) > 1])


def _flat(value: Any, run: RunData, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, run, f"{prefix}.{_own(str(key), run)}" if prefix else _own(str(key), run))
    else:
        yield prefix, _own(value, run) if isinstance(value, str) else str(value)


def _own(text: str, run: RunData) -> str:
    if not (stage := run.stage_of(text)):
        return text
    parts = Path(text).parts
    return "/".join([f"@{stage.name}", *parts[parts.index(stage.folder.name) + 1 :]])


def _curves(name: str, stages: Sequence[Stage | None], runs: Sequence[str]) -> Group:
    group = Group(f"curves-{name}", title_of(name))
    logged = list(dict.fromkeys(n for s in stages if s for n in s.names()))
    phase = next((s.phase for s in stages if s), name)
    order = [n for n in [*FIRST.get(phase, []), "validation_loss", *THEN] if n in logged]
    for metric in dict.fromkeys([*order, *logged]):
        curves = [(run, color, s.curve(metric)) for run, color, s in zip(runs, SERIES, stages, strict=False) if s]
        known = METRICS.get(metric)
        traces = [t for run, color, curve in curves if curve[0] for t in line(*curve, name=run, color=color)]
        spec = figure(traces, STEP, known.unit.split(",")[0] if known else metric, showlegend=True)
        chart = Chart(f"v-{name}-{metric}", known.title if known else metric, spec)
        (group.charts if metric in FIRST.get(phase, logged) else group.more).append(chart)
    return group


def tables(found: Comparison) -> Parts:
    """For the terminal. Names and texts are data: no markup in them is obeyed."""
    parts: list[Any] = []
    for kind, these in (("", found.figures), (": where the configs differ", found.differences)):
        for rows in these:
            table = Table(box=box.SIMPLE_HEAD, title=Text(rows.title + kind, style="bold"), title_justify="left")
            table.add_column("")
            for name in found.names:
                table.add_column(Text(safe(name)), justify="left" if kind else "right", overflow="fold")
            for key, cells in rows.rows:
                table.add_row(*(Text(safe(text)) for text in (key, *cells)))
            parts.append(table)
    if not found.differences:
        parts.append(Text("The configs are the same."))
    return Parts(*parts)


def write_page(found: Comparison, out: Path) -> Path:
    """One self-contained page. Raises UserError where `out` is something else than such a page."""
    if out.exists() and not (out.is_file() and GENERATOR in out.read_text(encoding="utf-8", errors="replace")[:4000]):
        raise UserError(f"{out}: is there already and not a page of trueup compare; name another file with --out")
    charts = [chart for group in found.curves for chart in [*group.charts, *group.more]]
    title = " against ".join(found.names)
    write_text(out, filled("versus.html.j2", charts, found=found, title=title, generator=Markup(GENERATOR)))
    return out
