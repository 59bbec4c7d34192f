"""The router: who labels what, within which budget, and what is known of the judge afterwards."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.commands import Command
from tests.label.ask import grade, queue
from tests.toy import results, rows, run
from trueup.data.readers import read_preferences
from trueup.label.accounts import Accounts
from trueup.label.queue import Answer, Nothing
from trueup.records import UserError, Waiting
from trueup.store import Store

JUDGES = '''
import hashlib
import time
from pathlib import Path

from trueup.records import Reading, Verdict

def coin(c, salt=""):
    """In [0, 1), by the content."""
    text = c.prompt.text + salt + "".join(sorted(x.text for x in c.completions))
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32

class One:
    def __init__(self, name, rule, note=None):
        self.name, self.rule, self.note = name, rule, note
    def judge(self, comparisons):
        if self.note:
            with open(f"{self.note}-{self.name}.txt", "a") as file:
                file.writelines(f"{c.prompt.text}\\n" for c in comparisons)
            time.sleep(0.05)
        return [self.rule(c) for c in comparisons]

def right(c):
    return 1.0 if "blue" in c.completions[0].text else 0.0

def people(note=None, wrong=0.0, silent="", seed=0):
    """Whose answer is the one with "blue", but for a share of errors; nobody can judge what holds `silent`."""
    def rule(c):
        if silent and silent in c.prompt.text:
            return Verdict(None, "ann")
        p = right(c)
        return Verdict(1 - p if coin(c, str(seed)) < wrong else p, "ann")
    return One("people", rule, note)

def bad_in(category="", unreadable="", sure=0.9, note=None):
    """Right, but always wrong in one category; what holds `unreadable` cannot be read."""
    def rule(c):
        if unreadable and unreadable in c.prompt.text:
            return Verdict(None, "machine", "unreadable", (Reading("one", False, None), Reading("one", True, None)))
        p = sure if right(c) else 1 - sure
        return Verdict(1 - p if c.prompt.category == category else p, "machine")
    return One("machine", rule, note)

def flips(share=0.4):
    """Wrong exactly where swapping turns the verdict."""
    def rule(c):
        p, flip = (0.9 if right(c) else 0.1), coin(c) < share
        wrong = (1 - p) * 0.2 + 0.4
        return Verdict(
            wrong if flip else p,
            "machine",
            "",
            (Reading("one", False, 1 - p if flip else p), Reading("one", True, p)),
        )
    return One("machine", rule)

class Liking:
    def __init__(self, word):
        self.name, self.word = word, word
    def score(self, prompts, completions):
        import numpy as np
        from trueup.records import Scores
        return Scores(np.array([3.0 * (self.word in c.text) for c in completions]))

def likes_blue():
    return Liking("blue")

def likes_yes():
    return Liking("yes")
'''
N, KINDS = 200, "abcd"


@pytest.fixture(scope="module")
def place(toy: Path) -> Path:
    """Pairs of four categories, fifty each; one answer is the right one."""
    said = [{"text": t, "stop": s} for t, s in (("yes please", "length"), ("the sky is blue.", "eos"))]
    (toy / "routejudges.py").write_text(JUDGES)
    rows(
        toy / "pairs-to-route.jsonl",
        [
            {"prompt": [{"role": "user", "content": f"question {i}"}], "category": KINDS[i % 4], "completions": said}
            for i in range(N)
        ],
    )
    return toy


def keys(**more) -> dict:
    judge = {"use": "routejudges:bad_in", "category": "c"}
    keys = {"completions": "pairs-to-route.jsonl", "judge": judge, "people": {"use": "routejudges:people"}}
    return {**keys, "budget": 90, "audit": 0.2, "overlap": 0.0, **more}


def routed(place, name="routes", **more):
    """(results, the rows of routed.jsonl, the comparisons)."""
    stage = run(place, {"route": keys(**more)}, name=name)["route"]
    return results(stage), lines(stage, "routed.jsonl"), lines(stage, "comparisons.jsonl")


def lines(stage, name):
    return [json.loads(line) for line in (stage.folder / name).read_text().splitlines()]


def of(table, why):
    return {r["prompt"][0]["content"] for r in table if r["why"] == why}


# who labels what


def test_a_judge_that_is_wrong_in_one_category_has_that_one_sent_to_people(place):
    found, table, comparisons = routed(place)
    assert {r["category"] for r in table if r["why"] == "risk"} == {"c"}
    audited = sum(r["category"] == "c" and r["why"] == "audit" for r in table)
    assert found["asked"] == {"audit": 40, "sensitive": 0, "random": 0, "risk": 50 - audited, "asked twice": 0}
    assert (found["labels"], found["left"], found["beyond"], found["dropped"]) == (90 - audited, 110 + audited, 0, {})
    weights = {name: one["weight"] for name, one in found["signals"].items()}
    assert max(weights, key=weights.get) == "category c" and weights["category a"] < 0
    assert found["signals"]["category c"]["with"]["accuracy"] == 0
    assert found["signals"]["category c"]["without"]["accuracy"] == 1
    assert found["audit"]["accuracy"] == pytest.approx(1 - audited / 40) and found["audit"]["pairs"] == 40
    assert found["trusted"] == {"pairs": 40 - audited, "accuracy": 1.0, "interval": pytest.approx([0.88, 1], abs=0.03)}
    low, high = found["audit"]["interval"]
    assert low < found["audit"]["accuracy"] < high and high - low > 0.15
    # every label is right, and says whose it is
    assert {(c["chosen"], c["by"]) for c in comparisons} == {("the sky is blue.", b) for b in ("ai", "simulated")}
    assert Counter(c["by"] for c in comparisons) == {"simulated": found["labels"], "ai": found["left"]}
    assert found["kinds"] == {"simulated": found["labels"]}


def test_the_audit_is_drawn_before_and_whatever_the_judge_says(place):
    one = routed(place)[1]
    other = routed(place, judge={"use": "routejudges:flips"}, scorers=["routejudges:likes_yes"])[1]
    control = routed(place, how="random")[1]
    assert of(one, "audit") == of(other, "audit") == of(control, "audit") and len(of(one, "audit")) == 40
    assert of(one, "risk") != of(other, "risk")
    assert of(routed(place, seed=1)[1], "audit") != of(one, "audit")
    assert of(one, "audit") < of(routed(place, audit=0.3)[1], "audit")


@pytest.mark.parametrize("how", ["routed", "random"])
@pytest.mark.parametrize("budget", [44, 55, 130])
def test_the_budget_is_never_passed_and_the_control_spends_it_all(place, how, budget):
    found, table, _ = routed(
        place, how=how, budget=budget, overlap=0.1, people={"use": "routejudges:people", "note": "n"}
    )
    assert found["labels"] == sum(len(r["raters"]) for r in table) <= budget
    if how == "random" or budget < 70:
        assert found["labels"] == budget
    assert found["asked"]["random"] == (budget - 44 if how == "random" else 0) and found["asked"]["asked twice"] == 4
    if how == "random":
        assert found["trusted"] == found["audit"] and found["bar"] == 1
    assert (found["asked"]["risk"] > 0) == (how == "routed" and budget > 44)
    if how == "routed":
        c = sum(r["category"] == "c" and r["why"] in ("audit", "risk") for r in table)
        assert found["beyond"] == 50 - c
        assert (found["trusted"]["pairs"] < 40) == (found["beyond"] == 0)


def test_people_are_asked_exactly_what_is_written(place):
    people = {"use": "routejudges:people", "note": "asked"}
    table = routed(place, people=people, seed=7)[1]
    asked = (place / "asked-people.txt").read_text().splitlines()
    assert sorted(asked) == sorted(of(table, "audit") | of(table, "risk"))


def test_sensitive_categories_go_to_people_first_and_never_to_the_judge(place):
    found, table, comparisons = routed(place, sensitive=["a"], budget=60)
    mine = [r for r in table if r["category"] == "a" and r["why"] != "audit"]
    assert Counter(r["why"] for r in mine) == {"sensitive": 20, "sensitive, beyond the budget": len(mine) - 20}
    assert found["asked"]["risk"] == 0 and found["dropped"] == {"sensitive, beyond the budget": len(mine) - 20}
    assert not [c for c in comparisons if c["by"] == "ai" and c["category"] == "a"]
    assert found["trusted"]["pairs"] == 40 - sum(r["category"] == "a" and r["why"] == "audit" for r in table)
    plenty, _, all_of_it = routed(place, sensitive=["a"], budget=150)
    assert plenty["asked"]["sensitive"] == len(mine) and plenty["asked"]["risk"] > 0 and len(all_of_it) == N
    control = routed(place, sensitive=["a"], budget=100, how="random")[1]
    assert of(control, "sensitive") == {r["prompt"][0]["content"] for r in mine}


def test_what_cannot_be_read_becomes_no_label_of_the_judge(place):
    judge = {"use": "routejudges:bad_in", "unreadable": "7"}
    found, table, comparisons = routed(place, judge=judge, budget=45)
    silent = [r for r in table if "7" in r["prompt"][0]["content"]]
    assert {r["p"] for r in silent} == {None} and {r["risk"] for r in silent if r["why"] != "audit"} == {0.5}
    assert Counter(r["why"] for r in silent)["risk"] == found["asked"]["risk"] == 5
    assert found["dropped"] == {"the judge could not be read": sum(r["why"] == "left" for r in silent)}
    assert {c["by"] for c in comparisons if "7" in c["prompt"][0]["content"]} == {"simulated"}
    assert found["audit"]["pairs"] == 40 - sum(r["why"] == "audit" for r in silent)
    assert len(comparisons) == N - found["dropped"]["the judge could not be read"]


def test_what_people_cannot_judge_is_dropped(place):
    found, table, comparisons = routed(place, people={"use": "routejudges:people", "silent": "3"})
    silent = [r for r in table if "3" in r["prompt"][0]["content"] and r["why"] != "left"]
    assert silent and found["dropped"] == {"people could not judge": len(silent)}
    assert all(r["wrong"] is None and r["by"] is None for r in silent)
    assert len(comparisons) == N - len(silent)


# what is learned


def test_an_order_flip_and_a_reward_model_are_signals(place):
    judge = {"use": "routejudges:flips", "share": 0.4}
    found, table, _ = routed(
        place, judge=judge, budget=150, scorers=["routejudges:likes_blue", "routejudges:likes_yes"]
    )
    flipped = [r for r in table if r["signals"]["order flip"]]
    assert 60 < len(flipped) < 100 and all(r["wrong"] == 1 for r in flipped if r["why"] == "audit")
    assert {r["why"] for r in flipped} == {"audit", "risk"} and found["asked"]["risk"] < len(flipped)
    assert found["trusted"]["accuracy"] == 1
    # one reward model likes the first, the other the second: sigmoid(3) and sigmoid(-3) are .905 apart
    assert {round(r["signals"]["reward models disagree"], 3) for r in table} == {0.905}
    assert "reward models disagree" not in found["signals"]  # alike everywhere, it says nothing
    assert set(found["signals"]) >= {"order flip", "near one half", "against the reward model"}
    alone = routed(place, judge=judge, scorers=["routejudges:likes_blue"])[1]
    gaps = {round(r["signals"]["against the reward model"], 3) for r in alone}
    # .953 of sigmoid(3), held against .9 and, where it flips, .42 (mirrored: .047 against .1 and .58)
    assert gaps == {round(abs(0.952574 - 0.9), 3), round(0.952574 - 0.42, 3)}


def test_the_threshold_is_how_often_two_people_differ(place):
    """10 pairs at 2 x .2 x .8 = .32 stand beside the 40 that two people labelled."""
    found, table, _ = routed(place, overlap=1.0, people={"use": "routejudges:people", "wrong": 0.3}, budget=100)
    pairs = [r["votes"] for r in table if len(r["votes"]) == 2]
    differ = sum((a > 0.5) != (b > 0.5) for a, b in pairs)
    assert len(pairs) == 40 and differ > 5
    assert found["threshold"] == pytest.approx((3.2 + differ) / 50)
    assert routed(place)[0]["threshold"] == pytest.approx(0.32)
    assert routed(place, person_error=0.1)[0]["threshold"] == pytest.approx(0.18)
    # where two people would differ as often as the judge and one do, nothing is sent to them
    assert routed(place, person_error=0.5, judge={"use": "routejudges:flips"})[0]["threshold"] == 0.5
    two = next(r for r in table if sorted(r["votes"]) == [0, 1])
    assert two["wrong"] == 0.5 and two["raters"] == ["ann", "ann, asked second"]


def test_the_judge_is_as_sure_as_its_risk_allows(place):
    """Where the audit found it right its label says more than its p; where as right as wrong, little. People's stay."""
    found, table, labels = routed(place, judge={"use": "routejudges:bad_in", "sure": 0.6})
    risks = {r["prompt"][0]["content"]: r["risk"] for r in table if r["by"] == "ai"}
    ai = [c for c in labels if c["by"] == "ai"]
    assert ai and all(c["label"] == pytest.approx(1 - risks[c["prompt"][0]["content"]]) for c in ai)
    assert min(c["label"] for c in ai) > 0.8 and found["asked"]["risk"] == 0
    assert found["confidence"] == pytest.approx(sum(c["label"] for c in ai) / len(ai))
    assert {c["label"] for c in labels if c["by"] != "ai"} == {1.0}
    people = {"use": "routejudges:people", "wrong": 0.5}
    coin = routed(place, judge={"use": "routejudges:bad_in"}, people=people, budget=40)
    assert all(0.5 <= c["label"] < 0.8 for c in coin[2] if c["by"] == "ai") and coin[0]["confidence"] < 0.65


