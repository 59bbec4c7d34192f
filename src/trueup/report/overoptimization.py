"""Proxy against gold over a PPO stage: against KL, its axis spaced by the square root, and against the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trueup.report.charts import STEP, Chart, Trace, figure, label, line, whiskers
from trueup.report.figures import running_mean, smoothing, thin, title_of
from trueup.report.headline import models_of
from trueup.report.read import RunData, Stage, number, pair


def tick_values(most: float) -> list[float]:
    """KLs in nats for an axis that is spaced by their square roots: round, and not crowded."""
    nice = [
        0,
        0.1,
        0.25,
        0.5,
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        10,
        15,
        20,
        30,
        40,
        50,
        75,
        100,
        150,
        200,
        300,
        500,
        1000,
        2000,
        5000,
        10000,
    ]
    end = math.sqrt(max(most, 1e-9))
    kept: list[float] = []
    for kl in nice:
        if math.sqrt(kl) <= end * 1.05 and (not kept or math.sqrt(kl) - math.sqrt(kept[-1]) >= 0.09 * end):
            kept.append(kl)
    return kept


@dataclass
class Curves:
    """Proxy and gold over a PPO stage: one row a logged step where score and kl are known."""

    steps: list[float]
    kl: list[float]  # nats, not below 0
    score: list[float]
    audit: list[float] | None
    smooth_kl: list[float]
    smooth_score: list[float]
    smooth_audit: list[float] | None
    window: int
    held_out: list[dict[str, Any]]  # {name, kl, gold, gold_interval, score} of the models on held-out prompts


def proxy_and_gold(run: RunData, stage: Stage) -> Curves | None:
    rows = [r for r in stage.metrics if all(number(r, k) is not None for k in ("step", "score", "kl"))]
    if not rows:
        return None
    has_audit = all(number(r, "audit") is not None for r in rows)
    names = ["step", "kl", "score", *(["audit"] if has_audit else [])]
    columns: dict[str, list[float]] = {}
    for name in names:
        _, columns[name] = thin([r["step"] for r in rows], [float(r[name]) for r in rows])
    columns["kl"] = [max(v, 0.0) for v in columns["kl"]]
    window = 2 * smoothing(len(columns["kl"])) - 1  # KL and score are both noisy here
    smooth = {k: running_mean(v, window) for k, v in columns.items()}
    return Curves(
        columns["step"],
        columns["kl"],
        columns["score"],
        columns.get("audit"),
        smooth["kl"],
        smooth["score"],
        smooth.get("audit"),
        window,
        _held_out(run, stage),
    )


def _held_out(run: RunData, stage: Stage) -> list[dict[str, Any]]:
    """The reference and this stage's own model as an evaluation found them, where it used the same scorers."""
    for evaluation in run.of("evaluate"):
        paths = evaluation.config.get("models")
        models, reference = models_of(evaluation.results), evaluation.results.get("reference")
        if not models or not isinstance(paths, Mapping):
            continue
        mine = [n for n in models if stage.holds(paths.get(n))]
        start = paths.get(str(reference)) in (stage.config.get("reference"), stage.config.get("model"))
        if not mine or not start:
            continue
        gold = stage.gold_audit and evaluation.config.get("gold") == stage.config.get("audit")
        proxy = evaluation.config.get("proxy") == stage.config.get("scorer")
        points = []
        for name in [str(reference), *mine]:
            sampled = models.get(name, {}).get("sampled", {})
            if (kl := number(sampled, "kl")) is not None:
                points.append(
                    {
                        "name": title_of(name),
                        "kl": max(kl, 0.0),
                        "gold": number(sampled, "gold") if gold else None,
                        "gold_interval": pair(sampled, "gold_interval"),
                        "score": number(sampled, "score") if proxy else None,
                    }
                )
        return points
    return []


