"""What a judge is worth, worked by hand; the file as a judge; labelling that refuses a judge worse than one person; and
PandaLM's raters."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.shared import SHARED, needs_shared
from trueup.agreement import cohen_kappa
from trueup.data.prepare import Pair
from trueup.judges import make_judge
from trueup.judges.measured import compare, line, majority, measure
from trueup.judges.recorded import Judged, read_judged
from trueup.phases.judge import JudgeConfig, run_phase
from trueup.phases.reward import batch_of, pair_loss
from trueup.records import Comparison, Completion, Preference, Prompt, Reading, UserError, Verdict, write_jsonl
from trueup.run import Run


def judged(*votes: float, of: str | None = None) -> Judged:
    return Judged(
        Comparison(Prompt.of("?", category=of), (Completion("short"), Completion("rather long"))), list(votes)
    )


def test_figures_by_hand():
    """Five pairs; the longer one is always the second.

    votes       majority   judge   right   each person against the other two      judge against the same
    1 1 1       first      .9      yes     3 of 3                                 3 of 3
    1 1 0       first      .2      no      the third sees 1 1: wrong; the others see a tie of sides: left out
                                                                                  1 majority (1 1): judge wrong
    0 0 0       second     .3      yes     3 of 3                                 3 of 3
    1 .5 0      none       .8      -       none: every two others differ          -
    1 1 .5      first      None    -       not among them: the judge says nothing
    """
    people = [judged(1, 1, 1, of="x"), judged(1, 1, 0, of="y"), judged(0, 0, 0), judged(1, 0.5, 0), judged(1, 1, 0.5)]
    said = [Verdict(p, "j") for p in (0.9, 0.2, 0.3, 0.8, None)]
    found = measure(said, people)
    assert (found["pairs"], found["judged"], found["abstained"], found["unreadable"]) == (5, 3, 1, 0)
    assert found["no_majority"] == 1 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["unanimous"] == {"pairs": 2, "accuracy": 1.0} and found["split"] == {"pairs": 1, "accuracy": 0.0}
    # judge: first, second, second; people: first, first, second: (2/3 - 4/9) / (5/9)
    assert found["kappa"] == pytest.approx(0.4)
    one = found["one_person"]
    assert (one["pairs"], one["held"]) == (3, 7) and one["person"] == one["judge"] == pytest.approx(6 / 7)
    assert found["accepted"] is True
    assert found["by_category"] == {"x": {"pairs": 1, "accuracy": 1.0}, "y": {"pairs": 1, "accuracy": 0.0}}
    assert found["longer_right"] == pytest.approx(1 / 3)  # the longer one is right on the third pair alone
    assert found["prefers_longer"] == pytest.approx(2 / 4)  # .2 and .3 of four
    # votes that are no tie, on the four pairs with a verdict: 3 + 3 + 3 + 2, of which 0 + 1 + 3 + 1 for the longer
    assert found["people_prefer_longer"] == pytest.approx(5 / 11)
    # sure .9, .8, .7, .8 against shares 1, 1/3, 1, 1/2: two in the bin of .8, whose mean share is 5/12
    assert found["ece"] == pytest.approx((abs(0.9 - 1) + 2 * abs(0.8 - 5 / 12) + abs(0.7 - 1)) / 4)


def test_a_judge_below_one_person_is_not_accepted_and_nobody_knows_without_several():
    people = [judged(1, 1, 1), judged(1, 1, 1), judged(0, 0, 0)]
    wrong = measure([Verdict(p, "j") for p in (0.9, 0.4, 0.1)], people)
    assert wrong["accepted"] is False and wrong["one_person"]["judge"] == pytest.approx(2 / 3)
    assert measure([Verdict(p, "j") for p in (0.9, 0.6, 0.1)], people)["accepted"] is True
    alone = measure([Verdict(0.9, "j")] * 2, [judged(1), judged(0)])
    assert alone["accepted"] is None and alone["accuracy"] == 0.5


def test_what_cannot_be_read_is_not_right():
    """One verdict in ten, and that one right, makes no judge; an abstention is held against nobody."""
    people = [judged(1, 1, 1)] * 10
    lost = Verdict(None, "j", "unreadable", (Reading("one", False, None),))
    for nothing, accepted in ((lost, False), (Verdict(None, "j"), True)):
        found = measure([Verdict(0.9, "j"), *[nothing] * 9], people)
        assert found["accepted"] is accepted and found["accuracy"] == 1.0


def test_scaling_mends_a_judge_that_is_too_sure():
    """It says .99 and is right on 7 of 10: scaled, on the other half's temperature, it is off by next to nothing."""
    people = [judged(float(i % 20 < 14)) for i in range(200)]
    found = measure([Verdict(0.99, "j") for _ in people], people)
    assert found["ece"] == pytest.approx(0.29) and found["ece_scaled"] < 0.03 and found["temperature"] > 4


