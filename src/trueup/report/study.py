"""The report of a study of over-optimization: gates, curves with their bands, what the policies said step by step.

Text and JSON in (`study.json`, `gates.json`, `curves.json`, the stages' samples), one HTML page out, as `page` makes
it: no torch, no network. Not in it: any figure that is not in those files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueup.records import UserError, write_text
from trueup.report.charts import SERIES, STEP, Chart, Trace, figure, label, whiskers
from trueup.report.figures import duration, num
from trueup.report.overoptimization import tick_values
from trueup.report.page import filled, to_yaml

GOLD, PROXY = "gold, s.d. of the start", "proxy, s.d. of the start"
CURVE = Mapping[str, Any]


def write_study_report(folder: Path) -> Path:
    """Writes `folder/report.html`; returns its path. Raises UserError where the study has not been concluded."""
    folder = Path(folder)
    data = {}
    for name in ("study", "gates", "curves"):
        path = folder / f"{name}.json"
        if not path.is_file():
            raise UserError(f"{folder}: no {name}.json here; trueup overoptimize writes it once every stage is done")
        data[name] = json.loads(path.read_text(encoding="utf-8"))
    write_text(folder / "report.html", render(Page(folder, **data)))
    return folder / "report.html"


def render(page: Page) -> str:
    return filled("study.html.j2", (chart for _, charts in page.parts for chart in charts), s=page)


class Page:
    """What the template shows."""

    def __init__(self, folder: Path, study: Any, gates: Any, curves: Any) -> None:
        self.study, self.found, self.curves = study["study"], gates, curves
        self.name, self.recipe = self.study["name"], study["recipe"]
        self.gates = [gate_rows(name, gate) for name, gate in gates["gates"].items()]
        self.fits = [row for name in ("bon", "rl") for row in fit_rows(name, gates["fits"].get(name))]
        self.costs = [
            (name, duration(c["mean"]), duration(c["longest"]), num(c["hours"])) for name, c in gates["cost"].items()
        ]
        self.hours = num(sum(c["hours"] for c in gates["cost"].values()), 1)
        seeds = self.study["seeds"]
        level = f"{100 * gates['level']:.4g}%"
        self.about = f"{len(seeds)} seeds ({', '.join(map(str, seeds))}) · {self.hours} core-hours · intervals {level}"
        self.few = len(seeds) < 6
        self.stages_said = said_by_stage(folder, self.study)
        self.config = to_yaml(self.study)
        drawn = [
            ("Best of n", self.best_of_n()),
            ("PPO without a penalty, and on gold", self.turnover()),
            ("Proxy against gold", self.scatter()),
            ("KL coefficients", self.sweep()),
            ("PPO, DPO and best of n", self.together()),
            ("The reward model and its comparisons", self.reward()),
            ("Length and endings", self.lengths()),
        ]
        self.parts = [(title, charts) for title, charts in drawn if charts]

    def of(self, kind: str, condition: str) -> tuple[list[float], CURVE] | None:
        found = self.curves.get(kind)
        if not found or condition not in found["conditions"]:
            return None
        return found["points"], found["conditions"][condition]

    def runs(self) -> list[tuple[str, str, str]]:
        """(condition, its name in a sentence, colour) of each PPO run."""
        coefs = [name_of(c) for c in sorted(self.study["kl_coefs"])]
        out = [(f"kl-{c}".replace(".", "_"), f"KL coefficient {c}", SERIES[1 + i % 7]) for i, c in enumerate(coefs)]
        return [*out, *([("on_gold", "on gold (control)", "gold")] if self.study["control"] else [])]

    def best_of_n(self) -> list[Chart]:
        points, c = self.of("best_of", "all") or ([], {})
        charts = []
        fit = self.found["fits"].get("bon")
        for key, name, color in (("gold_sd", GOLD, "gold"), ("proxy_sd", PROXY, "proxy")):
            x = roots(c["kl"]["mean"])
            traces = [
                *(thin_line(roots(kl), gains(y), color, f"seed {s}") for s, kl, y in self.each_seed(c, key)),
                *band(x, gains(c[key]["low"], c[key]["mean"]), gains(c[key]["high"], c[key]["mean"]), color),
                curve(x, gains(c[key]["mean"]), name, color, [f"n = {n:g}" for n in points]),
            ]
            if key == "gold_sd" and fit:
                traces += fit_traces(fit, "R_bon(d) = d (alpha - beta d), fitted")
            charts.append(Chart(f"best-of-{key}", f"Best of n: {name}", against_root(traces, name)))
        charts[0].note = (
            "KL of best of n is that of its own discrete distribution, ties counted. Answers still differ up to n = "
            f"{num(self.found['reach']['n'], 0)}; the fit goes so far, and leaves n = 1 out."
        )
        sweep = []
        for i, condition in enumerate(self.curves["best_of"]["conditions"]):
            points, c = self.of("best_of", condition) or ([], {})
            tag = condition.replace("comparisons-", "comparisons: ").replace("flips-", "labels turned: ")
            sweep.append(curve(roots(c["kl"]["mean"]), c["gold"]["mean"], tag.replace("_", "."), SERIES[i % 8]))
        if len(sweep) > 1:
            charts.append(
                Chart("best-of-sweep", "Best of n by each reward model", against_root(sweep, "gold score"), wide=True)
            )
        return charts

    def each_seed(self, c: CURVE, key: str) -> list[tuple[int, list[float], list[float]]]:
        return [
            (s, c["kl"]["seeds"][i], c[key]["seeds"][i]) for i, s in enumerate(self.study["seeds"])
        ]  # the curves keep the seeds' order

    def turnover(self) -> list[Chart]:
        charts = []
        free = self.of("trace", "kl-0")
        control = self.of("trace", "on_gold")
        for key, name, color in (("gold_sd", GOLD, "gold"), ("proxy_sd", PROXY, "proxy")):
            for axis in ("root", "step"):
                traces: list[Trace] = []
                for found, tag, paint, dash in (
                    (free, "PPO on the proxy", color, "solid"),
                    (control, "PPO on gold (control)", "c3", "dash"),
                ):
                    if found is None:
                        continue
                    points, c = found
                    x = roots(c["kl"]["mean"]) if axis == "root" else points
                    for s, kl, y in self.each_seed(c, key):
                        traces.append(thin_line(roots(kl) if axis == "root" else points, gains(y), paint, f"seed {s}"))
                    if axis == "step":
                        low, high = (gains(c[key][e], c[key]["mean"]) for e in ("low", "high"))
                        traces += band(x, low, high, paint)
                    hover = [f"step {p:g}, KL {k:.2f}" for p, k in zip(points, c["kl"]["mean"], strict=True)]
                    traces.append(curve(x, gains(c[key]["mean"]), tag, paint, hover, dash=dash))
                fit = self.found["fits"].get("rl")
                if key == "gold_sd" and axis == "root" and fit:
                    traces += fit_traces(fit, "R_RL(d) = d (alpha - beta log d), fitted")
                if traces:
                    fig = against_root(traces, name) if axis == "root" else figure(traces, STEP, name, height=340)
                    charts.append(Chart(f"ppo-{key}-{axis}", f"PPO, KL coefficient 0: {name}", fig))
        return charts

    def scatter(self) -> list[Chart]:
        charts = []
        for kind, title in (("best_of", "Best of n"), ("trace", "PPO")):
            names = [("all", "best of n", "c2")] if kind == "best_of" else self.runs()
            traces = []
            for condition, name, color in names:
                if found := self.of(kind, condition):
                    points, c = found
                    hover = [f"{'n' if kind == 'best_of' else 'step'} {p:g}" for p in points]
                    traces.append(curve(c["proxy_sd"]["mean"], c["gold"]["mean"], name, color, hover))
            if traces:
                fig = figure(traces, "proxy score, s.d. of the start", "gold score", height=360)
                charts.append(Chart(f"scatter-{kind}", f"{title}: gold against proxy", fig))
        if charts:
            charts[0].note = "Where the proxy is worth what it says, a curve goes up to the right; it bends where not."
        return charts

    def sweep(self) -> list[Chart]:
        traces: dict[str, list[Trace]] = {"gold": [], "kl": [], "path": []}
        for condition, name, color in self.runs():
            if found := self.of("trace", condition):
                points, c = found
                for key in ("gold", "kl"):
                    traces[key] += band(points, c[key]["low"], c[key]["high"], color)
                    traces[key].append(curve(points, c[key]["mean"], name, color))
                hover = [f"step {p:g}" for p in points]
                traces["path"].append(curve(roots(c["kl"]["mean"]), c["gold"]["mean"], name, color, hover))
        if not traces["gold"]:
            return []
        return [
            Chart("sweep-gold", "Gold by step", figure(traces["gold"], STEP, "gold score", height=360)),
            Chart("sweep-kl", "KL by step", figure(traces["kl"], STEP, "KL, nats a completion", height=360)),
            Chart(
                "sweep-path",
                "Gold over KL",
                against_root(traces["path"], "gold score"),
                "A run with a penalty does not go out for ever: at the same KL it may have another gold score than the "
                "run without one.",
                wide=True,
            ),
        ]

    def together(self) -> list[Chart]:
        """Where each way from the start leads; DPO's and PPO's ends joined in the order of beta and coefficient."""
        betas = [f"beta-{name_of(beta)}".replace(".", "_") for beta in sorted(self.study["betas"])]
        coefs = [name for name, _, _ in self.runs() if name.startswith("kl-")]
        traces: list[Trace] = []
        for kind, name, color in (("best_of", "best of n", "c2"), ("trace", "PPO, no penalty, step by step", "c1")):
            if found := self.of(kind, "all" if kind == "best_of" else "kl-0"):
                points, c = found
                hover = [f"{'n =' if kind == 'best_of' else 'step'} {p:g}" for p in points]
                traces.append(curve(roots(c["kl"]["mean"]), c["gold"]["mean"], name, color, hover))
        for kind, conditions, name, color in (
            ("trace", coefs, "PPO, the end at each KL coefficient", "c4"),
            ("dpo", betas, "DPO, the end at each beta", "c3"),
        ):
            ends = [(name, found[1]) for name in conditions if (found := self.of(kind, name))]
            if ends:
                x, y = ([c[m]["mean"][-1] for _, c in ends] for m in ("kl", "gold"))
                spans = [(c["gold"]["low"][-1], c["gold"]["high"][-1]) for _, c in ends]
                hover = [condition.replace("-", " ").replace("_", ".") for condition, _ in ends]
                drawn = curve(roots(x), y, name, color, hover, dash="dash")
                traces.append({**drawn, "error_y": whiskers(y, spans, color)})
        if not betas or not traces:
            return []
        return [Chart("together", "Gold over KL", against_root(traces, "gold score"), wide=True)]

    def reward(self) -> list[Chart]:
        found = self.curves.get("reward")
        if not found:
            return []
        rows = []
        for condition, c in found["conditions"].items():
            first = {m: [v["mean"][0], v["low"][0], v["high"][0]] for m, v in c.items()}
            rows.append((first["comparisons"][0], condition, first))
        clean = sorted((r for r in rows if not r[1].startswith("flips")), key=lambda r: r[0])
        noisy = [r for r in rows if r[1].startswith("flips")]
        charts = []
        for key, title in (("accuracy", "held-out accuracy"), ("loss", "held-out loss, nats a pair")):
            traces = []
            for part, name, color in ((clean, "from so many comparisons", "c2"), (noisy, "labels turned", "c6")):
                if part:
                    x, y = [r[0] for r in part], [r[2][key][0] for r in part]
                    spans = [(r[2][key][1], r[2][key][2]) for r in part]
                    traces.append(
                        {
                            **curve(x, y, name, color, [r[1].replace("_", ".") for r in part]),
                            "error_y": whiskers(y, spans, color),
                            "mode": "lines+markers" if part is clean else "markers",
                        }
                    )
            span = [min(r[0] for r in rows), max(r[0] for r in rows)]
            ceiling = clean[-1][2]["ceiling"][0]
            lines = [("chance", 0.5)] if key == "accuracy" else [("chance, ln 2", math.log(2))]
            if ceiling is not None and 0.5 < ceiling < 1:
                p = 1 - ceiling
                floor = -p * math.log(p) - (1 - p) * math.log(1 - p)
                lines.append(
                    ("the raters' ceiling", ceiling) if key == "accuracy" else ("the raters' noise, H(p)", floor)
                )
            traces += [
                {**curve(span, [y, y], name, "muted", dash="dot"), "mode": "lines", "hoverinfo": "skip"}
                for name, y in lines
            ]
            fig = figure(traces, "comparisons", title, height=360, xaxis={"type": "log"})
            charts.append(Chart(f"reward-{key}", f"Reward model: {title}", fig))
        return charts

    def lengths(self) -> list[Chart]:
        charts = []
        for key, title in (("length", "tokens an answer"), ("ended", "share that ends by itself")):
            traces = []
            for condition, name, color in self.runs():
                if found := self.of("trace", condition):
                    traces.append(curve(found[0], found[1][key]["mean"], name, color))
            if traces:
                charts.append(Chart(f"lengths-{key}", title.capitalize(), figure(traces, STEP, title, height=300)))
        return charts


def name_of(coef: float) -> str:
    return f"{coef:g}"


def gate_rows(name: str, gate: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for check in gate["checks"]:
        every = check["wanted"] == "every seed"
        span = check.get("interval")
        held = sum(map(bool, check["per_seed"]))
        without = f"not measured: {check['missing']}" if "missing" in check else "none (one seed)"
        rows.append(
            {
                "name": check["name"],
                "wanted": check["wanted"].replace(">=", "≥").replace("<=", "≤"),
                "value": f"{held} of {len(check['per_seed'])}" if every else num(check.get("value"), 3),
                "interval": "" if every else f"[{num(span[0], 3)}, {num(span[1], 3)}]" if span else without,
                "outcome": check["outcome"],
            }
        )
    return {"name": name, "says": gate["says"], "outcome": gate["outcome"], "void": gate["void"], "checks": rows}


def fit_rows(name: str, fit: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    if not fit:
        return []
    title = {"bon": "Best of n: d (alpha − beta d)", "rl": "PPO, KL coefficient 0: d (alpha − beta log d)"}[name]
    keys = ("alpha", "beta", "d_star", "r_star", "r2", "aicc_over_line")
    return [
        (
            title,
            [
                *(
                    f"{num(fit[k]['value'], 2)} [{num(fit[k]['interval'][0])}, {num(fit[k]['interval'][1])}]"
                    for k in keys
                ),
                str(fit["points"]),
            ],
        )
    ]


# what they said


def said_by_stage(folder: Path, study: Mapping[str, Any], prompts: int = 4) -> list[dict[str, Any]]:
    """What the policies without a penalty said to the same few prompts: at the start, at the middle, at the end."""
    out = []
    here = [seed for seed in study["seeds"] if (folder / f"seed-{seed}").is_dir()]  # others were run elsewhere
    for seed in here[:1]:
        found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        run = folder / f"seed-{seed}"
        record = json.loads((run / "recipe.json").read_text(encoding="utf-8")) if (run / "recipe.json").exists() else {}
        for stage in ("versions-start", "versions-kl-0"):
            name = record.get("stages", {}).get(stage)
            path = run / str(name) / "samples.jsonl"
            if not name or not path.exists():
                continue
            for text in path.read_text(encoding="utf-8").split("\n"):
                if text:
                    row = json.loads(text)
                    found.setdefault(row["prompt"], []).append((row["step"], row))
        for prompt, rows in list(found.items())[:: max(1, len(found) // prompts)][:prompts]:
            steps = sorted(rows, key=lambda r: r[0])
            chosen = [steps[i * (len(steps) - 1) // 4] for i in range(5)] if len(steps) > 5 else steps
            answers = [
                {
                    "title": "start" if step == 0 else f"step {step}",
                    "text": row["completion"],
                    "figures": [("gold", num(row["gold"])), ("proxy", num(row["proxy"])), ("KL", num(row["kl"], 1))],
                }
                for step, row in chosen
            ]
            out.append({"prompt": prompt, "category": rows[0][1].get("category"), "answers": answers})
    return out


# pieces of charts


def roots(kl: Sequence[float]) -> list[float]:
    return [math.sqrt(max(k, 0.0)) for k in kl]


def gains(values: Sequence[float], start: Sequence[float] | None = None) -> list[float]:
    """Over the start's own."""
    return [v - (start or values)[0] for v in values]


