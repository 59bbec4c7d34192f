"""`trueup init`: what it says of the data, what it writes, and that what it writes runs."""

from __future__ import annotations

import json

import pytest
import yaml

from trueup.recipe import load_recipe, resolve

FILES = ["--demonstrations", "demos.jsonl", "--comparisons", "pairs.jsonl", "--prompts", "prompts.jsonl"]


@pytest.mark.long
def test_what_it_writes_runs_unchanged(toy, call):
    code, out, err = call(toy, "init", "mine.yaml", "--model", "base", *FILES)
    assert code == 0, err
    assert "demos.jsonl: 512 rows of demonstrations from columns prompt, completion; 64 prompts; replies of" in out
    assert "pairs.jsonl: 128 rows of comparisons from columns prompt, chosen, rejected, category, gold_margin" in out
    assert "wrote mine.yaml: sft -> reward -> judge -> ppo -> evaluate" in out and "next: trueup run mine.yaml" in out
    text = (toy / "mine.yaml").read_text()
    assert "# demos.jsonl: 512 rows" in text and "a context of 512 tokens" in text and "\n\n\n" not in text
    stages = yaml.safe_load(text)["stages"]
    assert stages["sft"]["sampling"]["max_tokens"] == 16 and stages["sft"]["max_length"] == 64  # by the data's lengths
    assert stages["sft"]["train"]["optim"]["lr"] == 3e-4  # a small model
    assert stages["ppo"]["prompts"] == "prompts.jsonl" and stages["evaluate"]["judge"] == "@judge/final"
    code, out, err = call(toy, "run", "mine.yaml")
    assert code == 0, err
    assert "5/5 evaluate" in out and "report: runs/mine/report.html" in out
    found = json.loads(next((toy / "runs" / "mine").glob("evaluate-*/results.json")).read_text())
    assert set(found["models"]) == {"base", "sft", "ppo"} and found["judge"]


@pytest.mark.parametrize(
    "files, stages",
    [
        (FILES[:2], {"sft", "evaluate"}),
        (FILES[2:4], {"reward", "judge", "ppo", "evaluate"}),
        (["--comparisons", "few.jsonl", "--heldout", "prompts.jsonl"], {"reward", "ppo", "evaluate"}),
    ],
)
def test_stages_are_those_that_there_is_data_for(toy, tmp_path, monkeypatch, call, files, stages):
    (toy / "few.jsonl").write_text("".join((toy / "pairs.jsonl").read_text().splitlines(keepends=True)[:8]))
    out = tmp_path / "made.yaml"
    code, _, err = call(toy, "init", str(out), "--model", "base", *files, "--name", 'with "quotes": yes')
    assert code == 0, err
    recipe = load_recipe(out)
    assert set(recipe.stages) == stages and recipe.name == 'with "quotes": yes'
    assert {s.name for s in resolve(recipe, tmp_path)} == stages
    assert recipe.stages["evaluate"]["baseline"] in recipe.stages["evaluate"]["models"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["there.yaml", "--model", "base", *FILES], "there.yaml: is there already, and is left as it is"),
        (["new.yaml", *FILES], "--model"),
        (["new.yaml", "--model", "none", *FILES], "none"),
        (["new.yaml", "--model", "base"], "nothing to learn from"),
        (["new.yaml", "--model", "base", "--prompts", "prompts.jsonl"], "nothing to learn from"),
        (["new.yaml", "--model", "base", "--demonstrations", "none.jsonl"], "none.jsonl: no such file"),
        (["new.yaml", "--model", "base", "--demonstrations", "prompts.jsonl"], "prompts.jsonl, line 1: found columns"),
        (["new.yaml", "--model", "base", "--comparisons", "demos.jsonl"], "demos.jsonl, line 1: found columns"),
    ],
)
def test_mistakes_write_nothing(toy, call, arguments, said):
    (toy / "there.yaml").write_text("mine")
    code, _, err = call(toy, "init", *arguments)
    (line,) = [text for text in err.splitlines() if text.startswith("trueup: ")]
    assert code == 2 and said in line, err
    assert not (toy / "new.yaml").exists() and (toy / "there.yaml").read_text() == "mine"
