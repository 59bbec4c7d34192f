"""How far two raters agree beyond chance. Plain numbers in float64, as in `statistics`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cohen_kappa(a: Tensor | Sequence[int], b: Tensor | Sequence[int]) -> float:
    """(o - e) / (1 - e): o the share of items that two raters class alike, e what chance would give by their shares.

    a [N], b [N]: classes, any integers -> at most 1; 0 for chance; 1 where both give one and the same class to all,
    which leaves nothing to chance. ValueError where the shapes differ, or without items. Source: Cohen 1960.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be [N], N >= 1")
    observed = (a == b).double().mean().item()
    chance = sum(((a == c).double().mean() * (b == c).double().mean()).item() for c in a.unique())
    return (observed - chance) / (1 - chance) if chance < 1 else 1.0