def test_earlier_audits_join_in(place):
    before = run(place, {"route": keys(audit=0.5, budget=120)}, name="before")["route"]
    alone = routed(place, audit=0.02, budget=60)[0]
    joined, table, _ = routed(place, audit=0.02, budget=60, history=[str(before.folder / "routed.jsonl")])
    assert (alone["learned_from"], joined["learned_from"]) == (4, 104)
    assert joined["audit"]["pairs"] == 4  # what the judge is worth now is measured now
    risk = {r["category"]: r["risk"] for r in table if r["why"] != "audit"}
    assert risk["c"] > 0.8 and risk["a"] < 0.05


def test_gold_is_only_measured_with(place):
    found, _, comparisons = routed(place, gold="toyrules:gold")
    assert found["gold"] == {"judge": 0.75, "left": 1.0, "people": 1.0, "labels": 1.0}
    assert all(c["gold_margin"] == 1 for c in comparisons)
    assert "gold" not in routed(place)[0]


def test_money_pays_for_labels(place):
    found = routed(place, budget=None, money=4.5, price=0.1)[0]  # 44.999 as floats go
    assert (found["budget"], found["labels"]) == (45, 45) and found["spent"] == pytest.approx(4.5)


# in the store, and by people


def test_every_verdict_goes_into_the_store_by_what_the_rater_is(place):
    stage = run(place, {"route": keys(store="runs/routed.sqlite", overlap=0.5)}, name="stored")["route"]
    found = results(stage)
    kept = Store(place / "runs/routed.sqlite").preferences()
    assert Counter(j.kind for j in kept) == {"ai": N, "simulated": found["labels"]}
    assert {(j.kind, j.origin) for j in kept} == {
        ("ai", stage.folder.name),
        ("simulated", f"{stage.folder.name}, people"),
    }
    (stage.folder / "manifest.json").unlink()  # as if it had been cut off at its very end
    run(place, {"route": keys(store="runs/routed.sqlite", overlap=0.5)}, name="stored")
    assert len(Store(place / "runs/routed.sqlite").preferences()) == len(kept)


