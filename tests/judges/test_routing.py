"""The router's figures, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trueup.judges.routing import (
    Pair,
    Risk,
    Vote,
    agreement,
    apart,
    by_signal,
    people_differ,
    signals_of,
    unseen_risk,
)
from trueup.records import Comparison, Completion, Prompt, Reading, Verdict


def pair(category: str | None = None) -> Comparison:
    return Comparison(
        Prompt.of("q", **({"category": category} if category else {})), (Completion("a"), Completion("b"))
    )


def test_signals_by_hand():
    """Orders .9 and .3 flip; principles (.9 + .3) / 2 = .6 and .2 have s.d. .2."""
    readings = (Reading("x", False, 0.9), Reading("x", True, 0.3), Reading("y", False, 0.2), Reading("y", True, 0.2))
    found = signals_of(pair("harm"), Verdict(0.4, "m", "", readings), [])
    assert found == {
        "order flip": 1.0,  # .55 as it is shown, .25 swapped
        "near one half": pytest.approx(0.8),
        "spread over principles": pytest.approx(0.4),
        "partly unreadable": 0.0,
        "category harm": 1.0,
    }
    partly = (Reading("x", False, 0.9), Reading("x", True, 0.8), Reading("y", False, None))
    found = signals_of(pair(), Verdict(0.9, "m", "", partly), [])
    assert found == {
        "order flip": 0.0,
        "near one half": pytest.approx(0.2),
        "spread over principles": 0.0,
        "partly unreadable": 1.0,
    }


def test_reward_models_by_hand():
    """Margins log 3 and -log 3 are .75 and .25: s.d. .25, mean .5. No verdict is held for one half."""
    found = signals_of(pair(), Verdict(0.9, "m"), [math.log(3), -math.log(3)])
    assert found["reward models disagree"] == pytest.approx(0.5)
    assert found["against the reward model"] == pytest.approx(0.4)
    assert signals_of(pair(), Verdict(None, "m"), [math.log(3)])["against the reward model"] == pytest.approx(0.25)
    assert signals_of(pair(), Verdict(0.9, "m"), [math.log(3)])["against the reward model"] == pytest.approx(0.15)
    assert signals_of(pair(), Verdict(None, "m"), [math.log(3)])["near one half"] == 1


def test_how_far_a_label_is_from_votes():
    assert [apart(0.9, [1.0]), apart(0.9, [0.0]), apart(0.9, [0.5]), apart(0.5, [0.5])] == [0, 1, 0.5, 0]
    assert apart(0.1, [0.0, 1.0]) == 0.5 and apart(0.1, [0.0, 0.0, 1.0]) == pytest.approx(1 / 3)


def test_how_often_people_differ():
    """2 x .1 x .9 = .18 as ten pairs, and four of which one is split: (1.8 + 1) / 14. One vote tells nothing."""
    votes = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0], []]
    assert people_differ(votes, 0.1) == pytest.approx(2.8 / 14)
    assert people_differ([], 0.5) == 0.5


def test_the_risk_is_by_category_and_what_is_not_known_is_the_mean():
    signals = [{"near one half": 0.0, f"category {'ab'[i % 2]}": 1.0} for i in range(100)]
    wrong = [float(i % 2 == 1) for i in range(100)]
    risk = Risk(signals, wrong)
    a, b, new = risk.of([{"category a": 1.0, "near one half": 0.0}, {"category b": 1.0}, {"category c": 1.0}])
    assert a < 0.15 and b > 0.85 and new == pytest.approx(0.5, abs=0.01)
    assert risk.weight()["category b"] == pytest.approx(-risk.weight()["category a"], rel=1e-6)
    # one audited pair of a category moves it less than its prior's s.d.
    rare = Risk([*signals, {"category d": 1.0}], [*wrong, 1.0]).weight()
    assert 0 < rare["category d"] < 1 < rare["category b"]
    # a signal that an earlier round did not have
    later = Risk([{"x": 0.0}, {"x": 1.0}, {}, {}], [0.0, 1.0, 0.0, 1.0])
    assert later.of([{"x": 0.5}]) == pytest.approx(later.of([{}]))
    assert later.of([{"x": 1.0}]) > 0.5 > later.of([{"x": 0.0}])


def test_an_audited_pair_has_its_risk_from_the_others():
    """Coins: a model that had seen a pair would be drawn towards its outcome; one that has not is not."""
    rng = np.random.default_rng(0)
    signals = [{f"x{k}": float(v) for k, v in enumerate(rng.random(12))} for _ in range(40)]
    wrong = [float(w) for w in rng.random(40) < 0.5]
    seen, held = Risk(signals, wrong).of(signals), unseen_risk(signals, wrong)
    right, left = np.array(wrong) == 1, np.array(wrong) == 0
    assert seen[right].mean() > seen[left].mean() + 0.05
    assert held[right].mean() < held[left].mean() + 0.02
    assert unseen_risk([{"x": 1.0}], [1.0]).tolist() == [0.5]  # nobody else is known
    assert unseen_risk([{"x": 0.0}] * 4, [1.0, 1.0, 1.0, 0.0])[3] > 0.5


def told(p, vote, **signals) -> Pair:
    return Pair(pair(), Verdict(p, "m"), signals, votes=[Vote(vote, "ann", "human")])


def test_agreement_and_what_a_signal_is_worth():
    """Wilson at 2.5 of 4: (2.5 + 1.921) / 7.841 -+ 1.96 sqrt(.9375 + .960) / 7.841."""
    audit = [told(0.9, 1.0, x=0.0), told(0.9, 1.0, x=0.2), told(0.8, 0.5, x=0.9), told(0.7, 0.0, x=1.0)]
    found = agreement([*audit, told(None, 1.0), told(0.9, None)])
    assert (found["pairs"], found["accuracy"]) == (4, 0.625)
    assert found["interval"] == pytest.approx([0.2194, 0.9081], abs=1e-4)
    assert agreement([]) == {"pairs": 0, "accuracy": None, "interval": None}
    signals = by_signal([*audit, told(0.9, None, x=0.4, y=1.0)], audit, {"x": 1.5})
    assert signals["x"]["weight"] == 1.5
    assert (signals["x"]["with"]["accuracy"], signals["x"]["without"]["accuracy"]) == (0.25, 1.0)
    assert signals["y"]["weight"] is None and signals["y"]["with"]["pairs"] == 0
    assert not by_signal(audit, [told(0.9, 1.0, z=1.0)], {})["x"]["with"]["pairs"]
    assert "z" not in by_signal([told(0.9, 1.0, z=1.0)] * 3, audit, {})


def test_a_label_is_as_sure_as_its_risk_allows_and_no_risk_turns_it_round():
    def label(p, risk):
        return Pair(pair(), Verdict(p, "m"), {}, risk=risk).machine.p

    assert label(0.6, 0.1) == 0.9 and label(0.2, 0.1) == pytest.approx(0.1)
    assert label(0.9, 0.7) == label(0.1, 0.7) == label(0.5, 0.1) == 0.5 and label(None, 0.1) is None