def over_kl(run: RunData, stage: Stage) -> Chart | None:
    """The main chart: proxy and gold against KL, its axis spaced by the square root."""
    c = proxy_and_gold(run, stage)
    if c is None:
        return None
    root, smooth_root = [math.sqrt(k) for k in c.kl], [math.sqrt(k) for k in c.smooth_kl]
    traces: list[Trace] = []
    panels = [
        ("proxy (optimized)", "score", c.score, c.smooth_score, "proxy"),
        (audit_label(stage), "gold", c.audit, c.smooth_audit, "gold"),
    ]
    for i, (name, key, values, smooth, color) in enumerate(panels):
        if values is None or smooth is None:
            continue
        common = {"yaxis": "y" if i == 0 else "y2", "showlegend": i == 0}
        hover = f"step %{{customdata[0]}}<br>KL %{{customdata[1]:.2f}} nats<br>{name} %{{y:.3f}}<extra></extra>"
        traces.append(
            {
                "x": root,
                "y": values,
                "customdata": [list(z) for z in zip(c.steps, c.kl, strict=True)],
                "mode": "markers",
                "name": "each step",
                "legendgroup": "step",
                "marker": {"size": 5, "color": color},
                "opacity": 0.4 if c.window > 1 else 0.9,
                "hovertemplate": hover,
                **common,
            }
        )
        if c.window > 1:
            traces.append(
                {
                    "x": smooth_root,
                    "y": smooth,
                    "customdata": [list(z) for z in zip(c.steps, c.smooth_kl, strict=True)],
                    "mode": "lines",
                    "name": "running mean",
                    "legendgroup": "mean",
                    "line": {"color": color, "width": 2.5},
                    "hovertemplate": "running mean<br>" + hover,
                    **common,
                }
            )
        held = [p for p in c.held_out if p[key] is not None]
        if held:
            ys = [p[key] for p in held]
            bars = [p["gold_interval"] if i else None for p in held]
            traces.append(
                {
                    "x": [math.sqrt(p["kl"]) for p in held],
                    "y": ys,
                    "mode": "markers+text",
                    "name": "models in the evaluation",
                    "legendgroup": "held",
                    "text": [label(p["name"]) for p in held],
                    "customdata": [p["kl"] for p in held],
                    "textposition": "bottom right",
                    "cliponaxis": False,
                    "marker": {
                        "size": 11,
                        "symbol": "diamond-open",
                        "color": "text",
                        "line": {"width": 2, "color": "text"},
                    },
                    **({"error_y": whiskers(ys, bars)} if any(bars) else {}),
                    "hovertemplate": "%{text}, evaluated<br>KL %{customdata:.2f} nats<br>%{y:.3f}<extra></extra>",
                    **common,
                }
            )
    most = max([*c.kl, *(p["kl"] for p in c.held_out)])
    ticks, end = tick_values(most), math.sqrt(max(most, 1e-9))
    fig = figure(
        traces,
        "KL from the reference, nats per completion (spaced by √KL)",
        "",
        height=540 if c.audit else 340,
        xaxis={
            "tickvals": [math.sqrt(t) for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
            "range": [-0.03 * end, 1.06 * end],
        },
    )
    axes = [
        ("proxy (optimized)", stage.score_axis, "proxy"),
        *([(audit_label(stage), audit_axis(stage), "gold")] if c.audit else []),
    ]
    _stack(fig["layout"], axes)
    fig["layout"]["showlegend"] = True
    note = (
        "Each point is a step on training prompts, with the model as it was before that step's update. If the upper "
        "curve goes on rising while the lower one turns down, the proxy is over-optimized."
        if c.audit
        else "No audit was logged: no gold score is known here, so only the proxy can be drawn, and it cannot say "
        "whether the answers got better."
    )
    if c.audit and not stage.gold_audit:
        note += " No gold score is known: the audit is a reward model that was not optimized, a second opinion."
    if c.held_out:
        note += (
            " Diamonds: the models in the evaluation, gold with its 95% interval. There an answer that does not end "
            "keeps its score; in training it gets a fixed low one."
        )
    return Chart(
        f"over-kl-{stage.name}",
        f"{title_of(stage.name)}: proxy{' against ' + audit_label(stage) if c.audit else ''} over KL",
        fig,
        note,
        wide=True,
    )


def audit_label(stage: Stage) -> str:
    gold = "gold (audit; optimized itself: a control)" if stage.control else "gold (audit)"
    return gold if stage.gold_audit else "audit (not optimized)"


def audit_axis(stage: Stage) -> str:
    return "gold score" if stage.gold_audit else "audit score, s.d."


def over_steps(run: RunData, stage: Stage) -> Chart | None:
    c = proxy_and_gold(run, stage)
    if c is None:
        return None
    rows = [
        ("proxy (optimized)", c.score, "proxy", stage.score_axis),
        (audit_label(stage), c.audit, "gold", audit_axis(stage)),
        ("KL", c.kl, "kl", "KL, nats"),
    ]
    rows = [r for r in rows if r[1] is not None]
    traces: list[Trace] = []
    for i, (name, values, color, _) in enumerate(rows):
        traces += line(c.steps, values or [], name, color, yaxis="y" if i == 0 else f"y{i + 1}")
    fig = figure(traces, STEP, "", height=190 * len(rows) + 40)
    _stack(fig["layout"], [(name, axis, color) for name, _, color, axis in rows])
    return Chart(f"over-steps-{stage.name}", f"{title_of(stage.name)}: the same by step", fig, wide=True)


def _stack(layout: dict[str, Any], panels: Sequence[tuple[str, str, str]]) -> None:
    """Panels (name, y axis, colour) one over the other on a shared x axis, each named in its colour."""
    n, head = len(panels), 26 / layout["height"]
    layout["annotations"] = []
    for i, (name, axis, color) in enumerate(panels):
        low, high = 1 - (i + 1) / n, 1 - i / n - head
        layout["yaxis" if i == 0 else f"yaxis{i + 1}"] = {
            "domain": [round(low, 4), round(high, 4)],
            "title": {"text": axis},
        }
        layout["annotations"].append(
            {
                "text": f"<b>{name}</b>",
                "x": 0,
                "y": high,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"color": color, "size": 13},
            }
        )
    layout["xaxis"]["anchor"] = "y" if n == 1 else f"y{n}"
    layout["showlegend"] = False
