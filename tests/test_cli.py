"""The command line as a newcomer meets it: quick help, one clear line for every mistake, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueup.data.readers import read_demonstrations, read_preferences, read_prompts
from trueup.records import Completion, Preference
from trueup.world import gold_of

SRC = str(Path(__file__).parents[1] / "src")
MODEL = ("sft", "data=demos.jsonl")
PPO = ("ppo", "model=sft/final", "prompts=prompts.jsonl", "batch=8")
BAD_RULES = """
import os
from trueup.records import Scores

def falls(prompts, completions):
    return [len(c.text) / 0 for c in completions]

async def falls_later(prompts, completions):
    raise LookupError("no such\\nrow")

def trl(completions, **kwargs):
    raise RuntimeError("down")

def text(prompts, completions):
    return ["good" for _ in completions]

def nothing(prompts, completions):
    pass

def brief(prompts, completions):
    return [1.0]

def one(prompts, completions):
    return 1.0

class Object:
    name = "object"
    def score(self, prompts, completions):
        os.stat("nowhere-at-all")

class Bare:
    name = "bare"
    def score(self, prompts, completions):
        return [0.0 for _ in completions]

def unmade():
    raise ValueError("no key")

number = 3

class Judge:
    name = "judge"
    def judge(self, comparisons):
        return [c.winner for c in comparisons]

class Mute:
    name = "mute"
    def judge(self, comparisons):
        return None

class Wordy:
    name = "wordy"
    def judge(self, comparisons):
        from trueup.records import Verdict
        return [Verdict("first", "wordy") for _ in comparisons]
"""
JUDGE = ("judge", "completions=said.jsonl")
ASKED = ("prompts=prompts.jsonl", "limit=2", "sampling.max_tokens=4", "greedy=false")
BAD_JUDGES = """
from trueup.records import Verdict

class Judge:
    def __init__(self, p, name="bad"):
        self.p, self.name = p, name
    def judge(self, comparisons):
        return [Verdict(self.p, "bad") for _ in comparisons] if self.p != "brief" else []

