"""Python functions as scorers: which convention is meant, what each gets, what it may answer, who waits for whom."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trueup.engine.mesh import Mesh
from trueup.records import Completion, Prompt, Scores, UserError
from trueup.scorers import Weighted, make_scorer

PROMPTS = [Prompt.of("1 + 1?", answer="2"), Prompt.of("2 + 2?", answer="4", level=3)]
COMPLETIONS = [Completion("It is 2.", ids=(7, 8)), Completion("It is 5.", "length")]


@pytest.fixture
def rule(monkeypatch):
    """rule(function) -> the scorer that `rules:NAME` names."""
    module = ModuleType("rules")
    monkeypatch.setitem(sys.modules, "rules", module)

    def make(function, spec=None):
        setattr(module, function.__name__, function)
        return make_scorer(f"rules:{function.__name__}", Mesh())

    return make


def values(scorer, prompts=PROMPTS, completions=COMPLETIONS) -> list[float]:
    found = scorer.score(prompts, completions).value
    assert found.dtype == np.float64
    return found.tolist()


def test_two_arguments_are_the_records(rule):
    def ended(prompts, completions):
        assert all(isinstance(p, Prompt) for p in prompts)
        return [float(c.ended) for c in completions]

    async def later(prompts, completions, scale=2):
        await asyncio.sleep(0)
        return np.array([scale * len(c.text) for c in completions])

    assert values(rule(ended)) == [1, 0] and values(rule(later)) == [16, 16]


def test_keywords_are_what_trl_gives(rule):
    seen = {}

    def reward(completions, answer, **kwargs):
        seen.update(kwargs, completions=completions, answer=answer)
        return [float(a in c[0]["content"]) for c, a in zip(completions, answer, strict=True)]

    async def later(**kwargs):
        return reward(**kwargs)

    for scorer in (rule(reward), rule(later)):
        seen.clear()
        assert values(scorer) == [1, 0]
        assert seen == {
            "prompts": [[{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "2 + 2?"}]],
            "completions": [[{"role": "assistant", "content": c.text}] for c in COMPLETIONS],
            "completion_ids": [[7, 8], []],
            "answer": ["2", "4"],
            "level": [None, 3],
        }


def test_no_arguments_give_a_scorer(rule):
    class Length:
        name = "length"

        def score(self, prompts, completions):
            return Scores(np.array([float(len(c.text)) for c in completions]))

    def number():
        return 3

    assert values(rule(Length)) == [8, 8]
    with pytest.raises(UserError, match=r"'rules:number' takes no arguments, .* it returned int"):
        rule(number)


def test_a_column_that_the_prompts_lack_is_named(rule):
    def reward(completions, solution, **kwargs):
        return [0.0 for _ in completions]

    with pytest.raises(UserError, match=r"'rules:reward' wants 'solution', .* \(columns: answer, level\)"):
        rule(reward).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    "answers, said",
    [
        ([1.0], r"2 finite numbers .*, got 1 of them"),
        ([1.0, float("nan")], "2 finite numbers .*, got nan"),
        ([1.0, float("inf")], "got inf"),
        (3.0, "must return 2 numbers, got float"),
        ([1.0, "good"], "must return 2 numbers, got str among them"),
        ([1.0, None], r"'rules:reward' applies to 1 of 2 completions; not to '2 \+ 2\?'"),
    ],
)
def test_answers_that_are_no_scores_are_told_in_one_line(rule, answers, said):
    def reward(prompts, completions):
        return answers

    with pytest.raises(UserError, match=said) as error:
        rule(reward).score(PROMPTS, COMPLETIONS)
    assert "\n" not in str(error.value)


def test_in_a_weighted_sum_a_function_that_does_not_apply_counts_for_nothing(rule):
    def right(completions, answer, **kwargs):
        return [3.0, None]

    def brief(prompts, completions):
        return [0.5, -1.0]

    rule(right), rule(brief)
    scores = make_scorer({"rules:right": 2.0, "rules:brief": -1.0}, Mesh()).score(PROMPTS, COMPLETIONS)
    assert scores.value.tolist() == [5.5, 1.0]
    assert scores.parts["rules:brief"].tolist() == [0.5, -1.0]
    np.testing.assert_equal(scores.parts["rules:right"], [3.0, np.nan])
    with pytest.raises(UserError, match="applies to 1 of 2"):
        make_scorer({"rules:right": 1.0}, Mesh()).score(PROMPTS, COMPLETIONS)


def test_those_that_wait_wait_at_the_same_time(rule):
    order = []

    def waits(name):
        async def reward(prompts, completions):
            order.append(f"{name} asked")
            await asyncio.sleep(0.3)
            order.append(f"{name} answered")
            return [1.0, 2.0]

        reward.__name__ = name
        return rule(reward)

    def works(prompts, completions):
        time.sleep(0.15)
        order.append("worked")
        return [10.0, 10.0]

    scorer = Weighted([(rule(works), 1.0), (waits("a"), 1.0), (waits("b"), 1.0)])
    began = time.monotonic()
    assert values(scorer) == [12, 14]
    assert sorted(order[:2]) == ["a asked", "b asked"] and order[2] == "worked" and len(order) == 5
    assert time.monotonic() - began < 0.55  # one after the other: 0.75


def test_an_async_function_keeps_its_loop_and_runs_where_another_is_running(rule):
    loops = []

    async def reward(prompts, completions):
        loops.append(asyncio.get_running_loop())
        return [1.0, 2.0]

    async def notebook():
        return values(scorer)

    scorer = rule(reward)
    assert values(scorer) == asyncio.run(notebook()) == [1, 2]
    assert loops[0] is loops[1]


def test_an_error_in_a_function_is_told_with_its_place(rule):
    async def reward(prompts, completions):
        raise ZeroDivisionError("mine")

    place = rf"{Path(__file__).name}, line {reward.__code__.co_firstlineno + 1}\)$"
    with pytest.raises(UserError, match=rf"^'rules:reward' failed: ZeroDivisionError: mine \(.*{place}"):
        rule(reward).score(PROMPTS, COMPLETIONS)
