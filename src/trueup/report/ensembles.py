"""What an ensemble's members make of PPO's answers: their disagreement against KL."""

from __future__ import annotations

from trueup.report.charts import Chart, Trace, figure
from trueup.report.figures import running_mean, smoothing, thin
from trueup.report.read import Stage, number

MOST = 1000


def over_kl(stage: Stage) -> Chart | None:
    """Each shown sample's disagreement at its own KL, and the steps' means. None where the scorer is no ensemble."""
    rows = [r for r in stage.metrics if number(r, "disagreement") is not None and number(r, "kl") is not None]
    if not rows:
        return None
    shown = [s for s in stage.samples if number(s, "disagreement") is not None and number(s, "kl") is not None]
    shown = [shown[i * len(shown) // min(MOST, len(shown))] for i in range(min(MOST, len(shown)))]
    traces: list[Trace] = [
        {
            "x": [float(s["kl"]) for s in shown],
            "y": [float(s["disagreement"]) for s in shown],
            "mode": "markers",
            "name": "samples",
            "marker": {"size": 5, "color": "muted", "opacity": 0.6},
        }
    ]
    columns = [thin([r["step"] for r in rows], [float(r[name]) for r in rows])[1] for name in ("kl", "disagreement")]
    window = smoothing(len(columns[0]))
    kl, doubt = (running_mean(values, window) for values in columns)
    color = {"color": "c3"}
    traces.append({"x": kl, "y": doubt, "mode": "lines+markers", "name": "steps, mean", "line": color, "marker": color})
    return Chart(
        f"disagreement-{stage.name}",
        "Disagreement against KL",
        figure(traces, "KL to the reference, nats", f"s.d. over the members, {stage.score_axis}", height=340),
        "A point is a sample at its own log-ratio, which may be negative; the line is the mean of each step. Below, "
        "under Samples, order by disagreement to read where the members differ most.",
        wide=True,
        healthy="Level: the answers stay where the members were trained.",
        if_not="Rising with KL: the policy goes where the comparisons say little. Level while gold falls: the members "
        "share the error, and no ensemble of them sees it.",
    )
