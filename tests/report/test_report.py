"""The report says what is in the run, leaves out what is not, and lets no text become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.report.make_run import EVIL_CATEGORY, GOLD, HOSTILE, STAGES, make_run, write
from trueup.agreement import wilson
from trueup.records import UserError
from trueup.report import chart_svg, write_report
from trueup.report.figures import bracket, duration, num, paired_gain, percent, running_mean
from trueup.report.headline import headline, over_optimization
from trueup.report.metrics import METRICS, markdown
from trueup.report.page import choose_samples, script_json
from trueup.report.read import Stage, read_run

ALLOWED_SCRIPTS = 4  # two of data, plotly.js, report.js


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def data(self, name: str):
        ids = [a.get("id") for t, a in self.tags if t == "script"]
        return json.loads(self.scripts[ids.index(name)])


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "hostile")


@pytest.fixture(scope="module")
def hostile_text(hostile) -> str:
    return write_report(hostile).read_bytes().decode("utf-8")  # raises where it is not UTF-8


@pytest.fixture(scope="module")
def hostile_page(hostile_text) -> Page:
    return Page(hostile_text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plain", hostile=False)


@pytest.fixture(scope="module")
def plain_page(plain) -> Page:
    return page(plain)


def change(folder: Path, stage: str, **keys) -> None:
    path = next(folder.glob(f"{stage}-*/config.json"))
    config = json.loads(path.read_text())
    config["config"] |= keys
    write(path, config)


# texts are texts


def test_hostile_texts_make_no_element_and_no_attribute(hostile_page):
    tags = [t for t, _ in hostile_page.tags]
    assert tags.count("script") == ALLOWED_SCRIPTS
    assert not {"img", "iframe", "object", "embed", "svg", "base"} & set(tags)
    assert tags.count("form") == 1 and tags.count("meta") == 5
    for tag, attributes in hostile_page.tags:
        assert not [a for a in attributes if a.startswith("on")], (tag, attributes)
        assert not str(attributes.get("href", "#")).lower().startswith("javascript")
    links = [a["href"] for t, a in hostile_page.tags if t == "a"]
    assert links and all(h.startswith("#") for h in links)


def test_hostile_texts_are_shown_as_they_are(hostile_page):
    assert HOSTILE[0] in hostile_page.text
    assert EVIL_CATEGORY in json.dumps(hostile_page.data("sample-data")).replace('\\"', '"')
    prompts = {r["prompt"] for r in hostile_page.data("sample-data")["rows"]}
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3]} <= prompts


def test_data_in_scripts_cannot_end_them(hostile_text):
    for name in ("chart-data", "sample-data"):
        start = hostile_text.index(f'id="{name}">') + len(f'id="{name}">')
        data = hostile_text[start : hostile_text.index("</script>", start)]
        assert not re.search("[<>&\u2028\u2029]", data)
        json.loads(data)


def test_script_json_escapes_and_survives_the_round():
    value = {"</script>": ["<!--", "&amp;", "\u2028\u2029", "\ud800", float("nan"), float("inf"), 1.5]}
    text = str(script_json(value))
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"</script>": ["<!--", "&amp;", "\u2028\u2029", "\ud800", None, None, 1.5]}


def test_labels_of_charts_hold_no_markup(hostile_page):
    """Plotly reads <b> and <a> in its labels; ours are the only ones."""
    found = []

    def look(value):
        if isinstance(value, dict):
            [look(v) for v in value.values()]
        elif isinstance(value, list):
            [look(v) for v in value]
        elif isinstance(value, str):
            found.append(value)

    look(hostile_page.data("chart-data"))
    assert any("&lt;img" in text for text in found)
    ours = {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
    assert {tag for text in found for tag in re.findall("<[^>]*>", text)} <= ours


def test_policy_forbids_the_network_and_every_other_script(hostile_text, hostile_page):
    made = hostile_page
    policy = next(a["content"] for t, a in made.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    scripts = re.search("script-src ([^;]*);", policy)[1].split()
    assert "unsafe" not in " ".join(scripts)
    running = [
        s for s, a in zip(made.scripts, [a for t, a in made.tags if t == "script"], strict=True) if "id" not in a
    ]
    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in running]
    assert scripts == digests and len(digests) == 2
    for tag, attributes in made.tags:
        assert "src" not in attributes, tag
        assert tag != "link" or attributes["href"] == "data:,"
    assert hostile_text.count("plotly.js v") == 1


def test_a_lone_surrogate_and_control_characters_do_no_harm(hostile_text):
    markup = hostile_text[: hostile_text.index('<script type="application/json"')]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", markup)


def test_rows_with_unusual_line_ends_are_read_whole(hostile):
    run = read_run(hostile)
    evaluation = next(s for s in run.stages if s.phase == "evaluate")
    assert len(evaluation.samples) == 140 * 3 * 2 and not run.problems
    assert any("\u2028" in str(row["prompt"]) for row in evaluation.samples)


# what is said


def test_the_headline_claims_what_the_evaluation_found(plain):
    found = headline(read_run(plain))
    table = json.loads(next(plain.glob("evaluate-*/results.json")).read_text())["models"]
    before, after = (num(table[m]["sampled"]["gold"]) for m in ("sft", "ppo"))
    assert found.claim.startswith(
        f"PPO raised the gold score from {before} to {after} on 140 held-out prompts at a KL of "
    )
    assert re.search(r"The gain is 0\.\d\d, 95% interval 0\.\d\d to 0\.\d\d\.", found.claim)
    assert "win 71% [66, 76]" in found.claim
    assert any("judged by the gold score" in p for p in found.points)
    assert not found.unfinished and not found.warnings


def test_a_gain_within_its_noise_is_not_claimed(tmp_path):
    folder = make_run(tmp_path / "same", hostile=False)
    stage = next(folder.glob("evaluate-*"))
    rows = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    by_sft = {(r["mode"], i % 140): r["gold"] for i, r in enumerate(r for r in rows if r["model"] == "sft")}
    rng = np.random.default_rng(0)
    for i, row in enumerate([r for r in rows if r["model"] == "ppo"]):
        row["gold"] = by_sft[row["mode"], i % 140] + 0.2 * float(rng.normal())
    (stage / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "PPO did not clearly change the gold score" in headline(read_run(folder)).claim


def test_intervals_are_shown_in_the_closing_table(plain, plain_page):
    text = plain_page.text
    results = json.loads(next(plain.glob("evaluate-*/results.json")).read_text())
    for modes in results["models"].values():
        for figures in modes.values():
            assert f"{num(figures['gold'])} {bracket(tuple(figures['gold_interval']))}" in text
    assert "71% [66, 76]" in text and "6% [4, 8]" in text


def test_three_prompts_with_every_models_answers(plain_page):
    made = plain_page
    for name, answer in (
        ("base", "What is the capital of France?"),
        ("SFT", "Maybe Lyon."),
        ("PPO", "of France is Paris. (3)"),
    ):
        assert name in made.text and answer in made.text
    assert sum(a.get("class") == "example" for _, a in made.tags) == 3


def test_without_gold_it_names_the_judge_and_says_it_is_not_the_proxy(tmp_path):
    folder = make_run(tmp_path / "own", gold=False, hostile=False)
    text = page(folder).text
    assert "No gold score is known here. Win rates are judged by the reward model of stage “judge”." in text
    assert "It is not the proxy that PPO optimized (the reward model of stage “reward”)." in text
    assert "are preferred to SFT’s: they win 71% [66, 76]" in text
    assert "no gold" in text and "raised the gold score" not in text


def test_a_judge_that_was_optimized_is_warned_of(tmp_path):
    folder = make_run(tmp_path / "own", gold=False, hostile=False)
    judge = next(folder.glob("judge-*")) / "final"
    change(folder, "ppo", scorer=str(judge))
    found = headline(read_run(folder))
    assert any("come from what PPO optimized" in w for w in found.warnings)


def test_prompts_that_were_trained_on_are_not_called_held_out(tmp_path):
    folder = make_run(tmp_path / "x", hostile=False)
    assert "on 140 held-out prompts" in headline(read_run(folder)).claim
    change(folder, "evaluate", prompts="prompts.jsonl")
    assert "on 140 prompts (not held out: training used this file)" in headline(read_run(folder)).claim


def test_a_gold_score_that_gave_the_labels_is_said(tmp_path):
    folder = make_run(tmp_path / "x", hostile=False)
    assert "which PPO never optimized." in headline(read_run(folder)).points[0]
    change(folder, "comparisons", judge={"use": GOLD})
    assert "it also gave the labels of stage “comparisons”" in headline(read_run(folder)).points[0]


def test_parts_of_the_data_without_a_common_prompt_are_said(tmp_path):
    folder = make_run(tmp_path / "own", gold=False, hostile=False)
    for name, part in (("reward", [0, 0.7]), ("judge", [0.7, 1])):
        change(folder, name, part=part)
    assert "and was trained on other prompts of the same data" in headline(read_run(folder)).claim


def test_without_an_audit_only_the_proxy_is_drawn_and_it_says_so(tmp_path):
    folder = make_run(tmp_path / "x", gold=False, stages=("sft", "reward", "ppo"), hostile=False)
    made = page(folder)
    assert "No audit was logged" in made.text
    figure = made.data("chart-data")["over-kl-ppo"]
    assert {t.get("yaxis") for t in figure["data"]} == {"y"}
    assert "no gold score is known" in chart_svg(folder)


def test_over_optimization_is_found_and_noise_is_not():
    def stage(audit):
        rows = [{"step": i, "score": i / 30, "kl": i / 20, "audit": a} for i, a in enumerate(audit)]
        return Stage("ppo", "ppo", Path("x"), "done", {"audit": "m:gold"}, metrics=rows)

    noise = 0.02 * np.random.default_rng(0).normal(size=60)
    rising = [0.5 + 0.004 * i + e for i, e in enumerate(noise)]
    falling = [0.5 + 0.01 * min(i, 60 - i) + e for i, e in enumerate(noise)]
    assert over_optimization(stage(rising)) is None
    assert "gold score peaked near step" in over_optimization(stage(falling))


def test_gold_optimized_itself_is_called_a_control(tmp_path):
    folder = make_run(tmp_path / "control", hostile=False)
    change(folder, "ppo", scorer=GOLD)
    assert any("PPO optimized that very score here: a control" in p for p in headline(read_run(folder)).points)
    assert "optimized itself: a control" in chart_svg(folder)


# what is drawn


def test_every_chart_has_a_place_and_a_figure(hostile_page):
    places = [a["data-chart"] for _, a in hostile_page.tags if "data-chart" in a]
    assert len(places) == len(set(places)) and set(places) == set(hostile_page.data("chart-data"))


def test_the_main_chart_is_spaced_by_the_root_of_kl_and_named_in_nats(plain_page):
    figure = plain_page.data("chart-data")["over-kl-ppo"]
    points = next(t for t in figure["data"] if t["mode"] == "markers")
    assert points["x"] == pytest.approx([max(kl, 0) ** 0.5 for _, kl in points["customdata"]])
    axis = figure["layout"]["xaxis"]
    assert "nats" in axis["title"]["text"]
    assert axis["tickvals"] == pytest.approx([float(t) ** 0.5 for t in axis["ticktext"]])
    held = [t for t in figure["data"] if "text" in t["mode"]]
    assert [t["text"] for t in held] == [["SFT", "PPO"]] * 2


def test_every_ppo_metric_is_drawn_with_what_is_healthy(plain, plain_page):
    made = plain_page
    stage = next(s for s in read_run(plain).stages if s.phase == "ppo")
    figures = made.data("chart-data")
    for name in stage.names():
        if "/" not in name and not name.startswith("seconds_"):
            assert f"m-ppo-{name}" in figures
            assert METRICS[name].healthy.replace("`", " ").split()[0] in made.text
    assert figures["m-ppo-seconds"]["layout"]["barmode"] == "stack"
    assert {t["name"] for t in figures["m-ppo-seconds"]["data"]} == {"generate", "score", "logprobs", "update"}


def test_metrics_that_are_not_numbers_are_left_out(plain_page):
    figure = plain_page.data("chart-data")["m-ppo-explained_variance"]
    assert 7 not in figure["data"][0]["x"] and len(figure["data"][0]["x"]) == 59


def test_an_ensembles_disagreement_is_drawn_against_kl_and_goes_with_each_sample(tmp_path, plain_page):
    folder = make_run(tmp_path / "x", hostile=False, steps=20)
    change(folder, "ppo", scorer={"ensemble": "runs/e/final", "combine": "wco"})
    for name in ("metrics", "samples"):
        path = next(folder.glob(f"ppo-*/{name}.jsonl"))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "disagreement": 0.3 + row["kl"] / 10} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = page(folder)
    figure = made.data("chart-data")["disagreement-ppo"]
    points, means = figure["data"]
    assert len(points["x"]) == 60 and len(means["x"]) == 20
    assert points["y"] == pytest.approx([0.3 + kl / 10 for kl in points["x"]])
    assert figure["layout"]["yaxis"]["title"]["text"] == "s.d. over the members, proxy score, s.d."
    samples = [r for r in made.data("sample-data")["rows"] if r["stage"] == "ppo"]
    assert samples and all(r["figures"]["disagreement"] > 0.2 for r in samples)
    assert "disagreement-ppo" not in plain_page.data("chart-data")


def test_an_ensemble_is_measured_as_a_reward_model_is(tmp_path):
    folder = make_run(tmp_path / "x", hostile=False, stages=("sft", "reward"))
    for kind in ("config", "manifest"):
        path = next(folder.glob(f"reward-*/{kind}.json"))
        write(path, {**json.loads(path.read_text()), "phase": "ensemble"})
    path = next(folder.glob("reward-*/results.json"))
    shared = {"members": 5, "all_wrong": 0.12, "all_wrong_if_independent": 0.004}
    write(path, {**json.loads(path.read_text()), **shared})
    made = page(folder)
    assert "all 5 members are wrong on 12% of the pairs, where independent errors would meet on 0%" in made.text
    assert "rm-reward-margin" in made.data("chart-data")


def test_an_unknown_phase_gets_its_curves_too(tmp_path):
    folder = tmp_path / "run"
    write(folder / "recipe.json", {"recipe": {"name": "new"}, "stages": {"new": "new-1"}})
    write(folder / "new-1" / "config.json", {"phase": "new", "config": {"beta": 0.1}})
    write(folder / "new-1" / "manifest.json", {"phase": "new", "status": "done", "seconds": 3})
    (folder / "new-1" / "metrics.jsonl").write_text('{"step": 0, "margin": 0.1}\n{"step": 1, "margin": 0.2}\n')
    assert "m-new-margin" in page(folder).data("chart-data")


def test_a_dpo_stage_is_told_drawn_and_warned_of(tmp_path):
    folder = tmp_path / "run"
    write(folder / "recipe.json", {"recipe": {"name": "run"}, "stages": {"dpo": "dpo-1"}})
    write(folder / "dpo-1" / "config.json", {"phase": "dpo", "config": {"beta": 0.1}})
    write(folder / "dpo-1" / "manifest.json", {"phase": "dpo", "status": "done", "seconds": 3})
    write(folder / "dpo-1" / "results.json", {"steps": 9, "rows": 72, "validation_accuracy": 0.75, "kl": 1.26})
    logged = [
        {"loss": 0.69, "validation_loss": 0.68, "margin": 0.1, "validation_chosen_logprobs": -10.0, "end_rate": 1},
        {"loss": 0.5, "validation_loss": 0.6, "margin": 0.2, "validation_chosen_logprobs": -12.5, "end_rate": 0.5},
    ]
    (folder / "dpo-1" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(logged))
    )
    said = headline(read_run(folder))
    assert "DPO: 9 steps over 72 rows" in said.claim
    assert "75% of held-out rows are ordered as labelled" in said.claim
    assert "held-out chosen replies −10.0 → −12.5 nats" in said.claim and "KL 1.3 nats on its own answers" in said.claim
    assert said.warnings == ["DPO: only 50% of its answers end by themselves."]
    charts = page(folder).data("chart-data")
    assert [t["name"] for t in charts["m-dpo-loss"]["data"]] == ["training", "held out"]
    assert "m-dpo-margin" in charts and "m-dpo-validation_loss" not in charts


def test_the_reward_models_figures(plain_page):
    made = plain_page
    figures = made.data("chart-data")
    bars = dict(
        zip(figures["rm-reward-accuracy"]["data"][0]["y"], figures["rm-reward-accuracy"]["data"][0]["x"], strict=True)
    )
    assert (
        bars["held-out labels"] == 0.745
        and bars["the longer answer wins"] == 0.58
        and bars["clean: against gold"] == 0.83
    )
    assert figures["rm-reward-reliability"]["data"][1]["x"] == pytest.approx([0.55, 0.65, 0.75, 0.85, 0.95])
    assert "Expected calibration error 0.031" in made.text


# what is missing


@pytest.mark.parametrize(
    "stages",
    [(), ("world",), ("sft",), ("reward",), ("ppo",), ("evaluate",), ("sft", "ppo"), ("answers", "comparisons")],
)
def test_any_part_of_a_pipeline_gives_a_report(tmp_path, stages):
    made = page(make_run(tmp_path / "part", stages=stages))
    assert "What happened" in made.text
    assert ("evaluate" in stages) == ("The models, measured" in made.text)


@pytest.mark.parametrize("stop_at", STAGES)
def test_unfinished_stages_are_said_to_be(tmp_path, stop_at):
    folder = make_run(tmp_path / "stopped", gold=False, stop_at=stop_at, hostile=False)
    text = page(folder).text
    assert f"{stop_at}: unfinished" in text
    for later in STAGES[STAGES.index(stop_at) + 1 :]:
        assert f"{later}: not started." in text


def test_broken_files_are_said_and_not_fatal(tmp_path):
    folder = make_run(tmp_path / "broken", hostile=False)
    next(folder.glob("evaluate-*/results.json")).write_text('{"models": {"sft": ')
    with open(next(folder.glob("ppo-*/metrics.jsonl")), "a") as file:
        file.write('{"step": 60, "sco')
    for name in ("reward", "sft"):
        write(
            next(folder.glob(f"{name}-*/results.json")),
            {"accuracy": "high", "by_category": [1], "reliability": {"a": 1}, "steps": None},
        )
    text = page(folder).text
    assert "results.json is not a JSON object, so it was left out" in text
    assert "metrics.jsonl: 1 line is not a whole JSON object" in text


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no PPO steps"):
        chart_svg(make_run(tmp_path / "sft", stages=("sft",)))


def test_a_stage_cannot_lie_outside_its_run(tmp_path):
    write(tmp_path / "secret" / "config.json", {"phase": "sft", "config": {"key": "outside"}})
    write(tmp_path / "run" / "recipe.json", {"recipe": {}, "stages": {"sft": "../secret"}})
    assert "outside" not in page(tmp_path / "run").text


# samples


def test_samples_are_limited_and_it_says_of_how_many(plain):
    run = read_run(plain)
    total = sum(len(s.samples) for s in run.stages)
    data, note = choose_samples(run, most=300)
    assert 200 < len(data["rows"]) <= 310
    assert note.startswith(f"{len(data['rows'])} of {num(total, 0)} samples are in this page, spread evenly")
    by_model: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        if row["stage"] == "evaluate":
            by_model.setdefault((row["model"], row["mode"]), []).append(row["prompt"])
    assert len(by_model) == 6 and len({tuple(p) for p in by_model.values()}) == 1  # the same prompts of every model
    assert choose_samples(run, most=10**6)[1].startswith(
        f"{num(total, 0)} of {num(total, 0)} samples are in this page."
    )


def test_pairs_of_samples_stay_together(plain):
    rows = [r for r in choose_samples(read_run(plain), most=300)[0]["rows"] if r["stage"] == "reward"]
    assert [r["side"] for r in rows] == ["chosen", "rejected"] * (len(rows) // 2) and len(rows) > 20
    assert all(a["prompt"] == b["prompt"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_long_texts_are_cut_and_counted(hostile):
    data, note = choose_samples(read_run(hostile))
    assert max(len(r["completion"]) for r in data["rows"]) == 4000
    assert re.search(r"\d+ long texts are cut at 4,000 characters", note)


# the chart for a README


def test_chart_svg_is_whole_and_escaped(hostile):
    from xml.etree import ElementTree

    svg = chart_svg(hostile)
    root = ElementTree.fromstring(svg)
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("proxy score, s.d." in t for t in texts) and any("gold score" in t for t in texts)
    assert any("nats" in t for t in texts) and "SFT" in texts and "PPO" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 120
    assert not re.search(r"(href|<script|<image|url\()", svg)
    numbers = [float(v) for v in re.findall(r'c[xy]="([^"]+)"', svg)]
    assert min(numbers) >= 0 and max(numbers) <= 760


# figures


def test_wilson_by_hand():
    """8 of 10: centre (8 + 1.92) / 13.84 = 0.7168, half width 1.96 sqrt(1.6 + 0.96) / 13.84 = 0.2266."""
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=5e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_paired_gain_keeps_pairs_together():
    """Differences are all 0.1, however far the values are spread: the interval has no width."""
    before = np.random.default_rng(0).normal(size=50)
    gain, (low, high) = paired_gain(before, before + 0.1)
    assert (gain, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_paired_gain_is_as_wide_as_theory_says():
    """Of many values the bootstrap interval is the mean -+ 1.96 standard errors; tolerance: a tenth of that."""
    gains = np.random.default_rng(1).normal(0.3, 2.0, size=2000)
    half = 1.96 * gains.std() / 2000**0.5
    gain, (low, high) = paired_gain(np.zeros(2000), gains)
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=0.1 * half)


def test_running_mean_keeps_its_start_and_averages_its_end():
    assert running_mean([0, 3, 6, 9, 6], 3) == pytest.approx([0, 3, 6, 7, 7.5])
    assert running_mean([1, 5, 2], 1) == [1, 5, 2]


def test_numbers_as_people_read_them():
    assert num(-0.104) == "−0.10" and num(-0.001) == "0.00" and num(1234.5) == "1,234" and num(None) == "–"
    assert percent(0.714) == "71%" and bracket((0.66, 0.76), 0, scale=100) == "[66, 76]" and bracket(None) == ""
    assert [duration(s) for s in (3.21, 59.6, 200, 7500)] == ["3.2 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]


# beside the page


def test_the_docs_page_is_the_table_of_metrics():
    path = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert path.read_text(encoding="utf-8") == markdown()


def test_report_starts_without_torch(hostile):
    code = (
        "import sys; from pathlib import Path; "
        "from trueup.report import write_report; import trueup.report.closing; "
        f"write_report(Path({str(hostile)!r})); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
