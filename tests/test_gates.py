"""Gates on planted data: what they find is what was planted, with intervals that say how sure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trueup.evaluate.overoptimization import (
    Gates,
    analyze,
    chance,
    crossed,
    fall,
    holm,
    interval,
    outcome,
    ranks,
    rise,
    table_of,
)
from trueup.report.study import gate_rows

STEPS = [0, 10, 20, 30, 40, 50, 60, 70]
NS = [1, 2, 4, 8, 16, 32, 64, 128]
SIZES = ["comparisons-50", "comparisons-150", "comparisons-500", "all"]
PLAN = {
    "reference": "all",
    "sizes": SIZES,
    "fewer": "comparisons-50",
    "noisy": "flips-0_3",
    "control": "on_gold",
    "free": "kl-0",
    "default": "kl-0_25",
    "held": ["kl-0", "kl-0_05", "kl-0_25"],
}
# Curves over STEPS: gold, proxy, KL.
RISES_AND_FALLS = ([0.5, 0.62, 0.7, 0.68, 0.6, 0.5, 0.4, 0.3], [0, 0.5, 1, 1.3, 1.5, 1.6, 1.7, 1.9])
KEEPS = ([0.5, 0.6, 0.66, 0.7, 0.72, 0.73, 0.73, 0.73], [0, 0.4, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0])
LEARNS_GOLD = ([0.5, 0.7, 0.8, 0.85, 0.88, 0.9, 0.9, 0.9], [0, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
FORMS = {"kl-0": 20.0, "kl-0_05": 8.0, "kl-0_25": 1.5, "on_gold": 5.0}


def planted(seeds=8, prompts=40, noise=0.02, spread=0.02, **curves) -> dict:
    """Tables of a study in which each condition follows its curve, give or take a seed's own offset and noise."""
    rng = np.random.default_rng(0)
    shapes = {"kl-0": RISES_AND_FALLS, "kl-0_05": KEEPS, "kl-0_25": KEEPS, "on_gold": LEARNS_GOLD, **curves}
    trace, best, reward = [], [], []
    n = np.log(NS)
    roots = np.sqrt(np.log(NS) - 1 + 1 / np.array(NS))
    tops = {"all": 0.4, "comparisons-50": 0.1, "comparisons-150": 0.2, "comparisons-500": 0.3, "flips-0_3": 0.2}
    for _ in range(seeds):
        offset = rng.normal(0, spread, prompts)[:, None] + rng.normal(0, spread)
        rows = {}
        for name, end in FORMS.items():
            gold, proxy = (np.array(v)[None] + noise * rng.normal(size=(prompts, len(STEPS))) for v in shapes[name])
            kl = np.broadcast_to(np.linspace(0, end, len(STEPS)), gold.shape) * (1 + 0.01 * rng.normal())
            rows[name] = columns(
                "step", STEPS, gold=gold + offset, proxy=proxy, proxy_sd=proxy, gold_sd=gold + offset, kl=kl
            )
        trace.append(rows)
        rows = {}
        for name, alpha in tops.items():
            curve = curves.get("best", lambda d, a: d * (a - 0.13 * d))(roots, alpha)
            gold = 0.5 + curve[None] + noise * rng.normal(size=(prompts, len(NS)))
            proxy = np.broadcast_to(n, gold.shape)
            distinct = np.broadcast_to(np.where(np.array(NS) > curves.get("reach", 128), 0.1, 0.9), gold.shape)
            kl = np.broadcast_to(roots**2, gold.shape)
            rows[name] = columns("n", NS, gold=gold, gold_sd=gold, proxy=proxy, kl=kl, distinct=distinct)
        best.append(rows)
        accuracy = curves.get("accuracy", [0.52, 0.6, 0.68, 0.75])
        reward.append(
            {
                size: {
                    "rows": np.zeros(1),
                    "prompt": np.zeros(1),
                    "accuracy": np.array([a + rng.normal(0, 0.01)]),
                    "ceiling": np.array([curves.get("ceiling", 0.88)]),
                }
                for size, a in zip(SIZES, accuracy, strict=True)
            }
        )
    return {
        "trace": table_of(trace, "step", ["gold", "proxy", "gold_sd", "proxy_sd", "kl"]),
        "best_of": table_of(best, "n", ["gold", "gold_sd", "proxy", "kl", "distinct"]),
        "reward": table_of(reward, "rows", ["accuracy", "ceiling"], halves=1),
    }


def columns(point, points, **values) -> dict:
    prompts = len(next(iter(values.values())))
    return {
        point: np.tile(points, prompts),
        "prompt": np.repeat(np.arange(prompts), len(points)),
        **{name: np.asarray(v).ravel() for name, v in values.items()},
    }


def found(gates=None, plan=None, **curves) -> dict:
    return analyze(planted(**curves), Gates(**{"resamples": 400, **(gates or {})}), {**PLAN, **(plan or {})})


def outcomes(**curves) -> dict:
    return {name: gate["outcome"] for name, gate in found(**curves)["gates"].items()}