def sure(): return Judge(2.0)
def lost(): return Judge(float("nan"))
def silent(): return Judge(None)
def brief(): return Judge("brief")
"""


def trueup(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trueup", *arguments], cwd=cwd, env=env, capture_output=True, text=True, input=stdin
    )


def test_help_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['trueup', '--help']\n"
        "import trueup.cli\n"
        "try:\n    trueup.cli.main()\nexcept SystemExit:\n    pass\n"
        "bad = {'torch', 'transformers', 'pydantic', 'plotly'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SRC}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "ppo" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["run", "none.yaml"], "none.yaml: no such recipe"),
        (["sft"], "needs keys"),
        (["sft", "model=none", "data=none.jsonl"], "none"),
        (["sft", "modle=base", "data=demos.jsonl"], "did you mean 'model'?"),
        (["sft", "model=base", "data=empty.jsonl"], "no usable rows"),
        (["sft", "model=base", "data=demos.jsonl", "max_length=2"], "more than 2 tokens"),
        (["sft", "model=reward/final", "data=demos.jsonl"], "holds a reward model"),
        (["reward", "model=base", "data=demos.jsonl"], "expected columns: prompt, chosen and rejected"),
        (["ppo", "model=base", "scorer=sft/final", "prompts=prompts.jsonl"], "a reward model is needed"),
        (["ppo", "model=base", "scorer=toyrules:nothing", "prompts=prompts.jsonl"], "has no 'nothing'"),
        (["ppo", "model=base", "scorer=nowhere:rule", "prompts=prompts.jsonl"], "no module named 'nowhere'"),
        (["evaluate", "models.a=base", "prompts=prompts.jsonl"], "baseline=sft is not among"),
        (["run", "own", "sft.model=base"], "sft.data=..., reward.data=..., judge.data=..., ppo.prompts=..., evaluate."),
        (["sft", "model=base", "data=demos.jsonl", "device=gpu"], "device 'gpu'"),
        (["report", "none"], "not a run"),
        (["export", "none"], "neither a run"),
        (["export", "base"], "no record of how it was made"),
        (["chat", "none"], "neither a run"),
        (["chat", "base", "--device", "gpu"], "device 'gpu'"),
        (["keys", "none"], "unknown phase"),
        (["judge", "completions=none.jsonl", "judge=toyrules:gold"], "no such file"),
        (["score", "completions=none.jsonl", "scorer=toyrules:gold"], "no such file"),
        (["sft", "model=reward/none", "data=demos.jsonl"], "reward/none: no such folder"),  # not asked of the Hub
        (["sft", "model=base", "data=long.jsonl"], "the model's context"),
        (["dpo", "model=sft/final", "data=none.jsonl"], "none.jsonl: no such file"),
        (["dpo", "model=sft/final", "data=empty.jsonl"], "no usable rows"),
        (["dpo", "model=sft/final", "data=pairs.jsonl", "loss=orpo"], "key 'loss'"),
        (["dpo", "model=reward/final", "data=pairs.jsonl"], "reward/final"),
        (["best-of-n", "model=sft/final", "prompts=prompts.jsonl"], "'scorer'"),
        (["best-of-n", "model=sft/final", "prompts=prompts.jsonl", "scorer=toyrules:blue", "n=1"], "'n'"),
        (["reward", "model=base", "data=pairs.jsonl", "part=[0.7,0.7]"], "no prompt falls into part 0.7 to 0.7"),
        (["generate", "model=base", "prompts=prompts.jsonl", "max_prompt=2"], "every prompt has more than 2 tokens"),
        (["ppo", "model=base", "scorer=reward/final", "prompts=prompts.jsonl", "max_prompt=2"], "(0 held out, 64 over"),
        (["judge", "completions=said.jsonl", "judge=badjudges:sure"], "p in [0, 1], or None to abstain; got 2.0"),
        (["judge", "completions=said.jsonl", "judge=badjudges:lost"], "p in [0, 1], or None to abstain; got nan"),
        (["judge", "completions=said.jsonl", "judge=badjudges:silent"], "abstained on all"),
        (["judge", "completions=said.jsonl", "judge=badjudges:brief"], "gave 0 verdicts to 1 comparisons"),
        (["evaluate", "models.sft=sft/final", "models.b=base", *ASKED, "judge=badjudges:silent"], "on every prompt"),
        (["evaluate", "models.sft=sft/final", "models.b=base", *ASKED, "judge=badjudges:brief"], "gave 0 verdicts"),
        ([*MODEL, "model=noweights"], "noweights: cannot be loaded"),
        ([*MODEL, "model=notokenizer"], "notokenizer: no tokenizer"),
        ([*MODEL, "model=base", "max_length=0"], "key 'max_length': Input should be greater than 1 (got 0)"),
        ([*MODEL, "model=base", "epochs=3"], "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ([*MODEL, "model=base", "seed=-1"], "key 'seed'"),
        ([*MODEL, "model=base", "--name", "a/../../b"], "name 'a/../../b'"),
        ([*MODEL, "model=base", "--runs", "demos.jsonl"], "demos.jsonl/sft"),
        ([*MODEL, "model=base", "--runs", "/proc/none"], "/proc/none: No such file or directory"),
        (["ppo", "model=reward/final", "scorer=reward/final", "prompts=prompts.jsonl"], "a language model is needed"),
        ([*PPO, "scorer=badrules:falls"], "'badrules:falls' failed: ZeroDivisionError: division by zero ("),
        ([*PPO, "scorer=badrules:falls"], "badrules.py, line 6)"),
        ([*PPO, "scorer=badrules:falls_later"], "failed: LookupError: no such row ("),
        ([*PPO, "scorer=badrules:trl"], "'badrules:trl' failed: RuntimeError: down ("),
        ([*PPO, "scorer=badrules:text"], "'badrules:text' must return 256 numbers, got str among them"),
        ([*PPO, "scorer=badrules:nothing"], "'badrules:nothing' must return 256 numbers, got NoneType"),
        ([*PPO, "scorer=badrules:brief"], "must return 256 finite numbers (None where it does not apply), got 1 of"),
        ([*PPO, "scorer=badrules:one"], "'badrules:one' must return 256 numbers, got float"),
        ([*PPO, "scorer=badrules:Object"], "'badrules:Object' failed: FileNotFoundError: "),
        ([*PPO, "scorer=badrules:Bare"], "'badrules:Bare' must return Scores, got list"),
        ([*PPO, "scorer=badrules:unmade"], "'badrules:unmade' failed: ValueError: no key ("),
        ([*PPO, "scorer=badrules:number"], "'badrules:number' is no function, but int"),
        ([*PPO, "scorer=halfrules:blue"], "the import of 'halfrules' failed: SyntaxError: "),
        ([*PPO, "scorer=halfrules:blue"], "halfrules.py, line 1)"),
        ([*JUDGE, "judge=badrules:Judge"], "judge 'judge' failed: AttributeError: "),
        ([*JUDGE, "judge=badrules:Mute"], "judge 'mute' must give a list of Verdicts, got NoneType"),
        ([*JUDGE, "judge=badrules:Wordy"], "p in [0, 1], or None to abstain; got 'first'"),
        ([*JUDGE, "judge=badrules:unmade"], "judge 'badrules:unmade' failed: ValueError: no key ("),
        ([*JUDGE, "judge.name=x"], "key 'use' must name a function"),
        (["judge", "completions=demos.jsonl", "judge=toyrules:gold"], "demos.jsonl, line 1: no column 'completions'"),
        (["score", "completions=demos.jsonl", "scorer=toyrules:gold"], "demos.jsonl, line 1: no column 'completions'"),
        (
            ["score", "completions=odd.jsonl", "scorer=toyrules:gold"],
            "odd.jsonl, line 1: column 'completions' holds no",
        ),
        (["score", "completions=toyrules.py", "scorer=toyrules:gold"], "toyrules.py: unknown kind of file"),
    ],
)
def test_mistakes_are_told_in_one_line(toy, call, arguments, said):
    (toy / "empty.jsonl").write_text("")
    (toy / "long.jsonl").write_text(json.dumps({"prompt": "why? " * 3000, "completion": "so"}) + "\n")
    (toy / "badjudges.py").write_text(BAD_JUDGES)
    (toy / "badrules.py").write_text(BAD_RULES)
    (toy / "halfrules.py").write_text("def blue(:\n")
    (toy / "odd.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "so?"}], "completions": ["a"]}) + "\n"
    )
    for name, lacks in (("noweights", "model.safetensors"), ("notokenizer", "tokenizer")):
        shutil.copytree(toy / "base", toy / name, ignore=shutil.ignore_patterns(f"{lacks}*"), dirs_exist_ok=True)
    there = set(toy.glob("runs/*/*"))
    both = [{"text": text, "stop": "eos"} for text in ("yes", "no")]
    (toy / "said.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "so?"}], "completions": both}) + "\n"
    )
    code, out, err = call(toy, *arguments)
    assert code == 2, (out, err)
    lines = [text for text in err.splitlines() if text.startswith("trueup: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err, err
    half = [p for p in set(toy.glob("runs/*/*")) - there if (p / "manifest.json").exists() and not stopped(p)]
    assert not half and not list(toy.parent.glob("b*"))


def stopped(stage: Path) -> bool:
    return json.loads((stage / "manifest.json").read_text())["status"] == "stopped"


def test_a_failed_self_check_is_told_in_one_line_and_nothing_is_made(toy, call):
    code, out, err = call(toy, "ppo", "model=sft/final", "scorer=toyrules:meddling", "prompts=prompts.jsonl", "batch=8")
    (line,) = [text for text in err.splitlines() if text.startswith("trueup: ")]
    assert code == 1 and "self-check at step 0 failed: sampler and training path agree" in line, (out, err)
    assert not list((toy / "runs" / "ppo").glob("ppo-*/final"))


def test_a_single_stage_takes_the_recipes_device(toy, call):
    keys = ["model=base", "data=demos.jsonl", "train.epochs=0.1", "sampling.max_tokens=4", "device=cpu"]
    assert call(toy, "sft", *keys, "--name", "on-cpu")[0] == 0
    recipe = json.loads((toy / "runs" / "on-cpu" / "recipe.json").read_text())["recipe"]
    assert recipe["device"] == "cpu" and "device" not in recipe["stages"]["sft"]


def test_single_stages_chain_by_files(toy, call):
    assert call(toy, "generate", "model=sft/final", "prompts=prompts.jsonl", "n=2", "sampling.max_tokens=20")[0] == 0
    made = next((toy / "runs" / "generate").glob("generate-*"))
    assert call(toy, "score", f"completions={made}/completions.jsonl", "scorer=reward/final")[0] == 0
    rows = [json.loads(line) for line in next((toy / "runs" / "score").glob("score-*/completions.jsonl")).open()]
    assert all(isinstance(a["score"], float) for row in rows for a in row["completions"])
    assert call(toy, "judge", f"completions={made}/completions.jsonl", "judge=reward/final")[0] == 0
    rows = [json.loads(line) for line in next((toy / "runs" / "judge").glob("judge-*/comparisons.jsonl")).open()]
    clean = [row for row in rows if {row["chosen"], row["rejected"]} == {"the sky is blue.", "yes please"}]
    assert clean and all("blue" in row["chosen"] for row in clean)


def test_keys_lists_every_key_with_its_meaning(toy, call):
    _, shown, _ = call(toy, "keys", "ppo")
    assert "adaptive_kl.target = 6.0" in shown and "keep.last = 1" in shown
    assert "kl_coef" in shown and "sampling.temperature" in shown and "Completions a step." in shown
    _, shown, _ = call(toy, "keys", "sft")
    assert "lora = None" in shown and "lora.r = " in shown  # of a part that is off by default, too
    assert "model = required" in shown and "train.optim.schedule = 'cosine'" in shown  # the phase's, not Optim's


def test_chat_answers_and_can_show_two_models(toy, call):
    said = "what is the colour of aa?\n/new\nwhat is the colour of bb?\n\n"
    keys = ["--beside", "base", "--temperature", "0", "--max-tokens", "20"]
    code, out, err = call(toy, "chat", "sft", *keys, stdin=said)
    assert code == 0, err
    assert out.count("blue") + out.count("yes please") >= 2
    assert "sft" in out and "base" in out


@pytest.mark.long
def test_help_is_quick(tmp_path):
    """Not a benchmark: a torch import alone takes longer than this."""
    best = min(_timed(tmp_path) for _ in range(3))
    assert best < 1.0


def _timed(folder: Path) -> float:
    began = time.monotonic()
    assert trueup("--help", cwd=folder).returncode == 0
    return time.monotonic() - began


def test_the_world_is_exported_in_the_sizes_that_are_asked_for(tmp_path, call):
    sizes = ["--demonstrations", "30", "--prompts", "20", "--heldout", "10"]
    code, out, err = call(tmp_path, "world", "export", "mine", *sizes)
    assert code == 0, err
    assert len(read_demonstrations("mine/demonstrations.jsonl").records) == 30
    assert len(read_prompts("mine/prompts-ppo.jsonl").records) == 20
    assert len(read_prompts("mine/prompts-heldout.jsonl").records) == 10
    pairs = read_preferences("mine/comparisons.jsonl").records
    assert 1500 < len(pairs) < 3000 and f"comparisons.jsonl: {len(pairs)} rows" in out
    assert all(p.chosen.text != p.rejected.text and p.rater.startswith("pool-") for p in pairs)
    gaps = [core(p, p.chosen) - core(p, p.rejected) for p in pairs]
    assert sum(gap > 0 for gap in gaps) > 2 * sum(gap < 0 for gap in gaps)  # the raters are people, not coins
    assert (tmp_path / "mine" / "base" / "model.safetensors").exists()


def core(p: Preference, answer: Completion) -> float:
    return gold_of(p.prompt.text, answer.text, answer.ended).core


def test_the_world_is_not_exported_over_somebody_s_files(tmp_path, call):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "demonstrations.jsonl").write_text("my own\n")
    code, _, err = call(tmp_path, "world", "export", "mine")
    assert code == 2 and "not empty" in err
    assert (tmp_path / "mine" / "demonstrations.jsonl").read_text() == "my own\n"


def test_what_a_user_named_is_shown_as_it_is(toy, call, monkeypatch):
    """Neither an emoji nor markup: a folder's name is its name."""
    keys = ["model=base", "data=demos.jsonl", "train.epochs=0.1", "sampling.max_tokens=4", "device=cpu"]
    name = "a:smile:[red]b[bold]"
    assert call(toy, "sft", *keys, "--name", name)[0] == 0
    code, out, err = call(toy, "sft", *keys, "--name", name)
    assert code == 0 and f"runs/{name}/sft-" in out.split("done before")[1], (out, err)
    assert f"report: runs/{name}/report.html" in out


def test_ctrl_c_says_how_to_go_on(toy):
    env = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    keys = ["sft", "--name", "stopped", "model=base", "data=demos.jsonl", "train.epochs=50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trueup", *keys],
        cwd=toy,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's job may ignore it
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((toy / "runs" / "stopped").glob("sft-*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stopped; the same command goes on" in err and b"Traceback" not in err


@pytest.mark.long
def test_the_world_is_built_by_one_command(tmp_path, call):
    code, out, err = call(tmp_path, "world", "build", "--out", "made", "--tokens", "12000")
    assert code == 0, err
    assert json.loads(out[out.index("{") :])["config"]["schedules"][0]["mixes"][0][1] < 12_000
    assert {"model.safetensors", "tokenizer.json", "build.json"} <= {p.name for p in (tmp_path / "made").iterdir()}
