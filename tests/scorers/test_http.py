"""A scorer over HTTP against a real server on the loopback: the contract, batches, retries, and what goes wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trueup.engine.mesh import Mesh
from trueup.records import Completion, Prompt, UserError
from trueup.scorers import http, make_scorer

PROMPTS = [Prompt.of(f"question {i}") for i in range(5)]
COMPLETIONS = [Completion("x" * i, "length" if i == 1 else "eos") for i in range(5)]


@pytest.fixture
def server(monkeypatch):
    """A server that answers each completion with its length, after what `server.first` holds: (status, body) each."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(http, "TIMEOUT", 5.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            made.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(made.pause)
            lengths = [len(text) for text in made.asked[-1]["completions"]]
            status, body = made.first.pop(0) if made.first else (200, json.dumps({"scores": lengths}))
            if not status:  # hangs up without an answer
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.first, made.pause = [], [], 0.0
    made.url = f"http://127.0.0.1:{made.server_address[1]}/score"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(10)


def score(server, prompts=PROMPTS, completions=COMPLETIONS):
    return make_scorer(server.url, Mesh()).score(prompts, completions).value.tolist()


def test_what_is_sent_and_what_comes_back(server):
    assert score(server, PROMPTS[:2], COMPLETIONS[:2]) == [0, 1]
    assert server.asked == [
        {
            "prompts": [[{"role": "user", "content": "question 0"}], [{"role": "user", "content": "question 1"}]],
            "completions": ["", "x"],
            "stops": ["eos", "length"],
        }
    ]


def test_batches_come_back_in_order(server, monkeypatch):
    monkeypatch.setattr(http, "BATCH", 2)
    assert score(server) == [0, 1, 2, 3, 4]
    assert [batch["completions"] for batch in server.asked] == [["", "x"], ["xx", "xxx"], ["xxxx"]]
    assert [len(batch["prompts"]) for batch in server.asked] == [2, 2, 1]


@pytest.mark.parametrize("failures", [[(503, "busy")], [(500, ""), (0, "")]])
def test_a_server_that_fails_is_asked_again(server, failures):
    server.first = list(failures)
    assert score(server) == [0, 1, 2, 3, 4]
    assert len(server.asked) == len(failures) + 1


def test_it_is_asked_so_many_times_and_no_more(server):
    server.first = [(502, "bad\ngateway")] * 9
    with pytest.raises(UserError, match=rf"{server.url}: HTTP 502 Bad Gateway: bad gateway$"):
        score(server)
    assert len(server.asked) == 3


def test_a_server_that_is_too_slow(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.1)
    server.pause = 0.3
    began = time.monotonic()
    with pytest.raises(UserError, match="timed out"):
        score(server)
    assert time.monotonic() - began < 2 and len(server.asked) == 3


@pytest.mark.parametrize(
    "answer, said",
    [
        ((404, "no such path"), "HTTP 404 Not Found: no such path"),
        ((200, "scores"), "not JSON"),
        ((200, '{"scores": [1, 2]}'), r'expected {"scores": \[5 numbers\]}, got {"scores": \[1, 2\]}'),
        ((200, '{"score": [1, 2, 3, 4, 5]}'), r'expected {"scores": \[5 numbers\]}'),
        ((200, "[1, 2, 3, 4, 5]"), r'expected {"scores": \[5 numbers\]}'),
        ((200, '{"scores": [1, 2, 3, 4, "good"]}'), "must return 5 numbers"),
        ((200, '{"scores": [1, 2, 3, 4, NaN]}'), "5 finite numbers"),
        ((200, '{"scores": [1, 2, 3, 4, null]}'), "applies to 4 of 5 completions; not to 'question 4'"),
    ],
)
def test_a_wrong_answer_is_told_in_one_line_and_not_asked_for_again(server, answer, said):
    server.first = [answer]
    with pytest.raises(UserError, match=said) as error:
        score(server)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert len(server.asked) == 1


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "PAUSES", (0.01,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
        with pytest.raises(UserError, match="refused"):
            make_scorer(url, Mesh()).score(PROMPTS, COMPLETIONS)


def test_in_a_weighted_sum_with_another_server_both_wait_at_the_same_time(server):
    server.pause = 0.3
    scorer = make_scorer({server.url: 1.0, f"{server.url}?other": 2.0}, Mesh())
    began = time.monotonic()
    assert scorer.score(PROMPTS, COMPLETIONS).value.tolist() == [0, 3, 6, 9, 12]
    assert time.monotonic() - began < 0.55
