"""Labelled pairs: what is asked, what is asked twice, and what is left out."""

from __future__ import annotations

import json

import pytest

from tests.label.ask import grade, queue
from tests.toy import results, rows, run
from trueup.data.readers import read_preferences
from trueup.label.queue import Answer
from trueup.phases.reward import rater_agreement
from trueup.records import UserError, Waiting
from trueup.store import Store


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


def test_verdicts_go_into_the_store_once(toy, answers):
    keys = {"completions": answers.name, "judge": "toyrules:gold", "audit": "toyrules:gold", "limit": 4}
    keys |= {"store": "runs/prefs.sqlite", "kind": "simulated", "overlap": 1.0, "seed": 5}
    stage = run(toy, {"judge": keys})["judge"]
    found = Store(toy / "runs/prefs.sqlite").preferences()
    assert len(found) == results(stage)["comparisons"] == 8
    assert {(j.kind, j.origin) for j in found} == {("simulated", stage.folder.name)}
    assert all(j.comparison.completions[j.p < 0.5].text == "the sky is blue." for j in found)
    assert all(j.meta["gold_margin"] == (1 if j.p == 1 else -1) for j in found)
    (stage.folder / "manifest.json").unlink()  # as if it had been cut off at its very end
    again = run(toy, {"judge": keys})["judge"]
    assert again.folder == stage.folder and len(Store(toy / "runs/prefs.sqlite").preferences()) == 8
    # the store is no part of the key
    assert run(toy, {"judge": {**keys, "store": None}})["judge"].folder == stage.folder


def people(answers, **more):
    return {"judge": {"completions": answers.name, "judge": "people", "overlap": 0.0, "limit": 3, **more}}


def fill(path, choices):
    said = [json.loads(line) for line in path.read_text().splitlines()]
    rows(path, [{**row, "choice": choice, "rater": "ann"} for row, choice in zip(said, choices, strict=True)])


def test_people_are_waited_for(toy, answers):
    with pytest.raises(Waiting, match=r"3 of 3 comparisons to be labelled in .*to-label\.jsonl"):
        run(toy, people(answers, seed=21), name="asked")
    (stage,) = (toy / "runs/asked").glob("judge-*")
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["status"] == "waiting" and "3 of 3" in manifest["for"]
    fill(stage / "to-label.jsonl", ["first", "tie", None])
    with pytest.raises(Waiting, match="1 of 3"):
        run(toy, people(answers, seed=21), name="asked")
    fill(stage / "to-label.jsonl", ["second", "tie", "skip"])
    done = run(toy, people(answers, seed=21, store="runs/people.sqlite"), name="asked")["judge"]
    assert done.folder == stage and results(done)["dropped"] == {
        "answers without a partner": 10,
        "the judge abstained": 1,
        "over the limit": 7,
    }
    asked = [json.loads(line) for line in (stage / "to-label.jsonl").read_text().splitlines()]
    one, two = (json.loads(line) for line in (stage / "comparisons.jsonl").read_text().splitlines())
    assert (one["chosen"], one["label"], one["rater"]) == (asked[0]["second"], 1.0, "ann")
    assert two["label"] == 0.5
    kept = Store(toy / "runs/people.sqlite").preferences()
    assert [(j.p, j.tie, j.kind) for j in kept] == [(0.0, False, "human"), (0.5, True, "human")]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace("null", '"A"', 1), "id 0: choice 'A'; expected one of first, second, tie, skip"),
        (lambda text: text.replace("yes please", "yes", 1), "comparison 0 is missing or altered"),
        (lambda text: text.partition("\n")[2], "comparison 0 is missing or altered"),
        (lambda text: text + "{oops\n", "line 4: broken JSON"),
    ],
)
def test_what_people_spoil_is_told(toy, answers, spoil, said):
    with pytest.raises(Waiting):
        run(toy, people(answers, seed=22), name="spoiled")
    (stage,) = (toy / "runs/spoiled").glob("judge-*")
    path = stage / "to-label.jsonl"
    whole = path.read_text()
    path.write_text(spoil(whole))
    try:
        with pytest.raises(UserError, match=said):
            run(toy, people(answers, seed=22), name="spoiled")
    finally:
        path.write_text(whole)


def test_waiting_is_exit_code_75(toy, answers, call):
    keys = ["completions=answers.jsonl", "judge=people", "limit=2", "overlap=0", "device=cpu"]
    code, _, err = call(toy, "judge", *keys)
    assert code == 75 and err.startswith("trueup: waits for 2 of 2 comparisons") and len(err.splitlines()) == 1


def test_people_answer_on_the_labelling_page(toy, answers):
    keys = people(answers, seed=23, store="runs/page.sqlite", overlap=1.0)
    with pytest.raises(Waiting, match=r"6 of 6 comparisons to be labelled: trueup label runs/page\.sqlite"):
        run(toy, keys, name="paged")
    store = Store(toy / "runs/page.sqlite")
    q = queue(store)
    for k in range(6):
        task = q.next("ann")
        q.submit(task.assignment, "ann", Answer(grade(task, "the sky")))
        if k == 0:
            with pytest.raises(Waiting, match="5 of 6"):
                run(toy, keys, name="paged")
    found = run(toy, keys, name="paged")["judge"]
    assert results(found)["comparisons"] == 6
    preferences = read_preferences(found.folder / "comparisons.jsonl").records
    assert {(p.chosen.text, p.label) for p in preferences} == {("the sky is blue.", 1.0)}
    assert {p.rater for p in preferences} == {"ann", "ann, asked second"}
    assert rater_agreement(preferences) == 1.0
    assert len(store.preferences()) == 6  # once, where they were given
    store.close()
