"""Adapters on one frozen base: nothing is held twice, nothing changes before training, and what is saved is what was
trained, for us, for plain transformers and for plain peft."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models import tiny
from tests.models.test_load import IDS, one_line
from trueup.engine.learner import Learner, Optim
from trueup.models.load import load_scalar, save_model
from trueup.models.lora import (
    ADAPTER,
    Base,
    Lora,
    adapted,
    assert_merged,
    fingerprint,
    load_adapter,
    merged,
    own,
    save_adapter,
    share,
)
from trueup.models.net import Net
from trueup.models.nf4 import NF4Linear, to_nf4

FAMILIES = ["llama", "llama-tied", "qwen3", "neox", "gpt2", "gemma2", "gemma3"]


def base_of(folder: Path, name: str = "llama", precision: str = "fp32", **keys: object) -> Base:
    save_model(tiny.policy(name), folder / name, end_id=tiny.END, pad_id=tiny.PAD)
    return Base(str(folder / name), Lora.model_validate({"r": 4, **keys}), precision=precision)  # type: ignore[arg-type]


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """As if training had moved the adapter."""
    for i, parameter in enumerate(own(model).values()):
        generator = torch.Generator().manual_seed(i)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def storages(*models: nn.Module) -> set[int]:
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    states = [part.state for m in models for part in m.modules() if isinstance(part, NF4Linear)]
    tensors += [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_start_it_is_the_base_bit_for_bit_and_merged_it_is_what_was_trained(name: str, tmp_path: Path) -> None:
    base, batch = base_of(tmp_path, name), tiny.rows()
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    reference = Net(base.untrained(), "policy")(batch)["logprobs"]
    policy = base.policy(0)
    assert torch.equal(Net(policy, "policy")(batch)["logprobs"], reference)
    trained(policy)
    moved = Net(policy, "policy")(batch)["logprobs"]
    assert (moved - reference).abs().max() > 0.1
    assert torch.equal(Net(base.untrained(), "policy")(batch)["logprobs"], reference)

    plain = merged(policy)
    assert (Net(plain, "policy")(batch)["logprobs"] - moved).abs().max() < 2e-5
    assert plain.state_dict().keys() == before.keys() and not adapted(plain)
    assert all(torch.equal(before[key], value) for key, value in base.model.state_dict().items())
    assert torch.equal(Net(policy, "policy")(batch)["logprobs"], moved)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "neox"])
def test_the_base_is_held_once(name: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, name)
    policy, critic = base.policy(0), base.scalar(1)
    alone = storages(base.model)
    extra = [p for model in (policy, critic) for p in own(model).values()]
    assert storages(base.model, policy, critic) - alone == {p.untyped_storage().data_ptr() for p in extra}
    assert sum(p.numel() for p in extra) < 0.5 * sum(p.numel() for p in base.model.parameters())
    assert [p for p in policy.parameters() if p.requires_grad] == list(own(policy).values())
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_learner_moves_the_adapter_and_the_head_alone(tmp_path: Path) -> None:
    from tests.engine.test_learner import batch_of, regress

    base, batch = base_of(tmp_path), batch_of()
    before = fingerprint(base.model.base_model)
    critic = base.scalar(1)
    one = Learner(Net(critic, "critic"), Optim(lr=1e-2), steps=9)
    losses = []
    for _ in range(9):
        losses.append(one.forward_backward(batch, regress)["value"])
        one.step()
    assert losses[-1] < 0.5 * losses[0]
    assert {name.removeprefix("model.") for name, _ in one._named} == own(critic).keys()
    assert {key.partition(".")[2] for key in one.state() if key.startswith("param.")} == {n for n, _ in one._named}
    del base.model.base_model._trueup_sha256
    assert fingerprint(base.model.base_model) == before


def test_adapters_start_the_same_for_the_same_seed_alone(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    first, again, other = (own(base.policy(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert not any(first[name].any() for name in first if "lora_B" in name)


def test_the_head_starts_as_that_of_a_whole_reward_model(tmp_path: Path) -> None:
    base, batch = base_of(tmp_path), tiny.rows()
    whole = Net(load_scalar(base.folder, seed=5).model, "reward")(batch)["scores"]
    assert torch.equal(Net(base.scalar(5), "reward")(batch)["scores"], whole)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plain_peft_reads_the_adapter_and_its_head(name: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, name)
    for made, auto in (
        (trained(base.policy(0)), AutoModelForCausalLM),
        (trained(base.scalar(0)), AutoModelForSequenceClassification),
    ):
        save_adapter(made, tmp_path / ADAPTER)
        start = auto.from_pretrained(base.folder, num_labels=1) if "Sequence" in auto.__name__ else None
        start = start or auto.from_pretrained(base.folder)
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(start, tmp_path / ADAPTER).eval()(input_ids=IDS).logits
            assert (theirs - made(input_ids=IDS).logits).abs().max() < 1e-5
            assert (theirs - base.model(input_ids=IDS).logits.flatten()[: theirs.numel()].view_as(theirs)).any()


def test_an_adapter_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    base, batch = base_of(tmp_path), tiny.rows()
    made, other = trained(base.scalar(0)), base.scalar(1)
    save_adapter(made, tmp_path / ADAPTER)
    load_adapter(other, tmp_path / ADAPTER)
    assert torch.equal(Net(made, "reward")(batch)["scores"], Net(other, "reward")(batch)["scores"])
    assert "not for these layers" in one_line(lambda: load_adapter(base.policy(0), tmp_path / ADAPTER))


def reward_folder(model: PreTrainedModel, folder: Path) -> Path:
    save_model(merged(model), folder, end_id=tiny.END, pad_id=tiny.PAD)
    save_adapter(model, folder / ADAPTER)
    return folder


def test_a_reward_model_that_was_trained_on_the_base_shares_it(tmp_path: Path) -> None:
    base, batch = base_of(tmp_path), tiny.rows()
    made = trained(Base(base.folder, Lora(r=3, targets=("q_proj", "down_proj"))).scalar(0))
    folder = reward_folder(made, tmp_path / "reward")
    scorer, critic = base.reward(folder), base.critic(folder, 0)
    assert scorer is base.reward(tmp_path / "." / "reward")
    want = Net(made, "reward")(batch)["scores"]
    assert torch.equal(Net(scorer, "reward")(batch)["scores"], want)
    assert torch.equal(Net(critic, "reward")(batch)["scores"], want)
    mine = {p.untyped_storage().data_ptr() for model in (scorer, critic) for p in own(model).values()}
    assert storages(base.model, scorer, critic) - storages(base.model) == mine
    assert not any(p.requires_grad for p in scorer.parameters())
    assert [p for p in critic.parameters() if p.requires_grad] == list(own(critic).values())
    trained(critic)
    assert torch.equal(Net(scorer, "reward")(batch)["scores"], want)


def test_a_reward_model_of_other_weights_keeps_its_own_and_its_critic_shares_those(tmp_path: Path) -> None:
    base, batch = base_of(tmp_path), tiny.rows()
    folder = reward_folder(trained(base.scalar(0)), tmp_path / "reward")
    changed = tiny.policy()
    changed.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    save_model(changed, tmp_path / "changed", end_id=tiny.END, pad_id=tiny.PAD)
    other = Base(str(tmp_path / "changed"), base.lora)
    scorer, critic = other.reward(folder), other.critic(folder, 0)
    assert not adapted(scorer) and adapted(critic) and not storages(scorer) & storages(other.model)
    assert (Net(scorer, "reward")(batch)["scores"] - Net(critic, "reward")(batch)["scores"]).abs().max() < 1e-6
    mine = {p.untyped_storage().data_ptr() for p in own(critic).values()}
    assert storages(scorer, critic) - storages(scorer) == mine


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fingerprint_is_of_the_body_whatever_stands_on_it(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    whole = load_scalar(base.folder, seed=0).model
    assert fingerprint(whole.base_model) == fingerprint(base.model.base_model)


def test_a_fingerprint_is_of_the_weights_as_they_are_held(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    half = Base(base.folder, base.lora, precision="bf16")
    assert fingerprint(half.model.base_model) != fingerprint(base.model.base_model)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {"rms_norm_eps": 0.1}]
)
def test_equal_weights_that_are_used_otherwise_have_another_fingerprint(tmp_path: Path, change: dict) -> None:
    base = base_of(tmp_path)
    config = Path(base.folder) / "config.json"
    said = json.loads(config.read_text())
    assert said.keys() >= change.keys()
    config.write_text(json.dumps(said | change))
    other = Base(base.folder, base.lora)
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), other.model.parameters(), strict=True))
    assert fingerprint(other.model.base_model) != fingerprint(base.model.base_model)


def test_a_reward_model_may_be_trained_on(tmp_path: Path) -> None:
    save_model(tiny.scalar(), tmp_path / "reward", end_id=tiny.END, pad_id=tiny.PAD)
    base, batch = Base(str(tmp_path / "reward"), Lora()), tiny.rows()
    want = Net(tiny.scalar(), "reward")(batch)["scores"]
    assert (Net(base.scalar(0), "reward")(batch)["scores"] - want).abs().max() < 1e-5
    assert "language model is needed" in one_line(lambda: base.policy(0))


def test_in_bf16_the_base_is_bf16_and_what_learns_is_float32(tmp_path: Path) -> None:
    from tests.engine.test_learner import batch_of, regress, two

    base, batch = base_of(tmp_path, precision="bf16"), batch_of()
    policy, critic = base.policy(0), base.scalar(0)
    assert base.model.dtype == torch.bfloat16 and {p.dtype for p in own(critic).values()} == {torch.float32}
    nets = (Net(policy, "policy"), Net(critic, "critic"))
    learners = [Learner(net, Optim(lr=1e-2), steps=9, precision="bf16") for net in nets]
    reference = Net(base.untrained(), "policy")
    assert torch.equal(learners[0].forward(batch)["logprobs"], reference(batch)["logprobs"])
    for one, loss in zip(learners, (two, regress), strict=True):
        values = []
        for _ in range(9):
            values.append(sum(one.forward_backward(batch, loss).values()))
            one.step()
        assert values[-1] < values[0]
    assert Net(critic, "reward")(batch)["scores"].dtype == torch.float32
    plain = merged(critic)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert_merged(critic, plain, IDS)


def test_wrong_merges_are_noticed(tmp_path: Path) -> None:
    policy = trained(base_of(tmp_path).policy(0))
    plain = merged(policy)
    plain.model.layers[0].mlp.up_proj.weight.data *= 1.05
    with pytest.raises(RuntimeError, match="not what was trained"):
        assert_merged(policy, plain, IDS)


def test_targets_that_are_not_there_are_told(tmp_path: Path) -> None:
    base = base_of(tmp_path, targets=["q_proj", "v_proj"])
    assert {name.split(".")[-4] for name in own(base.policy(0))} == {"q_proj", "v_proj"}
    assert "lora.targets" in one_line(lambda: base_of(tmp_path, targets=["lm_head"]).policy(0))


def test_without_peft_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'trueup[lora]'" in one_line(lambda: base.policy(0))


def test_a_shared_tree_stays_one_tree(tmp_path: Path) -> None:
    """Tied weights stay tied, and a layer's config stays the model's."""
    base = base_of(tmp_path, "llama-tied")
    twin = share(base.model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is base.model.lm_head.weight
    assert twin.model.layers[0].self_attn.config is twin.model.config is not base.model.model.config


# four bits


def test_four_bits_are_near_and_the_gradient_is_that_of_the_spread_out_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 80)
    packed = NF4Linear.of(layer, "cpu")
    assert packed.weight.dtype == torch.uint8 and packed.weight.numel() == 96 * 80 // 2
    error = (packed.full() - layer.weight).abs().mean() / layer.weight.abs().mean()
    assert 0.01 < error < 0.12
    x = torch.randn(5, 96, requires_grad=True)
    out = packed(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    plain = x.detach().clone().requires_grad_()
    want = nn.functional.linear(plain, packed.full(), layer.bias)
    (wanted,) = torch.autograd.grad(want.square().sum(), plain)
    assert (out - want).abs().max() < 1e-5 and (grad - wanted).abs().max() < 1e-4
    with torch.no_grad():
        assert torch.equal(packed(x), out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_in_four_bits_carries_adapters(precision: str, tmp_path: Path) -> None:
    from tests.engine.test_learner import batch_of, two

    base, batch = base_of(tmp_path, precision=precision, quantize="nf4"), batch_of()
    if (maps := Path("/proc/self/maps")).exists():
        assert f"{base.folder}/model.safetensors" not in maps.read_text(), "the whole weights are still mapped"
    packed = [m for m in base.model.modules() if isinstance(m, NF4Linear)]
    assert len(packed) == 14 and type(base.model.lm_head) is not NF4Linear
    policy, reference = base.policy(0), Net(base.untrained(), "policy")
    one = Learner(Net(policy, "policy"), Optim(lr=1e-2), steps=9, precision=precision)  # type: ignore[arg-type]
    assert torch.equal(one.forward(batch)["logprobs"], reference(batch)["logprobs"])
    mine = {p.untyped_storage().data_ptr() for p in own(policy).values()}
    assert storages(base.model, policy) - storages(base.model) == mine
    values = []
    for _ in range(9):
        values.append(sum(one.forward_backward(batch, two).values()))
        one.step()
    assert values[-1] < values[0]
    plain = merged(policy)
    assert not any(isinstance(m, NF4Linear) for m in plain.modules())
    assert_merged(policy, plain, IDS)
    folder = save_model(plain, tmp_path / "plain", end_id=tiny.END, pad_id=tiny.PAD)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert (again.float()(input_ids=IDS).logits - plain.float()(input_ids=IDS).logits).abs().max() < 1e-5

    reward = reward_folder(trained(base.scalar(0)), tmp_path / "reward")
    assert adapted(base.reward(reward)), "the same weights in the same four bits are the same base"
    assert not adapted(Base(base.folder, Lora(r=4), precision=precision).reward(reward))  # type: ignore[arg-type]


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no nn.Linear layers" in one_line(lambda: to_nf4(tiny.policy("gpt2"), "cpu"))
    assert "no working NF4 kernel for xla" in one_line(lambda: to_nf4(tiny.policy(), "xla"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "pip install 'trueup[quantize]'" in one_line(lambda: to_nf4(tiny.policy(), "cpu"))
