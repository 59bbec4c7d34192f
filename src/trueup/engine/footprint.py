"""What a computation would hold in memory, and how many operations it would take, without doing it.

The code itself runs, on tensors that have shapes and no content (torch's FakeTensor): a model made under
`models.load.weightless` has such weights, and whatever is computed from them is such a tensor too. `Footprint` sees
every operation, knows when each result is freed, and keeps the parts at the moment of the highest sum. So nothing
about a family of models, a loss or gradient checkpointing has to be told twice. What it cannot see is scratch space
inside one operation, and what an allocator keeps of what was freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ACTIVATIONS, GRADIENTS, OPTIMIZER, CACHE, LOGITS = "activations", "gradients", "optimizer", "KV cache", "logits"


class Footprint(TorchDispatchMode):
    """Use as a context manager around the code. `vocab`: results with so many columns are logits.

    `now` and `peak`: bytes by part. `flops`: multiplications and additions of products and attention.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.part = vocab, ACTIVATIONS
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.highest = self.total = self.flops = 0
        self.compiles = False  # whether oneDNN has had a product to compile
        self._held: dict[int, tuple[Any, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        packet = func._overloadpacket
        copied = None
        if fake and packet is torch.ops.mkldnn._linear_pointwise and not args[0].is_contiguous():
            copied = torch.empty_like(args[0], memory_format=torch.contiguous_format)  # oneDNN wants its rows so
            self.hold(copied, self.part)
        out = func(*args, **kwargs)
        del copied
        if not fake:
            return out
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is torch.ops.mkldnn._linear_pointwise:
            self.compiles = True
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        for result in tree_leaves(out):
            if isinstance(result, FakeTensor):
                logits = result.ndim > 1 and result.shape[-1] == self.vocab and result.is_floating_point()
                self.hold(result, LOGITS if logits and self.part == ACTIVATIONS else self.part)
        return out

    def hold(self, tensor: Tensor, part: str, *, again: bool = False) -> None:
        """Counts a tensor's storage, once, until it is freed; `again` moves one that is known to this part."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            if not again:
                return
            _, before, size = self._held[key]
            self.now[before] -= size
            self.now[part] += size
            self._held[key] = (self._held[key][0], part, size)
            return
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._held[key] = (reference, part, size)
        self.now[part] += size
        self.total += size
        if self.total > self.highest:
            self.highest, self.peak = self.total, dict(self.now)

    def _free(self, key: int) -> None:
        _, part, size = self._held.pop(key)
        self.now[part] -= size
        self.total -= size

    def weights(self, model: nn.Module, part: str) -> None:
        """Counts a model's weights as `part`; those of another model that it shares are that one's."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.hold(tensor.detach(), part, again=self._part(tensor) in (None, ACTIVATIONS, LOGITS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)

    def _part(self, tensor: Tensor) -> str | None:
        found = self._held.get(tensor.untyped_storage()._cdata)
        return found[1] if found else None

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.hold(parameter.grad, GRADIENTS, again=True)

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """What is allocated meanwhile is `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def moment(self) -> Iterator[dict[str, int]]:
        """The peak of what happens inside, by part, filled in at the end."""
        found: dict[str, int] = {}
        self.restart()
        yield found
        found.update({part: size for part, size in self.peak.items() if size})

    def restart(self) -> None:
        """From now on the peak is the highest sum after this."""
        self.highest, self.peak = self.total, dict(self.now)
