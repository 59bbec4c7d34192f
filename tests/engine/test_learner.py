"""One update is one update: whatever the micro-batches, the pauses, or what a loss divides by."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from trueup.engine.learner import Learner, Optim
from trueup.engine.rows import split
from trueup.models.net import Batch, Net

Losses = dict[str, tuple[Tensor, Tensor]]


def parts(learner, batch):
    """The micro-batches that this process would run."""
    return split(batch, learner.mesh, learner.optim.micro_tokens)[1][learner.mesh.rank]


def nll(outputs: dict[str, Tensor], batch: Batch) -> Losses:
    return {"nll": (-outputs["logprobs"], batch["mask"].float())}


def two(outputs: dict[str, Tensor], batch: Batch) -> Losses:
    """Two losses with unlike weights, one per token and one per row."""
    per_row = (outputs["logprobs"].sum(1) - 1) ** 2
    return nll(outputs, batch) | {"rows": (0.1 * per_row, batch["weight"])}


def bt(outputs: dict[str, Tensor], batch: Batch) -> Losses:
    scores = outputs["scores"]
    return {"bt": (-torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]), batch["weight"])}


def regress(outputs: dict[str, Tensor], batch: Batch) -> Losses:
    return {"value": ((outputs["values"] - 1) ** 2, batch["mask"].float())}


def batch_of(count: int = 10, seed: int = 0) -> Batch:
    lengths = torch.randint(2, 15, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = tiny.rows(lengths, seed)
    batch["mask"][:, 1] = True
    return batch | {"weight": torch.linspace(0.5, 2, count)}


def pairs_of(count: int = 8, seed: int = 0) -> Batch:
    batch = batch_of(2 * count, seed)
    return {name: batch[name].unflatten(0, (count, 2)) for name in ("ids", "lengths")} | {
        "weight": torch.linspace(0.5, 2, count)
    }


def learner(
    kind: str = "policy", *, name: str = "llama", precision: str = "fp32", steps: int = 6, **optim: object
) -> Learner:
    model = tiny.policy(name) if kind == "policy" else tiny.scalar(name)
    settings = Optim.model_validate({"lr": 1e-2, "schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1, **optim})
    return Learner(Net(model, kind), settings, steps=steps, precision=precision)  # type: ignore[arg-type]


def weights(one: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in one.net.named_parameters()}


def apart(a: Learner, b: Learner) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def train(one: Learner, loss_fn, make, steps: int, first: int = 0) -> list[float]:  # type: ignore[no-untyped-def]
    out = []
    for i in range(first, first + steps):
        out.append(sum(one.forward_backward(make(seed=i), loss_fn).values()))
        one.step()
    return out


@pytest.mark.parametrize(
    ("kind", "loss_fn", "make"),
    [("policy", two, batch_of), ("critic", regress, batch_of), ("reward", bt, pairs_of)],
    ids=["policy", "critic", "reward"],
)
def test_the_token_budget_does_not_change_the_update(kind, loss_fn, make) -> None:  # type: ignore[no-untyped-def]
    # Adam's first steps move by the sign of the gradient, so rounding would show; eps makes them proportional.
    runs = [learner(kind, micro_tokens=tokens, eps=1e-3, lr=1e-3) for tokens in (8192, 25, 1)]
    losses = [train(one, loss_fn, make, 3) for one in runs]
    assert len(parts(runs[0], make())) == 1 and len(parts(runs[1], make())) > 2
    for other, values in zip(runs[1:], losses[1:], strict=True):
        assert values == pytest.approx(losses[0], rel=1e-5)
        assert apart(runs[0], other) < 1e-6


def test_it_is_the_plain_update() -> None:
    """Against the update written out: mean over counted tokens of the whole minibatch, plain torch AdamW."""
    batch, one = batch_of(), learner(micro_tokens=40, clip_norm=0.0, warmup=0.0, schedule="constant", eps=1e-3)
    model = tiny.policy()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, eps=1e-3
    )
    for _ in range(2):
        loss = -tiny.plain_logprobs(model, batch).sum() / batch["mask"].sum()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        adam.step()
        adam.zero_grad()
        assert one.forward_backward(batch, nll)["nll"] == pytest.approx(loss.item(), rel=1e-5)
        assert one.step()["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    want = dict(model.named_parameters())
    for name, parameter in weights(one).items():
        assert (parameter - want[name.removeprefix("model.")]).abs().max() < 1e-5, name


def test_norms_and_biases_do_not_decay() -> None:
    one = learner(name="gpt2", weight_decay=0.5, warmup=0.0, schedule="constant")
    before = weights(one)
    one.forward_backward(batch_of(), lambda o, b: {"none": (o["logprobs"] * 0, b["mask"].float())})
    one.step()
    for name, parameter in weights(one).items():
        share = 1 - 1e-2 * 0.5 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * share, rtol=1e-6), name


def test_the_gradient_is_clipped() -> None:
    free, held = learner(clip_norm=0.0), learner(clip_norm=0.01)
    for one in (free, held):
        one.forward_backward(batch_of(), nll)
        one._adam.zero_grad, one._adam.step = lambda: None, lambda: None  # type: ignore[method-assign,assignment]
        norm = one.step()["grad_norm"]
        found = torch.nn.utils.get_total_norm([p.grad for p in one.net.parameters()])  # type: ignore[misc]
        assert norm > 0.1
        assert float(found) == pytest.approx(norm if one is free else 0.01, rel=1e-3)


def test_schedules() -> None:
    steps = 10
    rates = {
        s: [Optim(lr=1.0, warmup=0.2, schedule=s).rate(i, steps) for i in range(12)]
        for s in ("constant", "linear", "cosine")
    }  # type: ignore[arg-type]
    assert rates["constant"] == [0.5] + [1.0] * 11
    assert rates["linear"] == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])
    assert (
        rates["cosine"][2] == 1.0
        and rates["cosine"][6] == pytest.approx(0.5)
        and rates["cosine"][10] == pytest.approx(0)
    )
    assert rates["cosine"][4] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    one = learner(steps=4, lr=0.5, warmup=0.5, schedule="linear")
    found = []
    for _ in range(4):
        one.forward_backward(batch_of(), nll)
        found.append(one.step()["lr"])
    assert found == pytest.approx([0.25, 0.5, 0.5, 0.25])


def test_forward_is_the_training_path_in_global_order() -> None:
    batch, one = batch_of(), learner(micro_tokens=30)
    assert len(parts(one, batch)) > 2
    out = one.forward(batch)
    assert not out["logprobs"].requires_grad
    assert (out["logprobs"] - tiny.plain_logprobs(tiny.policy(), batch)).abs().max() < 1e-5

    def ratio(outputs: dict[str, Tensor], part: Batch) -> Losses:
        worst.append(float(((outputs["logprobs"] - part["old"]).exp() - 1).abs().max().detach()))
        return nll(outputs, part)

    worst: list[float] = []
    one.forward_backward(batch | {"old": out["logprobs"]}, ratio)
    assert max(worst[1:]) == 0.0  # the first call sums weights on zeros


def test_forward_of_pairs() -> None:
    batch, one = pairs_of(), learner("reward", micro_tokens=30)
    assert torch.allclose(one.forward(batch)["scores"], one.net(batch)["scores"], atol=1e-5)


def test_bf16_stays_close_and_keeps_masters() -> None:
    full, half = learner(lr=3e-3), learner(lr=3e-3, precision="bf16", micro_tokens=40)
    start = weights(full)

    def same(seed: int) -> Batch:
        return batch_of()

    a, b = train(full, nll, same, 6), train(half, nll, same, 6)
    assert b == pytest.approx(a, rel=2e-2) and a != b
    assert a[-1] < a[0] - 0.05
    assert all(p.dtype == torch.float32 for p in half.net.parameters())
    flat = [torch.cat([p.flatten() for p in w.values()]) for w in (start, weights(full), weights(half))]
    assert (flat[1] - flat[2]).norm() < 0.3 * (flat[1] - flat[0]).norm()
    out = half.forward(batch_of())["logprobs"]
    assert out.dtype == torch.float32 and 0 < (out - half.net(batch_of())["logprobs"]).abs().max() < 0.2


def test_bf16_of_tied_weights() -> None:
    """The embedding and the head are one parameter: its gradient is the sum of both uses."""
    full, half = learner(name="llama-tied"), learner(name="llama-tied", precision="bf16")
    grads = []
    for one in (full, half):
        one.forward_backward(batch_of(), nll)
        grads.append({name: p.grad for name, p in one.net.named_parameters()})
    assert grads[0].keys() == grads[1].keys() and "model.lm_head.weight" not in grads[0]
    for name, whole in grads[0].items():
        assert (whole - grads[1][name]).norm() < 0.05 * whole.norm(), name


def test_bf16_gradients_add_up_in_float32() -> None:
    """Many micro-batches: were gradients summed in bfloat16, small late ones would be lost."""
    batch = batch_of(96)
    grads = []
    for tokens in (1 << 20, 1):
        one = learner(precision="bf16", micro_tokens=tokens)
        one.forward_backward(batch, nll)
        grads.append({name: p.grad for name, p in one.net.named_parameters()})
    for name, whole in grads[0].items():
        assert whole.dtype == torch.float32
        assert (whole - grads[1][name]).norm() < 0.02 * whole.norm(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(bad: float) -> None:
    one = learner()
    before = weights(one)
    with pytest.raises(FloatingPointError, match=r"loss 'nll' is (nan|-?inf) in 10 of 10 rows, weights unchanged"):
        one.forward_backward(batch_of(), lambda o, b: {"nll": (o["logprobs"] * bad, b["mask"].float())})
    assert all(torch.equal(before[k], v) for k, v in weights(one).items())
    assert all(p.grad is None for p in one.net.parameters())


def test_a_gradient_that_is_not_finite_stops() -> None:
    """A finite loss whose gradient is not: the square root of zero."""
    one = learner()
    before = weights(one)

    def root(outputs: dict[str, Tensor], batch: Batch) -> Losses:
        return {"root": ((outputs["logprobs"] * 0).sqrt(), batch["mask"].float())}

    one.forward_backward(batch_of(), root)
    with pytest.raises(FloatingPointError, match=r"gradient of model\..* is not finite, weights unchanged"):
        one.step()
    assert all(torch.equal(before[k], v) for k, v in weights(one).items()) and one.done == 0
    one.forward_backward(batch_of(), nll)
    assert math.isfinite(one.step()["grad_norm"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_for_bit(precision: str) -> None:
    make = partial(learner, precision=precision, micro_tokens=60)
    straight, first, second = make(), make(), make()
    losses = train(straight, two, batch_of, 6)
    before = train(first, two, batch_of, 2)
    state = {name: value.clone() for name, value in first.state().items()}
    assert all(isinstance(value, Tensor) for value in state.values())
    train(first, two, batch_of, 1, first=5)  # the saved state is a state, not a view that goes on
    second.load_state(copy.deepcopy(state))
    assert before + train(second, two, batch_of, 4, first=2) == losses
    assert apart(straight, second) == 0.0
    for name, value in straight.state().items():
        assert torch.equal(value, second.state()[name]), name


def test_state_holds_the_affine() -> None:
    one, other = learner("critic"), learner("critic")
    one.net.set_affine(1.5, 3.0)
    other.load_state(one.state())
    assert (other.net.mean.item(), other.net.std.item()) == (1.5, 3.0)
    with pytest.raises(KeyError):
        other.load_state({k: v for k, v in one.state().items() if not k.startswith("param.")})


def test_rows_that_do_not_count_change_nothing() -> None:
    batch = batch_of(6)
    one, other = learner(eps=1e-3), learner(eps=1e-3)
    more = batch_of(9)
    more = {k: torch.cat([v, more[k][6:, : v.shape[1]] if v.ndim > 1 else more[k][6:]]) for k, v in batch.items()}
    more["lengths"] = more["lengths"].clamp(max=batch["ids"].shape[1])
    more["mask"][6:] = False
    assert one.forward_backward(batch, nll)["nll"] == pytest.approx(other.forward_backward(more, nll)["nll"], rel=1e-6)
    one.step(), other.step()
    assert apart(one, other) < 1e-6


def test_a_minibatch_of_weight_zero_is_a_loss_of_zero() -> None:
    one, batch = learner(weight_decay=0.0), batch_of(4)
    batch["mask"][:] = False
    before = weights(one)
    assert one.forward_backward(batch, nll) == {"nll": 0.0}
    assert one.step()["grad_norm"] == 0.0
    assert all(torch.equal(before[k], v) for k, v in weights(one).items())


def test_metrics_are_reduced_but_not_optimized() -> None:
    def both(outputs: dict[str, Tensor], batch: Batch) -> Losses:
        return nll(outputs, batch) | {"metric/odd": (outputs["logprobs"] * float("inf"), batch["mask"].float())}

    def named(outputs: dict[str, Tensor], batch: Batch) -> Losses:
        return nll(outputs, batch) | {"metric/entropy": (outputs["entropy"], batch["weight"][:, None] * batch["mask"])}

    one, other, batch = learner(micro_tokens=25, eps=1e-3), learner(eps=1e-3), batch_of()
    values = one.forward_backward(batch, named)
    other.forward_backward(batch, nll)
    one.step(), other.step()
    assert apart(one, other) < 1e-5
    entropy = Net(tiny.policy(), "policy")(batch)["entropy"]
    weight = batch["weight"][:, None] * batch["mask"]
    assert values["metric/entropy"] == pytest.approx(
        float(((entropy * weight).sum() / weight.sum()).detach()), rel=1e-5
    )
    assert not math.isfinite(learner().forward_backward(batch, both)["metric/odd"])
