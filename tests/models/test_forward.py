"""Packed rows do not see each other, and come out as they do one by one."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.models import tiny
from trueup.models import forward
from trueup.models.forward import NAME, bucket, hidden_states, pack, packs, supports_packing
from trueup.models.net import Net, prepare


@pytest.mark.parametrize("name", tiny.ALL)
def test_logprobs_and_gradients_equal_one_by_one(name: str) -> None:
    plain, fast, batch = tiny.policy(name), tiny.policy(name), tiny.rows()
    weight = torch.randn(batch["ids"].shape, generator=torch.Generator().manual_seed(1))
    want = tiny.plain_logprobs(plain, batch)
    (want * weight).sum().backward()
    got = Net(fast, "policy")(batch)["logprobs"]
    (got * weight).sum().backward()
    assert (got - want).abs().max() < 1e-5
    wanted, found = tiny.gradients(plain), tiny.gradients(fast)
    assert wanted.keys() == found.keys()
    scale = max(g.abs().max() for g in wanted.values())
    for key in wanted:
        assert (wanted[key] - found[key]).abs().max() < 1e-5 * scale, key


@pytest.mark.parametrize("name", tiny.ALL)
def test_which_families_pack(name: str) -> None:
    model = prepare(tiny.policy(name))
    assert packs(model, 13) == (name in tiny.PACKED)
    if name in tiny.PACKED:
        assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_values_and_scores_equal_one_by_one(name: str) -> None:
    plain, batch = tiny.scalar(name), tiny.rows()
    states = tiny.plain_states(plain, batch)
    values = torch.zeros(batch["ids"].shape)
    for b, hidden in enumerate(states):
        for i in range(1, len(hidden)):
            if batch["mask"][b, i]:
                values[b, i] = plain.score(hidden[i - 1])
    scores = torch.stack([plain.score(hidden[-1])[0] for hidden in states])

    critic, reward = Net(tiny.scalar(name), "critic"), Net(tiny.scalar(name), "reward")
    assert (critic(batch)["values"] - values).abs().max() < 1e-5
    assert (reward(batch)["scores"] - scores).abs().max() < 1e-5
    reward.set_affine(0.5, 2.0)
    assert (reward(batch)["scores"] - (scores - 0.5) / 2).abs().max() < 1e-5


def test_pairs_keep_their_shape_and_order() -> None:
    batch = tiny.rows([9, 2, 5, 13, 7, 4])
    pairs = {name: value.unflatten(0, (3, 2)) for name, value in batch.items()}
    reward, policy = Net(tiny.scalar(), "reward"), Net(tiny.policy(), "policy")
    assert torch.equal(reward(pairs)["scores"], reward(batch)["scores"].view(3, 2))
    assert torch.equal(policy(pairs)["logprobs"], policy(batch)["logprobs"].view(3, 2, -1))


@pytest.mark.parametrize("name", [*tiny.PACKED, "gemma2"])
def test_pairs_that_share_a_beginning_equal_rows_alone(name: str) -> None:
    """Scores and gradients; one pair shares nothing, one row is the beginning of its partner, one pair is equal."""
    batch = tiny.rows([9, 7, 5, 5, 4, 9, 6, 6])
    for pair, common in ((0, 4), (2, 4), (3, 6)):
        batch["ids"][2 * pair + 1, :common] = batch["ids"][2 * pair, :common]
    shared = {name: value.unflatten(0, (4, 2)) for name, value in batch.items()}
    assert (shared["ids"][2, 0, :4] == shared["ids"][2, 1, :4]).all()
    together, alone = Net(tiny.scalar(name), "reward"), Net(tiny.scalar(name), "reward")
    got, want = together(shared)["scores"], alone(batch)["scores"].view(4, 2)
    assert (got - want).abs().max() < 1e-5
    weight = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-1.0, 3.0], [1.0, 2.0]])
    (got * weight).sum().backward(), (want * weight).sum().backward()
    wanted, found = tiny.gradients(alone.model), tiny.gradients(together.model)
    scale = max(g.abs().max() for g in wanted.values())
    for key in wanted:
        assert (wanted[key] - found[key]).abs().max() < 1e-5 * scale, key


@pytest.mark.parametrize("name", [*tiny.PACKED, "gemma2"])
def test_log_probs_of_pairs_with_one_prompt_equal_those_of_the_plain_concatenations(name: str) -> None:
    """Outputs and gradients, against each row by itself through the model's own forward: a prompt of 4 and replies of 5
    and 3; replies that begin alike; a reply of one token; a pair with nothing in common; a pair of equal rows."""
    lengths, prompts, common = [9, 7, 8, 6, 9, 5, 4, 9, 6, 6], [4, 4, 4, 1, 3], [4, 5, 4, 0, 6]
    batch = tiny.rows(lengths)
    for pair, same in enumerate(common):
        batch["ids"][2 * pair + 1, :same] = batch["ids"][2 * pair, :same]
    column = torch.arange(batch["ids"].shape[1])
    starts = torch.tensor(prompts).repeat_interleave(2)[:, None]
    batch["mask"] = (column >= starts) & (column < batch["lengths"][:, None])
    pairs = {key: value.unflatten(0, (5, 2)) for key, value in batch.items()}
    together, alone = Net(tiny.policy(name), "policy"), tiny.policy(name)
    got, want = together(pairs)["logprobs"].flatten(0, 1), tiny.plain_logprobs(alone, batch)
    assert (got - want).abs().max() < 1e-5
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward(), (want * weight).sum().backward()
    wanted, found = tiny.gradients(alone), tiny.gradients(together.model)
    scale = max(g.abs().max() for g in wanted.values())
    for key in wanted:
        assert (wanted[key] - found[key]).abs().max() < 1e-5 * scale, key


def test_the_prompt_of_a_pair_runs_once() -> None:
    batch = tiny.rows([9, 7])
    batch["ids"][1, :4] = batch["ids"][0, :4]
    batch["ids"][1, 4] = batch["ids"][0, 4] % 60 + 1
    batch["mask"] = (torch.arange(11) >= 4) & (torch.arange(11) < batch["lengths"][:, None])
    net, ran = Net(tiny.policy(), "policy"), []
    net.model.get_input_embeddings().register_forward_hook(lambda module, args, out: ran.append(args[0].numel()))
    net({key: value[None] for key, value in batch.items()})
    assert ran == [9 - 1 + 7 - 1 - 4]


@pytest.mark.parametrize("name", tiny.PACKED)
def test_the_last_feed_forward_runs_on_what_is_read(name: str) -> None:
    rows: list[int] = []
    net, batch = Net(tiny.policy(name), "policy"), tiny.rows()
    parts = [m for n, m in net.model.named_modules() if n.endswith(".mlp")]
    for part in parts:
        part.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    net(batch)["logprobs"].sum().backward()
    # A row's last token predicts nothing, and so does not run at all.
    assert rows == [int((batch["lengths"] - 1).clamp(min=1).sum()), int(batch["mask"].sum())]
    net.model(input_ids=batch["ids"])
    assert rows[-1] == batch["ids"].shape[1]


def test_a_feed_forward_that_is_told_too_late_runs_on_all() -> None:
    """It runs before its attention, so that it would be told of the batch before."""

    def early(model):  # type: ignore[no-untyped-def]
        last = model.model.layers[-1]

        def run(hidden_states, **kwargs):  # type: ignore[no-untyped-def]
            fed = last.mlp(last.post_attention_layernorm(hidden_states))
            return fed + last.self_attn(hidden_states=last.input_layernorm(hidden_states), **kwargs)[0]

        last.forward = run
        return model

    batch, model = tiny.rows(), early(tiny.policy())
    want = tiny.plain_logprobs(early(tiny.policy()), batch)
    net = Net(model, "policy")
    assert packs(model, 5) and not model._trueup_cut
    assert (net(batch)["logprobs"] - want).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_stands_past_a_row_changes_nothing(name: str) -> None:
    net, batch = Net(tiny.policy(name), "policy"), tiny.rows()
    past = torch.arange(batch["ids"].shape[1])[None] >= batch["lengths"][:, None]
    other = batch | {"ids": batch["ids"].where(~past, 17)}
    assert (batch["ids"] != other["ids"]).any()
    assert torch.equal(net(batch)["logprobs"], net(other)["logprobs"])


def test_one_token_and_uncounted_rows() -> None:
    batch = tiny.rows([1, 2, 1, 6])
    batch["mask"][3] = False
    batch["mask"][1, 1] = True
    out = Net(tiny.policy(), "policy")(batch)
    want = tiny.plain_logprobs(tiny.policy(), batch)
    assert (out["logprobs"] - want).abs().max() < 1e-5
    assert out["logprobs"][1, 1] != 0 and (out["logprobs"] != 0).sum() == 1


def test_an_uncounted_batch_still_has_a_gradient_of_zero() -> None:
    """A rank whose rows do not count must still take part in the reduction of gradients."""
    net, batch = Net(tiny.policy(), "policy"), tiny.rows()
    batch["mask"][:] = False
    net(batch)["logprobs"].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_says_once_that_it_pads(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_said", set())
    with caplog.at_level(logging.WARNING, logger="trueup"):
        model, batch = prepare(tiny.policy("gemma2")), tiny.rows()
        for _ in range(2):
            hidden_states(model, batch["ids"], batch["lengths"].tolist())
            packs(prepare(tiny.policy("mistral-window")), 13)
    assert [r.message.split(" runs padded")[0] for r in caplog.records] == ["Gemma2ForCausalLM", "MistralForCausalLM"]
    assert "soft-capped" in caplog.records[0].message and "window of 4" in caplog.records[1].message


def test_window_as_long_as_the_row_packs() -> None:
    model = prepare(tiny.policy("mistral-window"))
    assert packs(model, 4) and not packs(model, 5)
    batch = tiny.rows([4, 2, 3])
    want = tiny.plain_logprobs(tiny.policy("mistral-window"), batch)
    assert (Net(model, "policy")(batch)["logprobs"] - want).abs().max() < 1e-5


def test_config_refuses_what_it_names() -> None:
    assert supports_packing(tiny.ALL["llama"]()) == (True, "")
    assert "soft-capped" in supports_packing(tiny.ALL["gemma2"]())[1]


def test_the_probe_catches_attention_it_cannot_reproduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reason by name, the numbers alone must refuse: Gemma 2's soft cap, with its scores made large."""
    monkeypatch.setattr(forward, "supports_packing", lambda config: (True, ""))
    model = tiny.policy("gemma2")
    model.config.attn_logit_softcapping = 0.5
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    assert not packs(model, 5)
    assert model.config._attn_implementation != NAME


