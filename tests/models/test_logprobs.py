"""Log-probs, entropy and KL without [B, T, V] equal those with it, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny
from trueup.models import logprobs
from trueup.models.linear import FastLinear, fast_linears, product
from trueup.models.logprobs import Head, compare, token_logprobs
from trueup.models.net import Net, compare_per_token


def slow(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale and bias": {"scale": 0.4, "bias": True},
    "cap": {"cap": 2.0, "temperature": 1.3, "bias": True},
}


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_way(case: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(CASES[case])
    temperature = settings.pop("temperature", 1.0)
    monkeypatch.setattr(logprobs, "CHUNK", 4 * 19)  # rows in chunks of 4, the last one short
    monkeypatch.setattr(logprobs, "KEEP", 1 << 20 if keep else 0)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(14, 8), torch.randn(19, 8), torch.randint(0, 19, (14,))
    bias = torch.randn(19) if settings.pop("bias", False) else None
    a, b = torch.randn(14), torch.randn(14)
    found = []
    for way in (slow, lambda h, d, y, t: token_logprobs(h, d, y, temperature=t)):
        leaves = [x.clone().requires_grad_() if x is not None else None for x in (hidden, weight, bias)]
        lp, entropy = way(leaves[0], Head(leaves[1], leaves[2], **settings), targets, temperature)
        (lp * a + entropy * b).sum().backward()
        found.append([lp, entropy, *(leaf.grad for leaf in leaves if leaf is not None)])
    for want, got in zip(*found, strict=True):
        assert (want - got).abs().max() < 2e-5


@pytest.mark.parametrize("part", [0, 1], ids=["logprobs", "entropy"])
def test_gradient_of_one_output_alone(part: int) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8), torch.randn(19, 8), torch.randint(0, 19, (6,))
    grads = []
    for way in (slow, lambda h, d, y, t: token_logprobs(h, d, y, temperature=t)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        way(leaves[0], Head(leaves[1]), targets, 1.0)[part].sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for want, got in zip(*grads, strict=True):
        assert (want - got).abs().max() < 2e-5


def test_no_logits_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that the head makes, forward and backward, is a chunk."""
    monkeypatch.setattr(logprobs, "CHUNK", 8 * 500)
    monkeypatch.setattr(logprobs, "KEEP", 0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(128, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Watch():
        lp, entropy = token_logprobs(hidden, Head(weight), torch.randint(0, 500, (128,)))
        (lp + entropy).sum().backward()
    assert hidden.grad is not None and largest <= 8 * 500 < 128 * 500


def test_only_counted_tokens_meet_the_head() -> None:
    batch = tiny.rows()
    seen = []
    net = Net(tiny.policy(), "policy")
    original = logprobs.Head.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs.Head, "__call__", lambda self, h: seen.append(len(h)) or original(self, h))
        net(batch)
    assert seen == [int(batch["mask"].sum())]


@pytest.mark.parametrize("name", tiny.HEADS)
def test_the_head_is_the_models(name: str) -> None:
    model = tiny.policy(name)
    if name == "phi":
        model.lm_head.bias.data.normal_()
    ids = tiny.rows()["ids"]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        got = Head.of(model)(model.base_model(input_ids=ids).last_hidden_state)
    assert (want - got).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_policy_of_a_scaled_or_capped_family(name: str) -> None:
    batch, plain, fast = tiny.rows(), tiny.policy(name), tiny.policy(name)
    want = tiny.plain_logprobs(plain, batch, 0.8)
    got = Net(fast, "policy", temperature=0.8)(batch)["logprobs"]
    assert (want - got).abs().max() < 1e-5
    want.sum().backward()
    got.sum().backward()
    wanted, found = tiny.gradients(plain), tiny.gradients(fast)
    scale = max(g.abs().max() for g in wanted.values())
    assert max((wanted[k] - found[k]).abs().max() for k in wanted) < 1e-5 * scale


def test_temperature_and_entropy_of_the_net() -> None:
    batch, model = tiny.rows(), tiny.policy()
    out = Net(tiny.policy(), "policy", temperature=1.7)(batch)
    assert (out["logprobs"] - tiny.plain_logprobs(model, batch, 1.7)).abs().max() < 1e-5
    for b, logits in enumerate(tiny.plain_logits(model, batch)):
        logp = torch.log_softmax(logits / 1.7, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        for i in range(batch["ids"].shape[1]):
            want = entropy[i - 1] if batch["mask"][b, i] else torch.zeros(())
            assert abs(float(out["entropy"][b, i] - want)) < 1e-5


def test_exact_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 5 * tiny.VOCAB)
    batch, p, q = tiny.rows(), tiny.policy("llama"), tiny.policy("qwen2")
    nets = [Net(tiny.policy(family), "policy", 1.4) for family in ("llama", "qwen2")]
    got = compare_per_token(*nets, batch)
    for name, net in zip(("logprobs", "ref_logprobs"), nets, strict=True):
        torch.testing.assert_close(got[name], net(batch)["logprobs"], atol=1e-5, rtol=0)
    rows = zip(tiny.plain_logits(p, batch), tiny.plain_logits(q, batch), strict=True)
    for b, (a, c) in enumerate(rows):
        logp, logq = torch.log_softmax(a / 1.4, -1), torch.log_softmax(c / 1.4, -1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        for i in range(batch["ids"].shape[1]):
            want = kl[i - 1] if batch["mask"][b, i] else torch.zeros(())
            assert abs(float(got["kl"][b, i] - want)) < 1e-4
    same = compare_per_token(Net(tiny.policy(), "policy"), Net(tiny.policy(), "policy"), batch)
    assert not same["kl"].any() and torch.equal(same["logprobs"], same["ref_logprobs"])
    hidden = torch.randn(3, 32)
    assert (compare(hidden, Head.of(p), hidden, Head.of(q), torch.zeros(3, dtype=torch.long))[0] > 0).all()


@pytest.mark.parametrize("rows", [1, 40, 4000], ids=["small", "middle", "large"])
def test_fast_linear_is_linear(rows: int) -> None:
    torch.manual_seed(0)
    plain, fast = nn.Linear(48, 32), nn.Linear(48, 32)
    fast.load_state_dict(plain.state_dict())
    fast_linears(fast)
    assert type(fast) is FastLinear and fast.state_dict().keys() == plain.state_dict().keys()
    x, weight = torch.randn(2, rows, 48), torch.randn(2, rows, 32)
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    (fast(got) * weight).sum().backward()
    (plain(want) * weight).sum().backward()
    assert (fast(x) - plain(x)).abs().max() < 1e-5
    pairs = [(got.grad, want.grad), (fast.weight.grad, plain.weight.grad), (fast.bias.grad, plain.bias.grad)]
    for a, b in pairs:
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    assert (product(x, plain.weight) - x @ plain.weight.T).abs().max() < 1e-5