def curve(
    x: Sequence[float], y: Sequence[float], name: str, color: str, hover: Sequence[str] = (), *, dash: str = "solid"
) -> Trace:
    return {
        "x": list(x),
        "y": list(y),
        "name": label(name),
        "mode": "lines+markers",
        "line": {"color": color, "width": 2.5, "dash": dash},
        "marker": {"size": 5, "color": color},
        **({"text": list(hover), "hovertemplate": "%{text}<br>%{y:.3f}<extra></extra>"} if hover else {}),
    }


def thin_line(x: Sequence[float], y: Sequence[float], color: str, name: str) -> Trace:
    return {
        "x": list(x),
        "y": list(y),
        "name": label(name),
        "mode": "lines",
        "opacity": 0.3,
        "line": {"color": color, "width": 1},
        "showlegend": False,
    }


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> list[Trace]:
    """Between low and high; the fill takes the line's colour where none is given, faint by the trace's opacity."""
    edge = {"mode": "lines", "line": {"color": color, "width": 0}, "showlegend": False, "hoverinfo": "skip"}
    return [
        {**edge, "x": list(x), "y": list(low)},
        {**edge, "x": list(x), "y": list(high), "fill": "tonexty", "opacity": 0.15},
    ]


def fit_traces(fit: Mapping[str, Any], name: str) -> list[Trace]:
    c = fit["curve"]
    peak, r = fit["d_star"]["value"], fit["r_star"]["value"]
    traces = [
        *band(c["d"], c["low"], c["high"], "c1"),
        {**curve(c["d"], c["mean"], name, "text", dash="dot"), "mode": "lines"},
    ]
    if 0 < peak <= c["d"][-1]:
        low, high = fit["d_star"]["interval"]
        mark = {"size": 11, "symbol": "diamond-open", "color": "text"}
        traces.append(
            {
                "x": [peak],
                "y": [r],
                "mode": "markers",
                "name": "its peak, d*",
                "marker": mark,
                "hovertemplate": f"d* = {peak:.2f} [{low:.2f}, {high:.2f}]<extra></extra>",
            }
        )
    return traces


def against_root(traces: Sequence[Trace], y: str) -> dict[str, Any]:
    """Over KL, spaced by its square root."""
    end = max(v for t in traces for v in t["x"])
    ticks = tick_values(end * end)
    return figure(
        traces,
        "KL from the start, nats per completion (spaced by √KL)",
        y,
        height=360,
        xaxis={
            "tickvals": [math.sqrt(t) for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
            "range": [-0.03 * end, 1.06 * end],
        },
    )
