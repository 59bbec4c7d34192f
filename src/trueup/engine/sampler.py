"""Sampling in slots: rows of different lengths decode side by side, and a row that ends makes room for one that waits.

Each layer's keys and values live in one tensor [slots, heads, T, dim] that the sampler owns; the attention function
of `trueup.models.forward` finds the slots among its keyword arguments. Active rows stand in the first slots (the last
one moves into the place of one that ends), so a step costs what the active rows cost. A prompt goes through the model
packed with the others that come in, all but its last token, which is then decoded like any other.

Random numbers are counter-based: those of a completion come from (seed, step, its index) alone, one per position, and
choose the token by inverting the distribution function. Slots, order and the number of processes do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from trueup.config import Config, named
from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.models.forward import Layout, device_of, pack, packs, padded_states, states_of
from trueup.models.logprobs import Head
from trueup.models.net import prepare
from trueup.records import Completion


class Sampling(Config):
    """How tokens are drawn. Log-probs are always of softmax(logits / temperature), before top-k and top-p."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together reach this probability."""
    max_tokens: int = Field(default=64, ge=1)
    """Tokens per completion at most, the end token included."""
    stop: tuple[str, ...] = named(())
    """Strings that end a completion; the text is cut before the first."""
    greedy: bool = False
    """Always the likeliest token."""


CACHE_BYTES = 2 << 30
"""Keys and values of all slots on a CPU."""
GROUPS, GROUP_ROWS = 4, 8
"""Rows of like length attend together: at most so many groups of at least so many rows."""


@dataclass
class _Slots:
    """The layout of one decode step, and of the prefill that fills slots. Layers find theirs by order of call.

    keys, values [slots, heads, T, dim] of each layer.
    """

    slots: int
    length: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    layer: int = 0
    prefill: tuple[Layout, Tensor, Tensor, Tensor] | None = None
    """Of tokens on their way into slots: their packed layout; then flat tokens, and the slot and column of each."""
    wanted: Tensor | None = None
    """Of a prefill: the tokens whose last states are read; only keys and values are, but one token keeps shapes."""
    row: Tensor | None = None
    position: Tensor | None = None
    groups: list[tuple[slice, int, Tensor]] = field(default_factory=list)
    """Of a decode step: slots, how many columns they attend to, and which of those are open [rows, 1, 1, columns]."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, N, D] of a prefill, or [rows, H, 1, D] of a decode step -> the same with H and N swapped."""
        layer, self.layer = self.layer, self.layer + 1
        if layer == len(self.keys):
            for held, new in ((self.keys, key), (self.values, value)):
                held.append(new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3]))
        keys, values = self.keys[layer], self.values[layer]
        if self.prefill is not None:
            layout, token, slot, column = self.prefill
            keys[slot, :, column] = key[0].transpose(0, 1)[token]
            values[slot, :, column] = value[0].transpose(0, 1)[token]
            return layout.attend(query, key, value, scaling)
        keys[self.row, :, self.position] = key[:, :, 0]
        values[self.row, :, self.position] = value[:, :, 0]
        rows, heads, _, deep = query.shape
        shared = key.shape[1]
        # Heads that share a key stand as rows of one product.
        query = query.reshape(rows, shared, heads // shared, deep)
        scaling = deep**-0.5 if scaling is None else scaling
        plain = query.device.type == "cpu" and query.dtype is torch.float32
        if plain and layer == 0:  # the masks of a step, once for all of its layers
            self.groups = [(some, n, mask.expand(-1, shared, -1, -1).flatten(0, 1)) for some, n, mask in self.groups]
        attend = self._by_products if plain else self._by_kernel
        return attend(query, keys, values, scaling).reshape(rows, 1, heads, -1)

    def _by_products(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Plain products beat the attention kernel for a single query in float32 on CPUs."""
        heads, query, keys, values = keys.shape[1], query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        out = query.new_empty(*query.shape[:2], values.shape[2])
        for some, length, mask in self.groups:
            part = slice(some.start * heads, some.stop * heads)
            q, k = query[part], keys[part, :length]
            if q.shape[1] == 1:  # a matrix times a vector is read faster than a vector times its transpose
                scores = torch.baddbmm(mask.transpose(1, 2), k, q.transpose(1, 2), alpha=scaling).transpose(1, 2)
            else:
                scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
            torch.bmm(scores.softmax(-1), values[part, :length], out=out[part])
        return out

    def _by_kernel(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        out = []
        for some, length, mask in self.groups:
            k, v = keys[some, :, :length], values[some, :, :length]
            out.append(scaled_dot_product_attention(query[some], k, v, attn_mask=mask, scale=scaling))
        return out[0] if len(out) == 1 else torch.cat(out)


class Sampler:
    """Samples from `model` as it is at each call. Up to `slots` rows decode at a time in each process, fewer where
    their keys and values would not fit into 2 GiB, or on CUDA into half of what is free.

    `decode(ids) -> text` is needed for the texts of completions and for stop strings; it keeps whitespace as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        end_id: int,
        pad_id: int = 0,
        decode: Callable[[list[int]], str],
        mesh: Mesh | None = None,
        slots: int = 128,
    ) -> None:
        self.model, self.end_id, self.pad_id, self.decode = prepare(model), end_id, pad_id, decode
        self.mesh, self.slots = mesh or Mesh(), slots
        self.room = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def speaking(cls, chat: Chat, model: PreTrainedModel, mesh: Mesh) -> Sampler:
        """A sampler that ends, pads and decodes as `chat` does."""
        return cls(model, end_id=chat.end_id, pad_id=chat.pad_id, decode=chat.decode, mesh=mesh)

    @torch.inference_mode()
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        index: Sequence[int] | None = None,
        version: str = "",
    ) -> list[Completion]:
        """One completion for each prompt (give a prompt n times, with its own indices, for n of them).

        The answer for prompt i depends on its ids, (seed, step, index[i]) and the weights; index is 0, 1, ... where
        None. A prompt that leaves no room in the model's context gets an empty completion that was cut by length.
        """
        if any(len(ids) == 0 for ids in prompt_ids):
            raise ValueError(f"prompt {[len(ids) for ids in prompt_ids].index(0)} is empty")
        index = range(len(prompt_ids)) if index is None else index
        shares = self.mesh.shard([len(ids) for ids in prompt_ids])
        rows = shares[self.mesh.rank]
        run = _Run(self, [list(prompt_ids[r]) for r in rows], [index[r] for r in rows], sampling, seed, step, version)
        return self.mesh.gather_objects(run.completions(), shares)


