"""The loop with people in it: the run waits, simulated raters answer on the page, and it goes on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.label.serving import served
from trueup.recipe import load_recipe, resolve, run_recipe
from trueup.records import Waiting
from trueup.report.closing import rounds_table
from trueup.report.headline import headline
from trueup.report.read import read_run
from trueup.simulate import SimulateConfig, answer
from trueup.store import Store

TINY = [
    *("device=cpu", "world.demonstrations=200", "world.prompts=120", "world.heldout=14"),
    *("sft.train.epochs=1", "answers.limit=30", "again.stages.answers.limit=20"),
    *("route.budget=12", "again.stages.route.budget=8", "route.audit=0.2"),
    *("reward.train.epochs=1", "reward.normalize_samples=16", "ppo.steps=2", "ppo.batch=8"),
]


def test_the_recipe_joins_what_rounds_before_have_learned(tmp_path):
    stages = {s.name: s for s in resolve(load_recipe("loop"), tmp_path)}
    second = stages["route-2"].config
    assert second.history == (f"{stages['route'].folder}/routed.jsonl",) and stages["route"].config.history == ()
    assert second.scorers == (f"{stages['reward'].folder}/final",)
    assert [s.path for s in stages["reward-2"].config.data] == [
        f"{stages[name].folder}/comparisons.jsonl" for name in ("route", "route-2")
    ]
    people = {s.name: s for s in resolve(load_recipe("loop", ["route.people=people"]), tmp_path)}
    assert people["route-2"].config.people == "people" and people["route"].key != stages["route"].key


@pytest.mark.long
def test_the_run_waits_for_the_page_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("loop", [*TINY, "route.people=people"])
    judge = {"use": "trueup.world:raters", "name": "pool"}
    waits, kept = 0, 0
    while True:
        try:
            stages = {s.name: s for s in run_recipe(recipe, tmp_path / "runs")}
            break
        except Waiting as error:
            assert "trueup label" in str(error)
            waits += 1
        store = Store("runs/loop/preferences.sqlite")
        with served(store, simulated=True) as site:
            links = [site.url + site.links[name] for name in ("ann", "bob")]
            kept += sum(answer(links, SimulateConfig(judge=judge, seed=waits)).values())
        store.close()
    results = {name: json.loads((s.folder / "results.json").read_text()) for name, s in stages.items()}
    spent = [results[name]["labels"] for name in ("route", "route-2")]
    assert 2 <= waits <= 4 and sum(spent) == kept and spent[0] <= 12 and spent[1] <= 8
    assert results["route-2"]["learned_from"] > results["route-2"]["audit"]["pairs"]
    assert "against the reward model" in results["route-2"]["signals"]
    for name in ("route", "route-2"):
        assert set(results[name]["kinds"]) == {"simulated"}
        rows = [json.loads(line) for line in (stages[name].folder / "comparisons.jsonl").open()]
        assert Counter(r["by"] for r in rows).keys() <= {"ai", "simulated"}
    assert set(results["evaluate"]["models"]) == {"sft", "first", "ppo"}
    run = read_run(tmp_path / "runs/loop")
    table = rounds_table(run)
    assert table is not None and list(table.columns[1].cells) == [str(spent[0]), str(sum(spent))]
    said = headline(run)
    line = f"{spent[0]} labels of simulated raters (not people), {results['route']['left']} pairs left to "
    assert any(line in text and "of a random audit" in text for text in said.points), said.points
