"""`trueup diagnose` names what is wrong with runs that are broken on purpose, each made by the code itself, and is
silent on healthy ones. Every broken run differs from the healthy one in one thing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.judges.server import Server
from tests.models_made import make_model, make_tokenizer
from tests.report.make_run import make_run
from tests.report.test_report import change
from tests.toy import QUESTIONS, RULES, constant, rows, run
from trueup.data.chat import Chat
from trueup.recipe import load_recipe, run_recipe
from trueup.records import UserError
from trueup.report import write_report
from trueup.report.diagnosis import ERROR, NOTE, Finding, diagnose
from trueup.report.read import read_run
from trueup.world import base_path

ROOT = Path(__file__).parents[2]
GOOD = ("blue", "the sky is blue.", "it is blue, please")  # lengths tell nothing of which is better
BAD = ("no", "yes please, thanks", "I am fine how are you")
RAMBLING = '''
def rambling(prompts, completions):
    """Pays for length alone."""
    return [len(c.text) / 10 for c in completions]
'''
STAGES: dict[str, dict] = {
    "sft": {
        "model": "base",
        "data": "demos.jsonl",
        "held_out": 0.15,
        "sampling": {"max_tokens": 24},
        "train": {"epochs": 8, "batch": 16, "optim": constant(3e-3)},
    },
    "reward": {
        "model": "@sft/final",
        "data": "pairs.jsonl",
        "held_out": 0.25,
        "sampling": {"max_tokens": 24},
        "normalize_samples": 128,
        "train": {"epochs": 1.5, "batch": 16, "optim": constant(1e-3)},
    },
    "ppo": {
        "model": "@sft/final",
        "scorer": "@reward/final",
        "prompts": "prompts.jsonl",
        "audit": "toyrules:gold",
        "batch": 32,
        "steps": 16,
        "kl_coef": 0.1,
        "missing_eos_samples": 64,
        "sampling": {"max_tokens": 24},
        "optim": {"lr": 1e-3},
        "critic_optim": {"lr": 1e-3},
    },
    "evaluate": {
        "models": {"sft": "@sft/final", "ppo": "@ppo/final"},
        "prompts": "heldout.jsonl",
        "gold": "toyrules:gold",
        "sampling": {"max_tokens": 24},
    },
}


def demonstrations(replies: tuple[str, ...], each: int = 6, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"prompt": q, "completion": rng.choice(replies)} for q in QUESTIONS for _ in range(each)]


def comparisons(choose=lambda rng, good, bad, category: (good, bad, 1.0), each: int = 6, **columns) -> list[dict]:
    """Pairs of a good and a bad reply; `choose` gives chosen, rejected and the gold margin."""
    rng, out = random.Random(1), []
    for i, question in enumerate(QUESTIONS * each):
        category = "ab"[i % 2]
        chosen, rejected, margin = choose(rng, rng.choice(GOOD), rng.choice(BAD), category)
        row = {"prompt": question, "chosen": chosen, "rejected": rejected, "category": category, "gold_margin": margin}
        out.append(row | columns)
    return out


@cache
def tokens(text: str) -> int:
    return len(make_tokenizer()(text)["input_ids"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with base model, data and rules, and a healthy run of all four stages, runs/healthy."""
    folder = tmp_path_factory.mktemp("diagnose")
    make_model(folder / "base")
    rows(folder / "demos.jsonl", demonstrations(GOOD + BAD))
    rows(folder / "pairs.jsonl", comparisons())
    rows(folder / "prompts.jsonl", [{"prompt": q, "category": "ab"[i % 2]} for i, q in enumerate(QUESTIONS)])
    rows(folder / "heldout.jsonl", [{"prompt": f"what is the colour of {a}{b}?"} for a in "0123" for b in "abcdefgh"])
    (folder / "toyrules.py").write_text(RULES)
    (folder / "ramblingrules.py").write_text(RAMBLING)  # toyrules may have been imported from another folder
    run(folder, STAGES, name="healthy")
    return folder


def broken(
    place: Path, name: str, upto: str, *, fails: type[BaseException] | None = None, **keys: dict
) -> list[Finding]:
    """The healthy recipe as far as stage `upto` with other `keys`; stages before it that are unchanged are not made
    again."""
    before = [p for stage in ("sft", "reward") for p in (place / "runs/healthy").glob(f"{stage}-*") if upto != stage]
    for stage in before:
        shutil.copytree(stage, place / "runs" / name / stage.name)
    names = list(STAGES)[: list(STAGES).index(upto) + 1]
    stages = {n: {**STAGES[n], **keys.get(n, {})} for n in names}
    if more := {n: k for n, k in keys.items() if n not in STAGES}:  # before the last one
        stages = {**{n: stages[n] for n in names[:-1]}, **more, upto: stages[upto]}
    if fails:
        with pytest.raises(fails):
            run(place, stages, name=name)
    else:
        run(place, stages, name=name)
    return diagnose(read_run(place / "runs" / name))


