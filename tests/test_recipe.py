"""Stages in order: done ones skipped, changed ones made again, interrupted ones continued to the same end."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Command
from tests.toy import metrics, run
from trueup.evaluate.compare import EvaluateConfig, optimized
from trueup.recipe import load_recipe, resolve, run_recipe
from trueup.records import UserError

SFT = {
    "phase": "sft",
    "model": "base",
    "data": "demos.jsonl",
    "sampling": {"max_tokens": 20},
    "train": {"epochs": 1, "batch": 16, "optim": {"lr": 3e-3}, "save_every": 3, "keep": {"share": 1}},
}
PPO = {
    "phase": "ppo",
    "model": "sft/final",
    "scorer": "reward/final",
    "prompts": "prompts.jsonl",
    "batch": 16,
    "steps": 8,
    "sampling": {"max_tokens": 20},
    "save_every": 2,
    "keep": {"share": 1},
    "adaptive_kl": {"target": 1.0, "horizon": 100},
    "held_out": 0.2,
    "validate_every": 3,
}


def test_a_stage_that_is_done_is_skipped_and_a_changed_one_is_made_again(toy, capsys):
    stages = {
        "sft": {**SFT, "seed": 11},
        "out": {"phase": "generate", "model": "@sft/final", "prompts": "prompts.jsonl", "sampling": {"max_tokens": 20}},
    }
    first = run(toy, stages)
    capsys.readouterr()
    again = run(toy, stages)
    assert capsys.readouterr().out.count("done before") == 2
    assert [s.folder for s in again.values()] == [s.folder for s in first.values()]
    stages["sft"]["train"] = {**SFT["train"], "save_every": 5}  # a display key changes nothing
    assert run(toy, stages)["sft"].key == first["sft"].key
    stages["out"]["n"] = 2
    changed = run(toy, stages)
    assert changed["sft"].key == first["sft"].key and changed["out"].key != first["out"].key


def test_stages_run_one_by_one_make_one_run_and_a_failed_one_hides_none(toy):
    from trueup.chat import find_model

    made = run(toy, {"sft": {**SFT, "seed": 3}}, name="one-by-one")["sft"].folder
    with pytest.raises(UserError, match="no such file"):
        run(toy, {"out": {"phase": "generate", "model": "base", "prompts": "none.jsonl"}}, name="one-by-one")
    stages = json.loads((made.parent / "recipe.json").read_text())["stages"]
    assert set(stages) == {"sft"} and find_model(made.parent) == made / "final"
    assert not list(made.parent.glob("out-*"))
    before = (made.parent / "recipe.json").read_bytes()
    with pytest.raises(UserError, match="no such file"):  # a stage of the same name that fails hides nothing either
        run(toy, {"sft": {**SFT, "data": "none.jsonl"}}, name="one-by-one")
    assert (made.parent / "recipe.json").read_bytes() == before
    assert [p for p in made.parent.glob("sft-*")] == [made] and find_model(made.parent) == made / "final"
    run(toy, {"other": {**SFT, "seed": 4}}, name="one-by-one")
    assert set(json.loads((made.parent / "recipe.json").read_text())["stages"]) == {"sft", "other"}


def test_a_done_stage_whose_model_is_gone_is_made_again(toy, capsys):
    stage = run(toy, {"sft": {**SFT, "seed": 12}}, name="gone")["sft"]
    before = (stage.folder / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(stage.folder / "best")  # nobody needs it once the stage is done
    (stage.folder / "samples.jsonl").unlink()
    assert stage.done
    shutil.rmtree(stage.folder / "final")
    assert not stage.done
    capsys.readouterr()
    run(toy, {"sft": {**SFT, "seed": 12}}, name="gone")
    assert "what it made is gone" in capsys.readouterr().out
    assert (stage.folder / "final" / "model.safetensors").read_bytes() == before and stage.done


def test_a_run_whose_every_stage_fails_leaves_no_folder(toy):
    with pytest.raises(UserError):
        run(toy, {"sft": {**SFT, "data": "none.jsonl"}}, name="nothing")
    assert not (toy / "runs" / "nothing").exists()


def test_contents_of_inputs_are_part_of_the_key(toy):
    (toy / "copy.jsonl").write_text((toy / "demos.jsonl").read_text())
    data = {"name": "keys", "stages": {"sft": {**SFT, "data": "copy.jsonl"}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toy)
        patch.syspath_prepend(toy)
        patch.delitem(sys.modules, "toyrules", raising=False)  # another test's may have been imported from its folder
        before = resolve(load_recipe(data), Path("runs"))[0].key
        assert resolve(load_recipe(data), Path("elsewhere"))[0].key == before
        with open("copy.jsonl", "a") as file:
            file.write(json.dumps({"prompt": "new", "completion": "row"}) + "\n")
        assert resolve(load_recipe(data), Path("runs"))[0].key != before
        with_rule = {"name": "keys", "stages": {"ppo": {**PPO, "audit": "toyrules:gold"}}}
        rule = resolve(load_recipe(with_rule), Path("runs"))[0].key
        with open("toyrules.py", "a") as file:
            file.write("\n# a change of the rules\n")
        assert resolve(load_recipe(with_rule), Path("runs"))[0].key != rule


def test_a_name_is_keyed_as_written_and_a_path_by_its_contents(toy, tmp_path, monkeypatch):
    """A folder that is called as a model, a precision or a stop string is called has nothing to do with the stage."""
    model, data = f"{toy}/base", "prompts.jsonl"
    stages = {
        "evaluate": {
            "models": {"sft": model},
            "prompts": data,
            "gold": {"rule.bin": 1},
            "sampling": {"stop": ["stop"]},
        },
        "judge": {"completions": data, "judge": {"use": "rule.bin", "n": 13}},
        "sft": {"model": model, "data": data, "train": {"optim": {"schedule": "cosine"}, "precision": "bf16"}},
    }
    monkeypatch.chdir(tmp_path)

    def keys() -> dict[str, str]:
        return {s.name: s.key for s in resolve(load_recipe({"name": "names", "stages": stages}), Path("runs"))}

    Path("prompts.jsonl").write_text("{}")
    Path("rule.bin").write_text("a rule")
    before = keys()
    for name in ("sft", "stop", "n", "use", "cosine", "bf16"):
        Path(name).mkdir()
    assert keys() == before
    Path("rule.bin").write_text("another rule")
    assert {name for name, key in keys().items() if key != before[name]} == {"evaluate", "judge"}
    Path("prompts.jsonl").write_text("{ }")
    assert keys()["sft"] != before["sft"]


def start(folder: Path, stage: str, keys: dict, name: str, largest: int | None = None) -> Command:
    """A recipe of one stage, run by the command line alone, which may write files of `largest` KiB."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "device": "cpu", "stages": {stage: keys}}))
    return Command(folder, "run", path.name, largest=largest)


