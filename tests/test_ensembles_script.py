"""The table of scripts/ensembles.py on planted results: what its gates say, and how sure they are of it."""

from __future__ import annotations

import pytest

from scripts import ensembles
from scripts.ensembles import COMBINED, SINGLES, recipe_of, table
from trueup.recipe import load_recipe, resolve
from trueup.world.interface import begin


def planted(gains: list[float]) -> dict[int, dict[str, float]]:
    """Of each seed, in headroom units of .5: worst case and uwo are so far above the singles; the rest are equal."""
    rows = {}
    for seed, gain in enumerate(gains):
        row = {"sft": 0.5} | {f"{name} audit": 0.4 for name in (*SINGLES, *COMBINED)}
        rows[seed] = row | {f"{name} audit": 0.4 + 0.5 * gain for name in ("wco", "uwo")}
    return rows


def said(world: str, gains: list[float]) -> str:
    """The line of the table about the worst case against the singles."""
    return next(line for line in table(world, planted(gains)).splitlines() if line.startswith("| wco - single"))


def test_one_seed_decides_nothing():
    assert said("world", [0.1]) == "| wco - single | +0.100 | one seed | 1 | > -0.05 | INCONCLUSIVE |"


@pytest.mark.parametrize(
    ("world", "gains", "outcome"),
    [
        ("world", [0.1, 0.1], "PASS"),
        ("world", [0.1, 0.3], "INCONCLUSIVE"),  # t of one degree of freedom is 12.7: .2 -+ 1.27
        ("world", [0.10, 0.12, 0.11], "PASS"),
        ("world", [-0.2, -0.21, -0.22], "FAIL"),
        ("world", [-0.04] * 8, "PASS"),
        ("planted", [0.2] * 8, "FAIL"),
        ("planted", [0.31, 0.35, 0.4, 0.32, 0.5, 0.33], "PASS"),
    ],
)
def test_gates(world, gains, outcome):
    assert said(world, gains).endswith(f"| {len(gains)} | > {'0.3' if world == 'planted' else '-0.05'} | {outcome} |")


def test_another_world_and_another_draw_go_through_the_same_command(tmp_path, monkeypatch, capsys):
    begin(tmp_path / "manyworld")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("world", 3, tmp_path, ["world.name=manyworld", "world.world=1000"])
    assert recipe["name"] == "world-manyworld-1000-3" and recipe_of("world", 3, tmp_path)["name"] == "world-3"
    stages = {s.name: s.config for s in resolve(load_recipe(recipe), tmp_path)}
    assert (stages["world"].name, stages["world"].world) == ("manyworld", 1000)
    assert stages["start"].scorer == stages["wco"].audit == "manyworld:gold"
    # What is said on the command line arrives there; the planted worlds have no other draw.
    made = []
    monkeypatch.setattr(ensembles, "one_seed", lambda *given: made.append(given) or {})
    monkeypatch.setattr(
        "sys.argv", ["x", "world", "--world", "manyworld", "--draw", "7", "--seeds", "1", "--runs", "r"]
    )
    ensembles.main()
    assert made[0][2] == ["world.name=manyworld", "world.world=7"] and made[0][-1] == 1
    monkeypatch.setattr("sys.argv", ["x", "planted", "--draw", "7"])
    with pytest.raises(SystemExit):
        ensembles.main()
    assert "--world, --draw and --with go with `world`" in capsys.readouterr().err
