"""The labelling page on a real server in a thread, and a client that signs in and fills forms as a browser does."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from tests.label.ask import PLAIN
from trueup.label.app import LabelConfig, make_app
from trueup.store import Store

TOKEN = re.compile(r'name="csrf" value="([^"]+)"')


@dataclass
class Served:
    url: str
    links: dict[str, str]
    store: Store

    def visitor(self, rater: str | None = None) -> Visitor:
        """A browser of its own; signed in by the link of `rater`."""
        client = Visitor(base_url=self.url, follow_redirects=True, timeout=30)
        if rater is not None:
            assert client.get(self.links[rater]).status_code == 200
        return client


class Visitor(httpx.Client):
    def send_form(self, path: str, *, csrf: str | None = None, **fields) -> httpx.Response:
        """Posts a form with the token of the page of comparisons, as the page itself would."""
        token = csrf if csrf is not None else TOKEN.search(self.get("/label").text)
        return self.post(path, data={"csrf": token if isinstance(token, str) else token[1], **fields})

    def answer(self, grade="2", **fields) -> httpx.Response:
        """Answers the comparison that is shown."""
        page = self.get("/label").text
        place = re.search(r'action="(/label/\d+)"', page)[1]
        return self.post(place, data={"csrf": TOKEN.search(page)[1], "grade": grade, "do": "keep", **fields})


@contextmanager
def served(store: Store, clock=time.time, **keys) -> Iterator[Served]:
    keys = {"raters": ("boss", "ann", "bob"), "rules": PLAIN, **keys}
    app = make_app(store, LabelConfig(**keys), clock=clock)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", app.state.links, store)
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
