"""The reward model's loss, its normalization, when it stops, and what the held-out pairs say of it."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny
from tests.toy import QUESTIONS, metrics, results, rows, run
from trueup.data.chat import Chat
from trueup.engine.learner import Learner, Optim
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import load_policy
from trueup.models.net import Net
from trueup.phases import reward
from trueup.records import Completion, Preference, Prompt
from trueup.scorers import make_scorer

KEYS = {"phase": "reward", "model": "sft/final", "held_out": 0.2, "sampling": {"max_tokens": 20}}
QUICK = {**KEYS, "normalize_samples": 0, "train": {"epochs": 0.2, "batch": 8}}
BLUE_OR_YES = {"chosen": "the sky is blue.", "rejected": "yes please"}


def pair(chosen: int = 3, rejected: int = 3, category: str | None = None, **keys: float) -> reward.Pair:
    """A pair of rows of these lengths."""
    prompt = Prompt.of("Hi", **({"category": category} if category else {}))
    preference = Preference(prompt, Completion("a"), Completion("b"), **keys)
    return reward.Pair(list(range(1, chosen + 1)), list(range(11, rejected + 11)), preference)


def nll(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def test_the_loss_takes_margin_label_and_weight_from_the_data():
    """Gaps 1 and -2: -log s(1 - .5), and -.3 log s(-2 - .25) - .7 log s(2 - .25); sums 1 and 2."""
    batch = reward.batch_of([pair(margin=0.5, weight=2.0), pair(margin=0.25, label=0.3, weight=0.5)], pad_id=0)
    losses = reward.pair_loss({"scores": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, batch, center=0.1)
    bradley_terry, weight = losses["loss"]
    assert bradley_terry.tolist() == pytest.approx([nll(0.5), 0.3 * nll(-2.25) + 0.7 * nll(1.75)], abs=1e-6)
    assert losses["center"][0].tolist() == pytest.approx([0.1, 0.4], abs=1e-6)
    assert weight.tolist() == losses["center"][1].tolist() == [2.0, 0.5]


def test_validation_is_the_weighted_loss_and_the_share_in_order(mesh):
    net = Net(tiny.scalar(), "reward")
    pairs = [
        pair(5, 3, margin=0.5, weight=2.0),
        pair(2, 6, margin=2.0, label=0.3, weight=0.5),
        pair(4, 4, label=0.9, weight=1.5),
    ]
    scores = reward.pair_scores(net, mesh, pairs, 0)
    gaps = (scores[:, 0] - scores[:, 1]).tolist()
    losses = [
        p.label * nll(gap - p.margin) + (1 - p.label) * nll(-gap - p.margin)
        for gap, p in zip(gaps, (p.preference for p in pairs), strict=True)
    ]
    found = reward.validate(pairs, 0, Learner(net, Optim(), mesh, steps=1))
    assert found["validation_loss"] == pytest.approx((2 * losses[0] + 0.5 * losses[1] + 1.5 * losses[2]) / 4, abs=1e-5)
    in_order = [p.preference.label if gap > 0 else 1 - p.preference.label for gap, p in zip(gaps, pairs, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(in_order) / 3)


def test_the_center_key_weighs_the_penalty(toy):
    one, ten = (
        metrics(run(toy, {"center": {**QUICK, "data": "pairs.jsonl", "center": c}})["center"])[0] for c in (0.1, 1.0)
    )
    assert ten["center"] == pytest.approx(10 * one["center"], rel=1e-4) and one["center"] > 0
    assert ten["loss"] == one["loss"]


def test_soft_labels_are_met_and_not_outbid(toy):
    """Labels of .8 alone: the best gap is log 4, at which the loss is .8 log 1/.8 + .2 log 1/.2 = .5004."""
    rows(toy / "soft.jsonl", [{"prompt": q, **BLUE_OR_YES, "label": 0.8} for q in QUESTIONS])
    keys = {**KEYS, "normalize_samples": 0, "train": {"epochs": 3, "batch": 8, "optim": {"lr": 1e-3}}}
    found = results(run(toy, {"soft": {**keys, "data": "soft.jsonl"}})["soft"])
    assert found["best_validation_loss"] == pytest.approx(0.5004, abs=0.01)
    assert found["accuracy"] == pytest.approx(0.8) and found["calibration_error"] < 0.05


def test_scores_of_fresh_samples_have_mean_0_and_deviation_1(toy, mesh):
    """On other draws than those that it was normalized on: 512 each, three standard errors of their difference. Nothing
    holds the raw scores near either."""
    train = {"epochs": 1, "batch": 8, "optim": {"lr": 1e-3}}
    stage = run(toy, {"normal": {**KEYS, "data": "pairs.jsonl", "center": 0.0, "train": train}})["normal"]
    raw = results(stage)["normalization"]
    assert abs(raw["score_mean"]) > 0.5 * raw["score_std"] and abs(raw["score_std"] - 1) > 0.5 and raw["n"] == 512
    folder = str(toy / "sft/final")
    chat = Chat.load(folder)
    prompts = [Prompt.of(q) for q in QUESTIONS] * 8
    sampler = Sampler.speaking(chat, load_policy(folder), mesh)
    answers = sampler.sample([chat.prompt_ids(p.messages) for p in prompts], Sampling(max_tokens=20), seed=123)
    scores = make_scorer(str(stage.folder / "final"), mesh).score(prompts, answers).value
    assert abs(scores.mean()) < 3 * (2 / 512) ** 0.5 and scores.std() == pytest.approx(1, abs=3 / 512**0.5)


def test_it_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best(toy):
    """Labels by the hash of the question, which says nothing: what is learned of the training pairs is wrong."""
    sides = list(BLUE_OR_YES.values())
    coins = [sides[:: 1 if int(Prompt.of(q).id, 16) % 2 else -1] for q in QUESTIONS]
    pairs = zip(QUESTIONS, coins, strict=True)
    rows(toy / "coins.jsonl", [{"prompt": q, "chosen": chosen, "rejected": other} for q, (chosen, other) in pairs])
    train = {"epochs": 20, "batch": 8, "patience": 2, "validate_every": 0.5, "optim": {"lr": 1e-2}}
    stage = run(toy, {"coins": {**KEYS, "normalize_samples": 0, "data": "coins.jsonl", "train": train}})["coins"]
    log = metrics(stage)
    values = [row["validation_loss"] for row in log if "validation_loss" in row]
    assert len(log) == results(stage)["steps"] < 20 * 0.7 * len(QUESTIONS) / 8
    assert min(values) == values[-3] == results(stage)["best_validation_loss"]
    best, final = (load_file(stage.folder / name / "model.safetensors") for name in ("best", "final"))
    assert best.keys() == final.keys() and all(torch.equal(best[k], final[k]) for k in best)


def test_what_the_held_out_pairs_say_by_hand():
    """Gaps log 3, -log 3, 0, log 19: sure .75, .75, .5, .95; labelled so, or the other way round: 1, .8, .6, 0."""
    pairs = [
        pair(3, 2, "a"),
        pair(3, 3, "b", label=0.2),
        pair(2, 5, "a", label=0.6),
        pair(4, 4, "a", label=0.0),
    ]
    scores = torch.tensor([[math.log(3), 0.0], [1.0, 1.0 + math.log(3)], [2.0, 2.0], [math.log(19), 0.0]]).double()
    found = reward.evaluate(pairs, scores, 2.0, [])
    assert found["accuracy"] == pytest.approx((1 + 0.8 + 0 + 0) / 4)  # a tie in the scores is not right
    assert found["longer_wins"] == pytest.approx((1 + 0.5 + 0.4 + 0.5) / 4)  # of equal length: a toss
    assert found["by_category"] == {
        "a": {"accuracy": pytest.approx(1 / 3), "pairs": 3},
        "b": {"accuracy": pytest.approx(0.8), "pairs": 1},
    }
    assert found["reliability"] == [
        pytest.approx({"lower": 0.5, "upper": 0.6, "n": 1, "confidence": 0.5, "observed": 0.6}),
        pytest.approx({"lower": 0.7, "upper": 0.8, "n": 2, "confidence": 0.75, "observed": 0.9}),
        pytest.approx({"lower": 0.9, "upper": 1.0, "n": 1, "confidence": 0.95, "observed": 0.0}),
    ]
    assert found["calibration_error"] == pytest.approx(0.25 * 0.1 + 0.5 * 0.15 + 0.25 * 0.95)
    assert [(b["from"], b["accuracy"]) for b in found["by_margin"]] == [
        (0.0, 0.0),
        (pytest.approx(math.log(3) / 2), pytest.approx(1.0)),
        (pytest.approx(math.log(3) / 2), pytest.approx(0.8)),
        (pytest.approx(math.log(19) / 2), 0.0),
    ]
    assert (found["pairs"], found["agreement"], found["ceiling"], found["clean"]) == (4, None, None, None)


def test_accuracy_by_margin_in_bins_of_equal_counts():
    gap, label = torch.tensor([0.5, -3.0, -0.1, 1.0, -0.2]), torch.tensor([1.0, 0.0, 1.0, 0.7, 0.4])
    assert reward.by_margin(gap, label, bins=2) == [  # sorted: -.1 (0), -.2 (.6), .5 (1); 1 (.7), -3 (1)
        pytest.approx({"from": 0.1, "to": 0.5, "accuracy": (0 + 0.6 + 1) / 3, "pairs": 3}),
        pytest.approx({"from": 1.0, "to": 3.0, "accuracy": (0.7 + 1) / 2, "pairs": 2}),
    ]
    assert [b["pairs"] for b in reward.by_margin(gap, label)] == [1] * 5


def rated(rater: str, chosen: str, rejected: str, question: str = "Hi", label: float = 1.0) -> Preference:
    return Preference(Prompt.of(question), Completion(chosen), Completion(rejected), label=label, rater=rater)


def test_raters_agree_on_pairs_that_two_of_them_saw():
    """Ann and Ben agree on "Hi", which way round they saw it or which way the label is written; on "Ho" they do not,
    and of Cid's two opposite votes neither is held against his own."""
    agree = [rated("ann", "x", "y"), rated("ben", "y", "x", label=0.2)]
    differ = [rated("ann", "x", "y", "Ho"), rated("ben", "y", "x", "Ho")]
    own = [rated("cid", "x", "y", "Hu"), rated("cid", "y", "x", "Hu")]
    alone = [rated("ann", "x", "z"), rated("ben", "x", "y", label=0.5), rated("ben", "x", "y", "Ha")]
    assert reward.rater_agreement([*agree, *alone, *own]) == 1.0
    assert reward.rater_agreement([*agree, *differ, *own, *alone]) == 0.5
    assert reward.rater_agreement([*alone, *own]) is None
    three = [rated(who, *("yx" if who == "cid" else "xy")) for who in ("ann", "ben", "cid")]
    assert reward.rater_agreement(three) == pytest.approx(1 / 3)