def test_orders_tell_the_flips_and_the_liking_for_a_place():
    """Shown first, the place wins in 3 of 4 readings; one of two pairs is turned by swapping."""

    def both(plain: float, swapped: float) -> Verdict:
        readings = (Reading("x", False, plain), Reading("x", True, swapped))
        return Verdict((plain + swapped) / 2, "j", "", readings)

    found = measure([both(0.9, 0.4), both(0.8, 0.6), Verdict(0.5, "j")], [judged(1), judged(1), judged(1)])
    assert found["in_both_orders"] == 2 and found["flip_rate"] == 0.5
    assert found["first_shown_wins"] == 0.75  # first, first (1 - .4), first, and second (1 - .6)
    assert "swapping flips 50.0% of 2;" in line("j", found)


def test_majorities():
    assert majority([1, 0.9, 0]) == 0 and majority([0.5, 0.5, 1]) == 1 and majority([0]) == 2
    assert majority([1, 0]) is None and majority([1, 0.5, 0]) is None and majority([]) is None


def test_two_judges_are_compared_where_both_speak():
    found = compare([Verdict(p, "a") for p in (1, 0, 0.5, None)], [Verdict(p, "b") for p in (0.6, 1, 0.5, 1)])
    assert found["pairs"] == 3 and found["agreement"] == pytest.approx(2 / 3)
    assert found["kappa"] == pytest.approx((2 / 3 - 1 / 3) / (2 / 3))


def rows(*given: tuple[str, str, str, float, str]) -> list[dict]:
    keys = ("prompt", "chosen", "rejected", "label", "rater")
    return [dict(zip(keys, row, strict=True)) for row in given]


def test_a_pair_is_one_whichever_way_round_it_stands(tmp_path):
    table = rows(("q", "a", "b", 1, "x"), ("q", "b", "a", 1, "y"), ("q", "a", "b", 0.5, "z"), ("q", "a", "c", 0.9, "x"))
    write_jsonl(tmp_path / "p.jsonl", table)
    one, two = read_judged(str(tmp_path / "p.jsonl"))[0]
    first = one.comparison.completions[0].text
    assert sorted(one.votes) == [0, 0.5, 1] and one.votes[0] == (1 if first == "a" else 0)
    assert two.votes == [pytest.approx(0.9 if two.comparison.completions[0].text == "a" else 0.1)]


def test_a_file_is_a_judge(tmp_path, mesh):
    write_jsonl(tmp_path / "p.jsonl", rows(("q", "a", "b", 0.8, "x"), ("q", "b", "a", 0.4, "y")))
    judge = make_judge(str(tmp_path / "p.jsonl"), mesh)
    a, b, c = Completion("a"), Completion("b"), Completion("c")
    pairs = [Comparison(Prompt.of("q"), pair) for pair in ((a, b), (b, a), (a, c))]
    assert [v.p for v in judge.judge(pairs)] == [pytest.approx(0.7), pytest.approx(0.3), None]


def test_length_is_a_judge(mesh):
    pairs = [
        Comparison(Prompt.of("q"), (Completion(x), Completion(y))) for x, y in (("aa", "b"), ("a", "b"), ("", "b"))
    ]
    assert [v.p for v in make_judge("length", mesh).judge(pairs)] == [1.0, 0.5, 0.0]