def test_plain_calls_stay_right_after_preparing() -> None:
    """A left-padded batch through the model's own forward still gets its mask."""
    model, batch = prepare(tiny.policy()), tiny.rows([6, 6])
    alone = model(input_ids=batch["ids"][:1, :6]).logits[0, -1]
    ids = torch.cat([torch.full((1, 3), 5), batch["ids"][:1, :6]], 1)
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    padded = model(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[0, -1]
    assert (alone - padded).abs().max() < 1e-5


def test_layout_of_rows() -> None:
    """Rows of 3, 1 and 2 tokens: flat order is longest first; one bucket of 3 x 3 places, three of them empty.

    flat     a0 a1 a2 c0 c1 b0
    places   a0 a1 a2 | c0 c1 . | b0 . .
    """
    packed = pack([3, 1, 2], 4, "cpu")
    assert packed.token.tolist() == [0, 1, 2, 8, 9, 4]
    assert packed.position.tolist() == [0, 1, 2, 0, 1, 0]
    assert packed.flat[0, :3].tolist() == [0, 1, 2] and packed.flat[1, 0] == 5 and packed.flat[2, :2].tolist() == [3, 4]
    assert packed.layout.shapes == ((3, 3),)
    assert packed.layout.place_of.tolist() == [0, 1, 2, 3, 4, 6]
    assert packed.layout.token_of.tolist() == [0, 1, 2, 3, 4, 0, 5, 0, 0]


def test_buckets_hold_like_lengths() -> None:
    assert bucket([100] * 5 + [10] * 5) == [(5, 100), (5, 10)]
    assert bucket([100, 10]) == [(2, 100)]
    lengths = sorted(torch.randint(1, 200, (64,), generator=torch.Generator().manual_seed(0)).tolist(), reverse=True)
    shapes = bucket(lengths)
    assert sum(r for r, _ in shapes) == 64 and len(shapes) < 20
    assert sum(r * n for r, n in shapes) < 1.15 * sum(lengths)


def test_rows_may_share_flat_tokens() -> None:
    """Two answers to one prompt share the prompt's tokens.

    flat     p0 p1 p2 a0 a1 b0           rows  [p0 p1 p2 a0 a1], [p0 p1 p2 b0 .]
    """
    batch = {"ids": torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]]), "lengths": torch.tensor([5, 4])}
    want = tiny.plain_states(tiny.policy(), batch)
    model = prepare(tiny.policy())
    packed = pack([5, 4], 5, "cpu", shared=[0, 3])
    layout = packed.layout
    assert packed.token.tolist() == [0, 1, 2, 3, 4, 8] and packed.position.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.flat.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert layout.token_of.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0] and layout.place_of.tolist() == [0, 1, 2, 3, 4, 8]
    assert layout.again is not None and [x.tolist() for x in layout.again] == [[5, 6, 7], [0, 1, 2]]
    ids, position = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[0, 1, 2, 3, 4, 3]])
    out = forward.states_of(model, ids, position, layout)[0]
    assert (out[:5] - want[0]).abs().max() < 1e-5
    assert (out[5] - want[1][3]).abs().max() < 1e-5


def test_packing_makes_nothing_of_size_tokens_squared() -> None:
    """No mask of [N, N] is made, and attention stays within rows: its cost follows the rows' lengths."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    net, batch = Net(tiny.policy(), "policy"), tiny.rows([8] * 60)
    with Watch():
        net(batch)["logprobs"].sum().backward()
    tokens = 60 * 7  # the last token of a row predicts nothing
    assert tokens * 32 < largest < tokens * tokens / 2
