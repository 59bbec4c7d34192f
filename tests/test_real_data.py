"""Public data by the command line, as a user would: SFT on self-instruct and on GSM8K, a reward model on HH-RLHF, PPO
on HH's prompts, exports and a chat. The policy is a Qwen3, the reward model a GPT-NeoX with a tokenizer and a template
of its own, both tiny and random; what Trueup says of them is held to plain transformers in another process.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.models_real import make_real
from tests.shared import SHARED, needs_shared

SEEDS, SUMS, PAIRS = "data/self-instruct/seed_tasks.jsonl", "data/gsm8k/train.jsonl", "data/hh-rlhf/test.jsonl.gz"
ROOT = Path(__file__).parents[1]
LONGEST, PROMPT, TOKENS = 256, 160, 16  # of a pair, of a prompt to PPO, of a reply
CHAT = ["How are you?", "Why is that so?"]


def hh(transcript: str) -> list[dict]:
    """An HH transcript as messages: our own reading of it, apart from Trueup's."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    out: list[dict] = []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if out and out[-1]["role"] == role:
            out[-1]["content"] += "\n\n" + said.strip()
        else:
            out.append({"role": role, "content": said.strip()})
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(row: dict) -> list[dict]:
    """A sample's prompt as messages."""
    return [*row.get("earlier", []), {"role": "user", "content": row["prompt"]}]


def key(messages: list[dict]) -> str:
    return json.dumps(messages, sort_keys=True)