def test_people_answer_on_the_page_first_the_audit_then_the_hard_ones(place):
    asked = keys(people="people", store="runs/route-page.sqlite", limit=60, budget=30, sensitive=["b"], overlap=0.5)
    store = Store(place / "runs/route-page.sqlite")
    for name in ("ann", "bob"):
        Accounts(store).add(name, kind="simulated" if name == "bob" else "human", sensitive=True)
    q, answered = queue(store, raters=()), []
    for wave in (r"23 of 23 comparisons to be labelled: trueup label runs/route-page\.sqlite", "1 of 1"):
        with pytest.raises(Waiting, match=wave):  # 12 of the audit, 6 of them twice, and 11 of b; then what is left
            run(place, {"route": asked}, name="paged")
        for name in ("ann", "bob"):
            while not isinstance(task := q.next(name), Nothing):
                q.submit(task.assignment, name, Answer(grade(task, "the sky")))
                answered.append((name, task.comparison.prompt.category, task.sensitive))
    assert Counter(name for name, *_ in answered) == {"ann": 24, "bob": 6}
    assert all(sensitive == (category == "b") for _, category, sensitive in answered)
    found = run(place, {"route": asked}, name="paged")["route"]
    assert results(found)["labels"] == len(answered) == 30
    kept = store.preferences()
    by_machine = [j.comparison.prompt.category for j in kept if j.kind == "ai"]
    assert len(kept) == 30 + 45 and len(by_machine) == 45 and "b" not in by_machine
    by = {p.rater for p in read_preferences(found.folder / "comparisons.jsonl").records}
    assert "ann" in by and "ann, bob" in by
    assert results(found)["kinds"].keys() == {"human", "simulated"}
    store.close()