def test_what_was_planted_passes():
    result = found()
    assert {n: (g["outcome"], g["void"]) for n, g in result["gates"].items()} == {
        f"G{i}": ("PASS", False) for i in range(1, 7)
    }
    checks = {c["name"]: c for g in result["gates"].values() for c in g["checks"]}
    assert checks["gold's rise"]["value"] == pytest.approx(0.2, abs=0.01)
    assert checks["share of the headroom closed"]["value"] == pytest.approx(0.8, abs=0.02)
    assert checks["gold's fall minus 0.5 of its rise"]["value"] == pytest.approx(0.3, abs=0.01)
    assert checks["the proxy's rise after gold's peak, s.d."]["value"] == pytest.approx(0.9, abs=0.02)
    del checks["AICc of the line minus R_bon's"]  # resampled curves are rougher than the curve: its interval lies lower
    assert all(low < c["value"] < high for c in checks.values() if "interval" in c for low, high in [c["interval"]])


@pytest.mark.parametrize(
    ("gate", "curves"),
    [
        ("G1", {"on_gold": KEEPS}),  # closes less than half of the headroom
        ("G1", {"on_gold": ([*LEARNS_GOLD[0][:-2], 0.82, 0.81], LEARNS_GOLD[1])}),  # turns over
        ("G2", {"accuracy": [0.66, 0.7, 0.72, 0.77]}),  # far from chance at the fewest
        ("G2", {"accuracy": [0.52, 0.6, 0.58, 0.57]}),  # gains too little
        ("G2", {"ceiling": 0.7}),
        ("G3", {"best": lambda d, a: a * d}),  # a straight line
        ("G4", {"kl-0": KEEPS}),  # never falls
        ("G4", {"kl-0": ([0.5, 0.53, 0.54, 0.5, 0.4, 0.3, 0.2, 0.1], RISES_AND_FALLS[1])}),  # hardly rises
        ("G4", {"kl-0": (RISES_AND_FALLS[0], [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5])}),  # the proxy falls with it
        ("G5", {"kl-0_25": RISES_AND_FALLS}),
        ("G6", {"best": lambda d, a: d * (0.4 - a / 10 - 0.13 * d)}),  # more comparisons do harm
    ],
)
def test_what_is_not_there_fails(gate, curves):
    result = found(**curves)["gates"]
    assert result[gate]["outcome"] == "FAIL"
    assert all(g["outcome"] == "PASS" for name, g in result.items() if name != gate)
    assert result["G4"]["void"] == (gate == "G1") and not result["G1"]["void"]


@pytest.mark.parametrize(
    ("gate", "changes", "why"),
    [
        ("G1", {"plan": {"control": None}}, "the study has no `control`"),
        ("G2", {"ceiling": math.nan}, "no ceiling is known: too few comparisons are judged twice"),
        ("G2", {"plan": {"sizes": ["all"]}}, "the study has no `comparisons`"),
        (
            "G3",
            {"reach": 16, "best": lambda d, a: d * (a - 0.2 * d)},
            "answers differ at 5 values of n only, a fit needs 6",
        ),
        ("G3", {"reach": 0}, "answers hardly differ: n goes nowhere"),
        ("G4", {"plan": {"free": None}}, "0 is not among `kl_coefs`"),
        ("G5", {"plan": {"default": None}}, "the study has no `default`"),
        ("G5", {"plan": {"held": ["kl-0_25"]}}, "`kl_coefs` has one value"),
        ("G6", {"plan": {"noisy": None}}, "the study has no `flips`"),
        ("G6", {"plan": {"fewer": None}}, "the study has no `comparisons`"),
    ],
)
def test_a_gate_with_a_check_that_was_not_measured_stays_open_and_says_so(gate, changes, why):
    result = found(**changes)["gates"]
    assert set(result) == {f"G{i}" for i in range(1, 7)}
    assert [c["missing"] for c in result[gate]["checks"] if "missing" in c] == [why]
    assert result[gate]["outcome"] == "INCONCLUSIVE" and result[gate]["p"] is None
    others = {name for name, g in result.items() if name != gate and g["outcome"] != "PASS"}
    assert others <= ({"G6"} if changes.get("reach") == 0 else set())
    assert why in gate_rows(gate, result[gate])["checks"][-1]["interval"]


def test_a_check_that_fails_is_not_hidden_by_one_that_was_not_measured():
    gate = found(plan={"default": None, "held": ["kl-0_25", "kl-0"]})["gates"]["G5"]
    assert [c["outcome"] for c in gate["checks"]] == ["FAIL", "INCONCLUSIVE"] and gate["outcome"] == "FAIL"


def test_what_is_near_a_threshold_stays_open():
    assert outcomes(noise=0.2, gates={"rise": 0.2})["G4"] == "INCONCLUSIVE"
    assert outcomes(noise=0.2, gates={"headroom": 0.8})["G1"] == "INCONCLUSIVE"
    assert outcomes(noise=0.2, gates={"rise": 0.1})["G4"] == "PASS"