def test_the_command_measures_and_compares(tmp_path, call):
    table = [
        row
        for i in range(12)
        for rater in "xyz"
        for row in rows((f"q{i}", f"a longer answer {i}", f"no {i}", 1.0 if i % 3 else 0.0, rater))
    ]
    write_jsonl(tmp_path / "people.jsonl", table)
    one = [{**row, "label": 0.9} for row in table[::3]][:10]
    write_jsonl(tmp_path / "machine.jsonl", one)
    code, out, err = call(tmp_path, "judge", "people.jsonl", "judge=machine.jsonl", "against=length", "device=cpu")
    assert code == 0, err
    [folder] = (tmp_path / "runs" / "judge").glob("judged-*")
    found = json.loads((folder / "results.json").read_text())
    assert (found["pairs"], found["judged"], found["abstained"]) == (12, 10, 2)
    assert found["accuracy"] == pytest.approx(0.6) and found["accepted"] is False
    assert found["against"]["both"] == {"pairs": 10, "agreement": 1.0, "kappa": 1.0}
    assert "worse than one person: 60.0% against 100.0%" in " ".join(out.split())
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 10 and all(v["label"] == pytest.approx(0.9) and v["chosen"][0] == "a" for v in verdicts)
    without = [json.loads(line) for line in (folder / "no-verdict.jsonl").read_text().splitlines()]
    assert len(without) == 2 and "label" not in without[0] and "chosen" not in without[0]
    code, _, err = call(tmp_path, "judge", "people.jsonl", "judge=length", "--dry-run")
    assert code == 2 and "another is free" in err
    where = "judge={constitution: default, endpoint: 'http://127.0.0.1:9/v1', model: m, price_in: 2, price_out: 0}"
    code, out, _ = call(tmp_path, "judge", "people.jsonl", where, "--dry-run")
    assert code == 0 and out.startswith("12 pairs: 24 requests to send, 0 answered before; at most 0.")
    both = [where, f"against{where[5:]}".replace("model: m", "model: n")]
    code, out, _ = call(tmp_path, "judge", "people.jsonl", *both, "--dry-run")
    assert code == 0 and out.startswith("12 pairs: 48 requests")


def test_a_dry_run_counts_what_is_asked_twice_and_what_people_judged(labelled, tmp_path, call):
    _, people = labelled
    where = "judge={constitution: default, endpoint: 'http://127.0.0.1:9/v1', model: m}"
    given = (f"completions={tmp_path / 'completions.jsonl'}", where)
    for more, requests in (((), 12), (("overlap=1",), 24), ((f"humans={people}", "overlap=0"), 12 + 20)):
        code, out, err = call(tmp_path, "judge", *given, *(more or ("overlap=0",)), "device=cpu", "--dry-run")
        assert code == 0, err
        assert out.startswith(f"6 pairs: {requests} requests")


@pytest.fixture
def labelled(tmp_path, mesh):
    """Three answers to compare, and three people who prefer `a` to `b`: label(keys) runs phase judge on them."""
    answers = [{"text": "a", "stop": "eos"}, {"text": "b", "stop": "eos"}]
    asked = [{"prompt": [{"role": "user", "content": f"q{i}"}], "completions": answers} for i in range(6)]
    write_jsonl(tmp_path / "completions.jsonl", asked)
    people = [(f"h{i}", "a", "b", 1.0, r) for i in range(10) for r in "xyz"]
    write_jsonl(tmp_path / "people.jsonl", rows(*people))

    def label(machine: list, **keys):
        write_jsonl(tmp_path / "machine.jsonl", rows(*machine))
        paths = {k: str(tmp_path / f"{k}.jsonl") for k in ("completions",)}
        config = JudgeConfig(judge=str(tmp_path / "machine.jsonl"), overlap=0, **paths, **keys)
        with Run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", name="judge") as run:
            results = run_phase(config, run, mesh)
            return results, [json.loads(x) for x in (run.folder / "comparisons.jsonl").read_text().splitlines()]

    return label, str(tmp_path / "people.jsonl")


def test_labels_are_soft_scaled_and_none_where_nothing_was_said(labelled):
    label, people = labelled
    said = [(f"q{i}", "a", "b", 0.9, "m") for i in range(4)]
    results, pairs = label(said)
    assert {p["label"] for p in pairs} == {0.9} and len(pairs) == 4 and results["dropped"]["the judge abstained"] == 2
    unsure = said + [(f"h{i}", "a", "b", 0.6, "m") for i in range(10)]
    results, pairs = label(unsure, humans=people)  # right on all ten, and never sure: ten say at most 11 in 12
    assert results["humans"]["accepted"]
    assert results["humans"]["temperature"] == pytest.approx(math.log(0.6 / 0.4) / math.log(11))
    assert all(p["label"] > 0.999 for p in pairs)


