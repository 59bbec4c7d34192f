"""A study of over-optimization on the toy: killed and run again it ends, and nothing that was done is done again."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from tests.commands import Command
from tests.report.test_browser import Visit, browser  # noqa: F401
from tests.toy import run
from trueup.recipe import load_recipe
from trueup.records import UserError
from trueup.study import compose, left, load_study, name_of, read_measured

RECIPE = {
    "name": "toy",
    "device": "cpu",
    "stages": {
        "reward": {
            "model": "sft/final",
            "data": "pairs.jsonl",
            "held_out": 0.2,
            "sampling": {"max_tokens": 12},
            "normalize_samples": 64,
            "train": {"epochs": 1, "batch": 16, "optim": {"lr": 1e-3}},
        },
        "unused": {"phase": "generate", "model": "sft/final", "prompts": "prompts.jsonl"},
        "ppo": {
            "model": "sft/final",
            "scorer": "@reward/final",
            "prompts": "prompts.jsonl",
            "batch": 16,
            "missing_eos_samples": 16,
            "sampling": {"max_tokens": 12},
            "save_every": 1,
        },
    },
}
STUDY = {
    "name": "toy-study",
    "gold": "toyrules:gold",
    "prompts": "prompts.jsonl",
    "seeds": [0, 1],
    "kl_coefs": [0, 0.25],
    "comparisons": [8],
    "flips": [0.4],
    "betas": [0.1, 1.5],
    "dpo": {"train": {"batch": 16, "optim": {"lr": 1e-3}}, "samples": 8},
    "best_of": {"prompts": 8, "samples": 16, "ns": [1, 2, 3, 4, 6, 8]},
    "versions": {"steps": [2, 4], "prompts": 8, "samples": 2},
    "gates": {"resamples": 200, "distinct": 0.05},
}


@pytest.fixture(scope="module")
def folder(toy) -> Path:
    (toy / "study-recipe.yaml").write_text(json.dumps(RECIPE))
    (toy / "study.yaml").write_text(json.dumps(STUDY))
    return toy


def start(folder: Path, *keys: str) -> Command:
    return Command(folder, "overoptimize", "study-recipe.yaml", "--study", "study.yaml", *keys)


def manifests(folder: Path) -> dict[Path, dict]:
    found = {}
    for path in (folder / "runs" / "toy-study").glob("seed-*/*/manifest.json"):
        found[path.parent] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def done(folder) -> Path:
    """The study, killed while PPO was at work and run again."""
    process = start(folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(p.name.startswith("ppo") and m["status"] == "running" for p, m in manifests(folder).items()):
            break
        time.sleep(0.01)
    process.kill()
    before = {p: m for p, m in manifests(folder).items() if m["status"] == "done"}
    assert before and len(before) < 38
    code, said = start(folder, "--jobs", "2").wait()
    assert code == 0, said
    assert f"38 stages, {len(before)} done before" in said
    after = manifests(folder)
    assert len(after) == 38 and {m["status"] for m in after.values()} == {"done"}
    assert all(after[p] == m for p, m in before.items())
    return folder / "runs" / "toy-study"


@pytest.mark.long
def test_killed_it_goes_on_and_does_nothing_again(done, folder):
    _, said = start(folder).wait()
    assert "38 stages, 38 done before" in said and "report:" in said


@pytest.mark.long
def test_a_new_seed_and_a_new_coefficient_make_only_what_is_new(folder, done):
    _, said = start(folder, "--dry-run", "seeds=[0,1,2]", "kl_coefs=[0,0.25,1]").wait()
    due = [line for line in said.splitlines() if line.startswith("due")]
    assert len([line for line in due if "seed 2" in line]) == 21
    assert sorted(line.split()[3] for line in due if "seed 0" in line) == ["ppo-kl-1", "versions-kl-1"]


@pytest.mark.long
def test_what_a_study_leaves(done):
    table = parquet.read_table(done / "data.parquet")
    data = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}
    trace = data["kind"] == "trace"
    assert set(data["condition"][trace]) == {"kl-0", "kl-0_25", "on_gold"}
    assert set(data["step"][trace]) == {0, 2, 4} and trace.sum() == 2 * 3 * 3 * 8
    first = trace & (data["step"] == 0)
    assert all(abs(k) < 1e-6 for k in data["kl"][first]) and all(k > 0 for k in data["kl"][trace & ~first])
    dpo = data["kind"] == "dpo"
    assert set(data["condition"][dpo]) == {"beta-0_1", "beta-1_5"} and set(data["step"][dpo]) == {0, 1}
    moved = dpo & (data["step"] == 1)
    assert all(abs(k) < 1e-6 for k in data["kl"][dpo & ~moved]) and all(k > 0 for k in data["kl"][moved])
    best = data["kind"] == "best_of"
    assert set(data["condition"][best]) == {"all", "comparisons-8", "flips-0_4"} and best.sum() == 2 * 3 * 6 * 8
    found = json.loads((done / "gates.json").read_text())
    assert set(found["gates"]) == {"G1", "G2", "G3", "G4", "G5", "G6"} and found["seeds"] == 2
    assert all(g["outcome"] in ("PASS", "FAIL", "INCONCLUSIVE") for g in found["gates"].values())
    assert {n: g["void"] for n, g in found["gates"].items()}["G4"] == (found["gates"]["G1"]["outcome"] != "PASS")
    seconds = [found["cost"][name]["mean"] for name in ("ppo-kl-0", "versions-kl-0", "best_of")]
    assert all(s > 0 for s in seconds)


@pytest.mark.long
def test_seeds_run_elsewhere_are_joined(done, folder, monkeypatch):
    found = {name: (done / name).read_bytes() for name in ("data.parquet", "gates.json", "curves.json")}
    _, said = start(folder, "seeds=[0]").wait()
    assert "19 stages, 19 done before" in said and json.loads((done / "gates.json").read_text())["seeds"] == 1
    apart = folder / "seed-0.parquet"
    (done / "data.parquet").rename(apart)
    _, said = start(folder, "--with", str(apart), "--dry-run").wait()
    assert [line[:12] for line in said.splitlines()] == ["done  seed 1"] * 19
    _, said = start(folder, "--with", str(apart)).wait()
    assert "19 stages, 19 done before" in said  # seed 1's
    assert {name: (done / name).read_bytes() for name in found} == found
    (folder / "broken.parquet").write_text("rows")
    for names, keys, text in (
        ([apart.name], ["versions.samples=3"], f"{apart.name}: measured with another 'versions': "),
        ([apart.name], ["seeds=[1]"], f"{apart.name}: seed 0 is not among the study's seeds [1]"),
        ([apart.name, apart.name], [], f"{apart.name}: seed 0 is in another file too"),
        (["gone.parquet"], [], "gone.parquet: no such file"),
        (["broken.parquet"], [], "broken.parquet: not what trueup overoptimize writes as data.parquet"),
    ):
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match="^" + re.escape(text)):
            read_measured([Path(n) for n in names], "study-recipe.yaml", load_study("x", Path("study.yaml"), keys))


@pytest.mark.long
def test_the_report_holds_every_chart(done):
    page = (done / "report.html").read_text()
    charts = json.loads(page.partition('id="chart-data">')[2].partition("</script>")[0].replace("\\u003c", "<"))
    wanted = {"best-of-gold_sd", "best-of-proxy_sd", "best-of-sweep"}  # 1
    wanted |= {f"ppo-{m}_sd-{axis}" for m in ("gold", "proxy") for axis in ("root", "step")}  # 2, 3
    wanted |= {"scatter-best_of", "scatter-trace", "reward-accuracy", "reward-loss"}  # 4, 5
    wanted |= {"together", "sweep-gold", "sweep-kl", "sweep-path", "lengths-length", "lengths-ended"}  # 6, 10
    assert set(charts) == wanted
    assert all(f'data-chart="{name}"' in page for name in wanted)
    assert "What they said, step by step" in page and "what is the colour of" in page


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["prompts=nothing.jsonl"], "key 'prompts': nothing.jsonl: no such file"),
        (["gold=toyrules:glod"], "'toyrules:glod': module 'toyrules' has no 'glod'"),
        (["seeds=[7]", "name=short", "best_of.ns=[1,17]"], "seed 7, stage 'best_of': "),
    ],
)
@pytest.mark.long
def test_what_is_wrong_is_told_in_one_line(folder, keys, said):
    code, text = start(folder, *keys).wait()
    assert code == 2 and text.splitlines()[-1].startswith(f"trueup: {said}")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1300, 400])
def test_the_report_opens_offline_and_draws_every_chart(done, browser, width):  # noqa: F811
    visit = Visit(browser, done / "report.html", viewport={"width": width, "height": 900})
    visit.scroll_through()
    assert visit.page.locator("[data-chart]:has(svg.main-svg)").count() == 17
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.troubles == []


@pytest.mark.long
def test_the_reward_models_of_a_sweep_share_their_held_out_pairs(done):
    stages = {p.name.rpartition("-")[0]: p for p in (done / "seed-0").iterdir() if p.is_dir()}
    found = {n: json.loads((stages[n] / "results.json").read_text()) for n in stages if n.startswith("reward")}
    assert found["reward-comparisons-8"]["rows"] == 8 < found["reward"]["rows"] == found["reward-flips-0_4"]["rows"]
    assert len({f["pairs"] for f in found.values()}) == 1


@pytest.mark.long
def test_the_last_version_is_what_ppo_ends_with_and_its_kl_is_exact(done):
    from safetensors.torch import load_file

    stages = {p.name.rpartition("-")[0]: p for p in (done / "seed-1").iterdir() if p.is_dir()}
    last, end = (load_file(stages["ppo-kl-0"] / f / "model.safetensors") for f in ("snapshots/4", "final"))
    assert last.keys() == end.keys() and all(torch.equal(last[k], end[k]) for k in last)
    rows = parquet.read_table(stages["versions-kl-0"] / "trace.parquet").to_pylist()
    kl, k1, k3 = (np.mean([r[k] for r in rows if r["step"] == 4]) for k in ("kl", "kl_k1", "kl_k3"))
    assert kl > 0.01 and abs(k3 - kl) < 0.5 * kl and abs(k1 - kl) < max(1.0, kl)
    said = [json.loads(x) for x in (stages["versions-kl-0"] / "samples.jsonl").read_text().splitlines()]
    assert {r["step"] for r in said} == {2, 4} and {"gold", "proxy", "kl", "completion"} <= said[0].keys()


def test_best_of_n_by_hand(toy):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "category": None,
            "completions": [{"text": t, "stop": "eos", "score": g} for t, g in answers],
        }
        for i, answers in enumerate(
            [[("blue", 0.1), ("no", 0.5), ("no", 0.3)], [("no", 1.0), ("no", 0.0), ("no", 0.5)]]
        )
    ]
    (toy / "scored.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = {"phase": "best_of", "completions": "scored.jsonl", "proxy": "toyrules:blue", "ns": [1, 2]}
    made = run(toy, {"best": keys}, name="by-hand")["best"].folder
    found = {(r["prompt"], r["n"]): r for r in parquet.read_table(made / "best_of.parquet").to_pylist()}
    # Of two of (blue, no, no) blue is there in 2 of 3 draws; else a no, worth .4 on average.
    assert found[0, 2]["gold"] == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.4) and found[0, 2]["proxy"] == pytest.approx(
        2 / 3
    )
    assert found[0, 1]["gold"] == pytest.approx(0.3) and found[1, 2]["gold"] == pytest.approx(0.5)
    # q is (5/9, 4/9) over blue and no, p is (1/3, 2/3); where all answers score alike nothing is chosen.
    assert found[0, 2]["kl"] == pytest.approx(5 / 9 * np.log(5 / 3) + 4 / 9 * np.log(2 / 3))
    assert found[1, 2]["kl"] == pytest.approx(0) and found[1, 2]["bound"] == pytest.approx(np.log(2) - 0.5)
    assert found[0, 2]["distinct"] == pytest.approx((1 + 2 / 3) / 2) and found[1, 2]["distinct"] == pytest.approx(0.5)
    units = json.loads((made / "results.json").read_text())["units"]["gold"]
    assert units == {
        "mean": pytest.approx(0.4),
        "std": pytest.approx(np.std([0.1, 0.5, 0.3, 1, 0, 0.5], ddof=1)),
        "n": 6,
    }
    for keys_, said in (
        ({"ns": [1, 4]}, "3 answers to a prompt; ns asks for 4"),
        ({"completions": "none"}, "no such file"),
    ):
        with pytest.raises(UserError, match=said):
            run(toy, {"best": {**keys, **keys_}}, name="by-hand")


def composed(**changes) -> list[str]:
    recipe = {**RECIPE, "stages": {**RECIPE["stages"], **changes.pop("stages", {})}}
    study = load_study("x", None, [f"{k}={json.dumps(v)}" for k, v in {**STUDY, **changes}.items()])
    return list(compose(recipe, study, 3).stages)


def test_what_is_left_is_told_by_what_the_same_stages_took():
    took = {"sft": [50.0, 70.0], "ppo": [600.0]}
    assert left(["sft", "ppo", "ppo"], took, 2) == "about 10 min left"  # (60 + 2 x 600) / 2
    assert left(["sft", "ppo", "dpo"], took, 1) == "at least 11 min left"
    assert left([], took, 2) == "about 0 min left"


def test_only_what_is_needed_is_composed():
    stages = composed()
    assert stages[0] == "reward" and "unused" not in stages and "ppo" not in stages
    assert "ppo-on_gold" not in composed(control=False)
    assert name_of("kl", 0.25) == "kl-0_25"


def test_whole_runs_are_measured_whatever_ends_the_recipes_ppo_early():
    """`constitution` watches its PPO, which ends where the alarm is set off."""
    stages = compose("constitution", load_study("world", None, []), 0).stages
    found = {name: keys for name, keys in stages.items() if keys and keys.get("phase") == "ppo"}
    assert len(found) == 4 and "watch" in load_recipe("constitution").stages["ppo"]
    for keys in found.values():
        assert not keys.keys() & {"watch", "held_out", "patience"} and keys["steps"] == 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds, kl_coefs and versions.steps each need a value"),
        ({"seeds": [1, 1]}, "key 'seeds': the same value twice"),
        ({"default": 0.5}, r"default \(0.5\) is not among kl_coefs"),
        ({"gates": {"fewer": 9}}, r"gates.fewer \(9\) is not among comparisons"),
        ({"best_of": {"ns": [2, 4]}}, "1 must be among them"),
        ({"set": {"pop": {}}}, "set.pop: no such stage"),
        ({"goldd": "x"}, "unknown key 'goldd'; did you mean 'gold'"),
        ({"ppo": "reward"}, "needs one PPO stage"),
        ({"stages": {"more": {**RECIPE["stages"]["ppo"], "phase": "ppo"}}}, "needs one PPO stage"),
        ({"stages": {"gold": {"phase": "reward"}}}, "names a stage of its own 'gold'"),
        (
            {"stages": {"ppo": {**RECIPE["stages"]["ppo"], "scorer": "toyrules:blue"}}},
            "key 'comparisons' needs a proxy",
        ),
        ({"betas": [1, 1]}, "key 'betas': the same value twice"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        composed(**changes)