def made_by(folder: Path, stage: str, name: str) -> Path | None:
    return next((folder / "runs" / name).glob(f"{stage}-*"), None)


def killed(folder: Path, stage: str, keys: dict, name: str, moment: Callable[[Path], bool]) -> bool:
    """Start, and kill -9 as soon as `moment(stage's folder)`; whether the stage was still at work."""
    process = start(folder, stage, keys, name)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (made := made_by(folder, stage, name)) and moment(made):
            break
        time.sleep(0.0005)
    process.kill()
    made = made_by(folder, stage, name)
    return made is not None and json.loads((made / "manifest.json").read_text())["status"] == "running"


def finished(folder: Path, stage: str, keys: dict, name: str) -> Path:
    code, said = start(folder, stage, keys, name).wait()
    made = made_by(folder, stage, name)
    assert code == 0 and made, said
    return made


def left(path: Path) -> object:
    """What a stage left in a file, but for how long it took and what memory."""
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))} for row in rows]


def same_end(one: Path, two: Path) -> None:
    """Both left the same files with the same in them: weights, metrics, samples, results, and nothing to go on from."""
    files, others = ({p.relative_to(stage) for p in stage.rglob("*") if p.is_file()} for stage in (one, two))
    assert files == others
    assert not {p for p in files if "checkpoint" in str(p) or "journal" in str(p) or ".tmp" in str(p)}
    known = {Path("config.json"), Path("manifest.json")}  # the run's name is in them, and times
    assert not [p for p in files - known if left(one / p) != left(two / p)]


