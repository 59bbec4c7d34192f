"""One self-contained HTML page per run: what happened, the tables, the charts, the samples, the config.

In order: read the run (`read`), say what happened (`headline`), make the figures (`overoptimization`, `training`,
`measured`), choose the samples, fill the template, write it whole. Everything that a model or a user wrote is text:
escaped by Jinja2 in the page, by `script_json` in the data, set by `textContent` in the browser; and the page's own
Content-Security-Policy lets no script run but the two that stand in it, and nothing reach the network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trueup.records import visible, write_text
from trueup.report import alarm, ensembles, measured, overoptimization, training
from trueup.report.charts import Chart, Group
from trueup.report.closing import ROUND, rounds
from trueup.report.diagnosis import diagnose
from trueup.report.figures import bracket, clean, duration, num, percent, title_of
from trueup.report.headline import headline, judged_by, models_of, side_by_side
from trueup.report.read import ABSENT, DONE, RunData, Stage, finite, number, pair, read_run
from trueup.run import TRAINED

HERE = Path(__file__).parent
MOST_ROWS, MOST_TEXT = 3000, 4000
NOT_FIGURES = {"step", "pair"}


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder/report.html` from what the run holds so far; returns its path.

    Raises UserError where the folder holds no run. Parts whose stage is missing are left out, and said to be.
    """
    folder = Path(run_folder)
    run = read_run(folder)
    write_text(folder / "report.html", render(run))
    return folder / "report.html"


def render(run: RunData) -> str:
    sections = Sections(run)
    return filled(
        "report.html.j2",
        sections.charts(),
        run=run,
        sample_data=script_json(sections.samples),
        s=sections,
        title_of=title_of,
    )


