"""Simulated raters: calibrated to what is published of people, and the same whenever they are asked."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.records import Comparison, Completion, Judge, Prompt, UserError
from trueup.world.raters import demo_comparisons, people, pool, raters, reliability

PAIRS = demo_comparisons(2500, 1)


def swapped(c: Comparison) -> Comparison:
    return Comparison(c.prompt, c.completions[::-1])


@pytest.mark.parametrize("name", ["oracle", "flip(0.25)", "bt(0.45)", "biased", "pool(13)"])
def test_labels_do_not_depend_on_when_or_in_which_order_they_are_asked(name: str) -> None:
    judge = raters(name, 3)
    assert isinstance(judge, Judge)
    some = [c for c in PAIRS[:400] if c.completions[0].text != c.completions[1].text]
    first = judge.judge(some)
    assert judge.judge(some[::-1])[::-1] == first
    for a, b in zip(first, judge.judge([swapped(c) for c in some]), strict=True):
        assert (a.p is None) == (b.p is None) and a.rater == b.rater
        assert a.p is None or a.p == 1.0 - b.p
    if name != "oracle":
        assert raters(name, 4).judge(some) != first


def test_oracle_and_flip_have_the_stated_accuracy() -> None:
    oracle = reliability(raters("oracle"), raters("oracle"), PAIRS)
    assert oracle["accuracy"] == oracle["agreement"] == 1.0
    flipped = reliability(raters("flip(0.25)", 0), raters("flip(0.25)", 1), PAIRS)
    assert flipped["accuracy"] == pytest.approx(0.75, abs=0.03)
    assert flipped["agreement"] == pytest.approx(0.625, abs=0.035)


def test_bradley_terry_errs_on_close_pairs() -> None:
    close, clear = [], []
    from trueup.world.gold import gold_of

    for c, verdict in zip(PAIRS, raters("bt", 0).judge(PAIRS), strict=True):
        a, b = (gold_of(c.prompt.text, x.text).value for x in c.completions)
        if a != b:
            (close if abs(a - b) < 0.3 else clear).append((verdict.p > 0.5) == (a > b))
    assert np.mean(clear) > np.mean(close) + 0.15


def test_the_pool_agrees_as_people_do() -> None:
    figures = reliability(pool(13, 0), pool(13, 1), PAIRS)
    assert 0.63 <= figures["agreement"] <= 0.79  # published: .63 to .773 (.013); the pool agrees a little more
    assert 0.57 <= figures["prefers_longer"] <= 0.68
    assert 0.65 <= figures["accuracy"] <= 0.80
    assert 0.60 <= figures["kept"] <= 0.90  # better demonstrations are nearer ties; .72 on pairs sampled from SFT


def test_one_flattering_phrase_moves_the_pool_a_little() -> None:
    judge = pool(13, 0)
    plain, dressed = [], []
    for c in PAIRS:
        other = Comparison(c.prompt, (Completion("You are so smart! " + c.completions[0].text), c.completions[1]))
        plain.append(judge.judge([c])[0].p)
        dressed.append(judge.judge([other])[0].p)
    both = [(a, b) for a, b in zip(plain, dressed, strict=True) if a is not None and b is not None]
    shift = np.mean([b - a for a, b in both])
    assert 0.01 <= shift <= 0.10


def test_the_pool_names_its_people() -> None:
    names = {verdict.rater for verdict in pool(13, 0).judge(PAIRS[:500])}
    assert names == {p.name for p in people(13, 0)} and len(names) == 13


def test_errors_are_one_clear_line() -> None:
    with pytest.raises(UserError, match="unknown rater 'crowd'"):
        raters("crowd")
    with pytest.raises(UserError, match="flip"):
        raters("flip(high)")
    three = Comparison(Prompt.of("What is 1 plus 1?"), (Completion("2"), Completion("3"), Completion("4")))
    with pytest.raises(UserError, match="compare two answers, not 3"):
        raters("oracle").judge([three])
