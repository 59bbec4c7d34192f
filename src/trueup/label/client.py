"""A program that labels over HTTP as a person does: it signs in, reads the page, and posts the page's own form.

Not in it: what it prefers (`trueup.simulate` asks a judge).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import TracebackType
from urllib.parse import urlsplit

import httpx

from trueup.label.queue import GRADES
from trueup.records import Comparison, Completion, Message, Prompt, UserError

PAUSE = 5.0
"""Seconds to wait where the server says that there were too many requests in this minute."""


@dataclass
class Page:
    """What a page holds: the form's address and token, whether its rater is marked as a program, the texts as they were
    written, by the class of what holds them, and what it says."""

    action: str = ""
    csrf: str = ""
    simulated: bool = False
    can_skip: bool = False
    messages: list[tuple[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    heading: str = ""

    @property
    def comparison(self) -> Comparison:
        """In the order shown."""
        sides = [Completion(t, "length" if cut else "eos") for t, cut in zip(self.answers, self.cut, strict=True)]
        return Comparison(Prompt(tuple(Message(role=r, content=c) for r, c in self.messages)), tuple(sides))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self.inside = Page(), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        page = self.page
        if tag == "form" and found.get("id") == "answer":
            page.action = found["action"]
        elif tag == "input" and found.get("name") == "csrf":
            page.csrf = found["value"]
        elif tag == "select" and found.get("name") == "reason":
            page.can_skip = True
        elif tag == "h1":
            self.inside = "heading"
        elif tag == "span" and found.get("class") == "badge":
            self.inside = "badge"
        elif "data-message" in found:
            page.messages.append((found["data-message"], found["data-text"]))
        elif "data-answer" in found:
            page.answers.append(found["data-text"])
            page.cut.append(found["data-answer"] == "cut")

    def handle_data(self, data: str) -> None:
        if self.inside == "badge":
            self.page.simulated |= data.strip() == "simulated"
        elif self.inside == "heading":
            self.page.heading += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def read_page(html: str) -> Page:
    reader = _Reader()
    reader.feed(html)
    return reader.page


class Rater:
    """One rater's visits. `link` is what `trueup label` prints; or the server's address, with an account's name and
    password. Raises UserError where that does not sign in."""

    def __init__(self, link: str, name: str = "", password: str = "") -> None:
        where = urlsplit(link)
        if where.scheme not in ("http", "https") or not where.netloc:
            raise UserError(f"{link}: expected the link that trueup label prints, or http(s)://host:port")
        self.at = f"{where.scheme}://{where.netloc}"
        self.client = httpx.Client(base_url=self.at, follow_redirects=True, timeout=60)
        if name:
            self.client.get("/sign-in")
            said = self._answered("POST", "/sign-in", data={"name": name, "password": password})
        else:
            said = self._answered("GET", f"{where.path}?{where.query}")
        if said.status_code != 200:
            raise UserError(
                f"{self.at}: {read_page(said.text).heading or said.text or said.status_code}: not signed in"
            )

    def __enter__(self) -> Rater:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.client.close()

    def _answered(self, method: str, path: str, data: dict[str, str] | None = None) -> httpx.Response:
        try:
            while True:
                said = self.client.request(method, path, data=data)
                if said.status_code != 429 or path == "/sign-in":
                    return said
                time.sleep(PAUSE)  # a form that is sent twice is kept once
        except httpx.HTTPError as error:
            raise UserError(f"{self.at}: no answer: {error}") from None

    def look(self) -> Page:
        """The page of the next comparison; without `action` where there is none. Asked again it is the same one."""
        said = self._answered("GET", "/label")
        if said.status_code != 200:
            raise UserError(f"{self.at}/label: {said.status_code}: {said.text[:200]}")
        return read_page(said.text)

    def send(self, page: Page, grade: int | str, **more: str) -> httpx.Response:
        """Posts the page's form; `grade` in [-3, 3], above 0 where the left one is better."""
        return self._answered("POST", page.action, data={"csrf": page.csrf, "grade": str(grade), "do": "keep", **more})

    def skip(self, page: Page, reason: str) -> httpx.Response:
        """Leaves the comparison to another rater."""
        return self._answered("POST", page.action, data={"csrf": page.csrf, "do": "skip", "reason": reason})


def grade_of(p: float) -> int:
    """What a person would press who holds the left one for better with probability p: the surer, the stronger."""
    if p == 0.5:
        return 0
    return (1 if p > 0.5 else -1) * max(1, round(GRADES * abs(2 * p - 1)))
