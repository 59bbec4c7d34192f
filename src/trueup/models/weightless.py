"""Models with shapes and without weights: for who asks what a computation would hold, and has no weights at hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

ANSWERS = {
    torch.ops.aten._local_scalar_dense.default: 1.0,
    torch.ops.aten.allclose.default: True,
    torch.ops.aten.equal.default: True,
}
"""What is said where the code asks for a number that nobody has: checks pass, norms are finite."""


class _Mode(FakeTensorMode):
    """A real tensor that receives a fake result keeps its own numbers, so that what is read from it can be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            return ANSWERS[func]
        first = args[0] if args else None
        if isinstance(first, Tensor) and not isinstance(first, FakeTensor) and func._schema.is_mutable:
            return first
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo: Any) -> _Mode:
        return self  # a copied tensor belongs to the same mode


_mode: _Mode | None = None


@contextmanager
def weightless() -> Iterator[None]:
    """Meanwhile `load_policy`, `load_scalar` and `lora.Base` read a folder's config alone. Weights, and all that is
    computed from them, are torch's FakeTensors."""
    global _mode
    before, _mode = _mode, _Mode(allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings():
            # A deep copy asks for the address of what it copies; there is none, and it copies all the same.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        _mode = before


def is_weightless() -> bool:
    return _mode is not None


def making() -> AbstractContextManager[Any]:
    """Around what makes weights: they are fake ones where that is asked for."""
    return _mode or nullcontext()


def made(auto: Any, config: Any, dtype: Any) -> Any:
    """A model of this config by one of transformers' Auto classes."""
    with making():
        return staying(auto.from_config(config, dtype=dtype))


def fill(model: nn.Module) -> None:
    """Parameters on the meta device become fake ones where the model's weights are, on the CPU."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                with making():
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))


def staying(model: Any) -> Any:
    """The same model, which `to` leaves as it is where it has no weights: torch cannot move those."""
    if is_weightless():
        model._apply = MethodType(lambda self, fn, recurse=True: self, model)
    return model
