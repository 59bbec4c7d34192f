"""Layers that run again in the backward give the gradients of layers that keep everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.engine.test_learner import batch_of, learner, two
from tests.models import tiny
from trueup.engine.learner import Learner, Optim
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.net import Net
from trueup.records import UserError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_memory_alone(name: str, precision: str) -> None:
    """Packed and padded families; gemma2's layers run padded. What the graph keeps is counted in bytes."""
    batch, grads, kept, runs = batch_of(64), [], [], []
    for on in (False, True):
        one = learner(name=name, precision=precision, gradient_checkpointing=on)
        seen: dict[int, int] = {}
        ran: list[int] = []
        for layer in one.net.model.base_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                attention = next(m for n, m in layer.named_modules() if n.endswith(("attn", "attention")))
                attention.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))

        def keep(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            one.forward_backward(batch, two)
        grads.append({key: p.grad for key, p in one.net.named_parameters()})
        kept.append(sum(seen.values()))
        runs.append(len(ran))
    assert runs[1] == 2 * runs[0] > 0
    assert kept[1] < 0.7 * kept[0]
    for key, grad in grads[0].items():
        assert (grad - grads[1][key]).abs().max() <= 1e-6, key


def test_gradient_checkpointing_leaves_the_sampler_and_the_files_alone() -> None:
    one = learner(gradient_checkpointing=True)
    samples = [
        Sampler(model, end_id=tiny.END, decode=str).sample([[5, 6]] * 3, Sampling(max_tokens=9), seed=1)
        for model in (tiny.policy(), one.net.model)
    ]
    assert samples[0] == samples[1]
    assert one.net.model.state_dict().keys() == tiny.policy().state_dict().keys()


def test_a_family_without_layers_that_can_run_again_is_refused() -> None:
    model = tiny.policy()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="gradient_checkpointing"):
        Learner(Net(model, "policy"), Optim(gradient_checkpointing=True), steps=1)
