"""Hidden states of rows of different lengths, without padding: packed forwards for any Hugging Face decoder.

All real tokens of a batch go through the model as one sequence `[1, N]`. Everything but attention treats tokens
alone, so only attention must know where a row begins: a function registered with transformers' AttentionInterface
finds a `Layout` among its keyword arguments and computes attention row by row. Rows of about equal length share a
call (a bucket), so padding stays inside attention and stays small.

A family whose attention this function cannot reproduce (soft-capped scores, attention sinks, ALiBi, windows shorter
than a row, recurrent layers) is run padded through its own code instead. `packs` decides by the config and by a
probe on the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

log = logging.getLogger("trueup")

NAME = "trueup"
"""What our attention is called in `model.set_attn_implementation`."""

_said: set[str] = set()


def say_once(text: str) -> None:
    """A warning that is worth one line for a whole process."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trueup_layout: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function. Without a layout it is transformers' own SDPA attention; dropout is always off."""
    if trueup_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling, **kwargs)
    return trueup_layout.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # so that plain calls, without a layout, stay right


def states_of(model: PreTrainedModel, ids: Tensor, position: Tensor, layout: Any) -> Tensor:
    """The last hidden states [B, L, d] of ids and positions [B, L], attention as the layout's `attend` does it."""
    out = model.base_model(
        input_ids=ids,
        position_ids=position,
        # transformers takes a mask of four dimensions as it is and so makes none; the layout stands for it.
        attention_mask=torch.zeros(1, 1, 1, 1, device=ids.device),
        use_cache=False,
        trueup_layout=layout,
    )
    return out.last_hidden_state  # type: ignore[no-any-return]


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


class _Spread(torch.autograd.Function):
    """Flat tokens [N, ...] to places [K, ...]; each token has one place, places without a token repeat token 0.

    The backward is a gather too, which is much faster than the accumulating backward of `index_select`. It may
    ignore the empty places because nothing flows back from them: they stand after the row's tokens, which causal
    attention never lets see them, and `_Collect` sends them a zero gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of: Tensor, place_of: Tensor) -> Tensor:
        ctx.save_for_backward(place_of)
        return x.index_select(0, token_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place_of,) = ctx.saved_tensors
        return grad.index_select(0, place_of), None, None


class _Collect(torch.autograd.Function):
    """Places [K, ...] to flat tokens [N, ...]; empty places get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place_of: Tensor) -> Tensor:
        ctx.save_for_backward(place_of)
        ctx.places = x.shape[0]
        return x.index_select(0, place_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place_of,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.places, *grad.shape[1:])
        return out.index_copy_(0, place_of, grad), None


@dataclass(frozen=True)
class Layout:
    """Which flat tokens each attention row holds, and where each flat token's output is read.

    token_of [K]: the flat token at each place; places are the cells of the buckets, one bucket after another, each a
    rectangle of `shapes[i]` = (rows, length). place_of [N]: where the output of each flat token is read. With
    `once`, a flat token stands at one place; without, rows may share flat tokens (a common prefix).
    """

    token_of: Tensor
    place_of: Tensor
    shapes: tuple[tuple[int, int], ...]
    once: bool = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, N, D], key and value [1, Hkv, N, D] -> [1, N, H, D]."""
        groups = query.shape[1] // key.shape[1]
        sizes = [rows * length for rows, length in self.shapes]
        q, k, v = (self._spread(x[0].transpose(0, 1)).split(sizes) for x in (query, key, value))
        out = []
        for shape, *parts in zip(self.shapes, q, k, v, strict=True):
            qb, kb, vb = (x.unflatten(0, shape).transpose(1, 2) for x in parts)
            if groups > 1:
                kb, vb = kb.repeat_interleave(groups, 1), vb.repeat_interleave(groups, 1)
            ob = scaled_dot_product_attention(qb, kb, vb, is_causal=True, scale=scaling)
            out.append(ob.transpose(1, 2).flatten(0, 1))
        return self._collect(out[0] if len(out) == 1 else torch.cat(out))[None]

    def _spread(self, x: Tensor) -> Tensor:
        return _Spread.apply(x, self.token_of, self.place_of) if self.once else x.index_select(0, self.token_of)

    def _collect(self, x: Tensor) -> Tensor:
        return _Collect.apply(x, self.place_of)


BUCKET_SHARE = 0.85
"""A row joins a bucket when it is at least this share of the bucket's longest."""
BUCKET_ROWS = 4
"""A bucket of fewer rows takes any row: a call of its own would cost more than the padding."""


def bucket(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, longest) of each bucket for lengths sorted from long to short."""
    shapes: list[tuple[int, int]] = []
    for length in lengths:
        if shapes and (length >= BUCKET_SHARE * shapes[-1][1] or shapes[-1][0] < BUCKET_ROWS):
            shapes[-1] = (shapes[-1][0] + 1, shapes[-1][1])
        else:
            shapes.append((1, length))
    return shapes


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, longest first. token [N] = row * L + column of each flat token in the rectangle [B, L];
    position [N] within its row; flat [B, L] the flat index of a cell (0 where there is none)."""

    token: Tensor
    position: Tensor
    flat: Tensor
    layout: Layout