def test_the_ceiling_is_that_of_raters_who_flip():
    """Flips of .25: two agree on .75^2 + .25^2 = .625, and each is right with .75."""
    assert reward.ceiling(0.625) == pytest.approx(0.75)
    assert reward.ceiling(1.0) == 1.0 and reward.ceiling(0.5) == 0.5
    assert reward.ceiling(0.4) == 0.5  # chance, from few pairs
    assert reward.ceiling(None) is None


def test_fewer_pairs_are_among_more_and_a_share_of_the_labels_is_turned():
    from trueup.phases.reward import Pair, RewardConfig, degraded
    from trueup.records import Completion, Preference, Prompt

    pairs = [
        Pair([i], [i], Preference(Prompt.of(f"q{i}"), Completion("a"), Completion("b"), label=0.9)) for i in range(400)
    ]

    def some(**keys) -> dict[int, float]:
        kept = degraded(pairs, RewardConfig(model="m", data="d", **keys))
        assert [p.chosen[0] for p in kept] == sorted(p.chosen[0] for p in kept)
        return {p.chosen[0]: round(p.preference.label, 6) for p in kept}

    assert some() == dict.fromkeys(range(400), 0.9)
    few, more = some(limit=20, flips=0.3), some(limit=200, flips=0.3)
    assert len(few) == 20 and len(more) == 200 and few.items() <= more.items() <= some(flips=0.3).items()
    turned = [i for i, label in some(flips=0.3).items() if label == 0.1]
    assert 90 < len(turned) < 150 and set(turned) > {i for i, label in some(flips=0.1).items() if label == 0.1}
    assert some(limit=20) != some(limit=20, seed=1)
