"""Gate G10: when gold is lost, when a signal fires, what a way to choose a version keeps; and the whole, tiny."""

from __future__ import annotations

import json

import pytest

from scripts import alarm
from tests.toy import constant
from trueup.recipe import load_recipe, resolve
from trueup.world.interface import begin


def test_when_a_quarter_of_the_gain_is_lost():
    gold = {0: 0.5, 10: 0.7, 20: 0.9, 30: 0.85, 40: 0.75, 50: 0.2}
    # The bar is .9 - .25 x .4 = .8: half of the way from .85 at 30 to .75 at 40.
    assert alarm.lost_at(gold, 0.9) == pytest.approx(35)
    assert alarm.lost_at({0: 0.5, 10: 0.9, 20: 0.81}, 0.9) is None
    # A lower peak, read on the other half of the prompts, lowers the bar: .7 - .05 = .65, between .75 and .2.
    assert alarm.lost_at(gold, 0.7) == pytest.approx(40 + 10 * 0.1 / 0.55)
    # Before its best version nothing is lost; a bar that the best version itself does not reach is passed there.
    assert alarm.lost_at({0: 0.5, 10: 0.4, 20: 0.9, 30: 0.88}, 0.9) is None
    assert alarm.lost_at({0: 0.5, 10: 0.6, 20: 0.5}, 0.7) == 10


def test_stopping_early_on_the_audits():
    rates = [0.6, 0.7, 0.65, 0.6, 0.9]
    assert alarm.early([(10 * (i + 1), r, 20) for i, r in enumerate(rates)]) == 20  # two without a better one
    assert alarm.early([(10, 0.4, 20), (20, 0.45, 20), (30, 0.9, 20)]) == 0


def test_rules_of_the_signals():
    rows = [{"step": s, "kl": float(s), "entropy": 1.0 if s < 10 else 0.2, "heldout_gain": 1.0} for s in range(20)]
    rules = alarm.SIGNALS
    # What step 9 samples is known when version 10 is there.
    assert rules["KL above 6 nats"](rows) == 10  # the mean of 5 to 9 is 7, that of 4 to 8 is 6
    assert rules["entropy: half of the start's"](rows) == 14  # (1 + 4 x .2)/5 at 13, (2 + 3 x .2)/5 at 12
    assert rules["held-out gain .25 s.d. below its best"](rows) is None
    assert rules["length 1 s.d. from the start's"](rows) is None
    for row in rows:
        row["heldout_disagreement"] = 0.4 if row["step"] < 12 else 0.8
    assert rules["disagreement with the held-out model: half above the start's"](rows) == 15  # 3 of 5: .64 > .6
    for row in rows[8:]:
        row |= {"heldout_gain": 0.0, "gain/a": 0.1, "gain/b": -0.5}
    assert rules["held-out gain .25 s.d. below its best"](rows) == 10
    assert rules["a category's score .25 s.d. below the start's"](rows) == 13
    rows[15]["gap_low"] = 0.1  # of an audit of version 15
    assert rules["gap of predicted and audited wins, bound above 0"](rows) == 15


def run(lost, fired, rule="gap"):
    return {
        "lost": lost,
        "fired": {name: fired for name in (alarm.ALARM, *alarm.SIGNALS, alarm.OWN_KL)},
        "share": {alarm.BACK: 0.9, "last": -1.0},
    }


def test_the_table_counts_what_is_in_time_and_what_is_false():
    found = {i: {"free": run(30.0, 20), "default": run(None, None)} for i in range(40)}
    for i in range(2):
        found[i] = {"free": run(30.0, 31), "default": run(None, 10)}
    found[40] = {"free": run(None, 5), "default": run(50.0, 10)}  # never turned over; turned over at the default
    text = alarm.tables(found)
    assert "41 free runs, 40 of which turned over; 41 at the default coefficient, 40 of which stayed healthy" in text
    assert "| the alarm | 38 of 40 [0.83, 0.99] | 10 | 2 of 40 [0.01, 0.17] |" in text
    sure = "by the intervals: in time INCONCLUSIVE, false alarms INCONCLUSIVE"
    assert f"G10: in time HOLDS, false alarms HOLDS; {sure}" in text
    assert f"| {alarm.BACK} | 0.90 | 0.90 | 0.90 | 0.90 |" in text
    for i in range(2):
        found[i] = found[5]
    assert "by the intervals: in time PASS, false alarms PASS" in alarm.tables(found)
    never = alarm.tables({i: {"free": run(30.0, None)} for i in range(40)})
    assert "G10: in time FAILS, false alarms NOT MEASURED; by the intervals: in time FAIL," in never
    for i in range(6):
        found[i] = {"free": run(30.0, 31 if i else 29), "default": run(None, 10 if i else None)}
    assert "G10: in time HOLDS, false alarms FAILS" in alarm.tables(found)  # 35 and 5 of 40


