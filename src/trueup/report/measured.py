"""What was measured at a stage's end: reward models on held-out pairs, models by category, length, time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trueup.agreement import wilson
from trueup.report.charts import SERIES, STEP, Chart, Group, Trace, figure, label, labels, line, whiskers
from trueup.report.figures import duration, mean_interval, num, short, title_of
from trueup.report.headline import models_of
from trueup.report.metrics import METRICS
from trueup.report.read import RunData, Stage, number

# a reward model


def reward_model(stage: Stage) -> Group | None:
    """What the held-out pairs say of a reward model."""
    r = stage.results
    if number(r, "accuracy") is None:
        return None
    group = Group(f"reward-{stage.name}", title_of(stage.name))
    pairs = number(r, "pairs") or 0
    group.charts.append(_accuracies(stage, pairs))
    table = [
        b
        for b in r.get("reliability") or []
        if number(b, "confidence") is not None and number(b, "observed") is not None
    ]
    if table:
        group.charts.append(_reliability(stage, table))
    by = {str(c): v for c, v in (r.get("by_category") or {}).items() if number(v, "accuracy") is not None}
    if by:
        names = sorted(by, key=lambda c: -(number(by[c], "pairs") or 0))[:30]
        group.charts.append(
            Chart(
                f"rm-{stage.name}-category",
                "Accuracy by category",
                _accuracy_bars([(f"{c} ({num_pairs(by[c])})", by[c]) for c in names]),
                "In brackets: held-out pairs; whiskers: 95% intervals."
                + (f" The {len(names)} largest of {len(by)}." if len(by) > 30 else ""),
            )
        )
    margins = [b for b in r.get("by_margin") or [] if number(b, "accuracy") is not None]
    if margins:
        bars = [(f"{num(number(b, 'from'))} to {num(number(b, 'to'))}", b) for b in margins]
        group.charts.append(
            Chart(
                f"rm-{stage.name}-margin",
                "Accuracy by predicted margin",
                _accuracy_bars(bars, "predicted margin, s.d. of SFT scores"),
                "Equal numbers of pairs in each group. Healthy: the surer the model, the more often it is right.",
            )
        )
    return group


def num_pairs(group: Any) -> str:
    return f"{number(group, 'pairs') or 0:.0f}"


def _accuracies(stage: Stage, pairs: float) -> Chart:
    r = stage.results
    rows = [
        ("held-out labels", number(r, "accuracy"), pairs, "c2"),
        ("the longer answer wins", number(r, "longer_wins"), pairs, "muted"),
        ("ceiling: the raters’ noise", number(r, "ceiling"), None, "c3"),
        ("clean: against gold", number(r, "clean", "accuracy"), number(r, "clean", "pairs"), "gold"),
        (
            f"clean, gold margin > {short(number(r, 'clean', 'clear_margin'))}",
            number(r, "clean", "clear_accuracy"),
            number(r, "clean", "clear_pairs"),
            "gold",
        ),
    ]
    known = [(n, v, k, c) for n, v, k, c in rows if v is not None][::-1]
    bars = [wilson(v, k) if k else None for _, v, k, _ in known]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [label(n) for n, *_ in known],
        "x": [v for _, v, *_ in known],
        "marker": {"color": [c for *_, c in known]},
        "name": "accuracy",
        "error_x": whiskers([v for _, v, *_ in known], bars),
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    fig = figure(
        [trace],
        "share of pairs ordered right",
        "",
        height=90 + 40 * len(known),
        bargap=0.4,
        xaxis={"range": [0, 1.02], "tickformat": ".0%"},
        yaxis={"automargin": True},
        shapes=[_half("x")],
    )
    note = f"{pairs:.0f} held-out pairs; whiskers: 95% intervals; dotted: a coin toss."
    if number(r, "ceiling") is None:
        note += " No pair was rated twice, so the ceiling that the raters’ noise sets is not known."
    if number(r, "clean", "accuracy") is None:
        note += " No gold margin is in the data, so accuracy on clean pairs is not known."
    return Chart(f"rm-{stage.name}-accuracy", "Accuracy, between what is trivial and what is possible", fig, note)


def _half(axis: str) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": 0.5,
        f"{axis}1": 0.5,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": "muted", "dash": "dot", "width": 1.5},
    }


def _reliability(stage: Stage, table: Sequence[Mapping[str, Any]]) -> Chart:
    counts = [number(b, "n") or 0.0 for b in table]
    shares = [number(b, "observed") or 0.0 for b in table]
    spans = [wilson(s, n) for s, n in zip(shares, counts, strict=True)]
    most = max(counts) or 1.0
    traces: list[Trace] = [
        {
            "x": [0.5, 1],
            "y": [0.5, 1],
            "mode": "lines",
            "name": "perfect",
            "line": {"color": "muted", "dash": "dot"},
            "hoverinfo": "skip",
        },
        {
            "x": [number(b, "confidence") for b in table],
            "y": shares,
            "customdata": counts,
            "mode": "markers+lines",
            "name": "measured",
            "marker": {"color": "c2", "size": [6 + 14 * math.sqrt(n / most) for n in counts]},
            "line": {"color": "c2", "width": 1},
            "error_y": whiskers(shares, spans, "c2"),
            "hovertemplate": "says %{x:.0%}, is right %{y:.0%}<br>%{customdata:.0f} pairs<extra></extra>",
        },
    ]
    ece = number(stage.results, "calibration_error")
    return Chart(
        f"rm-{stage.name}-reliability",
        "Reliability: how sure it is against how often it is right",
        figure(
            traces,
            "probability that it states",
            "share that is right",
            height=340,
            xaxis={"range": [0.48, 1.02], "tickformat": ".0%"},
            yaxis={"range": [0, 1.05], "tickformat": ".0%"},
        ),
        (f"Expected calibration error {ece:.3f}. " if ece is not None else "")
        + "On the dotted line it is as sure as it should be; under it, too sure. Larger points hold more pairs.",
    )


def _accuracy_bars(rows: Sequence[tuple[str, Mapping[str, Any]]], axis: str = "") -> dict[str, Any]:
    values = [number(b, "accuracy") or 0.0 for _, b in rows]
    spans = [wilson(v, number(b, "pairs") or 0.0) for v, (_, b) in zip(values, rows, strict=True)]
    trace = {
        "type": "bar",
        "x": labels([n for n, _ in rows]),
        "y": values,
        "marker": {"color": "c2"},
        "name": "accuracy",
        "error_y": whiskers(values, spans),
        "hovertemplate": "%{x}: %{y:.1%}<extra></extra>",
    }
    return figure(
        [trace],
        axis,
        "share ordered right",
        height=320,
        bargap=max(0.2, 1 - 0.12 * len(rows)),
        xaxis={"type": "category", "automargin": True},
        yaxis={"range": [0, 1.05], "tickformat": ".0%"},
        shapes=[_half("y")],
    )


# models by category, length


def model_colors(names: Sequence[str]) -> dict[str, str]:
    """The same colour for the same model everywhere."""
    fixed = {"base": "c1", "sft": "c2", "ppo": "c3"}
    free = iter([*SERIES[3:], *["muted"] * len(names)])
    return {n: fixed[n] if n in fixed else next(free) for n in names}


def by_category(stage: Stage) -> list[Chart]:
    """Gold by category and model, sampled and greedy; the proxy's where no gold is known."""
    models = models_of(stage.results)
    key = "gold" if any("gold_by_category" in m for t in models.values() for m in t.values()) else "score"
    colors = model_colors(list(models))
    charts = []
    for mode, title in (("sampled", "sampled answers"), ("greedy", "greedy answers")):
        tables = {n: t.get(mode, {}).get(f"{key}_by_category") for n, t in models.items()}
        tables = {n: t for n, t in tables.items() if isinstance(t, Mapping) and t}
        if not tables:
            continue
        rows: dict[tuple[Any, Any], list[float]] = {}
        for r in stage.samples:
            if r.get("mode") == mode and (value := number(r, key)) is not None:
                rows.setdefault((r.get("model"), r.get("category")), []).append(value)
        count = {c: max((len(rows.get((n, c), [])) for n in tables), default=0) for t in tables.values() for c in t}
        names = sorted(count, key=lambda c: (-count[c], str(c)))[:20] if len(count) > 20 else sorted(count, key=str)
        traces = []
        for model, table in tables.items():
            half = [mean_interval(v)[1] if (v := rows.get((model, c))) else None for c in names]
            traces.append(
                {
                    "type": "bar",
                    "name": label(title_of(model)),
                    "x": labels(names),
                    "y": [number(table, c) for c in names],
                    "marker": {"color": colors[model]},
                    "error_y": {"type": "data", "array": half, "color": "text", "thickness": 1.2, "width": 2},
                    "hovertemplate": "%{x}: %{y:.2f}<extra>" + label(title_of(model)) + "</extra>",
                }
            )
        what = "gold score" if key == "gold" else "proxy score, s.d."
        note = "Whiskers: 95% intervals of the mean over prompts." if rows else ""
        if key == "score":
            note = f"No gold score is known; this is the proxy that PPO optimized, no measure of quality. {note}"
        if len(names) < len(count):
            note += f" The {len(names)} largest of {len(count)} categories."
        charts.append(
            Chart(
                f"category-{stage.name}-{mode}",
                f"{what.split(',')[0].capitalize()} by category, {title}",
                figure(traces, "", what, height=380, barmode="group", xaxis={"type": "category", "automargin": True}),
                note,
                wide=True,
            )
        )
    return charts