def top(found: list[Finding]) -> tuple[str, str]:
    """Stage and name of the first finding."""
    return found[0].stage, found[0].name


def training(**keys) -> dict:
    return {**STAGES["sft"]["train"], **keys}


def test_a_healthy_run_is_left_in_peace(place):
    found = diagnose(read_run(place / "runs/healthy"))
    assert not [f for f in found if f.severity != NOTE], found


# SFT


def test_an_end_token_that_was_never_trained(place, monkeypatch):
    """The mask of `ids != pad` where pad is the end token: the classic way to lose it."""
    encode = Chat.encode

    def without_end(self, demonstration):
        encoded = encode(self, demonstration)
        encoded.mask = [m and i != self.end_id for i, m in zip(encoded.ids, encoded.mask, strict=True)]
        return encoded

    monkeypatch.setattr(Chat, "encode", without_end)
    assert top(broken(place, "no-end", "sft")) == ("sft", "no-end")


def test_a_rate_that_is_far_too_high(place):
    found = broken(place, "diverged", "sft", sft={"train": training(optim=constant(1.0))})
    assert top(found) == ("sft", "diverged") and "sft.train.optim.lr=0.1" in found[0].change


def test_a_rate_that_is_far_too_low(place):
    assert top(broken(place, "slow", "sft", sft={"train": training(optim=constant(1e-6))})) == ("sft", "undertrained")


def test_a_rate_beyond_all_numbers(place):
    keys = {"train": training(optim={**constant(1e30), "clip_norm": 0})}
    found = broken(place, "infinite", "sft", fails=UserError, sft=keys)
    assert top(found) == ("sft", "not-finite")


def test_demonstrations_learned_by_heart(place):
    rng = random.Random(3)
    own = [{"prompt": q, "completion": "".join(rng.choices("abcdefgh", k=6))} for q in QUESTIONS[::6]]
    rows(place / "own.jsonl", own)
    keys = {"data": "own.jsonl", "held_out": 0.3, "train": training(epochs=200, validate_every=10)}
    assert top(broken(place, "heart", "sft", sft=keys)) == ("sft", "memorized")
    nothing_held_out = broken(place, "heart-blind", "sft", sft={**keys, "held_out": 0})
    assert top(nothing_held_out) == ("sft", "memorized")


def test_demonstrations_that_hold_whole_dialogues(place):
    talk = tuple(f"{reply}\nUser: and you?\nAssistant: {reply}" for reply in GOOD)
    rows(place / "talk.jsonl", demonstrations(talk))
    found = broken(place, "talk", "sft", sft={"data": "talk.jsonl", "sampling": {"max_tokens": 60}})
    assert top(found) == ("sft", "speaks-for-user")


def test_a_limit_below_the_demonstrations_own_length(place):
    found = broken(place, "limit", "sft", sft={"sampling": {"max_tokens": 4}})
    assert top(found) == ("sft", "max-tokens") and "sft.sampling.max_tokens" in found[0].change


# the reward model


@pytest.mark.parametrize(
    "name, choose, finding",
    [
        ("flipped", lambda rng, good, bad, _: (bad, good, -1.0), "labels-reversed"),
        ("shuffled", lambda rng, good, bad, _: rng.choice([(good, bad, 1.0), (bad, good, -1.0)]), "chance"),
        ("longer", lambda rng, good, bad, _: (*sorted([good, bad], key=tokens)[::-1], 0.0), "length-only"),
        (
            "blind",
            lambda rng, good, bad, c: (good, bad, 1.0) if c == "a" or rng.random() < 0.5 else (bad, good, -1.0),
            "blind-category",
        ),
    ],
)
def test_labels_that_teach_the_wrong_thing(place, name, choose, finding):
    rows(place / f"{name}.jsonl", comparisons(choose))
    found = broken(place, name, "reward", reward={"data": f"{name}.jsonl"})
    assert top(found) == ("reward", finding)


def test_comparisons_of_cut_replies(place):
    rows(place / "cut.jsonl", comparisons(chosen_ended=False, rejected_ended=False))
    found = broken(place, "cut", "reward", reward={"data": "cut.jsonl"})
    assert top(found) == ("reward", "no-end-token") and found[0].severity == ERROR


