"""How far raters agree: Krippendorff's alpha with its interval, Cohen's kappa of each pair; and how sure a share is. No
torch.

A rating is 1, -1 or 0: the first better, the second, neither. Alpha is evalica's (nominal).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist

Ratings = Mapping[str, Mapping[int, int]]
"""By rater, by item."""


def wilson(share: float, n: float, of: int = 1) -> tuple[float, float]:
    """95% interval of a rate measured on n independent trials (Wilson 1927); where it is one `of` several that are
    looked at, wide enough for all of them to hold at once (Bonferroni)."""
    if n <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - 0.025 / of)
    middle, half = share * n + z * z / 2, z * math.sqrt(share * (1 - share) * n + z * z / 4)
    return max(0.0, (middle - half) / (n + z * z)), min(1.0, (middle + half) / (n + z * z))


def cohen_kappa(a: Sequence[int], b: Sequence[int]) -> float:
    """(observed - expected) / (1 - expected) agreement of two raters of the same items, in their order; expected by
    chance from each one's own shares. NaN where chance alone gives 1, and for no items. Source: Cohen 1960."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} ratings")
    n = len(a)
    if not n:
        return float("nan")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    of_a, of_b = Counter(a), Counter(b)
    expected = sum(of_a[k] * of_b[k] for k in of_a) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def pair_kappas(ratings: Ratings, least: int = 1) -> list[tuple[str, str, int, float]]:
    """(rater, rater, items that both rated, kappa) of each pair with `least` such items, the most items first."""
    out = []
    for a, b in combinations(sorted(ratings), 2):
        both = sorted(ratings[a].keys() & ratings[b].keys())
        if len(both) >= least:
            out.append((a, b, len(both), cohen_kappa([ratings[a][i] for i in both], [ratings[b][i] for i in both])))
    return sorted(out, key=lambda row: -row[2])


def alpha(ratings: Ratings, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float, int] | None:
    """(alpha, low, high, items): Krippendorff's alpha over the items that two or more rated, and its 95% interval by
    resampling whole items. None where there are fewer than two such items, or all ratings are the same, which leave it
    undefined. Source: Krippendorff 2018, chapter 12."""
    import evalica
    import numpy as np
    import pandas as pd

    counts = Counter(item for of_rater in ratings.values() for item in of_rater)
    shared = sorted(item for item, n in counts.items() if n > 1)
    if len(shared) < 2 or len({r[i] for r in ratings.values() for i in shared if i in r}) < 2:
        return None
    table = np.array([[of_rater.get(i, np.nan) for i in shared] for of_rater in ratings.values()], dtype=float)
    point = float(evalica.alpha(pd.DataFrame(table)).alpha)
    rng = np.random.default_rng(seed)
    drawn = [_alpha(table[:, rng.integers(len(shared), size=len(shared))]) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return point, float(low), float(high), len(shared)


def _alpha(table: object) -> float:
    """Nominal alpha from the coincidences of ratings in {-1, 0, 1}, NaN where undefined: many times a second, which a
    data frame each time is not."""
    import numpy as np

    counts = np.stack([(np.asarray(table) == k).sum(0) for k in (-1, 0, 1)]).astype(float)  # [3, items]
    m = counts.sum(0)
    counts, m = counts[:, m > 1], m[m > 1]
    n, of_value = m.sum(), counts.sum(1)
    apart = ((m**2 - (counts**2).sum(0)) / (m - 1)).sum() / n if n else 0.0
    expected = (n**2 - (of_value**2).sum()) / (n * (n - 1)) if n > 1 else 0.0
    return float(1 - apart / expected) if expected else float("nan")


def by_rater(rows: Iterable[tuple[str, int, int]]) -> dict[str, dict[int, int]]:
    """(rater, item, rating) rows as `Ratings`; a later rating of the same item counts."""
    out: dict[str, dict[int, int]] = defaultdict(dict)
    for rater, item, rating in rows:
        out[rater][item] = rating
    return dict(out)