def test_people_answer_in_a_file(place):
    asked = keys(people="people", limit=20, budget=10, audit=0.3, overlap=0.5)
    said = []
    for wave in ("first", "second"):
        with pytest.raises(Waiting, match=f"to-label-{wave}.jsonl"):
            run(place, {"route": asked}, name="filed")
        (folder,) = (place / "runs/filed").glob("route-*")
        table = [json.loads(line) for line in (folder / f"to-label-{wave}.jsonl").read_text().splitlines()]
        for row in table:
            row |= {"choice": "first" if "blue" in row["first"] else "second", "rater": "zoe"}
        rows(folder / f"to-label-{wave}.jsonl", table)
        said.append(len(table))
    found = run(place, {"route": asked}, name="filed")["route"]
    assert said[0] == 9 and sum(said) == results(found)["labels"] <= 10
    assert results(found)["kinds"] == {"human": sum(said)}
    assert {c["by"] for c in lines(found, "comparisons.jsonl")} == {"human", "ai"}
    assert {c["chosen"] for c in lines(found, "comparisons.jsonl") if c["by"] == "human"} == {"the sky is blue."}


def test_a_file_of_verdicts_is_not_asked_twice(place):
    """It would say the same again, as if two people never differed."""
    said = [{"prompt": f"question {i}", "chosen": "the sky is blue.", "rejected": "yes please"} for i in range(N)]
    rows(place / "said.jsonl", [{**row, "rejected_ended": False} for row in said])
    asked = keys(people="said.jsonl", kind="human", limit=60, budget=40, overlap=0.5)
    found = results(run(place, {"route": asked}, name="from-file")["route"])
    assert found["asked"]["asked twice"] == 0 and found["kinds"] == {"human": found["labels"]}
    assert found["threshold"] == pytest.approx(2 * 0.2 * 0.8)  # what is supposed of two people, and no more


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"budget": None}, "people's labels need a limit"),
        ({"money": 3.0}, "not both"),
        ({"budget": None, "money": 3.0}, "people's labels need a limit"),
        ({"budget": None, "money": 0.3, "price": 0.5}, "money=0.3 pays for no label at price=0.5"),
        ({"audit": 0.001}, "audit=0.001 of 200 pairs is none"),
        ({"audit": 0.5, "overlap": 0.1, "budget": 109}, r"takes 110 labels \(10 pairs twice\), the budget is 109"),
        ({"people": {"use": "routejudges:people", "silent": "q"}}, "of the 40 audited pairs none has a label"),
        ({"history": ["pairs-to-route.jsonl"]}, "line 1: expected a routed.jsonl"),
        ({"history": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
        ({"how": "rooted"}, "'how': Input should be 'routed' or 'random'"),
        ({"audit": 0}, "'audit'"),
        ({"senstive": ["a"]}, "did you mean 'sensitive'"),
    ],
)
def test_what_cannot_be_is_told(place, more, said):
    with pytest.raises(UserError, match=said):
        run(place, {"route": keys(**more)}, name="told")
    assert not list((place / "runs").glob("told/*/comparisons.jsonl"))


