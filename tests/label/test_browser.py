"""The labelling page in a real browser: by keyboard alone, on a phone, for who cannot see it, with hostile answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chromium import launched
from tests.label.ask import Clock, pair
from tests.label.serving import served
from trueup.label.accounts import Accounts
from trueup.label.queue import Rules
from trueup.records import Comparison, Completion, Prompt
from trueup.store import Asked, Store

pytestmark = pytest.mark.browser
HOSTILE = (
    """<script>window.pwned = 1</script><img src="/static/x" onerror="window.pwned = 2">
![x](/static/pixel.png) [click](javascript:window.pwned=3) </div></main><style>* { display: none }</style>

# A heading

```python
def add(a: int, b: int) -> int:
    return a + b  # """
    + "a very long line " * 30
    + """
```

| left | right |
|---|---|
| """
    + "wide" * 200
    + """ | 1 |

\u202egnp.exe """
    + "Z\u0351\u036b\u0343\u036a\u0302" * 40
)


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


class Page:
    """A rater's browser, and everything that went wrong in it."""

    def __init__(self, browser, site, rater, **options):
        self.troubles: list[str] = []
        self.page = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}).new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda m: self.troubles.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.troubles.append(str(e)))
        self.page.on("dialog", lambda d: (self.troubles.append(d.message), d.dismiss()))
        self.page.on("request", lambda r: None if r.url.startswith(site.url) else self.troubles.append(r.url))
        self.page.goto(site.url + site.links[rater])

    def press(self, *keys: str) -> None:
        """On a page that is there whole: its script, which listens for keys, comes after its text."""
        for key in keys:
            self.page.wait_for_load_state("load")
            self.page.keyboard.press(key)

    def text(self) -> str:
        return self.page.locator("main").inner_text()

    def question(self) -> str:
        return re.search(r"question \d+", self.text())[0]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    store.ask([pair(i) for i in range(6)], "batch")
    yield store
    store.close()


def test_a_rater_labels_by_keyboard_alone(browser, store):
    with served(store) as site:
        ann = Page(browser, site, "ann")
        first = ann.question()
        ann.press("2", "Enter")
        ann.page.wait_for_selector("text=1 today")
        assert ann.question() != first
        ann.press("4", "c")
        ann.page.keyboard.type("2 of them, equal")  # keys in a text are letters
        ann.press("Escape", "Enter")
        ann.page.wait_for_selector("text=2 today")
        ann.press("w")
        ann.page.keyboard.type("My own answer")
        ann.press("Escape", "f", "Space", "Escape", "0", "Enter")
        ann.page.wait_for_selector("text=3 today")
        ann.press("g")
        assert ann.page.locator("dialog").is_visible()
        ann.press("g")
        assert not ann.page.locator("dialog").is_visible()
        ann.press("g", "Escape", "s", "Tab", "Space", "Tab", "Enter")
        ann.page.wait_for_selector("text=Skipped")
        ann.press("u")  # the skipped one again, and answered after all
        ann.page.wait_for_selector("text=Correct your last answer")
        ann.press("7", "Enter")
        ann.page.wait_for_selector("text=4 today")
        ann.press("u")
        ann.page.wait_for_selector("text=Correct your last answer")
        assert ann.page.locator("[value='-3']").is_checked()
        ann.press("1", "Enter")
        ann.page.wait_for_selector("text=Corrected.")
        assert ann.troubles == []
    kept = store.preferences()
    assert [(j.tie, j.both_bad) for j in kept] == [(False, False), (True, False), (False, True), (False, False)]
    assert kept[1].note == "2 of them, equal" and sorted(kept[2].meta["flags"]) == [[], ["false"]]
    assert [d.reply for d, _, _ in store.demonstrations()] == ["My own answer"]
    assert len(store.preferences(history=True)) == 5
    assert kept[3].strength == 1.0 and (kept[3].p == 1.0) != kept[3].meta["swapped"]


def test_two_race_for_one_item_and_a_reload_keeps_it(browser, tmp_path):
    store = Store(tmp_path / "one.sqlite")
    store.ask([pair(0)], "batch")
    clock = Clock()
    with served(store, clock=clock) as site:
        ann, bob = Page(browser, site, "ann"), Page(browser, site, "bob")
        assert ann.question() == "question 0" and "Nothing to label now" in bob.text()
        ann.press("1")
        ann.page.reload()
        assert ann.question() == "question 0"
        clock.now += 901  # her lease is over: he gets it, and she is told
        bob.page.reload()
        assert bob.question() == "question 0"
        ann.press("1", "Enter")
        ann.page.wait_for_selector("text=another rater has it now")
        bob.press("7", "Enter")
        bob.page.wait_for_selector("text=Nothing to label now")
        assert ann.troubles == bob.troubles == []
    assert [j.rater for j in store.preferences()] == ["bob"]
    store.close()


