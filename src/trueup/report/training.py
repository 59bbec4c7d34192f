"""Training curves of a stage: each logged metric, the known ones with what is healthy and what to do when not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trueup.report.charts import SERIES, STEP, Chart, Group, Trace, figure, label, line
from trueup.report.figures import running_mean, smoothing, thin, title_of
from trueup.report.metrics import METRICS
from trueup.report.read import Stage, number

FIRST: dict[str, list[str]] = {
    "sft": ["loss", "grad_norm"],
    "reward": ["loss", "accuracy"],
    "dpo": ["loss", "accuracy", "margin", "chosen_logprobs", "rejected_logprobs", "kl", "length", "end_rate"],
    "ensemble": ["loss", "accuracy"],
    "ppo": [
        "score",
        "audit",
        "kl",
        "kl_k3",
        "kl_ahead",
        "heldout_gain",
        "heldout_disagreement",
        "style_share",
        "length_drift",
        "disagreement",
        "reward",
        "validation",
        "entropy",
        "clip_fraction",
        "explained_variance",
        "value_loss",
        "flat_groups",
        "policy_grad_norm",
        "kl_coef",
        "length",
        "end_rate",
    ],
}
DRAWN = ("gap", "gap_low", "gap_high", "audited_win_rate", "predicted_win_rate", "audit_pairs", "alarm")
"""The alarm's own charts have these."""
LOSS_UNIT = {
    "sft": "nats per token",
    "reward": "nats per pair",
    "ensemble": "nats per pair, mean over members",
    "dpo": "per row",
}
THEN = [
    "policy_loss",
    "kl_loss",
    "entropy_bonus",
    "approx_kl",
    "score_std",
    "value",
    "baseline",
    "critic_grad_norm",
    "policy_lr",
    "critic_lr",
    "epochs",
    "win_rate_drop",
    "audit_labels",
    "peak_memory_mb",
    "center",
    "grad_norm",
    "lr",
    "tokens",
    "seconds",
]


def training(stage: Stage) -> Group | None:
    """Every metric that the stage logged: the known ones in a known order, then the rest by name."""
    names = stage.names()
    if not names:
        return None
    steps_logged = len(stage.metrics)
    group = Group(f"training-{stage.name}", title_of(stage.name))
    group.text = f"{steps_logged} step{'s' if steps_logged > 1 else ''} logged."
    if (best := number(stage.results, "best_step")) is not None:
        group.text += f" The weights kept are those of step {best:.0f}, the best on held-out data (dotted line)."
    parts = [n for n in names if n.startswith("seconds_")]
    beside = {n: [f"validation_{n}"] for n in names if f"validation_{n}" in names}
    alone = [n for n in names if "/" not in n and n not in (*parts, *DRAWN) and [n] not in beside.values()]
    first = [n for n in FIRST.get(stage.phase, alone) if n in alone]
    rest = [n for n in THEN if n in alone and n not in first]
    rest += [n for n in alone if n not in first and n not in rest]
    group.charts = [_metric(stage, n, beside.get(n, []), best) for n in first]
    group.more = [_metric(stage, n, beside.get(n, []), best) for n in rest]
    for prefix in ("score", "audit"):
        found = [n for n in names if n.startswith(f"{prefix}/")]
        if found:
            group.charts.append(_by_category_over_steps(stage, prefix, found))
    if parts:
        group.charts.append(_seconds(stage, parts))
    return group


def _metric(stage: Stage, name: str, beside: Sequence[str], best: float | None) -> Chart:
    known = METRICS.get(name)
    color = {"score": "proxy", "audit": "gold", "kl": "kl", "kl_k3": "kl"}.get(name, "c2")
    traces = line(*stage.curve(name), name="training" if beside else name, color=color)
    for other in beside:
        steps, values = thin(*stage.curve(other))
        traces.append(
            {
                "x": steps,
                "y": values,
                "name": "held out",
                "mode": "lines+markers",
                "line": {"color": "c3", "width": 2},
                "marker": {"size": 6, "color": "c3"},
            }
        )
    unit = known.unit if known else name
    if name == "loss" and stage.phase in LOSS_UNIT:
        unit = LOSS_UNIT[stage.phase]
    extra: dict[str, Any] = {}
    if best is not None and name in ("loss", "accuracy", "validation"):
        extra["shapes"] = [
            {
                "type": "line",
                "x0": best,
                "x1": best,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "muted", "dash": "dot", "width": 1.5},
            }
        ]
    if name in ("end_rate", "accuracy", "clip_fraction"):
        extra["yaxis"] = {"tickformat": ".0%"}
    values = stage.curve(name)[1]
    if not beside and max(values) - min(values) <= 1e-9 * abs(values[0]):  # a constant, not the rounding of its mean
        room = abs(values[0]) or 1.0
        extra["yaxis"] = {**extra.get("yaxis", {}), "range": [values[0] - room / 2, values[0] + room / 2]}
    return Chart(
        f"m-{stage.name}-{name}",
        known.title if known else name,
        figure(traces, STEP, unit.split(",")[0], **extra),
        f"{name}: {unit}" if known else "",
        known.healthy if known else "",
        known.if_not if known else "",
    )


def _by_category_over_steps(stage: Stage, prefix: str, names: Sequence[str]) -> Chart:
    shown = names[: len(SERIES)]
    traces: list[Trace] = []
    for color, name in zip(SERIES, shown, strict=False):
        steps, values = thin(*stage.curve(name))
        window = max(smoothing(len(values)), min(len(values) | 1, 7))
        traces.append(
            {
                "x": steps,
                "y": running_mean(values, window),
                "mode": "lines",
                "name": label(name.partition("/")[2]),
                "line": {"color": color, "width": 1.8},
            }
        )
    what = "proxy score" if prefix == "score" else stage.audit_name
    more = f" {len(shown)} of {len(names)} categories." if len(names) > len(shown) else ""
    return Chart(
        f"m-{stage.name}-{prefix}-by-category",
        f"{what.capitalize()} by category",
        figure(traces, STEP, "s.d." if prefix == "score" else what, height=340),
        f"Running means.{more}",
        wide=True,
        healthy="Every category rises or holds.",
        if_not="Where the score of a category rises and its audit falls, the reward model is fooled there: "
        "read its samples and label more of them.",
    )


def _seconds(stage: Stage, names: Sequence[str]) -> Chart:
    traces: list[Trace] = []
    for color, name in zip(SERIES, names, strict=False):
        steps, values = thin(*stage.curve(name), most=300)
        traces.append(
            {
                "type": "bar",
                "x": steps,
                "y": values,
                "name": label(name.removeprefix("seconds_")),
                "marker": {"color": color, "line": {"width": 0}},
            }
        )
    return Chart(
        f"m-{stage.name}-seconds",
        "Time of a step, by part",
        figure(traces, STEP, "seconds", height=300, barmode="stack", bargap=0.05),
        wide=True,
        healthy="Sampling and updating share the time; scoring is small.",
        if_not="Sampling dominates: lower `sampling.max_tokens`. Updating dominates: fewer `epochs`, or larger "
        "`optim.micro_tokens`.",
    )
