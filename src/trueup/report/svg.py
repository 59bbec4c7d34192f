"""The main chart as a small static SVG: proxy and gold against KL, for a README or a slide. Text in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from trueup.records import UserError, visible
from trueup.report.figures import Interval, title_of
from trueup.report.overoptimization import Curves, proxy_and_gold, tick_values
from trueup.report.read import Stage, read_run

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, BOTTOM = 760, 170, 64, 24, 74, 34, 52
INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#e4e7eb", "#ffffff"
COLORS = {"proxy": "#7a4fb0", "gold": "#a87400"}


def chart_svg(run_folder: Path) -> str:
    """The last PPO stage's proxy and gold over KL; the proxy alone, saying so, where no audit was logged.

    Raises UserError where the run has logged no PPO steps.
    """
    run = read_run(Path(run_folder))
    for stage in reversed(run.of("ppo")):
        if curves := proxy_and_gold(run, stage):
            return _draw(curves, stage)
    raise UserError(f"{run_folder}: no PPO steps are logged here, so there is nothing to draw")


def _draw(c: Curves, stage: Stage) -> str:
    panels: list[tuple[str, str, str, Sequence[float], Sequence[float]]] = [
        ("proxy", "score", f"{stage.score_axis} (optimized)", c.score, c.smooth_score)
    ]
    if c.audit is not None and c.smooth_audit is not None:
        caption = "audit: a reward model that was not optimized, s.d."
        if stage.gold_audit:
            caption = (
                "gold score (optimized itself: a control)" if stage.control else "gold score (never seen in training)"
            )
        panels.append(("gold", "gold", caption, c.audit, c.smooth_audit))
    height = TOP + len(panels) * PANEL + (len(panels) - 1) * GAP + BOTTOM
    right = math.sqrt(max([*c.kl, *(p["kl"] for p in c.held_out), 1e-6])) * 1.03
    x = Scale(0.0, right, LEFT, WIDTH - RIGHT)
    what = "the proxy against KL (no gold score is known)"
    if len(panels) == 2:
        what = f"proxy and {'gold' if stage.gold_audit else 'audit'} against KL"
    title = f"{title_of(stage.name)}: {what}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{_text(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{PAPER}"/>',
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="600">{_text(title)}</text>',
        f'<text x="{LEFT}" y="45" fill="{MUTED}">dots: steps on training prompts; lines: running means'
        + ("; diamonds: models in the evaluation, 95% intervals" if c.held_out else "")
        + "</text>",
    ]
    for i, (color, key, caption, raw, smooth) in enumerate(panels):
        top = TOP + i * (PANEL + GAP)
        out += _panel(c, x, top, COLORS[color], key, caption, raw, smooth, last=i == len(panels) - 1)
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{height - 14}" text-anchor="middle" fill="{MUTED}">'
        "KL from the reference, nats per completion (spaced by √KL)</text>"
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(
    c: Curves,
    x: Scale,
    top: float,
    color: str,
    key: str,
    caption: str,
    raw: Sequence[float],
    smooth: Sequence[float],
    *,
    last: bool,
) -> list[str]:
    held: list[tuple[str, float, float, Interval | None]] = [
        (p["name"], p["kl"], p[key], p["gold_interval"] if key == "gold" else None)
        for p in c.held_out
        if p[key] is not None
    ]
    values = [*raw, *(v for _, _, v, _ in held), *(e for _, _, _, b in held if b for e in b)]
    low, high = min(values), max(values)
    pad = (high - low or 1.0) * 0.06
    y = Scale(low - pad, high + pad, top + PANEL, top)
    out = [f'<text x="{LEFT}" y="{top - 8:.0f}" fill="{color}" font-weight="600">{_text(caption)}</text>']
    for tick in round_ticks(low - pad, high + pad):
        out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        out.append(
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="{MUTED}">{_number(tick)}</text>'
        )
    for kl in tick_values(max([*c.kl, *(p["kl"] for p in c.held_out)])):
        at = x(math.sqrt(kl))
        out.append(f'<path d="M{at:.1f} {top}V{top + PANEL}" stroke="{GRID}"/>')
        if last:
            out.append(f'<text x="{at:.1f}" y="{top + PANEL + 17}" text-anchor="middle" fill="{MUTED}">{kl:g}</text>')
    for kl, value in zip(c.kl, raw, strict=True):
        out.append(
            f'<circle cx="{x(math.sqrt(kl)):.1f}" cy="{y(value):.1f}" r="2.6" fill="{color}" fill-opacity="0.35"/>'
        )
    points = " ".join(f"{x(math.sqrt(kl)):.1f},{y(v):.1f}" for kl, v in zip(c.smooth_kl, smooth, strict=True))
    out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.4" stroke-linejoin="round"/>')
    for name, kl, value, interval in held:
        at, level = x(math.sqrt(kl)), y(value)
        if interval:
            out.append(
                f'<path d="M{at:.1f} {y(interval[0]):.1f}V{y(interval[1]):.1f}" stroke="{INK}" stroke-width="1.5"/>'
            )
        out.append(
            f'<path d="M{at:.1f} {level - 6:.1f}l6 6-6 6-6-6z" fill="{PAPER}" stroke="{INK}" stroke-width="1.6"/>'
        )
        side, anchor = (-10, "end") if at > WIDTH - RIGHT - 60 else (10, "start")
        out.append(
            f'<text x="{at + side:.1f}" y="{level + 4:.1f}" text-anchor="{anchor}" font-weight="600">'
            f"{_text(name)}</text>"
        )
    return out


class Scale:
    """A straight map of [low, high] to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start, self.factor = low, start, (end - start) / (high - low or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], steps of 1, 2 or 5 times a power of ten."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about + 1)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _text(text: str) -> str:
    return escape(visible(text, bidi=False))