def test_the_policy_stops_a_script_that_was_written_into_the_page(browser, store):
    """Even where an answer came through whole. Without the policy the same script runs."""
    write = """() => {
        const script = document.createElement("script");
        script.textContent = "window.injected = 1";
        document.querySelector("main").append(script);
        document.querySelector("main").insertAdjacentHTML("beforeend", "<img src='x:' onerror='window.injected = 2'>");
    }"""
    with served(store) as site:
        for options, runs in (({}, False), ({"bypass_csp": True}, True)):
            ann = Page(browser, site, "ann", **options)
            ann.page.evaluate(write)
            ann.page.wait_for_timeout(300)
            assert (ann.page.evaluate("window.injected") is not None) == runs
            assert any("Content Security Policy" in trouble for trouble in ann.troubles) != runs


def test_a_double_press_is_one_answer(browser, store):
    with served(store) as site:
        ann = Page(browser, site, "ann")
        tab = ann.page.context.new_page()
        tab.goto(site.url + "/label")
        ann.page.evaluate("document.querySelector('[value=\"2\"]').checked = true")
        ann.page.evaluate("const b = document.querySelector('[value=keep]'); b.click(); b.click()")
        ann.page.wait_for_selector("text=1 today")
        tab.keyboard.press("7")  # the same comparison in another tab
        tab.keyboard.press("Enter")
        tab.wait_for_selector("text=nothing has changed")
        assert ann.troubles == []
    assert [j.strength for j in store.preferences()] == [2 / 3]


def hostile() -> Asked:
    words = "A harmless answer. It says what was asked, in *two* sentences, with `code` and a list:\n\n- one\n- two"
    sides = (Completion(words), Completion(HOSTILE, "length"))
    return Asked(Comparison(Prompt.of("question 9: what does `add` do, and what is **2 + 2**?"), sides), priority=9.0)


def audited(page) -> list[str]:
    """What axe finds: the serious and the critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed; extra `dev`")
    found = axe.Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:150]}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360), ("dark", 360)])
def test_hostile_answers_stay_in_their_box_and_axe_finds_nothing(browser, store, scheme, width, tmp_path):
    store.ask([hostile()], "hostile")
    with served(store) as site:
        options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
        plain = {**options, "bypass_csp": False}
        ann = Page(browser, site, "ann", **plain)
        assert ann.page.evaluate("document.documentElement.scrollWidth") <= width
        assert ann.page.evaluate("window.pwned") is None
        assert ann.page.locator("main img, main script, main style, main a[href^=javascript]").count() == 0
        assert ann.page.locator(".grade").count() == 8 and ann.page.locator(".grade").last.is_visible()
        assert ann.troubles == []
        shot(ann.page, f"label-{scheme}-{width}")
        looked = Page(browser, site, "ann", **options)  # axe is a script, which the page's own policy would stop
        for details in looked.page.locator("details").all():
            details.evaluate("e => e.open = true")
        assert audited(looked.page) == []
        looked.press("g")
        assert audited(looked.page) == []


def shot(page, name: str) -> None:
    """Into the folder that TRUEUP_SHOTS names, to be looked at."""
    import os

    if folder := os.environ.get("TRUEUP_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_other_pages(browser, store, scheme):
    store.ask([pair(50, gold=1.0, explanation="The first is *right*.")], "gold")
    store.ask([pair(60, wanted=2, priority=5.0)], "batch")
    Accounts(store).add("root", role="manager", password="correct horse battery")
    with served(store, rules=Rules(onboarding=1)) as site:
        options = {"color_scheme": scheme, "bypass_csp": True}
        ann, bob, boss = (Page(browser, site, name, **options) for name in ("ann", "bob", "boss"))
        for page in (ann, bob):
            page.press("1", "Enter")
            page.page.wait_for_selector("text=The known answer")
        assert audited(ann.page) == []
        shot(ann.page, f"feedback-{scheme}")
        for page, good in ((ann, True), (bob, False)):
            page.press("Enter")
            page.page.wait_for_selector("text=question 60")
            left_is_good = "good" in page.page.locator(".answer").first.inner_text()
            page.press("1" if left_is_good == good else "7", "Enter")
            page.page.wait_for_selector("text=Kept.")
        boss.page.goto(site.url + "/manage")
        boss.page.locator("details").first.evaluate("e => e.open = true")
        assert audited(boss.page) == []
        shot(boss.page, f"manage-{scheme}")
        assert "question 60" in boss.text()
        for path in ("/log", "/guideline"):
            boss.page.goto(site.url + path)
            assert audited(boss.page) == []
        boss.page.locator("text=Sign out").click()
        assert audited(boss.page) == []
        shot(boss.page, f"sign-in-{scheme}")


def test_without_script_it_works_too(browser, store):
    with served(store) as site:
        ann = Page(browser, site, "ann", java_script_enabled=False)
        ann.page.locator(".grade").first.click()
        ann.page.get_by_role("button", name="Submit").click()
        assert "Kept." in ann.text()
    assert len(store.preferences()) == 1


def test_sensitive_content_is_shown_on_a_key(browser, store):
    store.ask([pair(70, priority=9.0, sensitive=True)], "harm")
    with served(store) as site:
        Accounts(store).add("ann", sensitive=True)
        ann = Page(browser, site, "ann")
        assert "question 70" not in ann.text() and "This one may upset" in ann.text()
        ann.press("r")
        assert "question 70" in ann.text()
        ann.press("1", "Enter")
        ann.page.wait_for_selector("text=1 today")
        assert ann.troubles == []