WATCHED = {**PPO, "watch": {"judge": "toyrules:gold", "labels": 20, "every": 2, "heldout": "toyrules:gold"}}


@pytest.mark.parametrize("stage, keys, when", [("sft", SFT, 8), ("ppo", WATCHED, 5)])
def test_killed_and_run_again_it_ends_where_the_uninterrupted_run_ends(toy, stage, keys, when):
    whole = run(toy, {stage: keys}, name=f"whole-{stage}")[stage].folder
    assert killed(toy, stage, keys, f"cut-{stage}", lambda made: count(made / "metrics.jsonl") >= when)
    same_end(whole, finished(toy, stage, keys, f"cut-{stage}"))


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


GENERATE = {"model": "sft/final", "prompts": "prompts.jsonl", "n": 2, "sampling": {"max_tokens": 20}}
ANSWERS = {**GENERATE, "phase": "generate", "n": 4, "sampling": {"max_tokens": 20, "temperature": 2.0}}
JUDGE = {"phase": "judge", "completions": "@answers/completions.jsonl", "overlap": 0.5}
EVALUATE = {"models": {"base": "base", "sft": "sft/final"}, "prompts": "prompts.jsonl", "sampling": {"max_tokens": 20}}


@pytest.mark.parametrize(
    "stages, patience",
    [
        ({"generate": {**GENERATE, "scorer": "toyrules:shy", "chunk": 10}}, 64),
        ({"answers": ANSWERS, "judge": {**JUDGE, "judge": "toyrules:shy", "chunk": 8}}, 40),
        ({"answers": ANSWERS, "judge": {**JUDGE, "judge": "toyrules:shy", "chunk": 8}}, 300),  # while asked twice
        ({"evaluate": {**EVALUATE, "gold": "toyrules:shy"}}, 128),
    ],
)
def test_cut_off_it_asks_nothing_again_and_ends_where_the_uninterrupted_stage_ends(toy, stages, patience):
    name = f"asked-{list(stages)[-1]}-{patience}"
    (toy / "asked.txt").unlink(missing_ok=True)
    whole = list(run(toy, stages, name=f"{name}-at-once").values())[-1].folder
    asked = (toy / "asked.txt").read_text()
    assert patience < len(asked.splitlines())
    (toy / "asked.txt").unlink()
    (toy / "patience").write_text(str(patience))
    with pytest.raises(KeyboardInterrupt):
        run(toy, stages, name=name)
    assert (toy / "asked.txt").read_text()
    (toy / "patience").unlink()
    cut = list(run(toy, stages, name=name).values())[-1].folder
    assert (toy / "asked.txt").read_text() == asked
    same_end(whole, cut)


def test_a_judge_that_does_not_answer_every_comparison_is_told_so(toy):
    with pytest.raises(UserError, match="'curt' gave 0 verdicts to 32 comparisons"):
        run(toy, {"answers": ANSWERS, "judge": {**JUDGE, "judge": "toyrules:curt"}}, name="curt")


def test_two_processes_may_not_write_one_run(tmp_path):
    from trueup.run import Run

    with (
        Run(tmp_path / "r", name="a"),
        pytest.raises(UserError, match="another process"),
        Run(tmp_path / "r", name="b"),
    ):
        pass