def pack(lengths: Sequence[int], width: int, device: torch.device | str) -> Packed:
    """The layout of rows of these lengths (each 1 or more) that stand left-aligned in a rectangle `width` wide."""
    rows = len(lengths)
    count = torch.tensor(lengths)
    order = torch.argsort(count, descending=True, stable=True)
    ordered = count[order]
    column = torch.arange(width)
    real = column[None] < ordered[:, None]
    token = (order[:, None] * width + column[None])[real]
    position = column.expand(rows, width)[real]
    start = torch.zeros(rows, dtype=torch.long)
    start[1:] = ordered.cumsum(0)[:-1]
    flat = torch.zeros(rows * width, dtype=torch.long)
    flat[token] = torch.arange(len(token))

    shapes = bucket(ordered.tolist())
    token_of, place_of, row, place = [], [], 0, 0
    for size, length in shapes:
        column = torch.arange(length)
        held = column[None] < ordered[row : row + size, None]
        cell = torch.arange(size * length).view(size, length) + place
        token_of.append(torch.where(held, start[row : row + size, None] + column, 0).flatten())
        place_of.append(cell[held])
        row, place = row + size, place + size * length
    layout = Layout(torch.cat(token_of).to(device), torch.cat(place_of).to(device), tuple(shapes))
    return Packed(token.to(device), position.to(device), flat.view(rows, width).to(device), layout)


def hidden_states(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The last hidden states of rows ids [B, L], of which the first lengths[b] >= 1 columns are real.

    Returns (hidden [N, d], flat [B, L]): the state of token (b, i) is hidden[flat[b, i]]. Packed where the model
    allows it (N = sum of lengths), padded otherwise (N = B * L). What stands past a row's length is never read.
    """
    longest = max(lengths)
    if packs(model, longest):
        packed = pack(lengths, ids.shape[1], ids.device)
        flat_ids = ids.reshape(-1).index_select(0, packed.token)
        return states_of(model, flat_ids[None], packed.position[None], packed.layout)[0], packed.flat
    real = torch.arange(longest, device=ids.device)[None] < torch.tensor(lengths, device=ids.device)[:, None]
    states = padded_states(model, ids[:, :longest].masked_fill(~real, 0), real)
    cells = torch.arange(real.numel(), device=ids.device).view(real.shape).masked_fill(~real, 0)
    flat = torch.zeros_like(ids)
    flat[:, :longest] = cells
    return states.flatten(0, 1), flat


def padded_states(model: PreTrainedModel, ids: Tensor, real: Tensor) -> Tensor:
    """The model's own forward of right-padded rows [B, L] -> [B, L, d]."""
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    out = model.base_model(input_ids=ids, attention_mask=real.long(), position_ids=position, use_cache=False)
    return out.last_hidden_state


def window(config: Any) -> int | None:
    """Rows up to this length see all of themselves; None where there is no limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if getattr(text, "use_sliding_window", True) is False:
        limits[0] = None
    return min((limit for limit in limits if limit), default=None)


def supports_packing(config: Any) -> tuple[bool, str]:
    """Whether the family's attention is what `Layout.attend` computes, by its config alone, and why not."""
    text = config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        return False, "it is an encoder-decoder"
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "attention_logit_cap", None):
        return False, "its attention scores are soft-capped"
    if getattr(text, "alibi", False):
        return False, "its attention has ALiBi biases"
    return True, ""


def packs(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows up to `longest` run packed. The first call probes the model and sets its attention."""
    known = getattr(model, "_trueup_packs", None)
    if known is None:
        known, reason = supports_packing(model.config)
        if known:
            known, reason = _probe(model)
        if not known:
            say_once(f"{type(model).__name__} runs padded, which is slower: {reason}")
        model._trueup_packs = known  # type: ignore[assignment]
    limit = window(model.config)
    if known and limit is not None and longest > limit:
        say_once(f"{type(model).__name__} runs padded for rows longer than its attention window of {limit}")
        return False
    return bool(known)


def _probe(model: PreTrainedModel) -> tuple[bool, str]:
    """Packed against one by one on three short rows; leaves the model on our attention when they agree."""
    before = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        return False, "its attention does not go through transformers' AttentionInterface"
    lengths: tuple[int, ...] = (5, 1, 3)
    vocab = model.config.get_text_config().vocab_size
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (3, 5), generator=generator).to(device)
    if (limit := window(model.config)) is not None:
        lengths = tuple(min(length, limit) for length in lengths)
    with torch.no_grad():
        plain = [
            model.base_model(input_ids=ids[i : i + 1, :n], use_cache=False).last_hidden_state[0]
            for i, n in enumerate(lengths)
        ]
        model.set_attn_implementation(NAME)
        model._trueup_packs = True  # type: ignore[assignment]
        try:
            states, flat = hidden_states(model, ids, lengths)
            difference = max((states[flat[i, :n]] - plain[i]).abs().max() for i, n in enumerate(lengths))
            scale = max(row.abs().max() for row in plain)
            good = bool(difference <= (1e-4 if states.dtype == torch.float32 else 5e-2) * scale)
            reason = f"packed hidden states differ by {float(difference):.1e} from plain ones"
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            good, reason = False, f"its forward refuses packed rows ({str(error).splitlines()[0]})"
    if not good:
        model.set_attn_implementation(before)
    return good, reason
