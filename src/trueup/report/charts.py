"""What charts are made of: plain Plotly figures (data and layout), which report.js paints in the reader's theme.

A value such as "proxy" under a key that ends in `color` names a colour of report.css. Every text that goes into a
figure passes `label`, because Plotly reads a little markup in labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trueup.report.figures import Interval, running_mean, smoothing, thin

Trace = dict[str, Any]
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
STEP = "step"


@dataclass
class Chart:
    """A figure with what stands around it. `note`: how to read it; `healthy`, `if_not`: of a metric."""

    id: str
    title: str
    figure: dict[str, Any]
    note: str = ""
    healthy: str = ""
    if_not: str = ""
    wide: bool = False


@dataclass
class Group:
    """Charts that belong together; `more`: those that few people need."""

    id: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    more: list[Chart] = field(default_factory=list)
    text: str = ""


def label(text: Any, most: int = 40) -> str:
    """Text for a figure: short, and without markup."""
    t = "".join(c if ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000 else " " for c in str(text))
    t = t if len(t) <= most else t[: most - 1] + "…"
    return t.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")


def labels(texts: Sequence[Any]) -> list[str]:
    """Labels for the bars of one axis: two that look the same once shortened are told apart by a number."""
    seen: dict[str, int] = {}
    out = []
    for text in (label(t, 22) for t in texts):
        seen[text] = seen.get(text, 0) + 1
        out.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return out


def figure(traces: Sequence[Trace], x: str, y: str, *, height: int = 260, **layout: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "height": height,
        "xaxis": {"title": {"text": label(x, 80)}},
        "yaxis": {"title": {"text": label(y, 80)}},
        "showlegend": len({t.get("name") for t in traces if t.get("showlegend", True)}) > 1,
    }
    for key, value in layout.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) and isinstance(value, dict) else value
    return {"data": list(traces), "layout": base}


def whiskers(values: Sequence[float], spans: Sequence[Interval | None], color: str = "text") -> dict[str, Any]:
    """Error bars from each value to the ends of its interval."""
    up = [s[1] - v if s else None for s, v in zip(spans, values, strict=True)]
    down = [v - s[0] if s else None for s, v in zip(spans, values, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color, "thickness": 1.5}


def line(steps: Sequence[float], values: Sequence[float], name: str, color: str, **extra: Any) -> list[Trace]:
    """A curve: the raw points faint, their running mean over them; only the points where there are few."""
    steps, values = thin(steps, values)
    window = smoothing(len(values))
    common = {"x": steps, "name": label(name), "legendgroup": label(name), **extra}
    if window == 1:
        return [
            {
                **common,
                "y": values,
                "mode": "lines+markers",
                "line": {"color": color},
                "marker": {"size": 5, "color": color},
            }
        ]
    raw = {
        **common,
        "y": values,
        "mode": "lines",
        "opacity": 0.3,
        "line": {"color": color, "width": 1},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    mean = {
        **common,
        "y": running_mean(values, window),
        "mode": "lines",
        "line": {"color": color, "width": 2},
        "customdata": values,
        "hovertemplate": "step %{x:.0f}: %{customdata:.4g}<br>running mean %{y:.4g}<extra></extra>",
    }
    return [raw, mean]
