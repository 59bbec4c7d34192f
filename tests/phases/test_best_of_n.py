"""Best of n on the toy: the curve is the formula's, the best answers are demonstrations, and SFT on them helps."""

from __future__ import annotations

import json

import pytest
import torch

from tests.toy import constant, results, run
from trueup.data.readers import read_demonstrations
from trueup.math import best_of_n, best_of_n_bound, best_of_n_kl
from trueup.records import UserError

KEYS = {
    "phase": "best-of-n",
    "model": "sft/final",
    "prompts": "prompts.jsonl",
    "scorer": "toyrules:short",
    "audit": "toyrules:gold",
    "n": 6,
    "sampling": {"max_tokens": 20},
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def stage(toy):
    return run(toy, {"bon": KEYS}, name="bon")["bon"]


def test_the_curve_is_what_the_samples_say(stage):
    rows, found = rows_of(stage.folder / "completions.jsonl"), results(stage)
    score, audit = (torch.tensor([[a[k] for a in r["completions"]] for r in rows]).double() for k in ("score", "audit"))
    cut = torch.tensor([[a["stop"] == "length" for a in r["completions"]] for r in rows])
    choice, ns = score.masked_fill(cut, -torch.inf), [1, 2, 4, 6]
    assert [row["n"] for row in found["curve"]] == ns
    for i, n in enumerate(ns):
        row = found["curve"][i]
        assert row["score"] == pytest.approx(best_of_n(choice, score, [n]).mean().item())
        assert row["audit"] == pytest.approx(best_of_n(choice, audit, [n]).mean().item())
        assert row["kl"] == pytest.approx(best_of_n_kl(choice, [n]).mean().item())
        assert row["kl_bound"] == pytest.approx(best_of_n_bound(n)) and row["kl"] <= row["kl_bound"] + 1e-9
    # The short answer is the wrong one: choosing by length loses what the audit wants.
    assert found["curve"][-1]["score"] > found["curve"][0]["score"]
    assert found["curve"][-1]["audit"] < found["curve"][0]["audit"] - 0.2
    alike = [len({a["text"] for a in r["completions"]}) / 6 for r in rows]
    assert found["distinct"] == pytest.approx(sum(alike) / len(rows)) and not found["kl_bound_is_exact"]


def test_the_best_are_demonstrations(stage):
    best = rows_of(stage.folder / "best.jsonl")
    whole = [
        (row, ended)
        for row in rows_of(stage.folder / "completions.jsonl")
        if (ended := [a for a in row["completions"] if a["stop"] == "eos"])
    ]
    assert len(best) == len(whole) == results(stage)["best"] > 50
    for one, (row, ended) in zip(best, whole, strict=True):
        top = max(a["score"] for a in ended)
        assert one["completion"] in {a["text"].strip() for a in ended if a["score"] == top}
        assert one["prompt"] == row["prompt"] and one["score"] == top
    read = read_demonstrations(stage.folder / "best.jsonl").records
    assert [d.reply for d in read] == [one["completion"] for one in best if one["completion"]]


def test_sft_on_the_best_is_rejection_sampling(toy):
    keys = {**KEYS, "scorer": "toyrules:gold", "audit": None}
    train = {"epochs": 4, "batch": 16, "optim": constant(1e-3)}
    learn = {
        "phase": "sft",
        "model": "sft/final",
        "data": "@bon/best.jsonl",
        "train": train,
        "sampling": {"max_tokens": 20},
    }
    stages = run(toy, {"bon": keys, "again": learn}, name="rejection")
    assert results(stages["bon"])["curve"][0]["audit"] is None
    before = results(stages["bon"])["curve"][0]["score"]
    said = [row["completion"] for row in rows_of(stages["again"].folder / "samples.jsonl")]
    assert before < 0.7 and sum("blue" in text for text in said) / len(said) > 0.9


def test_an_answer_that_was_cut_is_nobodys_best(toy):
    """The scorer likes what is long, and four tokens cut that."""
    keys = {**KEYS, "scorer": {"toyrules:short": -1.0}, "sampling": {"max_tokens": 4}}
    stage = run(toy, {"bon": keys}, name="cut")["bon"]
    rows = [r["completions"] for r in rows_of(stage.folder / "completions.jsonl")]
    longest = [max(r, key=lambda a: a["score"]) for r in rows]
    assert all(a["stop"] == "length" for a in longest)
    ended = [[a for a in r if a["stop"] == "eos"] for r in rows]
    best = rows_of(stage.folder / "best.jsonl")
    assert [b["score"] for b in best] == [max(a["score"] for a in e) for e in ended if e]
    assert 0 < len(best) < len(rows)


def test_what_makes_no_sense_is_refused(toy):
    with pytest.raises(UserError, match=r"sampling\.greedy must be false"):
        run(toy, {"bon": {**KEYS, "sampling": {"greedy": True}}}, name="refused")
    with pytest.raises(UserError, match="every prompt has more than 1 tokens"):
        run(toy, {"bon": {**KEYS, "max_prompt": 1}}, name="refused")
    with pytest.raises(UserError, match=r"\bn\b"):
        run(toy, {"bon": {**KEYS, "n": 1}}, name="refused")