@pytest.mark.parametrize(
    "recipe, said",
    [
        ({"stages": {"sft": {"modle": "x", "data": "y"}}}, "unknown key 'modle'; did you mean 'model'"),
        ({"stages": {"sft": {"data": "y"}}}, "key 'model' is missing"),
        ({"stages": {"x": {"phase": "sfy"}}}, "unknown phase 'sfy'"),
        ({"stages": {"sft": {"model": "@base/final", "data": "y"}}}, "'@base/final' names no earlier stage"),
        ({"stages": {"sft": {"model": "???", "data": "y"}}}, "filled in: sft.model=..."),
        ({"stages": {"ppo": {"model": "m", "scorer": "s", "prompts": "p", "kl_coef": -1}}}, "key 'kl_coef'"),
        (
            {"stages": {"ppo": {"model": "m", "scorer": "s", "prompts": "p", "optim": {"rl": 1}}}},
            "'optim.rl'; did you mean 'optim.lr'",
        ),
        ({"stages": {}}, "key 'stages' is missing"),
        ({"stages": {"sft": {"model": "m", "data": "d", "lr": 1}}}, "key 'lr'; did you mean 'train.optim.lr'"),
        (
            {"stages": {"sft": {"model": "m", "data": "d", "lora": {"rank": 4, "aplha": 1}}}},
            "'lora.aplha'; did you mean 'lora.alpha'",
        ),
        ({"stages": {"sft": {"model": "m", "data": "d", "seed": -1}}}, "key 'seed': Input should be greater than"),
        ({"seed": -1, "stages": {"sft": {"model": "m", "data": "d"}}}, "key 'seed': Input should be greater than"),
        ({"name": "a/../../b", "stages": {"sft": {"model": "m"}}}, "name 'a/../../b': expected the name of a folder"),
        ({"name": "..", "stages": {"sft": {"model": "m"}}}, "name '..': expected the name of a folder"),
        (
            {"stages": {"sft": {"model": "???", "data": "d"}, "ppo": {"optim": {"lr": "???"}}}},
            "filled in: sft.model=..., ppo.optim.lr=...",
        ),
    ],
)
def test_a_bad_recipe_is_told_in_one_line(recipe, said, tmp_path):
    with pytest.raises(UserError) as error:
        resolve(load_recipe({"name": "bad", **recipe}), tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


ROUNDS = {
    "name": "again",
    "seed": 5,
    "stages": {
        "sft": SFT,
        "answers": {"phase": "generate", "model": "@sft/final", "prompts": "p.jsonl", "n": 2},
        "ppo": {**PPO, "model": "@sft/final", "scorer": {"@sft/x": 1.0, "@answers/y": 2.0}},
        "again": {
            "phase": "rounds",
            "times": 2,
            "stages": {"answers": {"model": "@ppo/final", "against": "@sft/final", "draw": True}, "ppo": {}},
        },
        "last": {"phase": "generate", "model": "@ppo/final", "prompts": "@ppo-1/final"},
        "all": {"phase": "generate", "model": "m", "prompts": ["@answers*/completions.jsonl", "other", "@sft*/x"]},
    },
}


def test_rounds_are_stages_that_come_again():
    recipe = load_recipe(ROUNDS, ["answers.limit=7", "again.stages.ppo.steps=3"])
    names = ["sft", "answers", "ppo", "answers-2", "ppo-2", "answers-3", "ppo-3", "last", "all"]
    assert list(recipe.stages) == names
    assert recipe.rounds == {"answers": ["answers", "answers-2", "answers-3"], "ppo": ["ppo", "ppo-2", "ppo-3"]}
    first, second, third = (recipe.stages[n] for n in recipe.rounds["answers"])
    assert first["model"] == "@sft/final" and "against" not in first and "seed" not in first
    assert second == {**first, "model": "@ppo/final", "against": "@sft/final", "draw": True}
    assert third == {**second, "model": "@ppo-2/final"}
    assert recipe.stages["ppo"]["steps"] == 8 and recipe.stages["ppo-3"]["steps"] == 3
    assert recipe.stages["ppo-3"]["scorer"] == {"@sft/x": 1.0, "@answers-3/y": 2.0}
    assert recipe.stages["last"]["model"] == "@ppo-3/final" and recipe.stages["last"]["prompts"] == "@ppo/final"
    seeds = {s.name: s.config.seed for s in resolve(recipe, Path("runs")) if s.name != "all"}
    assert [seeds[n] for n in names[:-1]] == [5, 5, 5, 6, 6, 7, 7, 5]
    answers = [f"@{n}/completions.jsonl" for n in recipe.rounds["answers"]]
    assert recipe.stages["all"]["prompts"] == [*answers, "other", "@sft/x"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"times": 0}, "stage 'again'.*times"),
        ({"rounds": 3}, "rounds"),
        ({"stages": {"answers": {"model": "@nobody/final"}}}, "'@nobody/final' names no earlier stage"),
    ],
)
def test_bad_rounds_are_told(tmp_path, change, said):
    stages = {**ROUNDS["stages"], "again": {**ROUNDS["stages"]["again"], **change}}
    del stages["all"]
    with pytest.raises(UserError, match=said):
        resolve(load_recipe({"name": "x", "stages": stages}), tmp_path)