def test_a_judge_worse_than_one_person_is_refused_unless_forced(labelled):
    label, people = labelled
    said = [(f"q{i}", "a", "b", 0.9, "m") for i in range(4)]
    said += [(f"h{i}", *(("a", "b") if i < 9 else ("b", "a")), 0.9, "m") for i in range(10)]
    with pytest.raises(UserError, match=r"worse than one person: 90.0% against 100.0%.*force=true"):
        label(said, humans=people)
    results, pairs = label(said, humans=people, force=True)
    assert len(pairs) == 4 and results["humans"]["accepted"] is False


def test_soft_labels_reach_the_loss(tiny, mesh):
    """`label` of a judge's file goes into Bradley-Terry: the loss of a pair at .7 is the mix of both certain ones."""
    prompt = Prompt.of("q")

    def loss(label: float) -> float:
        pair = Pair([1, 2, 3], [1, 2, 4], Preference(prompt, Completion("a"), Completion("b"), label=label))
        batch = batch_of([pair], 0)
        losses, _ = pair_loss({"scores": torch.tensor([[1.0, -0.5]])}, batch, center=0.0)["loss"]
        return float(losses)

    assert loss(0.7) == pytest.approx(0.7 * loss(1.0) + 0.3 * loss(0.0))


PANDALM = ("data/pandalm/testset-v1.json", "data/pandalm/gpt-3.5-turbo-testset-v1.json")


@needs_shared(*PANDALM)
def test_pandalm_s_raters_and_gpt_3_5(tmp_path, mesh):
    """Published kappas of its three raters are .85, .88, .86. GPT-3.5 agrees with their majority on 73.3% of the 879
    items on which they are unanimous, and on 55.0% of the other 120, kappa .496, where the 25 outputs that are no
    verdict count as ties. We count what could not be read as no verdict: 73.6% of 860 and 56.1% of 114."""
    people, machine = (json.loads((SHARED / name).read_text()) for name in PANDALM)
    votes = [[one[f"annotator{k}"] for one in people] for k in (1, 2, 3)]
    kappas = [cohen_kappa(votes[a], votes[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert sorted(round(k, 3) for k in kappas) == [0.852, 0.862, 0.879]

    says = {0: 0.5, 1: 1.0, 2: 0.0, "1": 1.0, "2": 0.0, "Tie": 0.5, "garbage": 0.5}
    table, tied, read = [], [], []
    for one, other in zip(people, machine, strict=True):
        asked = f"{one['idx']}. {one['instruction']}\n\n{one['input']}"
        texts = [str(one["response1"]), str(one["response2"])]
        empty = not texts[0].strip()  # `chosen` may not be empty: such a pair is written the other way round
        pair = tuple(texts[::-1] if empty else texts)

        def row(vote, rater, asked=asked, pair=pair, empty=empty):
            return rows((asked, *pair, 1 - says[vote] if empty else says[vote], rater))

        table += [r for k in (1, 2, 3) for r in row(one[f"annotator{k}"], f"annotator{k}")]
        tied += row(other["gpt_result"], "gpt")
        read += row(other["gpt_result"], "gpt") if other["gpt_result"] != "garbage" else []
    for name, some in (("people", table), ("tied", tied), ("read", read)):
        write_jsonl(tmp_path / f"{name}.jsonl", some)
    judged, dropped = read_judged(str(tmp_path / "people.jsonl"))
    assert len(judged) == 999 and not dropped
    pairs = [j.comparison for j in judged]
    found = measure(make_judge(str(tmp_path / "tied.jsonl"), mesh).judge(pairs), judged)
    assert (found["unanimous"]["pairs"], found["split"]["pairs"]) == (879, 120)
    assert round(found["unanimous"]["accuracy"], 3) == 0.733 and round(found["split"]["accuracy"], 3) == 0.55
    assert found["kappa"] == pytest.approx(0.496, abs=0.005)  # in the file's order: it hangs on which side is "first"
    found = measure(make_judge(str(tmp_path / "read.jsonl"), mesh).judge(pairs), judged)
    assert (found["unanimous"]["pairs"], found["split"]["pairs"], found["abstained"]) == (860, 114, 25)
    assert round(found["unanimous"]["accuracy"], 3) == 0.736 and round(found["split"]["accuracy"], 3) == 0.561
    assert round(found["one_person"]["person"], 3) == 0.958 and found["accepted"] is False
    assert found["one_person"]["judge"] < 0.75