class _Run:
    """One call of `sample` in one process."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: list[list[int]],
        index: list[int],
        sampling: Sampling,
        seed: int,
        step: int,
        version: str,
    ) -> None:
        self.sampler, self.model, self.sampling, self.version = sampler, sampler.model, sampling, version
        self.prompts, self.index, self.seed, self.step = prompts, index, seed, step
        self.device = device_of(self.model)
        self.head = Head.of(self.model)
        room = sampler.room or 1 << 30
        self.room = [min(sampling.max_tokens, room - len(ids)) for ids in prompts]
        self.results: list[Completion | None] = [None] * len(prompts)
        self.longest = max((len(p) + max(0, n) for p, n in zip(prompts, self.room, strict=True)), default=0)
        self.packed = bool(prompts) and packs(self.model, self.longest)

    def completions(self) -> list[Completion]:
        waiting = []
        for i in range(len(self.prompts)):
            if self.room[i] <= 0:
                self.results[i] = Completion(text="", stop="length", version=self.version)
            else:
                waiting.append(i)
        # Long prompts first: rows that came earlier are then the longer ones, so that slots are sorted by length.
        waiting.sort(key=lambda i: (len(self.prompts[i]), self.prompts[i]))
        self._allocate(min(self.sampler.slots, len(waiting), self._fitting()))
        while waiting or self.active:
            free = self.slots - len(self.active)
            if waiting and (not self.active or free >= self.refill):
                self._fill([waiting.pop() for _ in range(min(free, len(waiting)))])
            self._advance()
        return [result for result in self.results if result is not None]

    def _fitting(self) -> int:
        """How many rows of the longest length memory should hold."""
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        wide = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        each = 2 * text.num_hidden_layers * heads * wide * self.model.dtype.itemsize * max(1, self.longest)
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else CACHE_BYTES
        return max(1, free // each)

    def _allocate(self, slots: int) -> None:
        """State of the slots; row s of each tensor is the row in slot s, and active rows come first."""
        limit = self.sampling.max_tokens
        self.slots, self.active = slots, list[int]()
        # A prefill of one row costs nearly as much as one of a few.
        self.refill = max(1, slots // 8)
        self.cache = _Slots(slots, self.longest)
        self.open = torch.zeros(slots, self.longest, device=self.device)
        self.token = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.position = torch.zeros_like(self.token)
        self.count = torch.zeros_like(self.token)
        self.limit = torch.zeros_like(self.token)
        self.row = torch.arange(slots, device=self.device)
        self.ids = torch.zeros(slots, limit, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(slots, limit, device=self.device)
        self.uniform = torch.zeros(slots, limit, device=self.device)
        if not self.packed:
            self.text = torch.zeros(slots, self.longest, dtype=torch.long, device=self.device)
        self.lengths: list[int] = []

    def _fill(self, new: list[int]) -> None:
        """Put these prompts into the free slots."""
        first, slots = len(self.active), range(len(self.active), len(self.active) + len(new))
        self.active += new
        self.lengths += [len(self.prompts[i]) for i in new]
        some = slice(first, slots.stop)
        lengths = torch.tensor(self.lengths[first:])
        self.token[some] = torch.tensor([self.prompts[i][-1] for i in new])
        self.position[some] = lengths - 1
        self.count[some] = 0
        self.limit[some] = torch.tensor([self.room[i] for i in new])
        if not self.sampling.greedy:
            self.uniform[some] = torch.from_numpy(np.stack([self._draws(i) for i in new]))
        width = max(self.lengths[first:])
        column = torch.arange(self.longest)
        self.open[some] = torch.where(column[None] < lengths[:, None], 0.0, -torch.inf).to(self.device)
        if not self.packed:
            ids = [self.prompts[i] + [0] * (width - len(self.prompts[i])) for i in new]
            self.text[some, :width] = torch.tensor(ids, device=self.device)
            return
        # Prompts that are the same go through the model once.
        held: dict[tuple[int, ...], list[int]] = {}
        for slot, i in zip(slots, new, strict=True):
            held.setdefault(tuple(self.prompts[i][:-1]), []).append(slot)
        held.pop((), None)
        if not held:
            return
        packed = pack([len(text) for text in held], width, self.device)
        rect = torch.tensor([[*text, *[0] * (width - len(text))] for text in held], device=self.device)
        into = [(flat[: len(text)], slot) for flat, text in zip(packed.flat, held, strict=True) for slot in held[text]]
        many = torch.tensor([len(flat) for flat, _ in into], device=self.device)
        token = torch.cat([flat for flat, _ in into])
        slot_of = torch.tensor([slot for _, slot in into], device=self.device).repeat_interleave(many)
        self.cache.prefill = (packed.layout, token, slot_of, packed.position[token])
        self.cache.wanted = self.row[:1]
        self._states(rect.flatten()[packed.token][None], packed.position[None])
        self.cache.prefill = self.cache.wanted = None

    def _draws(self, i: int) -> np.ndarray:
        """The uniform numbers of row i, one per position, kept below 1 after rounding to float32."""
        key = np.array([self.seed % 2**64, (self.step % 2**32) << 32 | self.index[i] % 2**32], dtype=np.uint64)
        draws = np.random.Generator(np.random.Philox(key=key)).random(self.sampling.max_tokens)
        return np.minimum(draws, 1 - 2**-22).astype(np.float32)

    def _states(self, ids: Tensor, position: Tensor) -> Tensor:
        self.cache.layer = 0
        return states_of(self.model, ids, position, self.cache)

    def _advance(self) -> None:
        """One token for every active row."""
        n = len(self.active)
        token, position, count = self.token[:n], self.position[:n], self.count[:n]
        logits = self.head(self._next_states(n))
        chosen, logprob = self._choose(logits, n)
        row = self.row[:n]
        self.ids[row, count] = chosen
        self.logprobs[row, count] = logprob
        count += 1
        position += 1
        token.copy_(chosen)
        ended = chosen == self.sampler.end_id
        finished = ended | (count >= self.limit[:n])
        self.lengths = [length + 1 for length in self.lengths]
        if self.packed:
            self.open[row, position.clamp(max=self.longest - 1)] = 0.0
        else:
            self.text[row, position.clamp(max=self.longest - 1)] = chosen
        stopped = self._stopped(n) if self.sampling.stop else {}
        if stopped or bool(finished.any()):
            over = {slot: "length" for slot in finished.nonzero()[:, 0].tolist()}
            over.update(stopped)
            over.update({slot: "eos" for slot in ended.nonzero()[:, 0].tolist()})
            self._retire(over)

    def _next_states(self, n: int) -> Tensor:
        """The last hidden states of the first n slots [n, d]."""
        position, cache = self.position[:n], self.cache
        if not self.packed:
            longest = max(self.lengths)
            real = torch.arange(longest, device=self.device)[None] <= position[:, None]
            states = padded_states(self.model, self.text[:n, :longest].masked_fill(~real, 0), real)
            return states[self.row[:n], position]
        cache.row, cache.position = self.row[:n], position
        cache.groups = [
            (some, length, self.open[some, None, None, :length].to(self.model.dtype))
            for some, length in groups(self.lengths)
        ]
        return self._states(self.token[:n, None], position[:, None])[:, 0]

    def _choose(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Tokens [n] drawn from logits [n, V], and their log-probs."""
        settings = self.sampling
        if settings.temperature != 1.0:
            logits = logits / settings.temperature
        logp = torch.log_softmax(logits, -1)
        if settings.greedy:
            chosen = logp.argmax(-1)
        else:
            p = logp.exp()
            if settings.top_k or settings.top_p < 1.0:
                p = filtered(p, settings.top_k, settings.top_p)
            total = p.cumsum(-1)
            u = self.uniform[self.row[:n], self.count[:n]]
            chosen = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]
            chosen = chosen.clamp(max=p.shape[-1] - 1)
        return chosen, logp.gather(-1, chosen[:, None])[:, 0]

    def _stopped(self, n: int) -> dict[int, str]:
        """Slots whose text holds a stop string since the newest token."""
        counts, rows = self.count[:n].tolist(), self.ids[:n].tolist()
        longest = max(map(len, self.sampling.stop))
        out = {}
        for slot in range(n):
            ids = rows[slot][: counts[slot]]
            # A stop string ends in the newest token, so its start is not far: look at a tail that is long enough.
            size = longest + 8
            while True:
                tail = self.sampler.decode(ids[-size:])
                if size >= len(ids) or len(tail) >= 4 * longest:
                    break
                size *= 2
            if any(stop in tail for stop in self.sampling.stop):
                out[slot] = "stop"
        return out

    def _retire(self, over: dict[int, str]) -> None:
        """Write the completions of these slots, and move the last active rows into their places."""
        slots = sorted(over)
        where = torch.tensor(slots, device=self.device)
        counts = self.count[where].tolist()
        ids, logprobs = self.ids[where].tolist(), self.logprobs[where].tolist()
        for slot, count, row, lp in zip(slots, counts, ids, logprobs, strict=True):
            reason = over[slot]
            kept = row[:count]
            text = self.sampler.decode(kept[:-1] if reason == "eos" else kept)
            found = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
            text = text[: min(found)].lstrip() if found else text.strip()
            self.results[self.active[slot]] = Completion(text, reason, tuple(kept), tuple(lp[:count]), self.version)  # type: ignore[arg-type]
        place = closed(self.lengths, slots)
        moved = [slot for slot in range(len(place)) if place[slot] != slot]
        self.active, self.lengths = [self.active[s] for s in place], [self.lengths[s] for s in place]
        if moved:
            to = torch.tensor(moved, device=self.device)
            source = torch.tensor([place[slot] for slot in moved], device=self.device)
            state = [self.open, self.token, self.position, self.count, self.limit]
            state += [self.ids, self.logprobs, self.uniform]
            if not self.packed:
                state.append(self.text)
            for tensor in state:
                tensor[to] = tensor[source]
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[to] = tensor[source]