def test_pairs_of_equal_replies(place):
    rows(place / "equal.jsonl", comparisons() + comparisons(lambda rng, good, bad, _: (good, good, 0.0), each=2))
    assert top(broken(place, "equal", "reward", reward={"data": "equal.jsonl"})) == ("reward", "identical-pairs")


@pytest.mark.long
def test_noise_learned_by_heart_is_overconfident(place):
    noisy = comparisons(lambda rng, g, b, _: (g, b, 1.0) if rng.random() < 0.75 else (b, g, -1.0), each=3)
    rows(place / "noise.jsonl", noisy)
    train = {"epochs": 40, "batch": 16, "validate_every": 5, "optim": constant(6e-3)}
    found = broken(place, "noise", "reward", reward={"data": "noise.jsonl", "train": train})
    assert top(found) == ("reward", "memorized")


# answers mended and compared by a model


def test_revisions_and_verdicts_that_are_lost(place):
    """Revisions of so few tokens are cut; a server that says nothing of use is not read."""
    told = {"model": str(base_path()), "prompts": "demos.jsonl", "limit": 24}
    server = Server(base_path())
    server.answers = ["(A)", "(B)"] * 12 + ["Hm."] * 200
    asked = {"endpoint": server.url, "model": "x", "parallel": 1, "cache": str(place / "cache.sqlite")}
    stages = {
        "critique": {**told, "constitution": "default", "by": {"model": str(base_path())}, "max_tokens": 4},
        "feedback": {"phase": "ai-feedback", **told, "constitution": "default", "by": asked},
    }
    run(place, stages, name="lost")
    server.stop()
    [once] = json.loads(next((place / "runs/lost").glob("critique-*/results.json")).read_text())["rounds"]
    assert once["too_long"] == once["unusable"] == 24  # the default constitution's examples alone fill 512 tokens
    found = [f for f in diagnose(read_run(place / "runs" / "lost")) if f.severity != NOTE]
    assert [(f.stage, f.name) for f in found] == [("critique", "revisions-lost"), ("feedback", "unreadable")]


COIN = """
from trueup.records import Verdict

class Coin:
    name = "coin"
    def judge(self, comparisons):
        return [Verdict(0.9 if sum(map(ord, c.prompt.text)) % 2 else 0.1, "coin") for c in comparisons]

def coin():
    return Coin()
"""


