"""Hidden states of rows of different lengths, without padding: packed forwards for any Hugging Face decoder.

All real tokens of a batch go through the model as one sequence `[1, N]`. Everything but attention treats tokens
alone, so only attention must know where a row begins: a function registered with transformers' AttentionInterface
finds a `Layout` among its keyword arguments and computes attention row by row. Rows of about equal length share a
call (a bucket), so padding stays inside attention and stays small. Rows that begin alike, such as the two answers of a
pair, may share the tokens of their beginning; and where only some states are read, the last layer's feed-forward part
runs on those tokens alone.

A family whose attention this function cannot reproduce (soft-capped scores, attention sinks, ALiBi, windows shorter
than a row, recurrent layers) is run padded through its own code instead. `packs` decides by the config and by a
probe on the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from trueup.models.weightless import is_weightless

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
    if (tail := getattr(module, "_trueup_tail", None)) is not None:
        tail[0]._trueup_wanted = trueup_layout.wanted
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
    """Flat tokens [N, ...] to places [K, ...]; places without a token repeat token 0.

    The backward is a gather too, which is much faster than the accumulating backward of `index_select`: only tokens
    that stand at further places are added. It may ignore the empty places because nothing flows back from them: they
    stand after the row's tokens, which causal attention never lets see them, and `_Collect` sends them a zero gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.token_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out = grad.index_select(0, ctx.layout.place_of)
        if ctx.layout.again is not None:
            place, token = ctx.layout.again
            out.index_add_(0, token, grad.index_select(0, place))
        return out, None


class _Collect(torch.autograd.Function):
    """Rows [K, ...] to those of an index [N] without repeats; the others get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


class _Return(torch.autograd.Function):
    """Rows [N, ...] back to where `_Collect` took them from, among zeros [K, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


@dataclass(frozen=True)
class Layout:
    """Which flat tokens each attention row holds, and where each flat token's output is read.

    token_of [K]: the flat token at each place; places are the cells of the buckets, one bucket after another, each a
    rectangle of `shapes[i]` = (rows, length). place_of [N]: where the output of each flat token is read. again: the
    further places of flat tokens that several rows share, and their tokens; None where no row shares any.
    wanted: the flat tokens whose last states are read, without repeats; None for all of them.
    """

    token_of: Tensor
    place_of: Tensor
    shapes: tuple[tuple[int, int], ...]
    again: tuple[Tensor, Tensor] | None = None
    wanted: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, N, D], key and value [1, Hkv, N, D] -> [1, N, H, D]."""
        groups = query.shape[1] // key.shape[1]
        sizes = [rows * length for rows, length in self.shapes]
        q, k, v = (_Spread.apply(x[0].transpose(0, 1), self).split(sizes) for x in (query, key, value))
        out = []
        for shape, *parts in zip(self.shapes, q, k, v, strict=True):
            qb, kb, vb = (x.unflatten(0, shape).transpose(1, 2) for x in parts)
            if groups > 1:
                kb, vb = kb.repeat_interleave(groups, 1), vb.repeat_interleave(groups, 1)
            ob = scaled_dot_product_attention(qb, kb, vb, is_causal=True, scale=scaling)
            out.append(ob.transpose(1, 2).flatten(0, 1))
        return _Collect.apply(out[0] if len(out) == 1 else torch.cat(out), self.place_of)[None]


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


def pack(lengths: Sequence[int], width: int, device: torch.device | str, shared: Sequence[int] | None = None) -> Packed:
    """The layout of rows of these lengths (each 1 or more) that stand left-aligned in a rectangle `width` wide.

    shared[b]: row b begins with so many tokens (fewer than it has) of row b - 1, which shares none itself; they go
    through the model once.
    """
    rows = len(lengths)
    count, common = torch.tensor(lengths), torch.tensor(shared or [0] * rows)
    order = torch.argsort(count, descending=True, stable=True)
    length, column = count[order, None], torch.arange(width)
    own = (column < length) & (column >= common[order, None])
    token = (order[:, None] * width + column)[own]
    flat = torch.zeros(rows * width, dtype=torch.long)
    flat[token] = torch.arange(len(token))
    flat = flat.view(rows, width)
    flat[1:] = torch.where(column < common[1:, None], flat[:-1], flat[1:])

    shapes = bucket(length[:, 0].tolist())
    token_of, place_of, again, row, place = [], [], [], 0, 0
    for size, longest in shapes:
        some = slice(row, row + size)
        held = column[:longest] < length[some]
        cell = torch.arange(size * longest).view(size, longest) + place
        token_of.append(torch.where(held, flat[order[some], :longest], 0).flatten())
        place_of.append(cell[own[some, :longest]])
        again.append(cell[held & ~own[some, :longest]])
        row, place = row + size, place + size * longest
    tokens, further = torch.cat(token_of), torch.cat(again)
    layout = Layout(
        tokens.to(device),
        torch.cat(place_of).to(device),
        tuple(shapes),
        (further.to(device), tokens[further].to(device)) if shared and len(further) else None,
    )
    return Packed(token.to(device), column.expand(rows, width)[own].to(device), flat.to(device), layout)


def states_at(
    model: PreTrainedModel, ids: Tensor, lengths: Sequence[int], cells: Tensor, *, shared: Sequence[int] | None = None
) -> Tensor:
    """The last hidden states [M, d] at `cells` [M] (row * L + column) of rows ids [B, L]; `shared` as in `pack`."""
    hidden, flat = hidden_states(model, ids, lengths, cells=cells, shared=shared)
    return hidden.index_select(0, flat.reshape(-1).index_select(0, cells))


def hidden_states(
    model: PreTrainedModel,
    ids: Tensor,
    lengths: Sequence[int],
    *,
    cells: Tensor | None = None,
    shared: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The last hidden states of rows ids [B, L], of which the first lengths[b] >= 1 columns are real.

    Returns (hidden [N, d], flat [B, L]): the state of token (b, i) is hidden[flat[b, i]]. Packed where the model
    allows it (N = sum of lengths, what is shared counted once), padded otherwise (N = B * L). What stands past a row's
    length is never read; where `cells` are given, only theirs are states, others may be anything.
    """
    longest = max(lengths)
    if packs(model, longest):
        packed = pack(lengths, ids.shape[1], ids.device, shared)
        layout = packed.layout
        if cells is not None and getattr(model, "_trueup_cut", False):
            wanted = packed.flat.reshape(-1).index_select(0, cells)
            layout = replace(layout, wanted=wanted if layout.again is None else wanted.unique())
        flat_ids = ids.reshape(-1).index_select(0, packed.token)
        return states_of(model, flat_ids[None], packed.position[None], layout)[0], packed.flat
    real = torch.arange(longest, device=ids.device)[None] < torch.tensor(lengths, device=ids.device)[:, None]
    states = padded_states(model, ids[:, :longest].masked_fill(~real, 0), real)
    numbers = torch.arange(real.numel(), device=ids.device).view(real.shape).masked_fill(~real, 0)
    flat = torch.zeros_like(ids)
    flat[:, :longest] = numbers
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
            known, reason = _seen(_probe, model)
        if known:
            model.set_attn_implementation(NAME)
            _cut_tail(model)
        if not known:
            say_once(f"{type(model).__name__} runs padded, which is slower: {reason}")
        model._trueup_packs = known  # type: ignore[assignment]
    limit = window(model.config)
    if known and limit is not None and longest > limit:
        say_once(f"{type(model).__name__} runs padded for rows longer than its attention window of {limit}")
        return False
    return bool(known)