def test_a_run_that_gained_nothing_has_no_share_and_is_counted():
    assert alarm.shares({"last": 0.3}, 0.5, 0.4) == {"last": pytest.approx(-0.5)}
    assert alarm.shares({"last": 0.3}, 0.5, 0.0) is None and alarm.shares({"last": 0.3}, 0.5, -0.1) is None
    found = {i: {"free": run(30.0, 20), "default": run(None, None)} for i in range(4)}
    assert "left out" not in alarm.tables(found)
    found[4] = {"free": {**run(1.0, 20), "share": None}, "default": run(None, None)}
    text = alarm.tables(found)
    assert f"| {alarm.BACK} | 0.90 | 0.90 | 0.90 | 0.90 |" in text
    assert "left out, as no version was better than the start: 1 free, 0 default" in text


def test_gold_and_kl_of_a_version_are_of_2048_answers_or_more(tmp_path):
    keys = alarm.recipe_of("world", 0, tmp_path)["stages"]["versions-free"]
    assert keys["limit"] * keys["samples"] >= 2048


def test_another_world_and_another_draw_go_through_the_same_command(tmp_path, monkeypatch):
    begin(tmp_path / "alarmworld")
    monkeypatch.chdir(tmp_path)
    recipe = alarm.recipe_of("world", 3, tmp_path, ["world.name=alarmworld", "world.world=1000"])
    assert recipe["name"] == "alarm-world-alarmworld-1000-3"
    stages = {s.name: s.config for s in resolve(load_recipe(recipe), tmp_path)}
    assert (stages["world"].name, stages["world"].world, stages["world"].seed) == ("alarmworld", 1000, 3)
    assert stages["versions-free"].gold == stages["free"].audit == "alarmworld:gold"
    assert stages["free"].watch.judge == {"use": "alarmworld:raters", "name": "pool"}  # it has no auditors of its own
    own = {s.name: s.config for s in resolve(load_recipe(alarm.recipe_of("world", 3, tmp_path)), tmp_path)}
    assert (own["world"].world, own["free"].watch.judge) == (0, "trueup.world:auditors")
    assert own["versions-free"].gold == "trueup.world:gold"


@pytest.mark.long
def test_a_seed_from_the_start_to_its_grades(tmp_path, monkeypatch):
    """A KL budget that any step passes: the alarm is set off, PPO is run again to go back."""
    over = {
        "sft": {"train": {"epochs": 4, "batch": 16, "optim": constant(3e-3)}},
        "ppo": {
            "steps": 8,
            "watch": {"judge": "scripts.alarm:others", "every": 2, "labels": 40, "kl_budget": 1e-3},
            "snapshots": [2, 4, 6, 8],
        },
        "trace": {"limit": 16, "samples": 2},
    }
    found = alarm.one_seed("planted", tmp_path, [], ["free"], True, 0, over)
    assert set(found) == {"free"} and found["free"]["fired"][alarm.ALARM] == 5 and found["free"]["rule"] == "kl"
    assert found["free"]["fired"][alarm.OWN_KL] == 5  # the rule itself
    assert set(found["free"]["gold"]) == {0, 2, 4, 6, 8} and found["free"]["kept"]["last"] == 8
    assert found["free"]["kept"][alarm.BACK] in (0, 2, 4, 5) and alarm.BACK in found["free"]["share"]
    again = alarm.one_seed("planted", tmp_path, [], ["free"], False, 0, over)
    assert json.dumps(again) == json.dumps(found)
    assert "the alarm" in alarm.tables({0: found})