def test_who_was_asked_is_told(place, call):
    words = [
        "completions=pairs-to-route.jsonl",
        "judge={use: routejudges:bad_in, category: c}",
        "audit=0.2",
        "overlap=0",
    ]
    words += ["people={use: routejudges:people}", "device=cpu"]
    code, out, _ = call(place, "route", *words, "budget=60")
    assert code == 0
    assert "200 pairs: simulated raters, not people, were asked 60 of 60 labels (40 audit, 20 risk)" in out
    assert "left to machine" in out and "of the random audit" in out and "hard: a risk above 0.320" in out
    out = call(place, "route", *words, "budget=60", "kind=human", "--name", "humans")[1]
    assert "200 pairs: people were asked 60" in out and "simulated" not in out


def test_a_dry_run_says_what_would_be_asked_and_asks_nothing(place, call):
    def said(judge, *more):
        words = ["completions=pairs-to-route.jsonl", f"judge={judge}", "people={use: routejudges:people, note: dry}"]
        code, out, err = call(place, "route", *words, "audit=0.2", "device=cpu", *more, "--name", "dry", "--dry-run")
        assert code == 0, err
        assert not list(place.glob("dry-*")) and not (place / "runs" / "dry").exists()
        return out.splitlines()

    people, judge = said("{use: routejudges:bad_in, category: c, note: dry}", "budget=90")
    found = routed(place, overlap=0.1)[0]
    assert found["asked"]["audit"] == 40 and found["asked"]["asked twice"] == 4
    assert people == "people: at most 90 labels for 200 pairs (40 audit, 4 asked twice, hard ones with the 46 left)"
    assert judge == "judge: not a server"
    server = "{constitution: default, endpoint: 'http://127.0.0.1:9/v1', model: m, price_in: 2, price_out: 0}"
    _, judge = said(server, "budget=90", "limit=150")
    assert judge.startswith("judge: 150 pairs: 300 requests to send, 0 answered before") and "at most 0 " not in judge
    [people, _] = said(server, "money=30", "price=0.5", "sensitive=[a]", "how=random")
    found = routed(place, overlap=0.1, budget=60, sensitive=["a"], how="random")[0]
    sensitive, beyond = found["asked"]["sensitive"], found["dropped"]["sensitive, beyond the budget"]
    assert sensitive == 16 and beyond > 0
    assert people == (
        "people: at most 60 labels for 200 pairs, 30 at the price given (40 audit, 4 asked twice, 16 sensitive); "
        f"dropped: {beyond} sensitive, beyond the budget"
    )