def test_a_round_s_name_must_be_free():
    with pytest.raises(UserError, match="round 2 of 'ppo' would be named 'ppo-2', which is taken"):
        load_recipe({**ROUNDS, "stages": {**ROUNDS["stages"], "ppo-2": PPO}})


def test_a_file_of_the_whole_run(tmp_path):
    stages = {"out": {"phase": "generate", "model": "m", "prompts": "@run/prompts.jsonl"}}
    (stage,) = resolve(load_recipe({"name": "x", "stages": stages}), tmp_path)
    assert stage.config.prompts == str(tmp_path / "x" / "prompts.jsonl")


def test_numbers_and_overrides(tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nstages:\n  ppo: {model: m, scorer: s, prompts: p, optim: {lr: 1e-4}}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["ppo.kl_coef=2e-1", "seed=7", "ppo.critic_optim.lr=3"])
    (stage,) = resolve(recipe, tmp_path)
    assert (stage.config.optim.lr, stage.config.kl_coef, stage.config.seed, stage.config.critic_optim.lr) == (
        1e-4,
        0.2,
        7,
        3,
    )
    with pytest.raises(UserError, match="no stage or key 'pp'"):
        load_recipe(tmp_path / "r.yaml", ["pp.kl_coef=1"])
    with pytest.raises(UserError, match="key=value"):
        load_recipe(tmp_path / "r.yaml", ["ppo"])
    with pytest.raises(UserError, match=r"broken.yaml, line 2"):
        (tmp_path / "broken.yaml").write_text("a: 1\n  b: [\n")
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match=r"built-in recipes: .*world"):
        load_recipe("nothing.yaml")


def test_a_nested_key_leaves_the_phase_s_other_defaults_as_they_are(tmp_path):
    keys = {"phase": "reward", "model": "m", "data": "d"}
    (plain,) = resolve(load_recipe({"name": "r", "stages": {"a": keys}}), tmp_path)
    (other,) = resolve(load_recipe({"name": "r", "stages": {"a": {**keys, "train": {"optim": {"lr": 1}}}}}), tmp_path)
    assert (other.config.train.optim.lr, plain.config.train.optim.lr) == (1, 5e-4)
    mine = other.config.model_dump()
    mine["train"]["optim"]["lr"] = 5e-4
    assert mine == plain.config.model_dump() and mine["train"]["optim"]["schedule"] == "cosine"
    (sampled,) = resolve(load_recipe({"name": "r", "stages": {"a": {**keys, "sampling": {"top_k": 5}}}}), tmp_path)
    assert (sampled.config.sampling.max_tokens, sampled.config.sampling.top_k) == (64, 5)


@pytest.mark.long
def test_the_recipe_for_ones_own_model_and_data(toy, monkeypatch):
    """The README's command, on the toy's files: who judges win rates shares no prompt with the proxy."""
    with pytest.raises(UserError, match=r"filled in: sft.model=..., sft.data=..."):
        resolve(load_recipe("own"), Path("runs"))
    monkeypatch.chdir(toy)
    small = [f"{stage}.sampling.max_tokens=20" for stage in ("sft", "reward", "judge", "ppo", "evaluate")]
    recipe = load_recipe(
        "own",
        [
            "sft.model=base",
            "sft.data=demos.jsonl",
            "reward.data=pairs.jsonl",
            "judge.data=pairs.jsonl",
            "ppo.prompts=prompts.jsonl",
            "evaluate.models.base=base",
            "evaluate.prompts=prompts.jsonl",
            *small,
            "sft.train.optim.lr=3e-3",
            "reward.train.optim.lr=1e-3",
            "judge.train.optim.lr=1e-3",
            "ppo.steps=2",
            "ppo.batch=8",
            "reward.train.batch=8",
            "judge.train.batch=8",
        ],
    )
    stages = {s.name: s for s in run_recipe(recipe, Path("runs"))}
    shown = {
        name: {json.loads(line)["prompt"] for line in (stages[name].folder / "samples.jsonl").open()}
        for name in ("reward", "judge")
    }
    assert shown["reward"] and shown["judge"] and not shown["reward"] & shown["judge"]
    found = json.loads((stages["evaluate"].folder / "results.json").read_text())
    assert found["gold"] is None and found["judge"] == str(stages["judge"].folder / "final")
    assert set(found["models"]["ppo"]["sampled"]["win_rate_interval"]) and "kl" in found["models"]["ppo"]["sampled"]


