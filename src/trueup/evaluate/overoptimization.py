"""What a study of over-optimization found: curves with bands, fits, and gates that pass, fail or stay open.

In order: lay the studies' rows out as tables of seeds, prompts and columns; draw resamples of seeds and, within each,
of prompts (conditions of a seed stay paired); of each resample take every curve, every fit and every figure that a gate
asks for; give each its percentile interval, or Student's t over the seeds where they are fewer than 6. The peak of a
curve is chosen on one half of the prompts and read on the other. Errors from the residuals of a fit are never used:
points of a curve share their samples. Not in it: how the rows came about (trace, best_of), drawing (report).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trueup.config import Config
from trueup.math import (
    fit_scaling,
    nested_bootstrap,
    scaling_curve,
    scaling_peak,
    student_mass,
    student_quantile,
)
from trueup.records import UserError

CHUNK = 500
ROLES = ("trace", "best_of", "reward")
VOID = {"G2", "G3", "G4", "G5", "G6"}
"""Without a control that works the rest means nothing."""
SAYS = {
    "G1": "PPO on gold itself closes the headroom and does not turn over",
    "G2": "The reward model learns from comparisons, within the raters' ceiling",
    "G3": "Best of n: gold turns over or flattens while the proxy rises",
    "G4": "PPO without a penalty: gold rises, then falls, while the proxy goes on rising",
    "G5": "The KL penalty holds the policy, and at the default gold keeps its peak",
    "G6": "More comparisons help, turned labels hurt",
}


class Gates(Config):
    """The thresholds, and how sure an interval must be. Committed before the confirming run."""

    level: float = Field(0.95, gt=0, lt=1)
    """Of every interval; .9706 for both looks where a second one was declared (Pocock)."""
    resamples: int = Field(10_000, gt=99)
    headroom: float = 0.60
    """G1: share of `gold_max` - SFT that PPO on gold closes, at least."""
    gold_max: float = 1.0
    """The best gold score there can be."""
    control_fall: float = 0.05
    """G1: the control's fall from its peak, at most."""
    few: float = 0.60
    """G2: accuracy at the fewest comparisons, at most."""
    growth: float = 0.10
    """G2: what accuracy gains from the fewest comparisons to the most, at least."""
    distinct: float = Field(0.5, ge=0, le=1)
    """G3: n goes as far as this expected share of n answers is distinct."""
    late: float = 0.25
    """G3: what the second half of the way, in sqrt(KL), adds to gold, as a share of what the first half added, at most;
    1 on a straight line, 1/3 where R_bon peaks at the end, below 0 where gold has turned past its middle."""
    aicc: float = 6.0
    """G3: how far R_bon's AICc is below the line's, at least."""
    rise: float = 0.08
    """G4: gold's rise to its peak, at least."""
    loss: float = 0.5
    """G4: the share of that rise which is lost at the end, at least."""
    kept: float = 0.05
    """G5: gold's fall from its peak at the default coefficient, at most."""
    fewer: int = 0
    """G6: the smaller number of comparisons; 0 for the fewest."""
    d_min: float = 0.3
    """R_RL is fitted from here, in sqrt(nats),"""
    kl_max: float = 15.0
    """to here, in nats: fixed before anything is fitted."""


@dataclass
class Table:
    """One kind of measurement: of each seed [H, N, C], H halves of the prompts, N prompts each, C columns that run
    over conditions, then points (steps, or n), then measures."""

    conditions: list[str]
    points: list[float]
    measures: list[str]
    groups: list[Tensor]

    def of(self, means: Tensor, condition: str, measure: str) -> Tensor:
        """means [..., H, C] -> a curve [..., H, K]."""
        shape = (len(self.conditions), len(self.points), len(self.measures))
        whole = means.unflatten(-1, shape)
        return whole[..., self.conditions.index(condition), :, self.measures.index(measure)]

    def now(self) -> Tensor:
        """The means as they are [G, H, C]."""
        return torch.stack([group.double().mean(1) for group in self.groups])


Rows = Mapping[str, np.ndarray]
"""Columns of one seed and condition: the point, the prompt, the measures."""


