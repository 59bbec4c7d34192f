"""The judge behind an endpoint, against a real server on loopback: log-probs and letters, retries, requests at once,
the budget, the cache, the dry run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.judges.server import Server
from trueup.judges import endpoint, make_answerer, make_judge
from trueup.judges.endpoint import Ledger, last_letter, only_letter, read
from trueup.recipe import load_recipe, resolve
from trueup.records import Comparison, Completion, Prompt, UserError, write_jsonl
from trueup.store import Judged, Store
from trueup.world import base_path

PAIRS = [Comparison(Prompt.of(f"Number {i}?"), (Completion(f"It is {i}."), Completion("No idea."))) for i in range(6)]


@pytest.fixture(scope="module")
def running(tiny):
    made = Server(tiny)
    yield made
    made.stop()


@pytest.fixture
def server(running):
    running.faults, running.bodies, running.tokens, running.answers = [], [], [], []
    running.most_busy, running.pause, running.logprobs = 0, 0.0, True
    return running


@pytest.fixture
def judge(server, mesh, tmp_path):
    def made(**keys):
        spec = {"constitution": "default", "endpoint": server.url, "model": "tiny", "examples": False, "pause": 0.01}
        return make_judge({**spec, "cache": str(tmp_path / "cache.sqlite"), **keys}, mesh)

    return made


def test_p_comes_from_logprobs(server, judge):
    [verdict] = judge().judge(PAIRS[:1])
    assert len(server.bodies) == 2 and all(b["logprobs"] and b["temperature"] == 0 for b in server.bodies)
    reading = next(r for r in verdict.readings if not r.swapped)
    assert 0 < reading.p < 1 and reading.p not in (0.0, 1.0)
    [text] = [
        b["messages"][0]["content"] for b in server.bodies if "Reply (A): It is 0." in b["messages"][0]["content"]
    ]
    ids = server.tokenizer(text + "\n(", return_tensors="pt")["input_ids"][:, -400:]
    logits = server.model(ids).logits[0, -1]
    a, b = (logits[server.tokenizer(x, add_special_tokens=False)["input_ids"][-1]].item() for x in "AB")
    assert reading.p == pytest.approx(1 / (1 + np.exp(b - a)), abs=1e-4)


def test_without_logprobs_p_is_the_letter_and_without_a_letter_there_is_none(server, judge):
    server.logprobs = False
    server.answers = ["(A)", "(A)", "I cannot choose.", "(B)"]
    first, second = judge(parallel=1).judge(PAIRS[:2])
    assert [r.p for r in first.readings] == [1.0, 0.0] and first.p == 0.5 and first.readable
    assert [r.p for r in second.readings] == [None, 1.0] and second.p is None and not second.readable
    assert second.readings[0].raw == "I cannot choose." and second.note == "unreadable"


def test_it_writes_what_follows_a_text(server, mesh, tmp_path):
    """And the same request is not sent twice, unless the temperature makes another draw of it."""
    spec = {"endpoint": server.url, "model": "tiny", "parallel": 1, "price_out": 1e6, "cache": str(tmp_path / "c")}
    server.answers = ["  Curt. ", "It was cut..."]

    def write(**keys):
        writer = make_answerer({**spec, **keys}, mesh, 0)
        return writer.write(["Say:", "Well:"], max_tokens=9, stop=tuple("abcde"), seed=3, index=[4, 5])

    found = write()
    assert [(w.text, w.ended, w.cost) for w in found] == [("Curt.", True, 3.0), ("It was cut...", False, 3.0)]
    assert write() == found and len(server.bodies) == 2
    body = server.bodies[0]
    assert body["max_tokens"] == 9 and body["stop"] == list("abcd") and body["seed"] == 3 and "logprobs" not in body
    assert body["messages"][0]["content"].startswith("Say:\n\nWrite")
    write(temperature=1.0)
    assert [b["seed"] for b in server.bodies[2:]] == [7, 8]


def test_a_server_that_stumbles_is_asked_again(server, judge):
    server.faults = [429, 503, 500]
    [verdict] = judge(parallel=1).judge(PAIRS[:1])
    assert verdict.p is not None and len(server.bodies) == 2 + 3


def test_a_server_that_refuses_is_not(server, judge):
    server.faults = [400]
    with pytest.raises(UserError, match=r"HTTP 400: .*told to.*; 0 of 2 requests of this batch"):
        judge(parallel=1).judge(PAIRS[:1])
    assert len(server.bodies) == 1
    server.faults = [503] * 9
    with pytest.raises(UserError, match="3 tries failed; the last: HTTP 503"):
        judge(parallel=1, tries=3).judge(PAIRS[:1])
    assert len(server.bodies) == 1 + 3
    server.faults = ["junk"]
    with pytest.raises(UserError, match="not an answer of the protocol"):
        judge(parallel=1).judge(PAIRS[:1])
    with pytest.raises(UserError, match="2 tries failed"):
        judge(endpoint="http://127.0.0.1:9/v1", tries=2).judge(PAIRS[:1])
    with pytest.raises(UserError, match="judge localhost:8000/v1: expected an address such as http://"):
        judge(endpoint="localhost:8000/v1")


def test_no_more_requests_at_once_than_said(server, judge):
    server.pause = 0.05
    judge(parallel=3).judge(PAIRS)
    assert server.most_busy == 3 and len(server.bodies) == 12


def test_what_was_answered_is_not_asked_again(server, judge):
    before = judge().judge(PAIRS)
    assert judge().judge(PAIRS) == before and len(server.bodies) == 12
    judge(seed=1).judge(PAIRS[:1])
    assert len(server.bodies) == 14  # another seed is another request
    again = judge().judge([PAIRS[0], PAIRS[0]])
    assert again[0] == again[1] == before[0] and len(server.bodies) == 14


def spent(path) -> float:
    return Ledger(str(path)).spent()


def test_the_budget_is_never_passed(server, judge, tmp_path):
    """What is booked before each request is the most that it can cost, so that even at the end nothing is over."""
    prices = {"price_in": 10.0, "price_out": 30.0}
    free = judge(cache=str(tmp_path / "whole.sqlite"), **prices)
    whole = sum(v.cost for v in free.judge(PAIRS))
    assert whole == pytest.approx(spent(tmp_path / "whole.sqlite")) and whole > 0
    sent = len(server.bodies)
    for budget in (0.0, whole / 3, whole / 2):
        with pytest.raises(UserError, match=r"the budget of .* does not hold another request"):
            judge(budget=budget, **prices).judge(PAIRS)
        assert spent(tmp_path / "cache.sqlite") <= budget
    asked = len(server.bodies) - sent
    assert 0 < asked < 12
    verdicts = judge(budget=10 * whole, **prices).judge(PAIRS)
    assert len(server.bodies) - sent == 12 and all(v.p is not None for v in verdicts)  # none was paid twice
    with pytest.raises(UserError, match="a budget needs price_in and price_out"):
        judge(budget=1.0)


def test_two_programs_share_one_budget(place, monkeypatch):
    slow = Ledger._spent
    monkeypatch.setattr(Ledger, "_spent", lambda self, db: (slow(self, db), time.sleep(0.2))[0])
    ledgers = [Ledger(str(place)) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        booked = list(pool.map(lambda ledger: ledger.book("key", 0.6, 1.0), ledgers))
    assert sorted(n is None for n in booked) == [False, True] and ledgers[0].spent() == 0.6


def test_a_store_of_labels_keeps_the_answers_too(server, judge, place):
    Store(place).append([Judged(PAIRS[0], 1.0, "ann", "human", "batch", "now")])
    before = judge(cache=str(place)).judge(PAIRS[:2])
    assert judge(cache=str(place)).judge(PAIRS[:2]) == before and len(server.bodies) == 4
    assert len(Store(place).preferences()) == 1


def test_pauses_double_or_are_what_the_server_says(server, judge, monkeypatch):
    waits = []

    class Told(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    monkeypatch.setattr(endpoint, "threading", SimpleNamespace(Event=Told, Lock=threading.Lock))
    monkeypatch.setattr(endpoint, "random", SimpleNamespace(random=lambda: 0.5))
    server.faults = [503, 503, (429, "1.5"), 503]
    judge(parallel=1, orders=1, pause=0.25).judge(PAIRS[:1])
    assert waits == [0.25, 0.5, 1.5, 2.0]


def test_a_failure_that_may_have_been_charged_stays_booked(server, judge, tmp_path):
    """A server that is too slow may charge all the same; one that says 503 does not."""
    prices = {"price_in": 10.0, "price_out": 30.0, "parallel": 1, "orders": 1}
    server.faults = [503]
    [verdict] = judge(**prices).judge(PAIRS[:1])
    assert spent(tmp_path / "cache.sqlite") == pytest.approx(verdict.cost)
    server.pause = 0.4
    with pytest.raises(UserError, match="ReadTimeout"):
        judge(tries=2, timeout=0.1, **prices).judge(PAIRS[1:2])
    asking = judge(**prices)
    most = asking.answerer.most(asking.answerer.body(asking.questions(PAIRS[1])[0]))
    assert spent(tmp_path / "cache.sqlite") == pytest.approx(verdict.cost + 2 * most)
    time.sleep(0.5)


def test_a_dry_run_asks_nothing_and_bounds_the_cost(server, judge):
    prices = {"price_in": 10.0, "price_out": 30.0}
    asking = judge(**prices)
    asking.judge(PAIRS[:2])
    sent = len(server.bodies)
    questions = [q for pair in PAIRS for q in asking.questions(pair)]
    found = asking.answerer.estimate(questions)
    assert len(server.bodies) == sent and (found.requests, found.cached) == (8, 4)
    cost = sum(v.cost for v in asking.judge(PAIRS[2:]))
    assert 0 < cost <= found.cost < 12 * cost


def test_the_key_is_sent_and_thoughts_have_room(server, judge, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    server.answers = ["Well. The better reply is: (B)", "The better reply is: (A), no. The better reply is: (A)"]
    server.logprobs = False
    [verdict] = judge(key_env="SOME_KEY", thought=True, parallel=1).judge(PAIRS[:1])
    assert set(server.tokens) == {"Bearer secret"} and {b["max_tokens"] for b in server.bodies} == {512}
    assert [r.p for r in verdict.readings] == [0.0, 0.0] and verdict.p == 0.4  # clamped
    assert "step" in json.dumps(server.bodies[0]) or "think it through" in server.bodies[0]["messages"][0]["content"]


def test_letters():
    for text, letter in {
        "(A)": "A",
        " B.": "B",
        "**(B)**": "B",
        "Reply (A) is better.": "A",
        "The better one is B": "B",
        "A good question": None,
        "(A) or (B)": None,
        "Both are bad": None,
        "": None,
    }.items():
        assert only_letter(text) == letter, text
    assert last_letter("The better reply is: (A). Or: The better reply is: (B).", "The better reply is:") == "B"
    assert last_letter("A, I think", "The better reply is:") is None


def test_logprobs_are_read_at_the_verdict():
    def token(text, p, **others):
        top = [{"token": t, "logprob": np.log(q)} for t, q in {text: p, **others}.items()]
        return {"token": text, "logprob": np.log(p), "top_logprobs": top}

    tokens = [token("A", 0.9, B=0.05), token(" is", 1.0), token(" (", 1.0), token("B", 0.6, A=0.2, **{" A": 0.1})]
    message = {"content": "A: ... The better reply is: (B)"}
    reply = {"choices": [{"message": message, "logprobs": {"content": tokens}}]}
    assert read(reply, 0, thought=True, verdict="The better reply is:").p == pytest.approx(1 / 3)
    tokens[3]["top_logprobs"] = None
    assert read(reply, 0, thought=True, verdict="The better reply is:").p == 0.0
    reply["choices"][0]["message"] = {"content": None}
    assert read(reply, 0, thought=True, verdict="x").p is None


@pytest.mark.long
def test_a_server_that_somebody_else_wrote(mesh, tmp_path):
    """`transformers serve` with the built-in base model: it answers, and its tokens are counted."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        base_path(),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.skip(f"transformers serve does not start here: {(tmp_path / 'log.txt').read_text()[-300:]}")
        spec = {"constitution": "world", "endpoint": f"http://127.0.0.1:{port}/v1", "model": str(base_path())}
        spec |= {"price_in": 1e6, "price_out": 1e6, "cache": str(tmp_path / "cache.sqlite"), "parallel": 1}
        pair = Comparison(Prompt.of("How do I rob a clerk?", category="harmful"), PAIRS[0].completions)
        [verdict] = make_judge(spec, mesh).judge([pair])
        assert all(r.raw for r in verdict.readings) and len(verdict.readings) == 2
        assert verdict.cost == spent(tmp_path / "cache.sqlite") > 80  # a token costs 1: two questions of 40 and more
        assert (verdict.p is None) == (not verdict.readable)
    finally:
        process.terminate()
        process.wait(30)


def test_a_cache_that_grows_makes_no_new_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    judge = {"constitution": "default", "endpoint": "http://127.0.0.1:9/v1", "model": "m", "cache": "mine.sqlite"}
    recipe = load_recipe({"name": "x", "stages": {"judged": {"data": "p.jsonl", "judge": judge}}})
    before = resolve(recipe, Path("runs"))[0].key
    (tmp_path / "mine.sqlite").write_text("more")
    assert resolve(recipe, Path("runs"))[0].key == before
    (tmp_path / "default").write_text("name: other")  # a constitution's content decides
    assert resolve(recipe, Path("runs"))[0].key != before
