"""A policy, a critic or a reward model as one module from a batch of rectangles to named outputs.

token index      0    1    2    3    4    5        row: prompt ids, completion ids, end token, then anything
ids              p0   p1   c0   c1   end  -        lengths = 5
mask             .    .    T    T    T    .        the tokens whose log-prob counts
read at          .    .    h1   h2   h3   .        log-prob and value of token i come from hidden state i - 1
score            .    .    .    .    h4   .        a reward model reads the state at lengths - 1
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from trueup.models.forward import device_of, packs, states_at
from trueup.models.linear import fast_linears
from trueup.models.logprobs import Head, compare, token_logprobs

Kind = Literal["policy", "critic", "reward"]
Precision = Literal["fp32", "bf16"]
Batch = dict[str, Tensor]


class Net(nn.Module):
    """`kind` says what is read from the model; see `forward`. Dropout is off, so that equal inputs and weights give
    equal outputs in sampling, scoring and training.

    mean, std: buffers of the scalar kinds; output = (raw - mean) / std. They are not part of the model's weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: PreTrainedModel, kind: Kind, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = prepare(model)
        self.kind: Kind = kind
        self.temperature = temperature
        device = device_of(model)
        self.register_buffer("mean", torch.zeros((), device=device))
        self.register_buffer("std", torch.ones((), device=device))

    def set_affine(self, mean: float, std: float) -> None:
        """From now on a scalar output is (raw - mean) / std."""
        self.mean.fill_(mean)
        self.std.fill_(std)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """ids [B, L] or pairs [B, 2, L], lengths [B] or [B, 2], mask as ids (True = counts; False in column 0).

        policy: logprobs and entropy, shaped as ids, of softmax(logits / temperature), zero outside the mask
        critic: values, shaped as ids, zero outside the mask
        reward: scores, shaped as lengths
        """
        ids, lengths = batch["ids"].flatten(0, -2), batch["lengths"].flatten()
        if self.kind == "reward":
            last = torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1
            hidden = states_at(self.model, ids, lengths.tolist(), last, shared=_shared(batch, lengths))
            return {"scores": self._scalar(hidden).view(batch["lengths"].shape)}
        mask = batch["mask"].flatten(0, -2)
        hidden = self._before(batch)
        if self.kind == "critic":
            return {"values": _spread(self._scalar(hidden), batch["mask"])}
        logprobs, entropy = token_logprobs(hidden, Head.of(self.model), ids[mask], temperature=self.temperature)
        return {"logprobs": _spread(logprobs, batch["mask"]), "entropy": _spread(entropy, batch["mask"])}

    def _before(self, batch: Batch) -> Tensor:
        """The hidden state [M, d] that predicts each counted token."""
        # The last token of a row predicts nothing that counts, so it need not go through the model.
        lengths = (batch["lengths"].flatten() - 1).clamp(min=1)
        cells = batch["mask"].flatten().nonzero()[:, 0] - 1
        shared = _shared(batch, lengths)
        return states_at(self.model, batch["ids"].flatten(0, -2), lengths.tolist(), cells, shared=shared)

    def _scalar(self, hidden: Tensor) -> Tensor:
        head = score_head(self.model)
        # A head that learns on a frozen body in bfloat16 is float32 itself.
        raw = head(hidden.to(head.weight.dtype))[:, 0].float()
        return (raw - self.mean) / self.std

    def outputs_like(self, batch: Batch) -> dict[str, Tensor]:
        """Zeros of the names and shapes that `forward` gives."""
        if self.kind == "reward":
            return {"scores": torch.zeros_like(batch["lengths"], dtype=torch.float32)}
        zero = torch.zeros_like(batch["ids"], dtype=torch.float32)
        return {"values": zero} if self.kind == "critic" else {"logprobs": zero, "entropy": zero}


class InBF16(nn.Module):
    """A network whose parameters are float32 and whose forward runs on a bfloat16 copy of them; what is bfloat16
    (a frozen base) or packed already is used as it is.

    The cast is part of the graph, so that gradients arrive, add up and are reduced over ranks in float32.
    """

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        copy = {n: p.to(torch.bfloat16) for n, p in self.net.named_parameters() if p.is_floating_point()}
        return functional_call(self.net, copy, (batch,))  # type: ignore[no-any-return]


@torch.no_grad()
def compare_per_token(policy: Net, reference: Net, batch: Batch) -> dict[str, Tensor]:
    """At each counted token, in nats [B, L], zero outside the mask: `kl`, KL(policy || reference) over the vocabulary;
    `logprobs` and `ref_logprobs`, the token's own under either."""
    found = compare(
        policy._before(batch),
        Head.of(policy.model),
        reference._before(batch),
        Head.of(reference.model),
        batch["ids"][batch["mask"]],
        temperature=policy.temperature,
    )
    names = ("kl", "logprobs", "ref_logprobs")
    return {name: _spread(value, batch["mask"]) for name, value in zip(names, found, strict=True)}


def _shared(batch: Batch, lengths: Tensor) -> list[int] | None:
    """With how many of its partner's tokens each row of pairs [B, 2, L] begins, of the lengths [2B] that go through the
    model; None for single rows. Both keep their last token to themselves: `pack` wants one."""
    if batch["lengths"].ndim == 1:
        return None
    first, second = batch["ids"].unbind(1)
    alike = (first == second).long().cumprod(-1).sum(-1)
    common = torch.minimum(alike, lengths.view(-1, 2).min(1).values - 1)
    return torch.stack([torch.zeros_like(common), common], 1).flatten().tolist()  # type: ignore[no-any-return]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """values [M] at the M places where mask is True, in order; zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns a hidden state into one number."""
    return model.score  # type: ignore[return-value]


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, in place: dropout at zero, eval mode, fast linear layers, packed attention where the family
    allows it. Its config and files stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast_linears(model)
    packs(model.eval(), 1)
    return model