def table_of(seeds: Sequence[Mapping[str, Rows]], point: str, measures: Sequence[str], halves: int = 2) -> Table:
    """seeds: of each, condition -> its rows, one a point and prompt. The prompts of even and of odd number are the two
    halves; one too many is left out. UserError where a seed lacks a condition, a point or a prompt that others have."""
    conditions = list(seeds[0])
    points = sorted({float(x) for x in seeds[0][conditions[0]][point]})
    groups = []
    for rows in seeds:
        blocks = []
        for condition in conditions:
            of = rows[condition]
            order = np.lexsort((of[point], of["prompt"]))
            values = np.stack([of[m][order] for m in measures], 1)
            if len(values) % len(points) or set(of[point].astype(float)) != set(points):
                raise UserError(f"condition '{condition}' was not measured at the {point}s of the others: {points}")
            blocks.append(values.reshape(-1, len(points) * len(measures)))
        if len({len(b) for b in blocks}) > 1:
            raise UserError("the conditions of a seed were not measured on the same prompts")
        whole = torch.from_numpy(np.concatenate(blocks, 1)).double()
        per_half = len(whole) // halves
        groups.append(torch.stack([whole[h::halves][:per_half] for h in range(halves)]))
    return Table(conditions, points, list(measures), groups)


# figures of a curve: [..., H, K] in, [...] out


def crossed(gold: Tensor, *curves: Tensor) -> list[Tensor]:
    """Each curve at gold's peak, [..., H]: the peak of one half of the prompts is read on the other half."""
    peak = gold.argmax(-1).flip(-1).unsqueeze(-1)
    return [curve.gather(-1, peak).squeeze(-1) for curve in curves]


def rise(gold: Tensor) -> Tensor:
    """Peak minus start."""
    [top] = crossed(gold, gold)
    return (top - gold[..., 0]).mean(-1)


def fall(gold: Tensor) -> Tensor:
    """Peak minus end."""
    [top] = crossed(gold, gold)
    return (top - gold[..., -1]).mean(-1)


def peak(gold: Tensor) -> Tensor:
    [top] = crossed(gold, gold)
    return top.mean(-1)


@dataclass
class Check:
    """A figure that must be at or beyond a threshold: the mean over seeds of `figure(means [..., H, C])`. `above`: at
    least; else at most. Without a threshold it is true or false of every seed, and all must have it."""

    gate: str
    name: str
    table: str
    figure: Callable[[Tensor], Tensor]
    threshold: float | None = None
    above: bool = True
    draws: list[Tensor] = field(default_factory=list)


@dataclass
class Missing:
    """A check that a gate asks for, and why the study could not measure it."""

    gate: str
    name: str
    why: str


Asked = Check | Missing
Plan = Mapping[str, Any]
"""The names of a study's conditions, by what they are to the gates."""


def checks_of(
    tables: Mapping[str, Table], gates: Gates, plan: Plan, reach: Mapping[str, int]
) -> tuple[list[Check], list[Missing]]:
    """What the gates ask, as far as the study measured it, and what it did not."""
    trace, best, reward = (tables.get(name) for name in ROLES)
    asked = [
        *asked_of_control(trace, gates, plan),
        *asked_of_reward(reward, gates, plan),
        *asked_of_best_of(best, gates, plan, reach),
        *asked_of_turnover(trace, gates, plan),
        *asked_of_penalty(trace, gates, plan),
        *asked_of_data(best, plan, reach),
    ]
    return [a for a in asked if isinstance(a, Check)], [a for a in asked if isinstance(a, Missing)]


def asked_of_control(trace: Table | None, gates: Gates, plan: Plan) -> list[Asked]:
    if not trace or not plan.get("control"):
        return [Missing("G1", "PPO on gold", "the study has no `control`")]

    def gold(h: Tensor) -> Tensor:
        return trace.of(h, plan["control"], "gold")

    def closed(h: Tensor) -> Tensor:
        mean = gold(h).mean(-2)
        return (mean[..., -1] - mean[..., 0]) / (gates.gold_max - mean[..., 0])

    return [
        Check("G1", "share of the headroom closed", "trace", closed, gates.headroom),
        Check("G1", "fall from the peak", "trace", lambda h: fall(gold(h)), gates.control_fall, above=False),
    ]