def filled(template: str, charts: Iterable[Chart], **values: Any) -> str:
    """A self-contained page: the template with its style, its scripts, the policy that lets no other run, its charts
    and `values`."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), (HERE / "report.js").read_text(encoding="utf-8")]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["coded"] = lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
    environment.filters["visible"] = lambda text: visible(str(text))
    page = environment.get_template(template).render(
        policy=content_policy(scripts),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        chart_data=script_json({chart.id: chart.figure for chart in charts}),
        **values,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def content_policy(scripts: Sequence[str]) -> str:
    """Nothing may be fetched, and no script may run but these."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(data: Any) -> Markup:
    """JSON that may stand in a <script> element: no character that could end it, or end a line."""
    text = json.dumps(clean(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


class Sections:
    """What the template shows. A part that the run cannot fill is empty, and named in `absent`."""

    def __init__(self, run: RunData) -> None:
        self.run = run
        self.headline = headline(run)
        self.findings = diagnose(run)
        evaluations = [s for s in run.of("evaluate") if models_of(s.results)]
        self.tables = [closing(run, s) for s in evaluations]
        self.rounds, self.round_columns = rounds(run), ROUND
        self.examples = [(s.name, answers_beside(s)) for s in evaluations if side_by_side(s)]
        self.main = [
            c
            for s in run.of("ppo")
            for c in (
                *alarm.charts(s),
                overoptimization.over_kl(run, s),
                overoptimization.over_steps(run, s),
                ensembles.over_kl(s),
            )
            if c
        ]
        self.training = [g for s in run.stages if (g := training.training(s))]
        self.reward = [g for p in ("reward", "ensemble") for s in run.of(p) if (g := measured.reward_model(s))]
        self.categories = [
            Group(f"category-{s.name}", s.name, found) for s in evaluations if (found := measured.by_category(s))
        ]
        self.lengths = [c for s in run.of("ppo") for c in measured.lengths(s)]
        self.samples, self.samples_note = choose_samples(run)
        self.times = measured.times(run)
        self.stages = [stage_row(s) for s in run.stages]
        self.versions = versions_of(run)
        self.recipe = to_yaml(run.recipe)
        self.configs = [(s.name, to_yaml(s.config)) for s in run.stages if s.config]
        self.about = about(run)
        self.absent = self._absent()
        self.contents = self._contents()

    def charts(self) -> list[Chart]:
        groups = [c for g in [*self.training, *self.reward, *self.categories] for c in [*g.charts, *g.more]]
        return [*self.main, *groups, *self.lengths, *([self.times] if self.times else [])]

    def _absent(self) -> list[str]:
        phases = {s.phase for s in self.run.stages}
        parts = [
            (self.tables, "the closing table and the answers side by side", "evaluate", "an evaluation"),
            (self.main, "proxy against gold", "ppo", "PPO"),
            (
                self.reward,
                "the reward model’s accuracy and calibration",
                "reward",
                "a reward model with held-out pairs",
            ),
            (self.categories, "figures by category", "evaluate", "an evaluation with categories"),
        ]
        idle = "that stage is not done, or measured nothing of it"
        return [
            f"{what} ({idle if phase in phases else f'it takes {needs}'})"
            for part, what, phase, needs in parts
            if not part
        ]

    def _contents(self) -> list[tuple[str, str]]:
        parts = [
            (True, "happened", "What happened"),
            (self.findings, "diagnosis", "Diagnosis"),
            (self.tables, "closing", "The models, measured"),
            (self.rounds, "rounds", "Round by round"),
            (self.examples, "examples", "Answers side by side"),
            (self.main, "overoptimization", "Proxy against gold"),
            (self.training, "training", "Training curves"),
            (self.reward, "reward", "The reward model"),
            (self.categories, "categories", "By category"),
            (self.lengths, "length", "Length and endings"),
            (self.samples["rows"], "samples", "Samples"),
            (True, "run", "The run: time, versions, config"),
        ]
        return [(anchor, title) for present, anchor, title in parts if present]


# the closing table and the answers


def closing(run: RunData, stage: Stage) -> dict[str, Any]:
    """The rows of the closing table: per model, (column, figure, interval) in the table's order."""
    results = stage.results
    models, baseline = models_of(results), str(results.get("baseline", ""))
    gold = bool(results.get("gold"))
    proxy = any(number(t, "sampled", "score") is not None for t in models.values())
    temperature = num(number(results, "temperature"), 1).removesuffix(".0")
    rows = []
    for name, modes in models.items():
        sampled, greedy = modes.get("sampled", {}), modes.get("greedy", {})
        cells = [
            *(
                (num(number(m, "gold")), bracket(pair(m, "gold_interval"))) if gold else ("no gold", "")
                for m in (sampled, greedy)
            ),
            *(
                ("baseline", "")
                if name == baseline
                else (percent(number(m, "win_rate")), bracket(pair(m, "win_rate_interval"), 0, scale=100))
                for m in (sampled, greedy)
            ),
            (num(number(sampled, "kl"), 1), bracket(pair(sampled, "kl_interval"), 1)),
            (num(number(sampled, "length"), 0), ""),
            (percent(number(sampled, "end_rate")), ""),
            (num(number(sampled, "surprise"), 1), ""),
            (percent(number(sampled, "distinct")), ""),
            *([(num(number(sampled, "score")), "")] if proxy else []),
        ]
        rows.append((title_of(name), cells))
    base = title_of(baseline)
    columns = [
        (f"Gold, T\u00a0=\u00a0{temperature}", "sampled"),
        ("Gold, greedy", "temperature 0"),
        (f"Win rate vs {base}", "sampled"),
        (f"Win rate vs {base}", "greedy"),
        ("KL", f"nats from {title_of(str(results.get('reference', '')))}"),
        ("Length", "tokens"),
        ("Ends by itself", "share"),
        ("Entropy", "nats a reply"),
        ("Distinct", "share"),
        *([("Proxy score", "s.d.; optimized")] if proxy else []),
    ]
    prompts = number(results, "prompts")
    note = f"Measured on {num(prompts, 0)} prompts. " if prompts else ""
    note += (
        "In brackets: 95% intervals, by bootstrap over prompts. Columns without another word are of sampled answers."
    )
    return {"name": stage.name, "columns": columns, "rows": rows, "note": note, "judge": judged_by(run, stage)}


def answers_beside(stage: Stage) -> list[dict[str, Any]]:
    """The examples with every model's answers, and what is known of each from the samples."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in stage.samples:
        known.setdefault((row.get("prompt"), row.get("model"), row.get("mode"), row.get("completion")), row)
    out = []
    for example in side_by_side(stage):
        columns = []
        for name in models_of(stage.results):
            modes = example["answers"].get(name)
            answers = []
            for mode, text in (modes if isinstance(modes, Mapping) else {}).items():
                row = known.get((example.get("prompt"), name, mode, text), {})
                answers.append(
                    {
                        "mode": str(mode),
                        "text": str(text),
                        "cut": row.get("stop") == "length",
                        "figures": figures_of(row),
                    }
                )
            columns.append((title_of(name), answers))
        out.append(
            {
                "prompt": str(example.get("prompt", "")),
                "category": example.get("category"),
                "earlier": turns(example.get("earlier")),
                "columns": columns,
            }
        )
    return out


def turns(earlier: Any) -> list[tuple[str, str]]:
    """Earlier turns of a conversation as (role, text)."""
    return (
        [(str(m.get("role", "")), str(m.get("content", ""))) for m in earlier or [] if isinstance(m, Mapping)]
        if isinstance(earlier, list)
        else []
    )


def figures_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("KL", num(float(v)) + " nats") if k == "kl" else (str(k), num(float(v)))
        for k, v in row.items()
        if finite(v) and k not in NOT_FIGURES
    ]


# samples


def choose_samples(run: RunData, most: int = MOST_ROWS) -> tuple[dict[str, Any], str]:
    """At most about `most` samples over all stages, spread evenly; long texts cut, and said to be.

    Within a stage the same rows are taken of every model and mode, so that answers to a prompt stay side by side.
    """
    stages = [s for s in run.stages if s.samples]
    total = sum(len(s.samples) for s in stages)
    quota: dict[str, int] = {}
    left, rest = most, sorted(stages, key=lambda s: len(s.samples))
    for i, stage in enumerate(rest):  # small stages whole, the rest shared by the large ones
        quota[stage.name] = min(len(stage.samples), left // (len(rest) - i))
        left -= quota[stage.name]
    rows, cut = [], 0
    for stage in stages:
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(stage.samples):
            groups[row.get("model"), row.get("mode"), row.get("side")].append(i)
        each = max(1, quota[stage.name] // len(groups))
        for i in sorted(row for group in groups.values() for row in spread(group, each)):
            packed, short = pack(stage, stage.samples[i])
            rows.append(packed)
            cut += short
    note = f"{num(len(rows), 0)} of {num(total, 0)} samples are in this page"
    note += (
        "."
        if len(rows) == total
        else ", spread evenly over stages, steps and prompts; all are in the stages’ samples.jsonl."
    )
    if cut:
        note += f" {num(cut, 0)} long text{'s are' if cut > 1 else ' is'} cut at {num(MOST_TEXT, 0)} characters."
    return {"rows": rows}, note


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spaced."""
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def pack(stage: Stage, row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A sample as the page's script reads it, and whether a text in it was cut."""
    texts = [str(row.get(k) or "") for k in ("prompt", "completion")]
    earlier = [(visible(r), visible(t[:MOST_TEXT])) for r, t in turns(row.get("earlier"))]
    out = {
        "stage": stage.name,
        "step": row.get("step") if stage.phase in TRAINED and finite(row.get("step")) else None,
        "model": "" if row.get("model") is None else str(row["model"]),
        "mode": str(row.get("mode") or ""),
        "side": str(row.get("side") or ""),
        "category": "" if row.get("category") is None else str(row["category"]),
        "prompt": visible(texts[0][:MOST_TEXT]),
        "completion": visible(texts[1][:MOST_TEXT]),
        "stop": str(row.get("stop") or ""),
        "figures": {k: round(float(v), 4) for k, v in row.items() if finite(v) and k not in NOT_FIGURES},
    }
    if earlier:
        out["earlier"] = earlier
    return out, any(len(t) > MOST_TEXT for t in texts)


# the run


def about(run: RunData) -> str:
    """A line on when, where and how long."""
    started = sorted(str(s.manifest["started"]) for s in run.stages if s.manifest.get("started"))
    seconds = [v for s in run.stages if (v := number(s.manifest, "seconds")) is not None]
    devices = sorted({str(s.manifest["device"]) for s in run.stages if s.manifest.get("device")})
    done = sum(s.status == DONE for s in run.stages)
    parts = [f"{done} of {len(run.stages)} stages done"]
    if seconds:
        parts.append(f"{duration(sum(seconds))} of work")
    if devices:
        parts.append(f"on {', '.join(devices)}")
    if started:
        parts.append(f"begun {started[0].replace('T', ' ').replace('+00:00', ' UTC')}")
    return " · ".join(parts)


def stage_row(stage: Stage) -> dict[str, str]:
    parents = stage.manifest.get("parents")
    return {
        "name": stage.name,
        "phase": stage.phase,
        "status": stage.status,
        "done": "yes" if stage.status == DONE else "",
        "absent": "yes" if stage.status == ABSENT else "",
        "time": duration(number(stage.manifest, "seconds")),
        "parents": ", ".join(map(str, parents)) if isinstance(parents, Mapping) else "",
        "folder": stage.folder.name,
        "seed": str(stage.config.get("seed", "")),
    }


def versions_of(run: RunData) -> list[tuple[str, str]]:
    """Each library with its version; with every version and its stages where they differ."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stage in run.stages:
        versions = stage.manifest.get("versions")
        for library, version in (versions if isinstance(versions, Mapping) else {}).items():
            found[str(library)][str(version)].append(stage.name)
    return [
        (library, next(iter(by)) if len(by) == 1 else "; ".join(f"{v} ({', '.join(names)})" for v, names in by.items()))
        for library, by in found.items()
    ]


def to_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110) if data else ""