def test_a_router_that_leaves_its_labels_to_a_coin_or_to_a_judge_that_nobody_knows(place):
    (place / "coins.py").write_text(COIN)
    pairs = [(f"{q} {i}", good, bad) for q in QUESTIONS for i, (good, bad) in enumerate(zip(GOOD, BAD, strict=True))]
    answered = [
        {"prompt": [{"role": "user", "content": q}], "completions": [{"text": t, "stop": "eos"} for t in texts]}
        for q, *texts in pairs
    ]
    rows(place / "answers.jsonl", answered)
    route = {"phase": "route", "completions": "answers.jsonl", "people": "toyrules:gold", "overlap": 0, "how": "random"}
    n, coin, good = len(pairs), {"use": "coins:coin"}, "toyrules:gold"
    run(place, {"route": {**route, "judge": coin, "budget": n // 3, "audit": 0.3}}, name="coin")
    run(place, {"route": {**route, "judge": coin, "budget": n // 3, "audit": 15 / n}}, name="unknown")
    run(place, {"route": {**route, "judge": good, "budget": n // 3, "audit": 0.3}}, name="known")
    run(place, {"route": {**route, "judge": coin, "budget": n, "audit": 0.3}}, name="unused")
    found = {name: diagnose(read_run(place / "runs" / name)) for name in ("coin", "unknown", "known", "unused")}
    assert {name: [f.name for f in of] for name, of in found.items()} == {
        "coin": ["judge-chance"],
        "unknown": ["small-audit"],
        "known": [],
        "unused": [],
    }


# PPO


def test_a_flawed_scorer_without_a_penalty(place):
    keys = {"scorer": "toyrules:short", "kl_coef": 0.0, "steps": 30, "optim": {"lr": 2e-3}}
    found = broken(place, "hacked", "ppo", ppo=keys)
    assert top(found) == ("ppo", "hacking") and "ppo.kl_coef=" in found[0].change


@pytest.mark.long
def test_drift_is_a_warning_where_nobody_audits(place):
    keys = {"scorer": "ramblingrules:rambling", "kl_coef": 0.0, "steps": 30, "optim": {"lr": 2e-3}, "audit": None}
    found = broken(place, "drift", "ppo", ppo=keys)
    assert {f.name for f in found if f.severity != NOTE} >= {"kl-far", "length"}


@pytest.mark.parametrize(
    "name, keys, finding, key",
    [
        ("still", {"optim": {"lr": 1e-9}}, "no-updates", "ppo.optim.lr"),
        ("held", {"kl_coef": 50.0}, "held-still", "ppo.kl_coef"),
        ("rough", {"optim": {"lr": 0.1}}, "updates-too-large", "ppo.optim.lr"),
        ("critic", {"scorer": "toyrules:gold", "critic_optim": {"lr": 1e-9}}, "critic", "ppo.critic_optim.lr"),
        pytest.param(
            "endless",
            {"missing_eos_score": 5.0, "steps": 30},
            "stops-ending",
            "ppo.missing_eos_score",
            marks=pytest.mark.long,
        ),
        ("short", {"sampling": {"max_tokens": 4}}, "max-tokens", "ppo.sampling.max_tokens"),
        ("proxy", {"audit": "@reward/final"}, "audit-is-proxy", "ppo.audit"),
    ],
)
def test_ppo_with_one_wrong_key(place, name, keys, finding, key):
    found = broken(place, name, "ppo", ppo=keys)
    assert top(found) == ("ppo", finding), found
    assert key in found[0].change


@pytest.mark.long
def test_another_template_than_that_of_sft(place):
    other = place / "retemplated"
    shutil.copytree(next((place / "runs/healthy").glob("sft-*")) / "final", other)
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert top(broken(place, "template", "ppo", ppo={"model": "retemplated"})) == ("ppo", "template")


def test_a_reward_model_that_does_not_know_the_answers(place):
    """Normalized on the answers of another model, which it likes less."""
    other = place / "elsewhere"
    shutil.copytree(next((place / "runs/healthy").glob("reward-*")) / "final", other)
    config = json.loads((other / "config.json").read_text())
    config["trueup"]["score_mean"] -= 3 * config["trueup"]["score_std"]
    (other / "config.json").write_text(json.dumps(config))
    found = broken(place, "offset", "ppo", ppo={"scorer": "elsewhere", "steps": 1})
    assert top(found) == ("ppo", "score-offset")


@pytest.mark.parametrize(
    "name, scorer, finding, error",
    [("meddled", "meddling", "self-check", RuntimeError), ("nan", "broken", "stopped", UserError)],
)
def test_a_stage_that_stopped_says_why(place, name, scorer, finding, error):
    sft = next((place / "runs/healthy").glob("sft-*"))
    (place / "sft").unlink(missing_ok=True)
    (place / "sft").symlink_to(sft)
    keys = {"model": "sft/final", "scorer": f"toyrules:{scorer}", "missing_eos_score": -1.0}
    assert top(broken(place, name, "ppo", fails=error, ppo=keys)) == ("ppo", finding)


# the measurement


@pytest.mark.long
def test_prompts_that_were_trained_on(place):
    some = [json.loads(line) for line in (place / "heldout.jsonl").read_text().splitlines()]
    rows(place / "leaked.jsonl", some + [{"prompt": q} for q in QUESTIONS[:20]])
    found = broken(place, "leaked", "evaluate", evaluate={"prompts": "leaked.jsonl"})
    assert top(found) == ("evaluate", "leaked") and "20 of 52" in found[0].figure and "demos.jsonl" in found[0].figure


@pytest.mark.long
def test_a_judge_from_the_proxys_own_comparisons(place):
    judge = {**STAGES["reward"], "phase": "reward", "part": [0.2, 1.0]}
    found = broken(place, "judged", "evaluate", second=judge, evaluate={"gold": None, "judge": "@second/final"})
    assert top(found) == ("evaluate", "judge-is-proxy")


# figures planted in the records of a run in which all is well: one that is amiss, and one that is just not


def late(name: str, first: float, last: float):
    """A curve that is at `first` in the first half and at `last` in the other one."""
    return lambda step: {name: first if step < 30 else last}


def validated(last: float):
    return lambda step: (
        {"validation": {9: 0.1, 19: 0.5, 29: 0.9, 39: 0.9, 49: 0.9, 59: last}[step]} if step % 10 == 9 else {}
    )


@pytest.mark.parametrize(
    "stage, finding, amiss, fine",
    [
        ("answers", "cut-answers", {"end_rate": 0.5}, {"end_rate": 0.95}),
        (  # of 2,590 pairs, 259 of them asked twice
            "comparisons",
            "abstains",
            {"dropped": {"the judge abstained": 1800}},
            {"dropped": {"the judge abstained": 1600}},
        ),
        (
            "comparisons",
            "same-answers",
            {"dropped": {"both answers the same": 1200}},
            {"dropped": {"both answers the same": 1000}},
        ),
        (  # a third of the way from chance to the ceiling is .613
            "reward",
            "below-ceiling",
            {"accuracy": 0.57, "pairs": 1000, "longer_wins": 0.5},
            {"accuracy": 0.60, "pairs": 1000, "longer_wins": 0.5},
        ),
        ("reward", "above-ceiling", {"ceiling": 0.64}, {"ceiling": 0.69}),
        ("reward", "calibration", {"calibration_error": 0.2}, {"calibration_error": 0.11}),
        ("reward", "likes-length", {"prefers_longer": 0.92}, {"prefers_longer": 0.85}),
        ("ppo", "flat-scores", late("score_std", 0.0, 1.0), late("score_std", 0.1, 1.0)),
        ("ppo", "entropy", late("entropy", 0.6, 0.18), late("entropy", 0.6, 0.22)),
        ("ppo", "entropy", late("entropy", 0.6, 0.95), late("entropy", 0.6, 0.85)),
        ("ppo", "duplicates", late("distinct", 0.9, 0.4), late("distinct", 0.9, 0.5)),
        ("ppo", "overfits-prompts", validated(0.5), validated(0.8)),
    ],
)
def test_a_figure_that_is_amiss_is_named_and_one_that_is_not_is_left_alone(tmp_path, stage, finding, amiss, fine):
    def names(folder: Path, planted) -> list[tuple[str, str]]:
        make_run(folder, hostile=False)
        path = next(folder.glob(f"{stage}-*")) / ("metrics.jsonl" if callable(planted) else "results.json")
        if callable(planted):
            log = [json.loads(line) for line in path.read_text().splitlines()]
            rows(path, [row | planted(row["step"]) for row in log])
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | planted))
        return [(f.stage, f.name) for f in diagnose(read_run(folder))]

    assert names(tmp_path / "amiss", amiss) == [(stage, finding)]
    assert names(tmp_path / "fine", fine) == []


# the command and the page


def test_the_command_prints_the_cause_and_the_key_and_knows_no_run(tmp_path):
    def ask(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trueup", "diagnose", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})

    folder = make_run(tmp_path / "own", gold=False)
    evil = "[red]m:f[/red]\x1b[31m"
    change(folder, "ppo", scorer=evil, audit=evil)
    said = ask(folder)
    assert said.returncode == 0 and "\x1b" not in said.stdout
    assert "WARNING  ppo: the audit is not independent" in said.stdout and "ppo.audit: a reward model" in said.stdout
    nowhere = ask(tmp_path / "nowhere")
    assert nowhere.returncode == 2 and "nowhere: not a run (no recipe.json here)" in nowhere.stderr


def test_the_report_shows_the_same(tmp_path):
    folder = make_run(tmp_path / "own", gold=False)
    found = diagnose(read_run(folder))
    page = write_report(folder).read_text(encoding="utf-8")
    assert found and all(f.figure in page for f in found)


def test_records_that_are_no_figures_are_no_findings(tmp_path):
    folder = make_run(tmp_path / "odd", hostile=False)
    for stage in ("sft", "comparisons", "reward", "ppo", "evaluate"):
        path = next(folder.glob(f"{stage}-*/results.json"))
        path.write_text(json.dumps({key: ["odd"] for key in json.loads(path.read_text())}))
    assert not [f for f in diagnose(read_run(folder)) if f.severity != NOTE]


def test_every_finding_is_in_the_docs():
    source = "".join(p.read_text() for p in (ROOT / "src/trueup/report/diagnosis").glob("*.py"))
    names = set(re.findall(r'^ +"([a-z]+(?:-[a-z]+)*)",$', source, re.M)) | {"labels-reversed", "labels-noisy"}
    page = (ROOT / "docs/diagnose.md").read_text()
    assert len(names) > 30
    assert not [name for name in names if f"`{name}`" not in page]


@pytest.mark.long
def test_of_the_built_in_recipe_cut_small_only_what_is_so_is_said(tmp_path):
    """1,774 comparisons are few: of the held-out pairs of lists, which the world's models see worst, 13 of 28 are
    ordered right. Nothing else is accused; of whole runs, nothing is (docs/diagnose.md)."""
    small = ["world.demonstrations=1500", "world.prompts=2400", "ppo.steps=20", "evaluate.limit=100", "device=cpu"]
    run_recipe(load_recipe("world", small), tmp_path)
    found = [f for f in diagnose(read_run(tmp_path / "world")) if f.severity != NOTE]
    assert {(f.stage, f.name) for f in found} <= {("reward", "blind-category")}, found
    assert all("“list”" in f.figure and f.figure.count("pairs in") == 1 for f in found)