def groups(lengths: Sequence[int]) -> list[tuple[slice, int]]:
    """Slots of these lengths in groups, each with its longest; neighbours of like length are one group."""
    size = max(GROUP_ROWS, -(-len(lengths) // GROUPS))
    out: list[tuple[slice, int]] = []
    for start in range(0, len(lengths), size):
        some = slice(start, min(start + size, len(lengths)))
        longest = max(lengths[some])
        if out and 0.85 <= longest / out[-1][1] <= 1 / 0.85:
            before, other = out.pop()
            some, longest = slice(before.start, some.stop), max(longest, other)
        out.append((some, longest))
    return out


def closed(lengths: Sequence[int], over: Sequence[int]) -> list[int]:
    """Which slots' rows of these lengths stand where once those in `over` (ascending) are gone, no hole left.

    The longest row of the next group moves into a hole, the longest of the group after it into the place so freed,
    and so on; the last row of all fills the last one. So few rows move, and groups stay sorted by length.
    """
    place, size = list(range(len(lengths))), max(GROUP_ROWS, -(-len(lengths) // GROUPS))
    for hole in reversed(over):
        for start in range(hole // size * size + size, len(place), size):
            source = max(range(start, min(start + size, len(place))), key=lambda slot: lengths[place[slot]])
            place[hole], hole = place[source], source
        place[hole] = place[-1]
        place.pop()
    return place


def filtered(p: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [n, V] with those outside the k likeliest, then outside the nucleus, set to zero (not rescaled).

    The nucleus is the smallest set of likeliest tokens that reaches top_p of what top-k left (Holtzman et al. 2020).
    """
    ordered, place = p.sort(stable=True, dim=-1, descending=True)
    if top_k and top_k < p.shape[-1]:
        ordered[:, top_k:] = 0.0
    if top_p < 1.0:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(p).scatter_(-1, place, ordered)