def test_one_seed_is_never_sure_and_few_take_students_t():
    one = found(seeds=1)["gates"]
    assert one["G4"]["outcome"] == "INCONCLUSIVE" and one["G4"]["checks"][0]["interval"] is None
    assert found(seeds=1, **{"kl-0_25": KEEPS})["gates"]["G5"]["checks"][0]["outcome"] == "PASS"  # true of every seed
    values = torch.tensor([1.0, 2.0, 4.0])
    low, high = interval(values, torch.zeros(10), 0.95)
    half = 4.30265 * float(values.std()) / math.sqrt(3)
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half), abs=1e-4)


@pytest.mark.parametrize(
    ("found", "threshold", "above", "said"),
    [
        ((0.1, 0.2), 0.1, True, "PASS"),
        ((0.05, 0.2), 0.1, True, "INCONCLUSIVE"),
        ((0.05, 0.09), 0.1, True, "FAIL"),
        ((0.05, 0.1), 0.1, False, "PASS"),
        ((0.05, 0.2), 0.1, False, "INCONCLUSIVE"),
        ((0.15, 0.2), 0.1, False, "FAIL"),
        ((float("nan"), 0.2), 0.1, True, "INCONCLUSIVE"),
        (None, 0.1, True, "INCONCLUSIVE"),
    ],
)
def test_outcomes(found, threshold, above, said):
    assert outcome(found, threshold, above) == said


def test_a_gate_among_others_must_be_surer():
    assert holm({"a": 0.03, "b": 0.01, "c": 0.012}) == pytest.approx({"b": 0.03, "c": 0.03, "a": 0.03})
    assert holm({"a": 0.001, "b": 0.4}) == pytest.approx({"a": 0.002, "b": 0.4})
    values = torch.tensor([1.0, 2.0, 4.0])  # t = 4/3 / (s.d. 1.5275 / sqrt 3) = 1.5119 at 1: one-sided p .1349
    assert chance(values, torch.zeros(9), 1.0, True) == pytest.approx(0.1349, abs=2e-4)
    assert chance(values, torch.zeros(9), 1.0, False) == pytest.approx(1 - 0.1349, abs=2e-4)
    draws = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert chance(torch.zeros(6), draws, 0.5, True) == 0.25 and chance(torch.zeros(6), draws, 0.5, False) == 0.75
    # Every check within its own interval; but the least sure of many gates would be so by chance too often.
    result = found(noise=0.2, gates={"rise": 0.116, "resamples": 2000})["gates"]["G4"]
    assert {c["outcome"] for c in result["checks"]} == {"PASS"} and result["outcome"] == "INCONCLUSIVE"
    assert result["p"] > 0.025 >= max(c["p"] for c in result["checks"])


def test_a_peak_is_chosen_on_one_half_and_read_on_the_other():
    gold = torch.tensor([[0.0, 5.0, 1.0, 2.0], [0.0, 2.0, 4.0, 1.0]])  # peaks at 1 and at 2
    [top] = crossed(gold, gold)
    assert top.tolist() == [1.0, 2.0]
    assert rise(gold) == 1.5 and fall(gold) == pytest.approx(0.0)
    # Of pure noise the cross-fitted rise is nothing; the peak as it is would rise.
    noise = torch.randn(4000, 2, 10, generator=torch.Generator().manual_seed(0))
    assert abs(float(rise(noise).mean())) < 0.05 < float((noise.max(-1).values - noise[..., 0]).mean())


def test_ranks():
    assert ranks(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])).tolist() == pytest.approx(
        [1, -1, 0.5]
    )


def test_best_of_n_goes_only_as_far_as_answers_differ():
    assert found()["reach"]["n"] == 128 and found(reach=16)["reach"]["n"] == 16


def test_fits_find_what_was_planted_and_count_the_points_they_may():
    fits = found(noise=0.001, spread=0.0)["fits"]
    assert fits["bon"]["alpha"]["value"] == pytest.approx(0.4, abs=0.01)
    assert fits["bon"]["beta"]["value"] == pytest.approx(0.13, abs=0.01)
    assert fits["bon"]["d_star"]["value"] == pytest.approx(0.4 / 0.26, abs=0.05)
    assert fits["bon"]["points"] == 8 * 7  # n = 1 is left out
    assert fits["rl"]["points"] == 8 * 5  # KL 2.9 to 14.3 of 0 to 20
    assert len(fits["bon"]["curve"]["d"]) == len(fits["bon"]["curve"]["low"])


def test_rows_in_any_order_and_an_odd_prompt_left_out():
    rows = {"n": np.array([2, 1, 1, 2, 1, 2]), "prompt": np.array([0, 0, 1, 1, 2, 2]), "gold": np.arange(6.0)}
    table = table_of([{"all": rows}], "n", ["gold"])
    assert table.points == [1, 2] and table.groups[0].tolist() == [[[1.0, 0.0]], [[2.0, 3.0]]]
