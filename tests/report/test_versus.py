"""Runs side by side: the figures, where the configs differ, the curves; hostile texts stay texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.make_run import make_run
from trueup.records import UserError
from trueup.report.versus import compare, tables, write_page


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two runs of the same stages: the second with other names of folders, another rate, and one figure changed."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["recipe"]["name"] = "[red]two</h1><script>window.pwned = 1</script>"
    for stage, folder in recipe["stages"].items():
        recipe["stages"][stage] = f"{folder}-two"
        (other / folder).rename(other / f"{folder}-two")
        for record in other.glob("*/config.json"):
            record.write_text(record.read_text().replace(folder, f"{folder}-two"))
    (other / "recipe.json").write_text(json.dumps(recipe))
    ppo = other / recipe["stages"]["ppo"]
    config = json.loads((ppo / "config.json").read_text())
    config["config"]["kl_coef"] = 0.75
    (ppo / "config.json").write_text(json.dumps(config))
    results = json.loads((ppo / "results.json").read_text())
    (ppo / "results.json").write_text(json.dumps({**results, "score": 12.5}))
    return [one, other]


def cells(rows, title: str, key: str) -> list[str]:
    (table,) = [t for t in rows if t.title == title]
    return dict(table.rows)[key]


def test_figures_and_differences(two):
    found = compare(two)
    assert cells(found.figures, "PPO", "score")[1] == "12.5" != cells(found.figures, "PPO", "score")[0]
    assert [(t.title, [k for k, _ in t.rows]) for t in found.differences] == [("PPO", ["kl_coef"])]  # no folder's name
    assert cells(found.differences, "PPO", "kl_coef")[1] == "0.75"
    assert any(re.fullmatch("ppo sampled gold", key) for t in found.figures for key, _ in t.rows)


def test_a_stage_that_one_run_lacks_is_a_dash(two):
    recipe = json.loads((two[1] / "recipe.json").read_text())
    del recipe["stages"]["reward"]
    (two[1] / "recipe.json").write_text(json.dumps(recipe))
    found = compare(two)
    assert cells(found.figures, "reward", "accuracy")[1] == "–" != cells(found.figures, "reward", "accuracy")[0]
    assert "reward" not in [t.title for t in found.differences]


def test_the_terminal_obeys_no_markup_in_a_name(two):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(compare(two)))
    assert "[red]two" in console.export_text()


def test_the_page_has_a_curve_a_run_and_no_script_of_a_name(two, tmp_path):
    page = write_page(compare(two), tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script>window.pwned" not in page
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', page)[1])
    names = {t["name"] for t in data["v-ppo-kl"]["data"]}
    assert len(names) == 2 and all("<" not in name for name in names)
    assert len({t["line"]["color"] for t in data["v-ppo-kl"]["data"]}) == 2
    write_page(compare(two), tmp_path / "compare.html")  # its own page it may write again


def test_mistakes(two, tmp_path):
    with pytest.raises(UserError, match="2 to 8 runs, got 1"):
        compare(two[:1])
    with pytest.raises(UserError, match="one run twice"):
        compare([two[0], two[0] / "." / ""])
    with pytest.raises(UserError, match="not a run"):
        compare([two[0], tmp_path])
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match="not a page of trueup compare"):
        write_page(compare(two), tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"