def asked_of_reward(reward: Table | None, gates: Gates, plan: Plan) -> list[Asked]:
    if not reward or len(plan["sizes"]) < 2:
        return [Missing("G2", "accuracy by the number of comparisons", "the study has no `comparisons`")]
    few, many = plan["sizes"][0], plan["sizes"][-1]

    def accuracy(h: Tensor, condition: str) -> Tensor:
        return reward.of(h, condition, "accuracy").mean((-2, -1))

    def grows(h: Tensor) -> Tensor:
        return ranks(torch.stack([accuracy(h, size) for size in plan["sizes"]], -1)) > 0

    def gained(h: Tensor) -> Tensor:
        return accuracy(h, many) - accuracy(h, few)

    def below(h: Tensor) -> Tensor:
        return reward.of(h, many, "ceiling").mean((-2, -1)) - accuracy(h, many)

    name = "the raters' ceiling minus accuracy at the most"
    unknown = bool(reward.of(reward.now(), many, "ceiling").isnan().any())
    return [
        Check("G2", "rank correlation with the number of comparisons", "reward", grows),
        Check("G2", "accuracy at the fewest", "reward", lambda h: accuracy(h, few), gates.few, above=False),
        Check("G2", "accuracy gained", "reward", gained, gates.growth),
        Missing("G2", name, "no ceiling is known: too few comparisons are judged twice")
        if unknown
        else Check("G2", name, "reward", below, 0.0),
    ]


def asked_of_best_of(best: Table | None, gates: Gates, plan: Plan, reach: Mapping[str, int]) -> list[Asked]:
    end, middle = reach["last"], reach["middle"]
    if not best or not end > middle > 0:
        return [Missing("G3", "gold and proxy by n", "answers hardly differ: n goes nowhere")]

    def curve(h: Tensor, measure: str) -> Tensor:
        return best.of(h, plan["reference"], measure).mean(-2)[..., : end + 1]

    def late(h: Tensor) -> Tensor:
        gold = curve(h, "gold")
        return (gold[..., -1] - gold[..., middle]) / (gold[..., middle] - gold[..., 0])

    def rises(h: Tensor) -> Tensor:
        return (curve(h, "proxy").diff(dim=-1) > 0).all(-1)

    def bend(h: Tensor) -> Tensor:
        gold = curve(h, "gold_sd")
        gain = gold[..., 1:] - gold[..., :1]
        return fit_scaling(curve(h, "kl")[..., 1:].sqrt(), gain, form="bon").over_line

    name = "AICc of the line minus R_bon's"
    return [
        Check("G3", "what the second half adds, of the first's", "best_of", late, gates.late, above=False),
        Check("G3", "the proxy rises with n", "best_of", rises),
        Missing("G3", name, f"answers differ at {end + 1} values of n only, a fit needs 6")
        if end < 5
        else Check("G3", name, "best_of", bend, gates.aicc),
    ]


def asked_of_turnover(trace: Table | None, gates: Gates, plan: Plan) -> list[Asked]:
    if not trace or not plan.get("free"):
        return [Missing("G4", "gold's rise and fall", "0 is not among `kl_coefs`")]

    def free(h: Tensor, measure: str) -> Tensor:
        return trace.of(h, plan["free"], measure)

    def lost(h: Tensor) -> Tensor:
        return fall(free(h, "gold")) - gates.loss * rise(free(h, "gold"))

    def proxy_after(h: Tensor) -> Tensor:
        [top] = crossed(free(h, "gold"), free(h, "proxy_sd"))
        return (free(h, "proxy_sd")[..., -1] - top).mean(-1)

    return [
        Check("G4", "gold's rise", "trace", lambda h: rise(free(h, "gold")), gates.rise),
        Check("G4", f"gold's fall minus {gates.loss:g} of its rise", "trace", lost, 0.0),
        Check("G4", "the proxy's rise after gold's peak, s.d.", "trace", proxy_after, 0.0),
    ]


