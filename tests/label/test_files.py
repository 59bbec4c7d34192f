"""Files into the store and out of it, and the agreement of public raters."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from tests.label.ask import grade, pair, queue
from tests.shared import SHARED, needs_shared
from trueup.agreement import alpha, by_rater, cohen_kappa, pair_kappas
from trueup.data.readers import read_demonstrations, read_preferences
from trueup.label.files import ask_file, export_file, import_file, preference_rows
from trueup.label.manager import figures, manager_view, share
from trueup.label.queue import Answer
from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.store import Judged, Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    yield store
    store.close()


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_what_is_asked_is_read_from_files(store, tmp_path):
    rows = [
        {"prompt": "a?", "first": "1", "second": "2", "gold": "second", "explanation": "why", "models": ["m", "n"]},
        {"prompt": "b?", "first": "1", "second": "2", "sensitive": True, "priority": 2, "wanted": 5, "category": "c"},
        {"prompt": "c?", "first": "same", "second": "same"},
        {"prompt": [{"role": "user", "content": "d?"}], "chosen": "1", "rejected": "2"},
    ]
    told = ask_file(store, write(tmp_path / "ask.jsonl", rows), origin="one")
    assert (told.new, told.rows) == (3, 4) and "1 left out" in str(told)
    said = [{"text": t, "stop": s, "model": t} for t, s in (("x", "eos"), ("y", "length"), ("z", "eos"))]
    answers = [{"prompt": [{"role": "user", "content": "e?"}], "category": "k", "completions": said}]
    told = ask_file(store, write(tmp_path / "completions.jsonl", answers), origin="two", overlap=4, share=1.0)
    assert str(told) == "1 new of 2 rows; 1 left out: answers without a partner"
    with store.reading() as db:
        found = [tuple(r) for r in db.exec_driver_sql("SELECT wanted, gold, sensitive, priority, open FROM items")]
    assert found == [(1, 0.0, 0, 0.0, 0), (5, None, 1, 2.0, 1), (1, None, 0, 0.0, 1), (4, None, 0, 0.0, 1)]
    ann = queue(store)
    task = next(t for t in iter(lambda: ann.next("ann"), None) if ann.skip(t.assignment, "ann", "") and "e?" in str(t))
    assert {c.stop for c in task.comparison.completions} == {"eos", "length"}
    assert task.comparison.prompt.meta == {"category": "k"}
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: column 'gold': 'A'; expected one of first, second, tie"):
        ask_file(store, write(tmp_path / "bad.jsonl", [{**rows[0], "gold": "A"}]), origin="x")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: found columns 'prompt'; expected prompt, first, second"):
        ask_file(store, write(tmp_path / "bad.jsonl", [{"prompt": "a"}]), origin="x")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_goes_out_comes_in_again(store, tmp_path, suffix):
    store.ask([pair(i) for i in range(3)], "batch")
    q = queue(store)
    for k in range(3):
        task = q.next("ann")
        answer = Answer(both_bad=True) if k == 2 else Answer(grade(task) if k == 0 else 0, note="n", own="my answer")
        q.submit(task.assignment, "ann", answer)
    out = tmp_path / f"labels{suffix}"
    assert export_file(store, "labels", out) == 3
    found = read_preferences(out).records
    assert (found[0].chosen.text, found[0].label, found[0].rater) == ("good answer 0", 1.0, "ann")
    columns = (
        set(pq.read_table(out).column_names)
        if suffix == ".parquet"
        else set(json.loads(out.read_text().split("\n")[0]))
    )
    assert {"prompt", "chosen", "rejected", "rater", "strength", "time", "kind"} <= columns
    other = Store(tmp_path / "other.sqlite")
    assert import_file(other, out, origin="x").new == 3 and import_file(other, out, origin="x").new == 0
    same = ("p", "strength", "tie", "both_bad", "rater", "kind", "time", "note", "origin", "comparison")
    assert [[getattr(j, n) for n in same] for j in other.preferences()] == [
        [getattr(j, n) for n in same] for j in store.preferences()
    ]
    assert export_file(store, "demonstrations", tmp_path / f"d{suffix}") == 2
    assert {d.reply for d in read_demonstrations(tmp_path / f"d{suffix}").records} == {"my answer"}
    with pytest.raises(UserError, match=r"expected \.jsonl or \.parquet"):
        export_file(store, "labels", tmp_path / "x.csv")
    other.close()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_raters_who_disagree_come_in_on_the_same_comparison(store, tmp_path, suffix):
    """However each row is turned, alpha, the preferences and the last word are the same after a round trip."""
    store.ask([pair(i, wanted=2) for i in range(6)], "batch")
    q = queue(store)
    for k in range(6):
        for name, better in (("ann", "bad" if k < 2 else "good"), ("bob", "good" if k < 3 else "bad")):
            task = q.next(name)
            q.submit(task.assignment, name, Answer(grade(task, better)))
    q.adjudicate(1, "ann", Answer(3))
    other, out = Store(tmp_path / "other.sqlite"), tmp_path / f"labels{suffix}"
    assert export_file(store, "labels", out) == 13
    assert str(import_file(other, out, origin="x")) == "13 new of 13 rows"
    assert str(import_file(other, out, origin="x")) == "0 new of 13 rows"
    assert [(j.comparison, j.p) for j in other.preferences()] == [(j.comparison, j.p) for j in store.preferences()]
    assert manager_view(other, 0.0)["alpha"] == manager_view(store, 0.0)["alpha"]

    def told(one):
        rows = [{k: v for k, v in row.items() if k not in ("chosen", "rejected")} for row in preference_rows(one)]
        return rows, [row["chosen"] for row in preference_rows(one) if row["label"] > 0.5]

    assert told(other) == told(store) and next(preference_rows(other))["adjudicated"]
    assert import_file(store, out, origin="x").new == 12  # beside its own, on the same comparisons
    assert len({j.comparison for j in store.preferences()}) == 6
    other.close()


def test_others_files_name_a_comparison_in_two_orders(store, tmp_path):
    rows = [
        {"prompt": "a?", "chosen": "1", "rejected": "2", "rater": "ann"},
        {"prompt": "a?", "chosen": "2", "rejected": "1", "rater": "bob"},
    ]
    assert import_file(store, write(tmp_path / "one.jsonl", rows), origin="x").new == 2
    assert import_file(store, write(tmp_path / "two.jsonl", rows[::-1]), origin="x").new == 0
    assert len({j.comparison for j in store.preferences()}) == 1 and [j.p for j in store.preferences()] == [1.0, 0.0]


def test_answers_to_what_is_known_come_in_as_no_opinion(store, tmp_path):
    rows = [
        {"prompt": "a?", "chosen": "1", "rejected": "2", "rater": "ann", "purpose": purpose}
        for purpose in ("onboarding", "gold", "label", "repeat")
    ]
    told = import_file(store, write(tmp_path / "labels.jsonl", rows), origin="x")
    assert str(told) == "1 new of 4 rows; 2 left out: answers to what is known; 1 left out: second askings"
    long = {**rows[2], "time": "2026-01-01T00:00:00+00:00 " * 3, "purpose": None}
    with pytest.raises(UserError, match=r"long\.jsonl, line 1: column 'time': more than 32 characters"):
        import_file(store, write(tmp_path / "long.jsonl", [long]), origin="x")
    with pytest.raises(UserError, match=r"odd\.jsonl, line 1: column 'strength': 'very'; expected a number"):
        import_file(store, write(tmp_path / "odd.jsonl", [{**rows[2], "strength": "very"}]), origin="x")


def test_argilla_s_records_come_in(store, tmp_path):
    fields = {"instruction": "which?", "response1": "one", "response2": "two"}
    said = [{"value": "response1", "user_id": "u1"}, {"value": "response-2", "user_id": "u2"}]
    ranked = [{"value": [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}], "user_id": "u3"}]
    nested = {"id": "r", "fields": fields, "metadata": {}, "suggestions": {}, "vectors": {}, "status": "completed"}
    nested["responses"] = {"preference": said, "ranking": ranked, "comment": [{"value": "hm", "user_id": "u1"}]}
    told = import_file(store, write(tmp_path / "argilla.json", [nested]), origin="argilla")
    assert str(told) == "3 new of 4 rows; 1 left out: answers to other questions"
    assert [(j.rater, j.p) for j in store.preferences()] == [("u1", 1.0), ("u2", 0.0), ("u3", 0.0)]
    flat = {**fields, "preference.responses": ["tie", "response1"], "preference.responses.users": ["u4", "u5"]}
    flat |= {"preference.responses.status": ["submitted", "draft"], "id": "r"}
    told = import_file(store, write(tmp_path / "flat.jsonl", [flat]), origin="argilla")
    assert str(told) == "1 new of 2 rows; 1 left out: responses that are draft"
    assert (store.preferences()[-1].rater, store.preferences()[-1].tie) == ("u4", True)


def test_label_studio_s_tasks_come_in(store, tmp_path):
    def annotation(selected, by, **more):
        result = [{"from_name": "pw", "to_name": "a,b", "type": "pairwise", "value": {"selected": selected}}]
        return {"id": 1, "result": result, "completed_by": by, "created_at": "2026-01-02T03:04:05.5Z", **more}

    task = {"id": 7, "data": {"prompt": "which?", "answer1": "one", "answer2": "two"}}
    task["annotations"] = [
        annotation("left", 10, lead_time=4.3),
        annotation("right", {"id": 3, "email": "bo@example.org"}),
        annotation("left", 12, was_cancelled=True),
        {"result": [], "completed_by": 13},
    ]
    told = import_file(store, write(tmp_path / "ls.json", [task]), origin="ls")
    assert told.new == 2 and dict(told.dropped) == {
        "skipped annotations": 1,
        "annotations without one pairwise choice": 1,
    }
    one, two = store.preferences()
    assert (one.rater, one.p, one.meta, one.time[:10]) == ("10", 1.0, {"seconds": 4.3}, "2026-01-02")
    assert (two.rater, two.p, two.comparison.completions[1].text) == ("bo@example.org", 0.0, "two")
    with pytest.raises(UserError, match=r"x\.json, row 1: found 'q'; expected the prompt as one of prompt, "):
        import_file(store, write(tmp_path / "x.json", [{"data": {"q": 1}, "annotations": []}]), origin="x")


def test_kappa_by_hand():
    """10 items: both say 0 on 4, both 1 on 3, a 0 and b 1 on 2, a 1 and b 0 on 1. Observed 7/10; a says 0 on 6, b on
    5: chance .6 x .5 + .4 x .5 = .5; kappa (.7 - .5) / .5 = .4."""
    a = [0] * 4 + [1] * 3 + [0] * 2 + [1]
    b = [0] * 4 + [1] * 3 + [1] * 2 + [0]
    assert cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_of_three_classes():
    """a 0,0,1,2 and b 0,1,1,0: observed 1/2; chance by a's and b's shares: 0: 1/2 x 1/2, 1: 1/4 x 1/2, 2: 1/4 x 0 =
    3/8; kappa (1/8) / (5/8) = .2."""
    assert cohen_kappa([0, 0, 1, 2], [0, 1, 1, 0]) == pytest.approx(0.2)


def test_kappa_at_its_ends():
    assert cohen_kappa([0, 1], [0, 1]) == 1.0
    assert cohen_kappa([0, 1], [1, 0]) == -1.0
    assert cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0.0


def test_kappa_that_is_undefined():
    """Both say one and the same of all, or there is nothing to agree on."""
    assert math.isnan(cohen_kappa([5, 5], [5, 5])) and math.isnan(cohen_kappa([], []))
    with pytest.raises(ValueError, match="1 and 2 ratings"):
        cohen_kappa([0], [0, 1])


def test_kappa_and_alpha_by_hand():
    # two raters, ten items, eight alike; shares of 1: .6 and .6 -> (.8 - .52) / .48
    a = [1] * 6 + [-1] * 4
    b = [1] * 5 + [-1] * 4 + [1]
    assert cohen_kappa(a, b) == pytest.approx((0.8 - 0.52) / 0.48)
    ratings = by_rater([("a", i, x) for i, x in enumerate(a)] + [("b", i, x) for i, x in enumerate(b)])
    assert pair_kappas(ratings) == [("a", "b", 10, pytest.approx(0.58333, abs=1e-4))]
    # alpha: 1 - apart / expected over 20 values, 12 and 8 of each: 4 / 20 against 192 / 380
    point, low, high, n = alpha(ratings)
    assert point == pytest.approx(1 - 0.2 / (192 / 380)) and n == 10 and low < point < high
    assert alpha({"a": {1: 1}, "b": {1: 1}}) is None


def test_leanings_are_counted_by_what_was_shown():
    class Row:
        rater, kind, gold, time, length_a, length_b = "ann", "human", None, "2026-01-01T00:00:00+00:00", 5, 9

        def __init__(self, comparison, p, **meta):
            self.comparison, self.p, self.meta = comparison, p, meta

    rows = [Row(1, 1.0, swapped=False), Row(2, 1.0, swapped=True), Row(3, 0.0, swapped=True), Row(4, 0.5, swapped=True)]
    rows += [Row(1, 0.0, swapped=True, purpose="repeat"), Row(9, 0.0, purpose="adjudication")]
    one = figures(rows, 0.0)["ann"]
    assert (one.left, one.longer, one.again, one.answers) == (
        [True, False, True, True],
        [False, False, True, True],
        [False],
        5,
    )
    assert share([True] * 8 + [False] * 2) == (
        0.8,
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
        10,
    )
    assert share([]) is None


@pytest.mark.long
@needs_shared("data/pandalm/testset-v1.json")
def test_the_three_raters_of_pandalm(store):
    """Their README: kappa .85, .88, .86; alpha .864 by two other programs."""
    p_of = {0: 0.5, 1: 1.0, 2: 0.0}
    rows = json.loads((SHARED / "data/pandalm/testset-v1.json").read_text())
    judged = []
    for row in rows:
        text = row["instruction"] + "\n\n" + row["input"] + f"\n{row['idx']}"
        compared = Comparison(Prompt.of(text), (Completion(row["response1"]), Completion(row["response2"], "stop")))
        for k in (1, 2, 3):
            p = p_of[row[f"annotator{k}"]]
            judged.append(Judged(compared, p, f"annotator{k}", "human", "pandalm", "", tie=p == 0.5))
    assert store.append(judged) == 3 * 999
    view = manager_view(store, 0.0)
    kappas = {(a[-1], b[-1]): round(k, 3) for a, b, n, k in view["kappas"] if n == 999}
    assert kappas == {("1", "2"): 0.852, ("1", "3"): 0.879, ("2", "3"): 0.862}
    point, low, high, n = view["alpha"]
    assert (round(point, 3), n) == (0.864, 999) and 0.84 < low < point < high < 0.89