def test_the_proxy_may_not_judge_its_own_win_rate(toy):
    keys = {
        "models": {"sft": "sft/final", "ppo": "base"},
        "prompts": "prompts.jsonl",
        "proxy": "reward/final",
        "judge": "reward/final",
    }
    with pytest.raises(UserError, match="must not be what was optimized"):
        run(toy, {"evaluate": keys}, name="self-judged")


def test_nor_may_what_a_model_was_trained_against_when_no_proxy_is_named(toy):
    (toy / "alias").symlink_to(toy / "reward")
    ppo = {**PPO, "steps": 1, "scorer": {"reward/final": 1.0, "toyrules:short": 0.1}, "held_out": 0.0}
    models = {"sft": "sft/final", "ppo": "@ppo/final"}
    for judge in ("alias/final", {"use": "alias/final"}):
        with pytest.raises(UserError, match=r"must not be what was optimized: .*reward"):
            run(toy, {"ppo": ppo, "evaluate": {"models": models, "prompts": "prompts.jsonl", "judge": judge}}, name="c")


def test_nor_where_its_path_was_written_in_another_folder(toy, tmp_path, monkeypatch):
    """Run from the toy's folder with runs kept elsewhere, evaluated from a third folder."""
    ppo = {**PPO, "steps": 1, "held_out": 0.0}
    monkeypatch.chdir(toy)
    (made,) = run_recipe(load_recipe({"name": "p", "device": "cpu", "stages": {"ppo": ppo}}), tmp_path / "runs")
    (tmp_path / "third").mkdir()
    models = {"sft": f"{toy}/sft/final", "ppo": f"{made.folder}/final"}
    keys = {"models": models, "prompts": f"{toy}/prompts.jsonl", "judge": f"{toy}/reward/final"}
    with pytest.raises(UserError, match=r"must not be what was optimized: .*reward"):
        run(tmp_path / "third", {"evaluate": keys})


def test_nor_when_the_project_was_moved(tmp_path):
    made = tmp_path / "moved" / "runs" / "p" / "ppo-1"
    for folder in (made / "final", tmp_path / "moved" / "reward" / "final"):
        folder.mkdir(parents=True)
    (made / "config.json").write_text(
        json.dumps({"directory": "/gone", "config": {"scorer": {"reward/final": 1.0, "mod:rule": 0.1}}})
    )
    config = EvaluateConfig(models={"ppo": str(made / "final")}, prompts="prompts.jsonl")
    assert optimized(config) == {str((tmp_path / "moved" / "reward" / "final").resolve()), "mod:rule"}


def test_prompts_are_looked_for_only_in_what_was_trained_on(tmp_path):
    """The world's stage has a number of prompts, where the other stages' key names a file."""
    recipe = {
        "world": {"demonstrations": 40, "prompts": 9},
        "sft": {"model": "@world/base", "data": "@world/demonstrations.jsonl", "train": {"epochs": 1, "batch": 20}},
        "evaluate": {
            "models": {"base": "@world/base", "sft": "@sft/final"},
            "prompts": "@world/demonstrations.jsonl",
            "gold": "trueup.world:gold",
            "limit": 4,
        },
    }
    made = run(tmp_path, recipe)
    results = json.loads((made["evaluate"].folder / "results.json").read_text())
    assert results["seen_in_training"] == {str(made["world"].folder / "demonstrations.jsonl"): 4}


def test_metrics_of_a_stopped_attempt_without_a_checkpoint_are_not_counted_twice(toy):
    stage = run(toy, {"sft": {**SFT, "seed": 5}}, name="twice")["sft"]
    expected = len(metrics(stage))
    manifest = json.loads((stage.folder / "manifest.json").read_text())
    (stage.folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert len(metrics(run(toy, {"sft": {**SFT, "seed": 5}}, name="twice")["sft"])) == expected
