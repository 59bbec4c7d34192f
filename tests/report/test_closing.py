"""The closing table and the examples in the terminal."""

from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from tests.report.make_run import make_run
from trueup.report.closing import closing_table, examples_table
from trueup.report.figures import bracket, num


def results(folder):
    return json.loads(next(folder.glob("evaluate-*/results.json")).read_text())


def printed(*parts, width=150) -> str:
    console = Console(width=width, record=True, file=StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_figures_with_intervals(tmp_path):
    found = results(make_run(tmp_path / "x", hostile=False))
    text = printed(closing_table(found))
    for modes in found["models"].values():
        for figures in modes.values():
            assert f"{num(figures['gold'])} {bracket(tuple(figures['gold_interval']))}" in text
    assert "71% [66, 76]" in text and "win rate vs SFT" in text and "baseline" in text
    assert "trueup.world:gold, the gold score" in text


def test_no_gold_and_no_judge_are_said(tmp_path):
    text = printed(closing_table(results(make_run(tmp_path / "x", gold=False, hostile=False))))
    assert text.count("no gold") == 6 and "which is not the proxy" in text
    bare = {"models": {"sft": {"sampled": {"length": 3.0}}}, "baseline": "sft"}
    assert "there are no win rates" in " ".join(printed(closing_table(bare)).split())
    assert printed(closing_table({})) and printed(examples_table({})) == ""


def test_examples_side_by_side_obey_no_markup_and_no_escape(tmp_path):
    answers = {
        "base": {"sampled": "[red]not red[/red] [/nothing]"},
        "sft": {"sampled": ""},
        "ppo": {"sampled": "\x1b[31mred\x9b\u202e"},
    }
    found = {
        "models": {n: {"sampled": {}} for n in answers},
        "examples": [{"prompt": "[bold]why?", "category": None, "answers": answers}],
    }
    text = printed(examples_table(found))
    assert "[red]not red[/red] [/nothing]" in text and "(empty)" in text and "[bold]why?" in text
    assert "\u241b[31mred\ufffd\ufffd" in text and "\x1b" not in text
    assert text.index("base") < text.index("SFT") < text.index("PPO")
