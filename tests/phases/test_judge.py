"""Labelled pairs: what is asked, what is asked twice, and what is left out."""

from __future__ import annotations

import pytest

from tests.toy import results, rows, run
from trueup.data.readers import read_preferences
from trueup.phases.reward import rater_agreement


@pytest.fixture
def answers(toy):
    """Ten prompts with three answers each, of which the first two make a pair."""
    said = [{"text": t, "stop": s} for t, s in (("yes please", "length"), ("the sky is blue.", "eos"), ("no", "eos"))]
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(10)]
    return rows(toy / "answers.jsonl", [{"prompt": p, "category": "a", "completions": said} for p in prompts])


def test_a_limit_leaves_the_second_askings_in(toy, answers):
    keys = {"completions": answers.name, "judge": "toyrules:gold", "overlap": 1.0, "limit": 4}
    stage = run(toy, {"judge": keys})["judge"]
    found = results(stage)
    assert (found["asked"], found["asked_twice"], found["comparisons"]) == (4, 4, 8)
    assert found["dropped"] == {"answers without a partner": 10, "over the limit": 6}
    preferences = read_preferences(stage.folder / "comparisons.jsonl").records
    assert {p.chosen.text for p in preferences} == {"the sky is blue."}
    assert all(p.chosen.ended and not p.rejected.ended for p in preferences)
    assert rater_agreement(preferences) == 1.0


def test_without_a_limit_every_pair_is_asked(toy, answers):
    stage = run(toy, {"judge": {"completions": answers.name, "judge": "toyrules:gold", "overlap": 0.0}})["judge"]
    assert (results(stage)["asked"], results(stage)["comparisons"]) == (10, 10)
    assert results(stage)["dropped"] == {"answers without a partner": 10}