def lengths(stage: Stage) -> list[Chart]:
    """Length and end rate over the steps of PPO."""
    charts = []
    for name, title, axis in (
        ("length", "length of the answers", {"rangemode": "tozero"}),
        ("end_rate", "answers that end by themselves", {"tickformat": ".0%"}),
    ):
        steps, values = stage.curve(name)
        if steps:
            unit = METRICS[name].unit
            charts.append(
                Chart(
                    f"length-{stage.name}-{name}",
                    f"{title_of(stage.name)}: {title}",
                    figure(line(steps, values, name, "c3"), STEP, unit.split(",")[0], yaxis=axis),
                    unit.capitalize() + ".",
                )
            )
    return charts


def times(run: RunData) -> Chart | None:
    rows = [(s.name, seconds) for s in run.stages if (seconds := number(s.manifest, "seconds")) is not None][::-1]
    if not rows:
        return None
    most = max(v for _, v in rows)
    unit, scale = ("seconds", 1.0) if most < 180 else ("minutes", 60.0) if most < 3 * 3600 else ("hours", 3600.0)
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [label(n) for n, _ in rows],
        "x": [v / scale for _, v in rows],
        "marker": {"color": "c2"},
        "name": "time",
        "text": [duration(v) for _, v in rows],
        "textposition": "auto",
        "hovertemplate": "%{y}: %{x:.2f} " + unit + "<extra></extra>",
    }
    return Chart(
        "times",
        "Time per stage",
        figure(
            [trace], unit, "", height=90 + 32 * len(rows), bargap=0.35, yaxis={"type": "category", "automargin": True}
        ),
        wide=True,
    )
