"""Gate G9, scripts/refresh.py: what its table says of planted results, and what its control is."""

from __future__ import annotations

import pytest

from scripts.refresh import ONE, figures, recipe_of, table, with_control
from trueup.recipe import resolve


def seeds(first, last, one):
    """Of each seed the gold of round 1, of round 4 and of the control; SFT's is .5."""
    return {
        seed: {"sft": {"gold": 0.5}, "1": {"gold": a}, "2": {"gold": 0.1}, "4": {"gold": b}, ONE: {"gold": c}}
        for seed, (a, b, c) in enumerate(zip(first, last, one, strict=True))
    }


def line(text, head):
    return next(x for x in text.splitlines() if x.startswith(head))


@pytest.mark.parametrize(
    ("last", "one", "better", "as_good", "gate"),
    [
        (0.75, 0.74, "PASS", "PASS", "PASS"),
        (0.75, 0.76, "PASS", "PASS", "PASS"),  # .02 of the headroom below the control
        (0.75, 0.80, "PASS", "FAIL", "FAIL"),
        (0.68, 0.68, "FAIL", "PASS", "FAIL"),
    ],
)
def test_the_gate_has_two_sides(last, one, better, as_good, gate):
    text = table(seeds([0.7, 0.71, 0.69, 0.7], [last, last + 0.011, last - 0.009, last], [one, one + 0.01, one, one]))
    assert line(text, "| round 4 - 1 ").endswith(f"| 4 | > 0 | {better} |")
    assert line(text, f"| round 4 - {ONE} ").endswith(f"| 4 | > -0.05 | {as_good} |")
    assert text.endswith(f"G9: {gate}")


def test_differences_are_paired_and_in_headroom_units():
    text = table(seeds([0.7, 0.6, 0.5], [0.75, 0.65, 0.55], [0.7, 0.6, 0.5]))
    assert line(text, "| round 4 - 1 ").startswith("| round 4 - 1 | +0.100 | +0.100 to +0.100 |")  # .05 of 1 - .5


def test_what_is_not_sure_or_not_measured_is_not_decided():
    one_seed = table(seeds([0.7], [0.8], [0.7]))
    assert "| one seed |" in line(one_seed, "| round 4 - 1 ") and one_seed.endswith("G9: INCONCLUSIVE")
    text = table(seeds([0.7] * 3, [0.6, 0.8, 0.9], [0.7] * 3))
    assert text.endswith("G9: INCONCLUSIVE")
    found = seeds([0.7] * 3, [0.75, 0.76, 0.75], [0.7] * 3)
    for of in found.values():
        del of[ONE]
    assert "| not measured | 0 |" in table(found) and table(found).endswith("G9: INCONCLUSIVE")
    for of in found.values():
        del of["2"], of["4"]
    assert table(found).endswith("G9: INCONCLUSIVE")  # of one round nothing can be said
    assert table({0: {}}).endswith("G9: INCONCLUSIVE")


def test_what_each_round_cost_and_gave():
    recipe = recipe_of("world", 0)
    done = {"versions-start": {"gold": 0.5}}
    for k in range(1, 5):
        tail = "" if k == 1 else f"-{k}"
        done[f"comparisons{tail}"] = {"comparisons": 100 * k}
        parts = {str(i): {"pairs": 10 * i, "accuracy": i / 10} for i in range(1, k + 1)}
        done[f"reward{tail}"] = {"rows": 90 * k, "accuracy": 0.6, "by_data": parts if k > 1 else None}
        done[f"versions-ppo{tail}"] = {"kl": k, "gold": 0.5 + k / 20}
    done |= {"comparisons-one": {"comparisons": 1100}, "reward-one": {"rows": 900, "accuracy": 0.7}}
    done["versions-ppo-one"] = {"kl": 2.0, "gold": 0.66}
    found = figures(recipe, done)
    assert [found[str(k)]["labels"] for k in (1, 2, 3, 4)] == [100, 300, 600, 1000] and found[ONE]["labels"] == 1100
    assert "accuracy, earlier" not in found["1"] and found["1"]["accuracy, own"] == 0.6
    # round 3's model: .1 of 10 and .2 of 20 are right of earlier rounds' pairs, .3 of its own
    assert found["3"]["accuracy, earlier"] == pytest.approx(5 / 30) and found["3"]["accuracy, own"] == 0.3
    assert line(table({0: found}), "| 4 ") == "| 4 | 1000 | 360 | 0.233 | 0.400 | 4.000 | 0.700 | 1 |"
    assert line(table({0: found}), f"| {ONE} ") == f"| {ONE} | 1100 | 900 |  | 0.700 | 2.000 | 0.660 | 1 |"
    del done["reward-4"]
    assert "4" not in figures(recipe, done)


def test_the_control_has_as_many_comparisons_of_the_same_people_and_everything_else_is_the_same(tmp_path):
    recipe = with_control(recipe_of("world", 5, ["world.world=1000"]), 4321)
    assert recipe.name == "refresh-world-1000-5"
    stages = {s.name: s.config for s in resolve(recipe, tmp_path)}
    assert stages["world"].world == 1000
    assert stages["reward-one"].limit == 4321 and stages["reward-4"].limit == 0
    assert {config.seed for name, config in stages.items() if name.startswith("comparisons")} == {5}
    asked = [stages[name].limit for name in ("answers", "answers-2", "answers-3", "answers-4", "answers-one")]
    assert asked == [2000, 1000, 1000, 1000, 6000] and stages["answers-one"].against is None
    assert len({stages[name].seed for name in ("answers", "answers-2", "answers-3", "answers-4")}) == 4
    assert stages["answers-one"].seed == 5
    assert stages["ppo-one"].model_dump(exclude={"scorer"}) == stages["ppo"].model_dump(exclude={"scorer"})
    graded = stages["versions-ppo-4"], stages["versions-ppo-one"]
    assert (
        graded[0].training.startswith(str(tmp_path))
        and "ppo-4" in graded[0].training
        and "ppo-one" in graded[1].training
    )
    assert {(one.limit, one.samples, one.gold, one.prompts, one.start) for one in graded} == {
        (512, 4, "trueup.world:gold", stages["versions-start"].prompts, stages["versions-start"].start)
    }
