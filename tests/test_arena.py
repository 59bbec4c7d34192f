"""Models compared blindly: what is asked, and what follows from the answers."""

from __future__ import annotations

import json
import math
import random
import time
import zlib

import httpx
import numpy as np
import pytest

from tests.commands import Command
from tests.label.ask import queue
from tests.label.serving import TOKEN
from trueup.arena.asked import ArenaConfig, answers_of, ask_arena
from trueup.arena.standings import ORIGIN, arena_of, arena_rows, ask_judge, shown, standings
from trueup.label.manager import manager_view
from trueup.label.queue import Answer
from trueup.math import prediction_powered_mean
from trueup.records import UserError, Verdict
from trueup.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    yield store
    store.close()


def write(path, answers: dict[str, str]):
    rows = [
        {
            "prompt": [{"role": "user", "content": q}],
            "category": "c",
            "completions": [{"text": a, "stop": "eos"}, {"text": "a second answer is not looked at", "stop": "eos"}],
        }
        for q, a in answers.items()
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def made(tmp_path, prompts=120, models=("red", "green", "blue"), same=10):
    """Answers `<model> <worth>`: the worth is what the raters go by, and nothing else says which model it is."""
    rng, files = random.Random(0), {}
    worth = {name: 1.0 * k for k, name in enumerate(models)}
    for name in models:
        files[name] = write(
            tmp_path / f"{name}.jsonl",
            {
                f"q{i}": "the same" if i < same else f"{name} {worth[name] + rng.gauss(0, 2):.3f}"
                for i in range(prompts)
            },
        )
    return files


def better(text: str) -> float:
    return float(text.split()[-1]) if text != "the same" else 0.0


def label(store, raters=("ann",), most=10_000) -> int:
    """The raters prefer what is worth more."""
    q, n = queue(store, raters=raters), 0
    while n < most:
        before = n
        for rater in raters:
            task = q.next(rater)
            if hasattr(task, "assignment") and n < most:
                gap = better(task.left) - better(task.right)
                q.submit(task.assignment, rater, Answer(2 if gap > 0 else -2))
                n += 1
        if n == before:
            break
    return n


class Machine:
    """Right fifteen times in sixteen, with p .9 or .1."""

    name = "machine"

    def __init__(self) -> None:
        self.asked = 0

    def judge(self, comparisons):
        self.asked += len(comparisons)
        out = []
        for c in comparisons:
            a, b = (better(x.text) for x in c.completions)
            first = (a > b) != (zlib.crc32(c.completions[0].text.encode()) % 16 == 0)
            out.append(Verdict(None if a == 7 else 0.9 if first else 0.1, self.name))
        return out


def test_what_people_are_asked(store, tmp_path):
    files = made(tmp_path)
    config = ArenaConfig(comparisons=50)
    said = ask_arena(store, files, config)
    assert "120 prompts, 3 pairs of models, 340 comparisons, 340 of them new; 10 of two equal answers" in said
    assert "people are asked 50" in said and "takes 803 of those" in said and "3 pairs of models 2409" in said
    with store.reading() as db:
        items = db.exec_driver_sql(
            "SELECT wanted, open, priority, meta, first, second FROM items JOIN comparisons c ON c.id = comparison"
        ).all()
    assert sum(i.wanted for i in items) == sum(i.open for i in items) == 50
    asked = [json.loads(i.meta)["pairs"] for i in items if i.open]
    assert all(len(pairs) == 1 for pairs in asked) and all(i.first != i.second for i in items if i.open)
    assert all(len(json.loads(i.meta)["pairs"]) == 3 for i in items if i.first == i.second)
    apart = [i for i in items if i.first != i.second]
    assert min(i.priority for i in apart if i.open) > max(i.priority for i in apart if not i.open)
    counts = [sum(set(pair) == {a, b} for [pair] in asked) for a, b in (("red", "green"), ("red", "blue"))]
    assert min(counts) > 8  # drawn over all pairs
    assert 15 < sum(a < b for [[a, b]] in asked) < 35  # a judge that likes the first likes no model
    assert manager_view(store, 0.0)["progress"]["total"] == 50
    assert "0 of them new" in ask_arena(store, files, config)
    assert label(store) == 50


def test_more_may_be_asked_later_and_nothing_again(store, tmp_path):
    files = made(tmp_path, models=("red", "green"))
    ask_arena(store, files, ArenaConfig(comparisons=30))
    assert label(store) == 30
    assert "asked 80" in ask_arena(store, files, ArenaConfig(comparisons=80))
    assert label(store) == 50 and label(store) == 0
    ask_arena(store, files, ArenaConfig(comparisons=80, raters=2))
    assert label(store) == 0 and label(store, raters=("bob",)) == 80
    ask_arena(store, files, ArenaConfig(comparisons=30))  # fewer: what was asked stays
    assert store.open_items(arena_of(store, None)) == 0 and len(store.preferences()) == 160


def test_models_that_answer_alike_share_a_comparison(store, tmp_path):
    files = {
        name: write(tmp_path / f"{name}.jsonl", {"q": text})
        for name, text in (("a", "x 1"), ("b", "x 1"), ("c", "x 5"), ("d", "x 3"))
    }
    said = ask_arena(store, files, ArenaConfig())
    assert "6 pairs of models, 4 comparisons" in said and "people are asked 3" in said
    assert label(store) == 3
    rows, _ = arena_rows(store, arena_of(store, None))
    assert {r.pair: (r.people, r.same) for r in rows} == {
        ("a", "b"): (None, True),
        ("a", "c"): (0.0, False),
        ("b", "c"): (0.0, False),
        ("a", "d"): (0.0, False),
        ("b", "d"): (0.0, False),
        ("c", "d"): (1.0, False),
    }


def test_answers_that_a_model_lacks_are_counted_and_models_need_names(store, tmp_path):
    files = made(tmp_path, models=("red", "green"))
    write(tmp_path / "green.jsonl", {f"q{i}": f"green {i}" for i in range(110, 130)})
    said = ask_arena(store, files, ArenaConfig())
    assert "10 prompts, 1 pair of models" in said and "120 answers left out" in said
    write(tmp_path / "green.jsonl", {"other": "green 1"})
    with pytest.raises(UserError, match="answer no prompt in common"):
        ask_arena(store, files, ArenaConfig())
    for given in ([], [tmp_path / "red.jsonl"], [tmp_path / "red.jsonl", tmp_path / "x" / "red.jsonl"]):
        with pytest.raises(UserError, match="two or more models with names of their own"):
            answers_of(given, ArenaConfig(), "s.sqlite", "cpu", tmp_path)
    with pytest.raises(UserError, match=r"arena\.prompts=PROMPTS\.jsonl is needed"):
        answers_of([tmp_path / "red.jsonl", tmp_path / "run"], ArenaConfig(), "s.sqlite", "cpu", tmp_path)


def test_two_models_by_people_alone(store, tmp_path):
    files = made(tmp_path, models=("red", "green"), same=20)
    ask_arena(store, files, ArenaConfig(comparisons=60))
    label(store, raters=("ann", "bob"))
    rows, kinds = arena_rows(store, arena_of(store, None))
    found = standings(rows, kinds)
    (pair,) = found["pairs"]
    assert pair["models"] == ("green", "red") and kinds == {"human": 60}
    texts = {name: [json.loads(x)["completions"][0]["text"] for x in path.open()] for name, path in files.items()}
    # Told apart by the text alone, whichever stood first.
    labelled = {int(r.prompt, 16) for r in rows if r.people is not None}
    assert len(labelled) == pair["labelled"] == pair["decisive"] == 60
    wins = sum(r.people for r in rows if r.people is not None)
    truth = np.mean([better(g) > better(r) for g, r in zip(texts["green"], texts["red"], strict=True) if g != r])
    assert pair["wins"] == wins and abs(wins / 60 - truth) < 0.15 and truth > 0.55
    alone = prediction_powered_mean([1.0] * int(wins) + [0.0] * int(60 - wins), [0.5] * 60, [])
    share = 0.5 + 100 / 120 * (alone.mean - 0.5)  # 20 of 120 answers are equal
    assert pair["people"]["mean"] == pytest.approx(share) and pair["same"] == 20 and pair["both"] is None
    scaled = [0.5 + 100 / 120 * (x - 0.5) for x in (alone.low, alone.high)]
    assert pair["people"]["low"] < scaled[0] and pair["people"]["high"] > scaled[1]
    assert pair["people"]["high"] - pair["people"]["low"] < 1.1 * (scaled[1] - scaled[0])
    first, second = found["models"]
    assert first["name"] == "green" and first["rating"] + second["rating"] == pytest.approx(2000)
    assert first["rating"] - second["rating"] == pytest.approx(400 * math.log10(share / (1 - share)), abs=0.1)
    low, high = first["interval"]
    assert low < first["rating"] < high


def test_a_judge_narrows_what_people_say(store, tmp_path):
    files = made(tmp_path, prompts=400, models=("red", "green"), same=0)
    ask_arena(store, files, ArenaConfig(comparisons=80))
    label(store)
    origin, machine = arena_of(store, None), Machine()
    assert ask_judge(store, origin, machine) == (400, 0) and machine.asked == 400
    assert ask_judge(store, origin, machine) == (0, 0) and machine.asked == 400  # nothing twice
    rows, kinds = arena_rows(store, origin)
    found = standings(rows, kinds)
    (pair,) = found["pairs"]
    people, both = pair["people"], pair["both"]
    assert found["judge"] == "machine" and both["weight"] > 0.5
    assert both["high"] - both["low"] < 0.8 * (people["high"] - people["low"])
    truth = np.mean(
        [
            better(json.loads(g)["completions"][0]["text"]) > better(json.loads(r)["completions"][0]["text"])
            for g, r in zip(files["green"].open(), files["red"].open(), strict=True)
        ]
    )
    assert both["low"] < truth < both["high"] and abs(both["mean"] - truth) < 0.1
    assert pair["judge"] == pytest.approx(np.mean([r.judges["machine"] for r in rows]))
    assert "people, narrowed by the judge" in shown(found) and "needed for the difference" in shown(found)
    with pytest.raises(UserError, match="several judges have been asked: by=machine or by=other"):
        rows[0].judges["other"] = 0.4
        standings(rows, kinds)


def test_what_a_judge_cannot_read_says_nothing_and_is_counted(store, tmp_path):
    files = made(tmp_path, prompts=40, models=("red", "green"), same=5)
    write(tmp_path / "red.jsonl", {f"q{i}": "the same" if i < 5 else "red 7" for i in range(40)})
    ask_arena(store, files, ArenaConfig())
    new, silent = ask_judge(store, arena_of(store, None), Machine())
    assert new + silent == 35 and silent > 8
    rows, _ = arena_rows(store, arena_of(store, None))
    assert sum(not r.judges for r in rows) == silent + 5


def test_three_models_and_nobody_asked_yet(store, tmp_path):
    ask_arena(store, made(tmp_path), ArenaConfig(comparisons=90))
    none = standings(*arena_rows(store, arena_of(store, None)))
    assert all(m["rating"] is None for m in none["models"]) and "no rating yet" in shown(none)
    label(store)
    found = standings(*arena_rows(store, arena_of(store, None)))
    assert [m["name"] for m in found["models"]] == ["blue", "green", "red"]
    assert sum(m["rating"] for m in found["models"]) == pytest.approx(3000)
    assert found == standings(*arena_rows(store, arena_of(store, None)))  # the same seed, the same intervals


def test_simulated_raters_are_told_apart(store, tmp_path):
    from trueup.label.accounts import Accounts

    ask_arena(store, made(tmp_path, models=("red", "green")), ArenaConfig(comparisons=30))
    q = queue(store)
    Accounts(store).add("robot", kind="simulated")
    for _ in range(10):
        q.submit(q.next("robot").assignment, "robot", Answer(1))
    rows, kinds = arena_rows(store, arena_of(store, None))
    found = standings(rows, kinds)
    (pair,) = found["pairs"]
    assert kinds == {"simulated": 10} and found["by"] == "simulated raters, not people"
    assert pair["people"] is None and pair["simulated"]["mean"] == found["pairs"][0]["share"]
    assert pair["labelled"] == 10 and found["models"][0]["rating"] is not None
    lines = shown(found).splitlines()
    assert all("simulated raters, not people" in x for x in lines if "judged by" in x or "%" in x)
    assert all("by simulated raters, not people" in x for x in lines if x.startswith(("red  ", "green  ")))
    for _ in range(10):  # from now on people alone count
        q.submit(q.next("ann").assignment, "ann", Answer(1))
    rows, kinds = arena_rows(store, arena_of(store, None))
    found = standings(rows, kinds)
    (pair,) = found["pairs"]
    assert kinds == {"human": 10, "simulated": 10} and found["by"] == "people"
    assert pair["labelled"] == 10 and pair["simulated"] is None and pair["people"] is not None
    said = shown(found)
    assert "10 verdicts of human raters, 10 verdicts of simulated raters (left out)" in said
    assert "10 judged by people" in said and "not people" not in said


def test_which_arena(store, tmp_path):
    with pytest.raises(UserError, match="no models are compared here yet"):
        arena_of(store, None)
    files = made(tmp_path)
    ask_arena(store, files, ArenaConfig())
    ask_arena(store, {n: files[n] for n in ("red", "green")}, ArenaConfig())
    with pytest.raises(UserError, match="expected one of 'red, green'; 'red, green, blue'"):
        arena_of(store, None)
    assert arena_of(store, "red, green") == ORIGIN + "red, green"


def test_the_command_from_models_to_standings(toy, call):
    """Two models answer, a rater labels over HTTP, a judge is asked, and the models stand."""
    keys = ["sft/final", "base", "arena.prompts=prompts.jsonl", "arena.limit=12", "arena.max_tokens=12", "port=0"]
    (toy / "arena.sqlite").unlink(missing_ok=True)
    server = Command(toy, "label", "arena.sqlite", "--arena", *keys, "rules.onboarding=0")
    deadline = time.monotonic() + 120
    while "stop with" not in server.said():
        assert server.poll() is None and time.monotonic() < deadline, server.said()
        time.sleep(0.05)
    said = server.said()
    assert "arena: sft, base: 12 prompts, 1 pair of models" in said
    link = next(line for line in said.splitlines() if line.startswith("me: ")).removeprefix("me: ")
    with httpx.Client(follow_redirects=True, timeout=30) as visitor:
        page = visitor.get(link)
        assert "sft" not in page.text and "base" not in page.text  # blind
        home = str(page.url).rpartition("/")[0]
        labelled = 0
        while form := TOKEN.search(visitor.get(f"{home}/label").text):
            number = visitor.get(f"{home}/label").text.partition('action="/label/')[2].partition('"')[0]
            if not number:
                break
            visitor.post(f"{home}/label/{number}", data={"csrf": form[1], "grade": "1"})
            labelled += 1
    server.kill()
    assert labelled > 4
    code, out, err = call(toy, "arena", "arena.sqlite", "judge=length", "--out", "found.json")
    assert code == 0, err
    assert f"{labelled} verdicts of human raters; judge: length" in out and "base against sft" in out
    assert json.loads((toy / "found.json").read_text())["arena"] == "sft, base"
    code, _, err = call(toy, "arena", "nowhere.sqlite")
    assert code == 2 and "nowhere.sqlite: no such store" in err
    code, _, err = call(toy, "label", "arena.sqlite", "--arena", "sft", "arena.prompts=prompts.jsonl")
    assert code == 2 and "two or more models" in err