# cut off


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on_and_asks_nobody_twice(place):
    more = {"seed": 3, "chunk": 4, "overlap": 0.25, "budget": 100}
    more |= {"judge": {"use": "routejudges:bad_in", "category": "c", "note": "killed"}}
    more |= {"people": {"use": "routejudges:people", "note": "killed"}}
    whole = run(place, {"route": keys(**more)}, name="unkilled")["route"]
    asked = {n: Counter((place / n).read_text().splitlines()) for n in ("killed-machine.txt", "killed-people.txt")}
    for name in asked:
        (place / name).unlink()
    (place / "killed.yaml").write_text(
        json.dumps({"name": "killed", "device": "cpu", "stages": {"route": keys(**more)}})
    )
    kills = 0
    for after in (1.5, 2.5, 1):
        command = Command(place, "run", "killed.yaml")
        began = None
        while command.poll() is None:
            if began is None and list((place / "runs/killed").glob("route-*/journal-*")):
                began = time.monotonic()
            if began is not None and time.monotonic() - began > after:
                command.kill()
                kills += 1
                break
            time.sleep(0.01)
    code, said = Command(place, "run", "killed.yaml").wait()
    assert code == 0, said
    assert kills, "killed too late to test anything"
    (folder,) = (place / "runs/killed").glob("route-*")
    for name in ("comparisons.jsonl", "routed.jsonl"):
        assert (folder / name).read_text() == (whole.folder / name).read_text()
    for name, once in asked.items():  # what was under way when the kill came, a chunk a kill, is asked again
        again = Counter((place / name).read_text().splitlines())
        assert again.keys() == once.keys() and (again - once).total() <= 4 * kills