_found: dict[tuple[Any, ...], Any] = {}


def _seen(probe: Callable[[PreTrainedModel], Any], model: PreTrainedModel) -> Any:
    """What a probe finds. Without weights the config decides it, and each config is asked once."""
    if not is_weightless():
        return probe(model)
    key = (probe.__name__, type(model), model.config.to_json_string())
    if key not in _found:
        _found[key] = probe(model)
    return _found[key]


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


def _cut_tail(model: PreTrainedModel) -> None:
    """Lets the last layer's feed-forward part run on the wanted tokens alone, where the family has such a part and
    the states of wanted tokens come out the same. `model._trueup_cut` says whether it does.

    The part is told by the attention before it (see `_attention`), in the same layer, so that a layer which runs
    again for its gradient does the same again.
    """
    model._trueup_cut = False  # type: ignore[assignment]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    mlp = getattr(stacks[0][-1], "mlp", None) if stacks else None
    if not isinstance(mlp, nn.Module):
        return
    if not hasattr(mlp, "_trueup_wanted"):  # a body may come from another model, and be told already
        mlp.register_forward_pre_hook(_take_wanted)
        mlp.register_forward_hook(_give_back)
        for module in stacks[0][-1].modules():
            module._trueup_tail = (mlp,)  # type: ignore[assignment]
    mlp._trueup_wanted = None  # type: ignore[assignment]
    with suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        model._trueup_cut = _seen(_same_where_wanted, model)  # type: ignore[assignment]
    if not model._trueup_cut:
        mlp._trueup_wanted = None  # type: ignore[assignment]


def _take_wanted(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    wanted: Any = mlp._trueup_wanted
    if wanted is None:
        return None
    mlp._trueup_rows = args[0].shape[1]
    return (_Collect.apply(args[0][0], wanted)[None], *args[1:])


def _give_back(mlp: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    wanted: Any = mlp._trueup_wanted
    mlp._trueup_wanted = None  # type: ignore[assignment]
    return None if wanted is None else _Return.apply(out[0], wanted, mlp._trueup_rows)[None]


@torch.no_grad()
def _same_where_wanted(model: PreTrainedModel) -> bool:
    """Twice, since a part that ran before its attention would be told of the batch before."""
    vocab, device = model.config.get_text_config().vocab_size, device_of(model)
    ids = torch.randint(0, vocab, (2, 4), generator=torch.Generator().manual_seed(1)).to(device)
    for cells in ([1, 3, 4], [5, 0]):
        index = torch.tensor(cells, device=device)
        whole, flat = hidden_states(model, ids, [4, 2])
        want = whole[flat.reshape(-1)[index]]
        model._trueup_cut = True  # type: ignore[assignment]
        got = states_at(model, ids, [4, 2], index)
        model._trueup_cut = False  # type: ignore[assignment]
        limit = 1e-5 if got.dtype == torch.float32 else 2e-2
        if not bool((want - got).abs().max() <= limit * want.abs().max()):
            return False
    return True