def asked_of_penalty(trace: Table | None, gates: Gates, plan: Plan) -> list[Asked]:
    out: list[Asked] = []
    name = "final KL falls with the coefficient"
    if trace and len(plan["held"]) > 1:

        def ends(h: Tensor) -> Tensor:
            return torch.stack([trace.of(h, held, "kl")[..., -1].mean(-1) for held in plan["held"]], -1)

        out.append(Check("G5", name, "trace", lambda h: (ends(h).diff(dim=-1) < 0).all(-1)))
    else:
        out.append(Missing("G5", name, "`kl_coefs` has one value"))
    name = "gold's fall at the default"
    if trace and plan.get("default"):

        def default(h: Tensor) -> Tensor:
            return fall(trace.of(h, plan["default"], "gold"))

        out.append(Check("G5", name, "trace", default, gates.kept, above=False))
    else:
        out.append(Missing("G5", name, "the study has no `default`"))
    return out


def asked_of_data(best: Table | None, plan: Plan, reach: Mapping[str, int]) -> list[Asked]:
    if not best:
        return []

    def top(h: Tensor, condition: str) -> Tensor:
        return peak(best.of(h, condition, "gold")[..., : reach["last"] + 1])

    def ahead(h: Tensor, condition: str) -> Tensor:
        return top(h, plan["reference"]) - top(h, condition)

    out: list[Asked] = []
    for key, of in (("fewer", "comparisons"), ("noisy", "flips")):
        if condition := plan.get(key):
            figure = partial(ahead, condition=condition)
            out.append(Check("G6", f"peak gold minus that of {condition}", "best_of", figure, 0.0))
        else:
            out.append(Missing("G6", f"peak gold minus that with other `{of}`", f"the study has no `{of}`"))
    return out


def ranks(values: Tensor) -> Tensor:
    """Spearman's correlation of values [..., K] with their place 1 .. K."""
    a = values.argsort(-1).argsort(-1).double()
    place = torch.arange(values.shape[-1], dtype=torch.float64)
    a, place = a - a.mean(-1, keepdim=True), place - place.mean()
    return (a * place).sum(-1) / (a.square().sum(-1) * place.square().sum()).sqrt()


# intervals and outcomes


