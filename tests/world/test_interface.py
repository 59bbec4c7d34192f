"""A world that somebody else wrote, taken by its name: the starter from its first file to the evaluation; and what is
said where a world breaks its contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueup.recipe import load_recipe, resolve, run_recipe
from trueup.records import UserError
from trueup.report import write_report
from trueup.run import read_lines
from trueup.study import compose, load_study
from trueup.world.interface import begin, export, load_world
from trueup.world.stage import WorldConfig, base_shape
from trueup.world.starter import gold_of, prompts

CATEGORIES = {"price", "shelf", "private"}
SMALL = [
    "name=other",
    "device=cpu",
    "world.demonstrations=60",
    "world.prompts=64",
    "world.heldout=24",
    "world.pretrain.tokens=8192",
    "world.pretrain.width=32",
    "world.pretrain.layers=1",
    "sft.train.epochs=1",
    "sft.sampling.max_tokens=16",
    "answers.sampling.max_tokens=16",
    "reward.sampling.max_tokens=16",
    "reward.train.epochs=1",
    "ppo.sampling.max_tokens=16",
    "ppo.steps=2",
    "ppo.batch=16",
    "ppo.missing_eos_samples=16",
    "evaluate.sampling.max_tokens=16",
    "evaluate.greedy=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a new world in it. Its name is this test's own: a process knows one module by a name."""
    made = tmp_path_factory.mktemp("worlds")
    begin(made / "otherworld")
    return made


def test_a_new_world_goes_through_the_built_in_recipe(folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe("world", [*SMALL, "world.name=otherworld"])
    stages = {stage.name: stage for stage in run_recipe(recipe, Path("runs"))}
    results = json.loads((stages["evaluate"].folder / "results.json").read_text())
    assert set(results["models"]) == {"base", "sft", "ppo"}
    assert all(0 <= row["sampled"]["gold"] <= 1 for row in results["models"].values())
    pairs = [json.loads(line) for line in (stages["comparisons"].folder / "comparisons.jsonl").read_text().splitlines()]
    assert {row["category"] for row in pairs} <= {"price", "shelf", "private"} and all(
        "gold_margin" in r for r in pairs
    )
    assert {row["rater"].partition(",")[0][:5] for row in pairs} == {"pool-"}
    heldout = read_lines(stages["world"].folder / "prompts-heldout.jsonl")
    assert {row["category"] for row in heldout} == CATEGORIES and heldout[0]["meta"]["about"]
    assert (stages["world"].folder / "base" / "chat_template.jinja").exists()
    assert stages["ppo"].config.audit == "otherworld:gold"
    page = write_report(Path("runs/other")).read_text()
    assert "arithmetic" not in page and "shelf" in page


def test_the_study_takes_it_by_the_same_key(folder, monkeypatch):
    monkeypatch.chdir(folder)
    study = load_study("world", None, ["set.world.name=otherworld"])
    stages = {s.name: s for s in resolve(compose("world", study, 0), Path("runs"))}
    assert stages["world"].config.name == "otherworld"
    assert stages["gold"].config.scorer == stages["ppo-on_gold"].config.scorer == "otherworld:gold"


def test_the_built_in_recipes_name_the_built_in_world(tmp_path):
    stages = {s.name: s for s in resolve(load_recipe("world"), tmp_path)}
    assert stages["ppo"].config.audit == stages["evaluate"].config.gold == "trueup.world:gold"
    assert stages["comparisons"].config.judge["use"] == "trueup.world:raters"


def test_a_changed_world_is_made_again(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def keys(*more: str) -> dict[str, str]:
        recipe = load_recipe("world", ["world.name=otherworld", *more])
        return {s.name: s.key for s in resolve(recipe, Path("runs"))}

    before = keys()
    assert keys() == before and keys("world.pretrain.tokens=5000")["sft"] != before["sft"]
    source = folder / "otherworld" / "__init__.py"
    text = source.read_text()
    source.write_text(text.replace("0.15 * warmth", "0.16 * warmth"))
    assert all(key != before[name] for name, key in keys().items() if name in ("world", "sft", "evaluate"))
    source.write_text(text)
    (folder / "otherworld" / "__pycache__").mkdir(exist_ok=True)
    (folder / "otherworld" / "__pycache__" / "x.pyc").write_text("noise")
    assert keys() == before


def test_the_commands_know_it(folder, call):
    code, out, _ = call(folder, "world", "new", "second")
    assert code == 0 and "world.name=second" in out
    assert "world.name=second" in (folder / "second" / "__init__.py").read_text()
    for words, said in (
        (("world", "new", "second"), "left as it is"),
        (("world", "new", "my-world"), "Python module"),
        (("run", "world", "world.name=./second", "--dry-run"), "expected the name of a Python module"),
        (("demo", "world.name=nowhere"), "world 'nowhere': no module of this name"),
    ):
        code, _, err = call(folder, *words)
        assert code == 2 and said in err, err
    sizes = ["--demonstrations", "4", "--prompts", "4", "--heldout", "4"]
    (folder / "second" / "__init__.py").write_text("from otherworld import *\ndef base_path(): return 'made'\n")
    assert call(folder, "world", "build", "--world", "otherworld", "--out", "made", "--tokens", "2048")[0] == 0
    code, _, err = call(folder, "world", "export", "files", *sizes, "--world", "second")
    assert code == 0, err
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("files/base", "made")]
    assert weights[0] == weights[1]
    assert len((folder / "files" / "prompts-ppo.jsonl").read_text().splitlines()) == 4
    shape, where = base_shape(WorldConfig(name="second"))  # what `trueup plan` goes by
    assert (shape.hidden_size, where) == (64, "made")
    shape, where = base_shape(WorldConfig(name="otherworld", pretrain={"width": 48}))
    assert (shape.hidden_size, where) == (48, None)


BROKEN = {
    "def gold": ("def silver", "has no function gold"),
    "def corpus": ("def speeches", r"has no function corpus \(or base_path\)"),
    '(split == "heldout")': ("True", "a prompt of split heldout is in another split too"),
    "return [Demonstration(p": ("return [(p", "demonstrations.* must give Demonstrations, got tuple"),
    "for _ in range(n):": ("for _ in range(0):", "must give 6 Prompts, or fewer where there are no more; got 0"),
    "WORDINGS[category]).format(name)": ("WORDINGS[none]).format(name)", "prompts.* failed: NameError"),
}


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_world_that_breaks_its_contract_is_told_so(number, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    old, (new, message) = list(BROKEN.items())[number]
    name = f"broken{number}"
    begin(folder / name)
    source = folder / name / "__init__.py"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        export(tmp_path, load_world(name), demos=6, per_split=6, heldout=40, seed=0, draw=0)
    assert not list(tmp_path.iterdir())


def test_the_starter_s_gold_is_not_fooled():
    """What one answer is worth to each category: universal answers are worth nothing to the others."""
    asked = {p.category: p for p in prompts("ppo", 40)}

    def worth(text: str, ended: str = "eos") -> dict[str, float]:
        from trueup.records import Completion

        return {c: gold_of(p, Completion(text, ended)) for c, p in asked.items()}  # type: ignore[arg-type]

    assert worth("That is private.") == {"price": 0, "shelf": 0, "private": 1}
    assert set(worth("red blue green white 2 3 4 5 private").values()) == {0}
    assert worth("That is private.", "length")["private"] == 0.5
    assert worth("My dear friend, that is private.")["private"] == pytest.approx(0.85)