def said(text: str) -> str:
    """Without whitespace and the frames that the terminal puts around an answer."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything once: the stages' folders, what was printed, the exports, and what plain transformers says of them."""
    folder = tmp_path_factory.mktemp("real")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    printed: dict[str, str] = {}

    def trueup(command: str, *words: str, name: str = "", stdin: str = "") -> Path | None:
        name = name or command
        run = ["--name", name] if command in ("sft", "reward", "ppo", "generate") else []
        done = subprocess.run(
            [sys.executable, "-m", "trueup", command, *words, *run],
            cwd=folder, env=env, input=stdin, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        printed[name] = done.stdout
        return next((folder / "runs" / name).glob(f"{command}-*"), None) if run else None

    make_real(folder / "models", [SHARED / name for name in (SEEDS, SUMS, PAIRS)], context=512)
    (folder / "sums.jsonl").write_text("".join((SHARED / SUMS).open(encoding="utf-8").readlines()[:200]), "utf-8")
    with gzip.open(SHARED / PAIRS, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for _, line in zip(range(240), file, strict=False)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), "utf-8")

    reply = f"sampling.max_tokens={TOKENS}"
    sums = trueup(
        "sft", "model=models/qwen3", "data=sums.jsonl", "max_length=256", "samples=8", reply,
        "train.epochs=4", "train.batch=16", "train.optim.lr=1e-2", name="sums",
    )  # fmt: skip
    seeds = trueup(
        "sft", f"model={sums}/final", f"data={SHARED / SEEDS}", "max_length=100", "samples=8", reply,
        "held_out=0", "train.epochs=30", "train.batch=16", "train.optim.lr=1e-2", name="seeds",
    )  # fmt: skip  # by heart, so that it answers differently to different prompts
    reward = trueup(
        "reward", "model=models/neox", "data=pairs.jsonl", f"max_length={LONGEST}", "held_out=0.3",
        "normalize_samples=32", "samples=1000", reply,
        "train.epochs=5", "train.batch=16", "train.optim.lr=3e-3",
    )  # fmt: skip
    ppo = trueup(
        "ppo", f"model={seeds}/final", f"scorer={reward}/final", "prompts=pairs.jsonl", f"max_prompt={PROMPT}",
        "steps=3", "batch=24", "show=24", "missing_eos_samples=24", "optim.lr=5e-4", reply,
    )  # fmt: skip
    answers = trueup(
        "generate", f"model={ppo}/final", "prompts=pairs.jsonl", f"max_prompt={PROMPT}", "limit=12",
        "sampling.greedy=true", reply,
    )  # fmt: skip
    trueup("export", "runs/ppo", "--out", "assistant")
    trueup("export", "runs/reward", "--out", "judge")
    trueup("chat", "assistant", "--temperature", "0", "--max-tokens", str(TOKENS), stdin="\n".join(CHAT) + "\n")

    held, rollout, greedy = (
        lines(f / name)
        for f, name in ((reward, "samples.jsonl"), (ppo, "samples.jsonl"), (answers, "completions.jsonl"))
    )
    question = {
        "policy": str(folder / "assistant"),
        "judge": str(folder / "judge"),
        "chat": CHAT,
        "prompts": [row["prompt"] for row in greedy],
        "conversations": [
            [*asked(row), {"role": "assistant", "content": row["completion"].strip()}] for row in held + rollout
        ],
        "tokens": TOKENS,
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/plain.py")],
        cwd=folder, env={k: v for k, v in env.items() if k != "PYTHONPATH"}, input=json.dumps(question),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plain = json.loads(done.stdout)
    told = [p for p in pairs if hh(p["chosen"])[-1]["content"]]
    return SimpleNamespace(
        folder=folder, pairs=told, printed=printed, sums=sums, seeds=seeds, reward=reward, ppo=ppo,
        held=held, rollout=rollout, greedy=greedy, plain=plain,
        results={f: json.loads((f / "results.json").read_text()) for f in (sums, seeds, reward, ppo)},
    )  # fmt: skip


pytestmark = [needs_shared(SEEDS, SUMS, PAIRS), pytest.mark.long]


def as_asked(row: dict) -> tuple[str, str]:
    """A row of GSM8K or self-instruct as question and answer."""
    if "question" in row:
        return row["question"], row["answer"]
    (instance,) = row["instances"]
    return "\n\n".join(t.strip() for t in (row["instruction"], instance["input"]) if t.strip()), instance["output"]


@pytest.mark.parametrize("stage, rows, longest", [("sums", 200, 256), ("seeds", 175, 100)])
def test_sft_learns_from_self_instruct_and_from_gsm8k_and_counts_what_is_too_long(made, stage, rows, longest):
    folder = getattr(made, stage)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    over = 0
    for row in lines(made.folder / "sums.jsonl" if stage == "sums" else SHARED / SEEDS):
        question, answer = as_asked(row)
        messages = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        over += len(tokenizer(text.removesuffix("\n"))["input_ids"]) > longest
    log, found = lines(folder / "metrics.jsonl"), made.results[folder]
    losses = [row["loss"] for row in log]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    valid = [row["validation_loss"] for row in log if "validation_loss" in row]
    assert found["too_long"] > 0 and (min(valid) < valid[0] if stage == "sums" else not valid)
    counted = re.search(r"(\d+) rows; (\d+) to train on, (\d+) held out, (\d+) over", made.printed[stage])
    total, *parts = map(int, counted.groups())
    assert total == rows == sum(parts) and parts[2] == found["too_long"] == over


def test_the_reward_models_accuracy_stands_beside_longer_wins_and_both_are_true(made):
    """Both counted again, from the published file and by plain transformers."""
    found, held = made.results[made.reward], made.held
    scored = made.plain["scores"][: len(held)]
    assert [row["side"] for row in held] == ["chosen", "rejected"] * found["pairs"]
    published = {(key(hh(p["chosen"])), key(hh(p["rejected"]))) for p in made.pairs}
    whole = [[*asked(row), {"role": "assistant", "content": row["completion"].strip()}] for row in held]
    assert all((key(a), key(b)) in published for a, b in zip(whole[::2], whole[1::2], strict=True))
    assert any(row.get("earlier") for row in held), "no conversation of several turns"
    pairs = list(zip(scored[::2], scored[1::2], strict=True))
    right = sum(a[0] > b[0] for a, b in pairs) / len(pairs)
    longer = sum((a[1] > b[1]) + (a[1] == b[1]) / 2 for a, b in pairs) / len(pairs)
    assert found["accuracy"] == pytest.approx(right) and found["longer_wins"] == pytest.approx(longer)
    assert f"held-out accuracy {right:.3f}; longer wins {longer:.3f}" in made.printed["reward"]
    assert 0.2 < longer < 0.8 and [a[0] > b[0] for a, b in pairs] != [a[1] > b[1] for a, b in pairs]
    losses = [row["loss"] for row in lines(made.reward / "metrics.jsonl")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1 * 5


def test_no_prompt_is_on_both_sides_and_every_long_pair_is_counted(made):
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "judge")
    end = tokenizer.eos_token
    longest, prompts = [], []
    for pair in made.pairs:
        texts = [tokenizer.apply_chat_template(hh(pair[s]), tokenize=False) for s in ("chosen", "rejected")]
        longest.append(max(len(tokenizer(t[: t.rindex(end) + len(end)])["input_ids"]) for t in texts))
        prompts.append(key(hh(pair["chosen"])[:-1]))
    short = [p for p, n in zip(prompts, longest, strict=True) if n <= LONGEST]
    found = made.results[made.reward]
    assert found["dropped"] == {"empty chosen": 240 - len(made.pairs)} and len(made.pairs) < 240
    assert found["too_long"] == len(made.pairs) - len(short) > 0
    held = {key(asked(row)) for row in made.held}
    assert found["pairs"] == sum(p in held for p in short)  # all pairs of a held-out prompt are held out
    assert found["rows"] == sum(p not in held for p in short)


def test_a_judges_scores_are_plain_transformers_scores_by_its_own_template(made):
    """On the held-out pairs, and on what PPO's policy wrote: text goes over, not the other model's tokens."""
    held, rollout = made.held, made.rollout
    scores = [s for s, _ in made.plain["scores"]]
    assert [row["score"] for row in held] == pytest.approx(scores[: len(held)], abs=2e-3)
    ended = [(row, s) for row, s in zip(rollout, scores[len(held) :], strict=True) if row["stop"] == "eos"]
    assert len(ended) >= 10 and len({row["completion"] for row, _ in ended}) >= 5
    assert [row["score"] for row, _ in ended] == pytest.approx([s for _, s in ended], abs=2e-3)
    cut = made.results[made.ppo]["missing_eos_score"]
    unended = [row["score"] for row in rollout if row["stop"] == "length"]
    assert unended and unended == pytest.approx([cut] * len(unended), abs=1e-4)
    judge, policy = (AutoTokenizer.from_pretrained(made.folder / f) for f in ("judge", "assistant"))
    assert judge.chat_template != policy.chat_template and judge.get_vocab() != policy.get_vocab()
    assert judge.chat_template.count("User: ") == 1 and "<|im_start|>" in policy.chat_template
    assert made.plain["sides"] == ["qwen3", "gpt_neox"] and not made.plain["trueup"]


def test_ppo_asks_hhs_own_prompts_of_several_turns_and_moves_the_policy(made):
    published = {key(hh(pair["chosen"])[:-1]) for pair in made.pairs}
    prompts = [asked(row) for row in made.rollout]
    assert len(prompts) == 3 * 24 and all(key(p) in published for p in prompts)
    assert sum(len(p) > 1 for p in prompts) > 10
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "assistant")
    over = sum(
        len(tokenizer.apply_chat_template(json.loads(p), add_generation_prompt=True)["input_ids"]) > PROMPT
        for p in published
    )
    assert 0 < over < len(published)
    assert f"{len(published) - over} distinct prompts to train on, 0 held out, {over} over" in made.printed["ppo"]
    log = lines(made.ppo / "metrics.jsonl")
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0.01
    # the policy's own kind, since the judge speaks another vocabulary
    assert AutoConfig.from_pretrained(made.ppo / "critic").model_type == "qwen3"


def test_plain_transformers_answers_the_same_greedily(made):
    """By `generate`, by `pipeline("text-generation")` and, over two turns, as `trueup chat` did."""
    replies = [row["completions"][0] for row in made.greedy]
    assert [a["ids"] for a in replies] == made.plain["ids"]
    assert made.plain["texts"] == made.plain["piped"]
    assert [a["text"] for a in replies] == [t.strip() for t in made.plain["texts"]]  # a reply's text is kept stripped
    assert len({a["text"] for a in replies}) > 2 and any(len(row["prompt"]) > 1 for row in made.greedy)
    assert any(re.search(r"\w", a["text"]) for a in replies)
    first, second = made.printed["chat"].split("you")[1:3]
    for panel, text in ((first, made.plain["chat"][0]), (second, made.plain["chat"][1])):
        assert said(text) and said(text) in said(panel)