def interval(seeds: Tensor, draws: Tensor, level: float) -> tuple[float, float] | None:
    """Percentiles of the resampled means; Student's t over fewer than 6 seeds; None for a single one."""
    n = len(seeds)
    if n < 2:
        return None
    if n < 6:
        half = student_quantile(level, n - 1) * float(seeds.std()) / math.sqrt(n)
        return float(seeds.mean()) - half, float(seeds.mean()) + half
    low, high = (float(draws.nanquantile(q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high


def outcome(found: tuple[float, float] | None, threshold: float, above: bool) -> str:
    """PASS where the whole interval is beyond the threshold, FAIL where it is wholly on the wrong side."""
    if found is None or not all(map(math.isfinite, found)):
        return "INCONCLUSIVE"
    low, high = found if above else (-found[1], -found[0])
    bar = threshold if above else -threshold
    return "PASS" if low >= bar else "FAIL" if high < bar else "INCONCLUSIVE"


def chance(seeds: Tensor, draws: Tensor, threshold: float, above: bool) -> float:
    """One-sided p that the mean is on the wrong side of the threshold: by the same t, or resamples, as the interval."""
    n = len(seeds)
    if n < 2:
        return 1.0
    if n >= 6:
        return float((draws < threshold if above else draws > threshold).double().mean())
    gap = float(seeds.mean()) - threshold if above else threshold - float(seeds.mean())
    t = gap / max(float(seeds.std()) / math.sqrt(n), 1e-12)
    half = student_mass(abs(t), n - 1) / 2
    return 0.5 - half if t > 0 else 0.5 + half


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Each gate's p, made larger for being one of several (Holm 1979): the smallest times their number, and so on, none
    below the one before."""
    out, floor = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda k: p[k])):
        floor = max(floor, min(1.0, (len(p) - i) * p[name]))
        out[name] = floor
    return out


def judged(check: Check, now: Tensor, level: float) -> dict[str, Any]:
    seeds = check.figure(now)
    row: dict[str, Any] = {"name": check.name, "per_seed": [float(x) for x in seeds]}
    if check.threshold is None:
        return {
            **row,
            "wanted": "every seed",
            "value": float(seeds.double().mean()),
            "outcome": "PASS" if seeds.all() else "FAIL",
        }
    found = interval(seeds, torch.cat(check.draws), level)
    return {
        **row,
        "wanted": f"{'>=' if check.above else '<='} {check.threshold:g}",
        "value": float(seeds.mean()),
        "interval": found,
        "p": chance(seeds, torch.cat(check.draws), check.threshold, check.above),
        "outcome": outcome(found, check.threshold, check.above),
    }


def worst(outcomes: Sequence[str]) -> str:
    return next(o for o in ("FAIL", "INCONCLUSIVE", "PASS") if o in outcomes)


def analyze(tables: Mapping[str, Table], gates: Gates, plan: Plan, *, seed: int = 0) -> dict[str, Any]:
    """Gates, fits and curves, as data that can be written down."""
    reach = (
        best_of_reach(tables["best_of"], plan["reference"], gates) if "best_of" in tables else {"last": 0, "middle": 0}
    )
    checks, missing = checks_of(tables, gates, plan, reach)
    fits = {"bon": {"form": "bon"}} if reach["last"] >= 5 else {}
    fits |= {"rl": {"form": "rl"}} if plan.get("free") and "trace" in tables else {}
    drawn: dict[str, list[Any]] = {f"fit {name}": [] for name in fits} | {f"curves {name}": [] for name in tables}
    for start in range(0, gates.resamples, CHUNK):
        for name, table in tables.items():
            means = nested_bootstrap(table.groups, seed=seed + start, samples=min(CHUNK, gates.resamples - start))
            for check in checks:
                if check.table == name and check.threshold is not None:
                    check.draws.append(check.figure(means).mean(-1))
            drawn[f"curves {name}"].append(means.mean((1, 2)))
            for form in fits:
                if name == ("best_of" if form == "bon" else "trace"):
                    drawn[f"fit {form}"].append(fitted(table, means, form, gates, plan, reach))
    found: dict[str, Any] = {}
    for check in checks:
        gate = found.setdefault(check.gate, {"says": SAYS[check.gate], "checks": []})
        gate["checks"].append(judged(check, tables[check.table].now(), gates.level))
    for one in missing:
        gate = found.setdefault(one.gate, {"says": SAYS[one.gate], "checks": []})
        row = {"name": one.name, "wanted": "", "missing": one.why, "per_seed": [], "outcome": "INCONCLUSIVE"}
        gate["checks"].append(row)
    for gate in found.values():
        gate["outcome"] = worst([c["outcome"] for c in gate["checks"]])
    # A gate with a check that was not measured cannot pass by chance: it is none of the several.
    whole = {n: gate["checks"] for n, gate in found.items() if not any("missing" in c for c in gate["checks"])}
    adjusted = holm({name: max(c.get("p", 0.0) for c in rows) for name, rows in whole.items()})
    for name, gate in found.items():
        gate["p"] = adjusted.get(name)  # of the check that is least sure
        if gate["outcome"] == "PASS" and adjusted[name] > (1 - gates.level) / 2:
            gate["outcome"] = "INCONCLUSIVE"
    works = found["G1"]["outcome"] == "PASS"
    for name, gate in found.items():
        gate["void"] = name in VOID and not works
    tail = (1 - gates.level) / 2
    return {
        "gates": dict(sorted(found.items())),
        "level": gates.level,
        "seeds": len(next(iter(tables.values())).groups),
        "reach": reach and {"n": tables["best_of"].points[reach["last"]] if "best_of" in tables else None},
        "fits": {f: summary(tables, f, drawn[f"fit {f}"], gates, plan, reach) for f in fits},
        "curves": {n: curves(t, torch.cat(drawn[f"curves {n}"]), tail) for n, t in tables.items()},
    }


def best_of_reach(table: Table, reference: str, gates: Gates) -> dict[str, int]:
    """last: the place of the largest n at which answers still differ. middle: the first at half of its sqrt(KL)."""
    distinct, kl = (table.of(table.now(), reference, m).mean((0, 1)) for m in ("distinct", "kl"))
    last = max(int((distinct >= gates.distinct).double().cumprod(0).sum()) - 1, 0)
    d = kl.clamp(min=0).sqrt()
    return {"last": last, "middle": int((d >= d[last] / 2).double().argmax())}


def points_of(
    table: Table, means: Tensor, form: str, gates: Gates, plan: Plan, reach: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """d, gain in s.d. and which count, [..., G x K]: the points of all seeds together."""
    name = plan["reference"] if form == "bon" else plan["free"]
    kl, gold = (table.of(means, name, m).mean(-2) for m in ("kl", "gold_sd"))
    if form == "bon":
        kl, gold = kl[..., : reach["last"] + 1], gold[..., : reach["last"] + 1]
    d, gain = kl.clamp(min=0).sqrt(), gold - gold[..., :1]
    mask = torch.ones_like(d, dtype=torch.bool)
    mask[..., 0] = False
    if form == "rl":
        mask &= (d >= gates.d_min) & (d <= math.sqrt(gates.kl_max))
    return d.flatten(-2), gain.flatten(-2), mask.flatten(-2)


def fitted(table: Table, means: Tensor, form: str, gates: Gates, plan: Plan, reach: Mapping[str, int]) -> Tensor:
    """alpha, beta, d*, R*, R2 and the AICc gap [n, 6]; resamples with too few points are left out."""
    d, gain, mask = points_of(table, means, form, gates, plan, reach)
    enough = mask.sum(-1) >= 5
    if not bool(enough.any()):
        return torch.empty(0, 6, dtype=torch.float64)
    fit = fit_scaling(d[enough], gain[enough], form=form, mask=mask[enough])
    at, height = scaling_peak(fit.alpha, fit.beta, form=form)
    return torch.stack([fit.alpha, fit.beta, at, height, fit.r2, fit.over_line], -1)


def summary(
    tables: Mapping[str, Table],
    form: str,
    drawn: list[Tensor],
    gates: Gates,
    plan: Plan,
    reach: Mapping[str, int],
) -> dict[str, Any] | None:
    """The fit with its percentile intervals, and its curve with a band."""
    table = tables["best_of" if form == "bon" else "trace"]
    now = fitted(table, table.now().unsqueeze(0), form, gates, plan, reach)
    draws = torch.cat(drawn)
    if not len(now) or not len(draws):
        return None
    tail = (1 - gates.level) / 2
    names = ("alpha", "beta", "d_star", "r_star", "r2", "aicc_over_line")
    low, high = (draws.nanquantile(q, dim=0) for q in (tail, 1 - tail))
    d, _, mask = points_of(table, table.now(), form, gates, plan, reach)
    xs = torch.linspace(0, float(d[mask].max()), 60, dtype=torch.float64)
    band = scaling_curve(xs, draws[:, :1], draws[:, 1:2], form=form)
    return {
        **{n: {"value": float(now[0, i]), "interval": [float(low[i]), float(high[i])]} for i, n in enumerate(names)},
        "points": int(mask.sum()),
        "resamples": len(draws),
        "curve": {
            "d": xs.tolist(),
            "mean": scaling_curve(xs, now[0, 0], now[0, 1], form=form).tolist(),
            "low": band.nanquantile(tail, dim=0).tolist(),
            "high": band.nanquantile(1 - tail, dim=0).tolist(),
        },
    }


def curves(table: Table, draws: Tensor, tail: float) -> dict[str, Any]:
    """Each condition's and measure's mean over seeds with its band, and every seed's own curve."""
    now = table.now().mean(1)  # [G, C]
    ends = [draws.nanquantile(q, dim=0) for q in (tail, 1 - tail)]

    def at(values: Tensor, c: str, m: str) -> list[Any]:
        out: list[Any] = table.of(values.unsqueeze(-2), c, m).squeeze(-2).tolist()
        return out

    return {
        "points": table.points,
        "conditions": {
            c: {
                m: {
                    "mean": at(now.mean(0), c, m),
                    "low": at(ends[0], c, m),
                    "high": at(ends[1], c, m),
                    "seeds": at(now, c, m),
                }
                for m in table.measures
            }
            for c in table.conditions
        },
    }
