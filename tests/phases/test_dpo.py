"""DPO and its kin: what the losses take from the data, the check before step 0, the reference's cache, learning."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny
from tests.toy import QUESTIONS, constant, metrics, results, rows, run
from trueup.data.chat import Chat
from trueup.engine.learner import Learner, Optim
from trueup.models.lora import own
from trueup.models.net import Net
from trueup.models.roles import models_of
from trueup.phases import dpo
from trueup.records import CheckFailed, Completion, Preference, Prompt, Thumb, UserError

KEYS = {
    "phase": "dpo",
    "model": "sft/final",
    "data": "pairs.jsonl",
    "held_out": 0.2,
    "beta": 0.5,
    "samples": 32,
    "sampling": {"max_tokens": 20},
    "train": {"epochs": 2, "batch": 16, "validate_every": 0.5, "optim": constant(1e-3)},
}
QUICK = {**KEYS, "samples": 0, "train": {**KEYS["train"], "epochs": 0.3}}


def row(chosen: int, rejected: int, ref: tuple[float, float], **keys: float) -> dpo.Row:
    """A prompt of 2 tokens and replies of these lengths."""
    record = Preference(Prompt.of("Hi"), Completion("a"), Completion("b"), **keys)
    return dpo.Row([1, 2], [list(range(3, 3 + n)) for n in (chosen, rejected)], record, list(ref))


def losses_of(kind: str, batch: dict, logprobs: torch.Tensor, **keys: float) -> dict:
    keys = {"beta": 0.5, "label_smoothing": 0.0, "sft_coef": 0.0} | keys
    return dpo.pair_loss({"logprobs": logprobs}, batch, kind=kind, **keys)


def spread(batch: dict, sums: list[list[float]]) -> torch.Tensor:
    """Log-probs [B, 2, L] that add up to `sums`, all on the first token that counts."""
    first = batch["mask"].float().argmax(-1, keepdim=True)
    return torch.zeros(batch["mask"].shape).scatter_(-1, first, torch.tensor(sums)[..., None])


def nll(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def test_a_batch_of_pairs_counts_the_replies_alone():
    batch = dpo.batch_of([row(3, 1, (-1.0, -2.0), label=0.7, weight=2.0), row(2, 4, (-3.0, -4.0))], pad_id=0)
    assert batch["ids"].tolist() == [
        [[1, 2, 3, 4, 5, 0], [1, 2, 3, 0, 0, 0]],
        [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]],
    ]
    assert batch["mask"].int().tolist() == [
        [[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]],
        [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]],
    ]
    assert batch["lengths"].tolist() == [[5, 3], [4, 6]] and batch["ref"].tolist() == [[-1, -2], [-3, -4]]
    assert batch["label"].tolist() == pytest.approx([0.7, 1.0]) and batch["weight"].tolist() == [2.0, 1.0]


def test_the_loss_takes_label_and_weight_from_the_data_and_the_sft_term_its_length():
    """h = (-2 + 1) - (-4 + 2) = 1 and (-5 + 3) - (-4 + 4) = -2; beta h = .5 and -1."""
    batch = dpo.batch_of([row(3, 1, (-1.0, -2.0), label=0.7, weight=2.0), row(2, 4, (-3.0, -4.0))], pad_id=0)
    logprobs = spread(batch, [[-2.0, -4.0], [-5.0, -4.0]])
    found = losses_of("sigmoid", batch, logprobs, sft_coef=0.5)
    loss, weight = found["loss"]
    assert loss.tolist() == pytest.approx([0.7 * nll(0.5) + 0.3 * nll(-0.5), nll(-1.0)], abs=1e-6)
    assert weight.tolist() == found["sft"][1].tolist() == [2.0, 1.0]
    assert found["sft"][0].tolist() == pytest.approx([0.5 * 2 / 3, 0.5 * 5 / 2])
    said = {name.removeprefix("metric/"): value.tolist() for name, (value, _) in found.items()}
    assert said["margin"] == pytest.approx([0.5, -1.0]) and said["accuracy"] == pytest.approx([0.7, 0.0])
    assert said["chosen_reward"] == pytest.approx([-0.5, -1.0]) and said["rejected_reward"] == pytest.approx([-1, 0])
    assert (said["chosen_logprobs"], said["rejected_logprobs"]) == ([-2, -5], [-4, -4])


def test_ipo_is_summed_and_by_name_averaged_over_length():
    batch = dpo.batch_of([row(4, 2, (-1.0, -2.0))], pad_id=0)
    logprobs = spread(batch, [[-3.0, -3.0]])
    assert losses_of("ipo", batch, logprobs)["loss"][0].item() == pytest.approx((-2 + 1 - 1) ** 2)
    assert losses_of("ipo_mean", batch, logprobs)["loss"][0].item() == pytest.approx((-2 / 4 + 1 / 2 - 1) ** 2)
    smoothed = losses_of("cdpo", batch, logprobs, label_smoothing=0.1)["loss"][0].item()
    assert smoothed == pytest.approx(0.9 * nll(-0.5) + 0.1 * nll(0.5))


def test_what_is_logged_has_no_gradient():
    batch = dpo.batch_of([row(3, 1, (-1.0, -2.0))], pad_id=0)
    logprobs = spread(batch, [[-2.0, -4.0]]).requires_grad_()
    found = losses_of("sigmoid", batch, logprobs, sft_coef=1.0)
    assert {name for name, (value, _) in found.items() if value.requires_grad} == {"loss", "sft"}


def thumbs(*good: bool) -> list[dpo.Row]:
    made = []
    for i, one in enumerate(good):
        replies = [[5 + i] * (1 + i % 3), [9, 8, 7][: 1 + (i + 1) % 3]]
        made.append(dpo.Row([1 + i, 2], replies, Thumb(Prompt.of(f"{i}"), Completion("a"), one), [-4.0 - i, -9.0 - i]))
    return made


def test_ktos_baseline_comes_from_replies_to_other_prompts_and_is_the_same_in_any_micro_batch(mesh):
    found = thumbs(True, False, True, True)
    whole = dpo.thumb_batch(found, 0)
    alone = [
        tiny.plain_logprobs(
            tiny.policy(), {k: dpo.thumb_batch([r], 0)[f"other_{k}"] for k in ("ids", "lengths", "mask")}
        )
        for r in found
    ]
    want = sum(float(x.detach().sum()) - r.ref[1] for x, r in zip(alone, found, strict=True)) / 4
    updates = []
    for budget in (1, 8192):
        learner = Learner(Net(tiny.policy(), "policy"), Optim(lr=1e-3, eps=1e-3, micro_tokens=budget), mesh, steps=1)
        batch = dpo.with_baseline(learner, whole)
        assert not any(name.startswith("other_") for name in batch)
        assert batch["baseline"].tolist() == pytest.approx([max(0.0, want)] * 4, abs=1e-4)
        loss = partial(dpo.thumb_loss, beta=0.5, weights=(1.0, 2.0), sft_coef=0.1)
        updates.append((learner.forward_backward(batch, loss), learner.step()))
    for a, b in zip(*updates, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_kto_by_hand():
    """beta (l - ref - z): .5 (2 - 1) = .5 liked, .5 (-2 - 1) = -1.5 disliked."""
    batch = {"ref": torch.tensor([-3.0, -2.0]), "good": torch.tensor([True, False]), "baseline": torch.ones(2)}
    batch["mask"] = torch.tensor([[False, True, True], [False, True, False]])
    logprobs = torch.tensor([[0.0, -0.5, -0.5], [0.0, -4.0, 0.0]])
    found = dpo.thumb_loss({"logprobs": logprobs}, batch, beta=0.5, weights=(3.0, 2.0), sft_coef=1.0)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5, 1.5)]
    assert found["loss"][0].tolist() == pytest.approx([3 * (1 - sigmoid[0]), 2 * (1 - sigmoid[1])])
    said = dpo.reduced(found)
    assert said["sft"] == pytest.approx(0.5)  # of the liked one alone
    assert (said["chosen_logprobs"], said["rejected_logprobs"], said["accuracy"]) == (-1, -4, 1)
    assert (said["chosen_reward"], said["rejected_reward"]) == (1, -1)


def said_blue(folder) -> float:
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    last = [r["completion"] for r in shown if r["step"] == shown[-1]["step"]]
    return sum("blue" in text for text in last) / len(last)


LEARN = {**KEYS, "sft_coef": 0.5, "show": 32}


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_it_says_what_was_chosen(toy, loss):
    stage = run(toy, {"dpo": {**LEARN, "loss": loss}}, name=f"dpo-{loss}")["dpo"]
    log, found = metrics(stage), results(stage)
    assert log[0]["loss"] == pytest.approx({"sigmoid": math.log(2), "hinge": 1.0}[loss], abs=1e-4)
    assert found["validation_accuracy"] == 1 and log[-1]["margin"] > log[1]["margin"] > 0
    kl = [row["kl"] for row in log if "kl" in row]
    assert 0 < kl[0] < kl[-1] and found["end_rate"] == 1
    assert said_blue(stage.folder) > 0.8


@pytest.mark.parametrize(
    ("loss", "start"), [("cdpo", math.log(2)), ("robust", math.log(2)), ("ipo", 1), ("ipo_mean", 1)]
)
def test_it_parts_chosen_from_rejected(toy, loss, start):
    smoothing = {"label_smoothing": 0.1} if loss in ("cdpo", "robust") else {}
    keys = {**KEYS, "loss": loss, **smoothing, "samples": 0, "train": {**KEYS["train"], "epochs": 1}}
    stage = run(toy, {"dpo": keys}, name=f"dpo-{loss}")["dpo"]
    log, found = metrics(stage), results(stage)
    assert log[0]["loss"] == pytest.approx(start, abs=1e-3)
    assert found["validation_accuracy"] == 1 and found["validation_loss"] < 0.8 * start
    parted = [row["chosen_logprobs"] - row["rejected_logprobs"] for row in log]
    assert parted[-1] > parted[0] + 0.5


def test_where_both_fall_and_the_policy_leaves_the_data_the_log_shows_it(toy):
    """Without the SFT term, far too hard: accuracy and loss look perfect, and the answers are ruined."""
    found = results(run(toy, {"dpo": KEYS}, name="ruin")["dpo"])
    log = metrics(run(toy, {"dpo": KEYS}, name="ruin")["dpo"])
    assert found["validation_accuracy"] == 1 and found["validation_loss"] < 0.1
    assert log[-1]["chosen_logprobs"] < log[0]["chosen_logprobs"] - 1 and found["kl"] > 3 and found["end_rate"] < 0.5


def test_kto_learns_from_thumbs(toy):
    said = {"the sky is blue.": True, "yes please": False}
    thumbs = [{"prompt": q, "completion": c, "label": y} for q in QUESTIONS * 2 for c, y in said.items()]
    rows(toy / "thumbs.jsonl", thumbs)
    stage = run(toy, {"dpo": {**LEARN, "loss": "kto", "data": "thumbs.jsonl"}}, name="kto")["dpo"]
    log = metrics(stage)
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-4) and log[0]["baseline"] == pytest.approx(0, abs=1e-4)
    assert results(stage)["validation_loss"] < 0.35 and said_blue(stage.folder) > 0.8


def test_the_sft_term_holds_the_chosen_log_prob_up(toy):
    ends = []
    for coef in (0.0, 1.0):
        stage = run(toy, {"dpo": {**KEYS, "samples": 0, "sft_coef": coef}}, name="rpo")["dpo"]
        ends.append(results(stage)["validation_chosen_logprobs"])
    assert ends[1] > ends[0] + 0.5


def computed_in(text: str) -> int:
    return int(re.findall(r"known before, (\d+) computed", text)[-1])


def test_the_references_log_probs_are_computed_once_and_found_by_content(toy, capsys):
    def computed(**keys) -> int:
        run(toy, {"dpo": {**QUICK, "data": "cached.jsonl", **keys}}, name="cached")
        return computed_in(capsys.readouterr().out)

    pairs = [{"prompt": q, "chosen": "the sky is cached.", "rejected": "yes"} for q in QUESTIONS]
    rows(toy / "cached.jsonl", pairs)
    assert computed() == len(QUESTIONS)
    assert computed(beta=0.2) == computed(seed=5, loss="ipo") == computed(lora={"r": 2}) == 0
    assert computed(model="base") == len(QUESTIONS)
    rows(toy / "cached.jsonl", [*pairs, {"prompt": "new", "chosen": "the sky", "rejected": "no"}])
    assert computed() > 0
    rows(toy / "cached.jsonl", list(reversed(pairs)))
    assert computed() == 0
    shutil.copytree(toy / "sft/final", toy / "turned")  # the same weights, read otherwise
    config = json.loads((toy / "turned/config.json").read_text())
    (toy / "turned/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert config["rms_norm_eps"] != 0.1 and computed(model="turned") == len(QUESTIONS)


def test_what_is_cached_is_the_references_log_prob(toy, mesh):
    chat = Chat.load(toy / "sft/final")
    models = models_of(str(toy / "sft/final"), None, precision="fp32", device=mesh.device)
    record = Preference(Prompt.of("what is it?"), Completion("the sky"), Completion("no way", "length"))
    made = dpo.encode(chat, record)
    keys = {"pad_id": chat.pad_id, "micro_tokens": 100}
    first = dpo.reference_logprobs(models.untrained(), [(made.prompt, made.replies)], mesh, toy / "ref", **keys)
    again = dpo.reference_logprobs(models.untrained(), [(made.prompt, made.replies)], mesh, toy / "ref", **keys)
    assert first[1] == 1 and again == (first[0], 0)
    for reply, value in zip(made.replies, first[0][0], strict=True):
        ids = torch.tensor([made.prompt + reply])
        logp = models.untrained()(ids).logits[0].log_softmax(-1)
        want = sum(logp[i - 1, ids[0, i]].item() for i in range(len(made.prompt), ids.shape[1]))
        assert value == pytest.approx(want, abs=1e-4)
    assert made.replies[0][-1] == chat.end_id != made.replies[1][-1]


def test_a_reference_that_is_not_the_policys_start_is_found_before_step_0(toy, capsys):
    keys = {**QUICK, "data": "wrong.jsonl"}
    rows(toy / "wrong.jsonl", [{"prompt": q, "chosen": "the sky is wrong.", "rejected": "yes"} for q in QUESTIONS])
    run(toy, {"dpo": keys}, name="right")
    for path in (toy / "runs/.reference-logprobs").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
        path.write_text("".join(json.dumps({k: v - 0.1 for k, v in line.items()}) + "\n" for line in lines))
    with pytest.raises(CheckFailed, match=r"log-probs differ by 1\.0e-01"):
        run(toy, {"dpo": {**keys, "beta": 0.3}}, name="wrong")
    for path in (toy / "runs/.reference-logprobs").glob("*.jsonl"):
        path.write_text(path.read_text()[:50])  # as after a loss of power
    run(toy, {"dpo": {**keys, "beta": 0.3}}, name="wrong")
    assert computed_in(capsys.readouterr().out) == len(QUESTIONS)


def test_with_an_adapter_the_reference_is_the_model_without_it(toy, mesh):
    keys = {**LEARN, "lora": {"r": 4}, "train": {**KEYS["train"], "optim": constant(1e-2)}}
    stage = run(toy, {"dpo": keys}, name="dpo-lora")["dpo"]
    log = metrics(stage)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and said_blue(stage.folder) > 0.8
    assert (stage.folder / "final/adapter/adapter_model.safetensors").exists()
    config = dpo.DPOConfig(**{k: v for k, v in keys.items() if k != "phase"})
    models = models_of(str(toy / "sft/final"), config.lora, precision="fp32", device=mesh.device)
    policy, reference = models.policy(0), models.untrained()
    shared = {p.data_ptr() for p in reference.parameters()}
    assert {n for n, p in policy.named_parameters() if p.data_ptr() not in shared} == set(own(policy))
    before, after = (load_file(f / "model.safetensors") for f in (toy / "sft/final", stage.folder / "final"))
    assert any(not torch.equal(before[k], after[k]) for k in before if k in after)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing is for loss=cdpo and loss=robust; loss=sigmoid has none"),
        ({"loss": "kto"}, "pairs.jsonl, line 1: column 'completion' is missing"),
        ({"max_length": 5}, "pairs.jsonl: no row is left to train on"),
        ({"loss": "dpo"}, "key 'loss'"),
    ],
)
def test_what_does_not_fit_together_is_refused(toy, keys, said):
    with pytest.raises(UserError) as error:
        run(toy, {"dpo": {**QUICK, **keys}}, name="refused")
    assert said in str(error.value) and "\n" not in str(error.value)
