"""What the alarm saw: the wins over the start that the proxy promised and those that the judge gave, and their gap."""

from __future__ import annotations

from trueup.agreement import wilson
from trueup.report.charts import Chart, Trace, figure, whiskers
from trueup.report.figures import title_of
from trueup.report.read import Stage, number


def alarm_step(stage: Stage) -> float | None:
    """The step at which the alarm was set off, if it was."""
    return next((row["step"] for row in stage.metrics if number(row, "alarm")), None)


def words(stage: Stage) -> str:
    """What set it off."""
    alarm = (stage.results.get("watch") or {}).get("alarm") or {}
    return str(alarm.get("text", "the run is not done yet; its terminal says what set it off"))


def charts(stage: Stage) -> list[Chart]:
    """Win rates at each check, and the gap with its bounds; none where nobody audited."""
    rows = [r for r in stage.metrics if number(r, "audited_win_rate") is not None]
    if not rows:
        return []
    at = alarm_step(stage)
    lines = [] if at is None else [at]
    shapes = [
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "cut", "dash": "dot"}}
        for x in lines
    ]
    steps = [r["step"] for r in rows]
    audited = [float(r["audited_win_rate"]) for r in rows]
    spans = [wilson(a, number(r, "audit_pairs") or 1) for a, r in zip(audited, rows, strict=True)]
    traces: list[Trace] = [
        {
            "x": steps,
            "y": audited,
            "name": "audited",
            "mode": "lines+markers",
            "line": {"color": "gold"},
            "marker": {"color": "gold", "size": 7},
            "error_y": whiskers(audited, spans, "gold"),
        }
    ]
    promised = [number(r, "predicted_win_rate") for r in rows]
    if any(p is not None for p in promised):
        color = {"color": "proxy"}
        traces.insert(
            0,
            {"x": steps, "y": promised, "name": "promised", "mode": "lines+markers", "line": color, "marker": color},
        )
    when = "No alarm." if at is None else f"Alarm at step {at:.0f} (dotted)."
    out = [
        Chart(
            f"audits-{stage.name}",
            f"{title_of(stage.name)}: wins over the start, promised and audited",
            figure(traces, "step", "win rate", height=340, shapes=shapes, yaxis={"tickformat": ".0%", "range": [0, 1]}),
            f"{when} Promised: by the proxy’s own scores of the audited pairs; audited: what the judge said of them, "
            "with the 95% interval of each check alone.",
            wide=True,
            healthy="The two stay together: a right proxy promises what the judge gives.",
            if_not="Promised above audited, and farther with each check: the proxy is being exploited. Go back to "
            "where they parted, raise `kl_coef`, or label pairs of this policy.",
        )
    ]
    gaps = [r for r in rows if number(r, "gap") is not None]
    if gaps:
        x = [r["step"] for r in gaps]
        low, high = ([float(r[k]) for r in gaps] for k in ("gap_low", "gap_high"))
        band: list[Trace] = [
            {
                "x": x,
                "y": y,
                "name": name,
                "mode": "lines",
                "line": {"color": "muted", "width": 1},
                **({"fill": "tonexty", "fillcolor": "rgba(128,128,128,0.15)"} if name == "upper bound" else {}),
            }
            for name, y in (("lower bound", low), ("upper bound", high))
        ]
        mean: Trace = {
            "x": x,
            "y": [float(r["gap"]) for r in gaps],
            "name": "mean over all audits",
            "mode": "lines+markers",
            "line": {"color": "proxy"},
            "marker": {"color": "proxy"},
        }
        tolerance = number(stage.config, "watch", "tolerance") or 0.0
        zero = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": tolerance, "y1": tolerance}
        out.append(
            Chart(
                f"gap-{stage.name}",
                f"{title_of(stage.name)}: promised less audited",
                figure(
                    [*band, mean],
                    "step",
                    "share of pairs",
                    height=300,
                    shapes=[*shapes, {**zero, "line": {"color": "text", "width": 1}}],
                    yaxis={"tickformat": ".0%"},
                ),
                "The bounds hold at every look at once, so that a rule may be tried at each check. The alarm is set "
                "off where the lower one passes the line.",
                wide=True,
                healthy="The lower bound stays below the line.",
                if_not="See above.",
            )
        )
    return out
