"""The report in a real browser: it opens offline, draws, filters, and hostile texts stay texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chromium import launched
from tests.report.make_run import make_run
from trueup.report import write_report
from trueup.report.versus import compare, write_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


class Visit:
    """A page that was opened, and everything that went wrong on it."""

    def __init__(self, browser, report: Path, **options) -> None:
        self.troubles: list[str] = []
        self.uri = report.as_uri()
        self.page = browser.new_context(**options).new_page()
        self.page.on(
            "console", lambda m: self.troubles.append(f"console: {m.text}") if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda e: self.troubles.append(f"error: {e}"))
        self.page.on("dialog", lambda d: (self.troubles.append(f"dialog: {d.message}"), d.dismiss()))
        self.page.on("request", self.asked)
        self.page.goto(self.uri)

    def asked(self, request) -> None:
        if request.url != self.uri and not request.url.startswith(("data:", "blob:")):
            self.troubles.append(f"request: {request.url}")

    def until(self, condition: str) -> None:
        """Playwright's own waiting evaluates strings in the page, which the page's policy forbids."""
        for _ in range(100):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {condition}")

    def scroll_through(self) -> None:
        """Charts are drawn when they come into view."""
        height = self.page.evaluate("document.documentElement.scrollHeight")
        for y in range(0, height, 700):
            self.page.evaluate(f"scrollTo(0, {y})")
            self.page.wait_for_timeout(30)
        self.until(
            "[...document.querySelectorAll('[data-chart]')]"
            ".every(p => !p.checkVisibility() || p.querySelector('svg.main-svg'))"
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "hostile"))


@pytest.mark.parametrize("scheme, width", [("light", 1300), ("dark", 1300), ("light", 400)])
def test_it_opens_without_a_trouble_and_draws_every_chart(browser, report, scheme, width):
    visit = Visit(browser, report, color_scheme=scheme, viewport={"width": width, "height": 900})
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    visit.scroll_through()
    charts = visit.page.locator("[data-chart]").count()
    assert charts > 40
    assert visit.page.locator("[data-chart]:has(svg.main-svg)").count() == charts
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.evaluate("window.pwned") is None
    assert visit.page.locator("img").count() == 0
    assert visit.troubles == []


def test_colours_follow_the_scheme_while_it_is_open(browser, report):
    visit = Visit(browser, report, color_scheme="light")
    visit.scroll_through()
    label = visit.page.locator("[data-chart=over-kl-ppo] .xtick text").first
    before = label.evaluate("e => getComputedStyle(e).fill")
    visit.page.emulate_media(color_scheme="dark")
    visit.until(
        "getComputedStyle(document.querySelector('[data-chart=over-kl-ppo] .xtick text')).fill !== "
        + json.dumps(before)
    )
    assert visit.troubles == []


def test_filters_find_and_count(browser, report):
    visit = Visit(browser, report)
    page = visit.page
    count = page.locator("#count")
    assert "of 1,248 match; the first 25 are shown" in count.inner_text()
    page.locator("#more").click()
    assert page.locator(".sample").count() == 50
    page.select_option("[name=stage]", "ppo")
    assert page.locator("[name=model] option").count() == 1  # the samples of PPO name no model
    page.select_option("[name=step]", "40")
    visit.until("document.getElementById('count').textContent.startsWith('3 of')")
    assert all("step 40" in text for text in page.locator(".sample .meta").all_inner_texts())
    page.select_option("[name=stage]", "evaluate")
    page.select_option("[name=model]", "ppo, greedy")
    visit.until("document.getElementById('count').textContent.startsWith('140 of')")
    page.fill("[name=text]", "<SCRIPT>window.pwned")
    visit.until("!document.getElementById('count').textContent.startsWith('140 of')")
    assert page.locator(".sample").count() > 0
    assert all("<script>window.pwned" in text for text in page.locator(".sample").all_inner_texts())
    page.fill("[name=text]", "no such text anywhere")
    visit.until("document.getElementById('count').textContent === 'No sample matches.'")
    page.fill("[name=text]", "")
    page.select_option("[name=order]", "-gold")
    visit.until("document.querySelectorAll('.sample').length === 25")
    found = page.locator(".sample .meta").all_inner_texts()
    gold = [float(text.split("gold ")[1].split()[0].replace("−", "-")) for text in found]
    assert gold == sorted(gold, reverse=True)
    assert visit.troubles == [] and page.evaluate("window.pwned") is None


def test_the_policy_stops_a_script_that_got_in(browser, report, tmp_path):
    """The last line of defence: even an element that slipped through escaping would not run."""
    bad = tmp_path / "bad.html"
    text = report.read_text(encoding="utf-8")
    bad.write_text(
        text.replace("<main>", "<main><script>window.pwned = 9</script><img src=x onerror='window.pwned = 8'>", 1),
        encoding="utf-8",
    )
    visit = Visit(browser, bad)
    assert visit.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in t for t in visit.troubles)


@pytest.mark.parametrize("options", [{"stages": ("sft",)}, {"stop_at": "ppo"}, {"gold": False}, {"stages": ()}])
def test_parts_of_a_run_open_too(browser, tmp_path, options):
    visit = Visit(browser, write_report(make_run(tmp_path / "part", **options)))
    visit.scroll_through()
    assert visit.troubles == []


@pytest.mark.parametrize("width", [1300, 400])
def test_runs_side_by_side_open_and_draw_every_curve(browser, tmp_path, width):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", stop_at="ppo")]
    visit = Visit(
        browser, write_page(compare(runs), tmp_path / "compare.html"), viewport={"width": width, "height": 900}
    )
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    visit.scroll_through()
    charts = visit.page.locator("[data-chart]").count()
    assert charts > 20 and visit.page.locator("[data-chart]:has(svg.main-svg)").count() == charts
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.evaluate("window.pwned") is None and visit.troubles == []
