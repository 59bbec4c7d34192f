"""The command line as a newcomer meets it: quick help, one clear line for every mistake, exit code 2."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueup.cli import main
from trueup.data.readers import read_demonstrations, read_preferences, read_prompts
from trueup.records import Completion, Preference
from trueup.world import gold_of

SRC = str(Path(__file__).parents[1] / "src")
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


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: call(folder, *arguments) -> (exit code, stdout, stderr)."""

    def run(folder: Path, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["trueup", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


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
        (["evaluate", "models.a=base", "prompts=prompts.jsonl"], "'sft' is not among the models"),
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
        (["reward", "model=base", "data=pairs.jsonl", "part=[0.7,0.7]"], "no prompt falls into part 0.7 to 0.7"),
        (["generate", "model=base", "prompts=prompts.jsonl", "max_prompt=2"], "every prompt has more than 2 tokens"),
        (["ppo", "model=base", "scorer=reward/final", "prompts=prompts.jsonl", "max_prompt=2"], "(0 held out, 64 over"),
        (["judge", "completions=said.jsonl", "judge=badjudges:sure"], "p in [0, 1], or None to abstain; got 2.0"),
        (["judge", "completions=said.jsonl", "judge=badjudges:lost"], "p in [0, 1], or None to abstain; got nan"),
        (["judge", "completions=said.jsonl", "judge=badjudges:silent"], "abstained on all"),
        (["judge", "completions=said.jsonl", "judge=badjudges:brief"], "gave 0 verdicts to 1 comparisons"),
        (["evaluate", "models.sft=sft/final", "models.b=base", *ASKED, "judge=badjudges:silent"], "on every prompt"),
        (["evaluate", "models.sft=sft/final", "models.b=base", *ASKED, "judge=badjudges:brief"], "gave 0 verdicts"),
    ],
)
def test_mistakes_are_told_in_one_line(toy, call, arguments, said):
    (toy / "empty.jsonl").write_text("")
    (toy / "long.jsonl").write_text(json.dumps({"prompt": "why? " * 3000, "completion": "so"}) + "\n")
    (toy / "badjudges.py").write_text(BAD_JUDGES)
    both = [{"text": text, "stop": "eos"} for text in ("yes", "no")]
    (toy / "said.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "so?"}], "completions": both}) + "\n"
    )
    code, out, err = call(toy, *arguments)
    assert code == 2, (out, err)
    lines = [text for text in err.splitlines() if text.startswith("trueup: ")]
    assert len(lines) == 1 and said in lines[0], err


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
    assert "kl_coef" in shown and "sampling.temperature" in shown and "Completions a step." in shown
    _, shown, _ = call(toy, "keys", "sft")
    assert "model = required" in shown and "train.optim.schedule = 'cosine'" in shown  # the phase's, not Optim's


def test_chat_answers_and_can_show_two_models(toy):
    done = trueup(
        "chat",
        "sft",
        "--beside",
        "base",
        "--temperature",
        "0",
        "--max-tokens",
        "20",
        cwd=toy,
        stdin="what is the colour of aa?\n/new\nwhat is the colour of bb?\n\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("blue") + done.stdout.count("yes please") >= 2
    assert "sft" in done.stdout and "base" in done.stdout


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


def test_ctrl_c_says_how_to_go_on(toy):
    env = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    keys = ["sft", "--name", "stopped", "model=base", "data=demos.jsonl", "train.epochs=50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trueup", *keys], cwd=toy, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
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
