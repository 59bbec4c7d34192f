"""Figures as people read them, and the little statistics that the report needs. numpy, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]
NONE = "–"
UPPER = {"sft", "ppo", "dpo", "rlhf", "rlaif", "kto", "ipo"}


def title_of(name: str) -> str:
    """A model's or stage's name in a sentence: acronyms in capitals, the rest as it is."""
    return name.upper() if name.lower() in UPPER else name


def num(value: float | None, digits: int = 2) -> str:
    """0.52, −0.10, 1,234; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) >= 1000:
        digits = 0
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def short(value: float | None) -> str:
    """Three significant digits, for figures of unknown size."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return num(value, 0)
    return f"{value:.3g}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def bracket(interval: Interval | None, digits: int = 2, *, scale: float = 1.0) -> str:
    """[0.49, 0.55], or nothing."""
    return "" if interval is None else f"[{num(scale * interval[0], digits)}, {num(scale * interval[1], digits)}]"


def duration(seconds: float | None) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95% interval by the normal approximation; None for fewer than two values."""
    x = np.asarray(values, dtype=np.float64)
    half = 1.959964 * float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
    return float(x.mean()), half


def paired_gain(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> tuple[float, Interval]:
    """Mean of after - before over the same prompts, with its 95% percentile bootstrap over prompts."""
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [float(gain[rng.integers(len(gain), size=len(gain))].mean()) for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gain.mean()), (float(low), float(high))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` neighbours. At the start the window shrinks, so that the curve begins at the first
    value (a policy at KL 0); at the end it is cut, so that the last figure is a mean too and not one noisy step."""
    x = np.asarray(values, dtype=np.float64)
    total = np.concatenate([[0.0], np.cumsum(x)])
    out = []
    for i in range(len(x)):
        left = min(window // 2, i)
        right = min(left, len(x) - 1 - i)
        out.append(float((total[i + right + 1] - total[i - left]) / (left + right + 1)))
    return out


def smoothing(n: int) -> int:
    """The window of the running mean for a curve of n points; 1 means none."""
    return 1 if n < 15 else max(3, n // 12 | 1)


def thin(steps: Sequence[float], values: Sequence[float], most: int = 800) -> tuple[list[float], list[float]]:
    """At most `most` points, each the mean of its neighbours."""
    if len(steps) <= most:
        return list(steps), list(values)
    parts = np.array_split(np.arange(len(steps)), most)
    s, v = np.asarray(steps), np.asarray(values)
    return [float(s[p].mean()) for p in parts], [float(v[p].mean()) for p in parts]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth (at least one value each): noise averaged out a little."""
    x = np.asarray(values, dtype=np.float64)
    k = max(1, len(x) // 10)
    return float(x[:k].mean()), float(x[-k:].mean())


def clean(value: Any) -> Any:
    """JSON-ready: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
