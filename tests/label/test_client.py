"""Programs that label over HTTP, and are marked as such."""

from __future__ import annotations

import pytest

from tests.label.ask import pair
from tests.label.serving import served
from trueup.label.accounts import Accounts
from trueup.label.client import Rater, grade_of
from trueup.records import Comparison, Completion, Prompt, Reading, UserError, Verdict
from trueup.simulate import SimulateConfig, answer
from trueup.store import Asked, Store

HOSTILE = '4. <script>alert("1")</script>\n\n  * a *b* &amp; "c" <p data-text="no">\n```\nx  y\n```'


class Good:
    """Prefers what begins with "good"; has no preference in question 1, and cannot be read in question 2."""

    def __init__(self, seed: int = 0) -> None:
        self.name = f"good {seed}"

    def judge(self, comparisons):
        return [
            self.one(c.prompt.text, 0.75 if c.completions[0].text.startswith("good") else 0.25) for c in comparisons
        ]

    def one(self, asked: str, p: float) -> Verdict:
        lost = (Reading("kind", False, None),) if asked == "question 2" else ()
        return Verdict(None if asked == "question 1" or lost else p, self.name, "unreadable" if lost else "", lost)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    yield store
    store.close()


CONFIG = SimulateConfig(judge="tests.label.test_client:Good")


def test_every_comparison_is_answered_and_marked_as_simulated(store):
    store.ask([pair(i, wanted=2) for i in range(4)], "batch")
    said = []
    with served(store, simulated=True) as site:
        links = [site.url + site.links[name] for name in ("ann", "bob")]
        assert answer(links, CONFIG, say=said.append) == dict.fromkeys(links, 3)
    kept = store.preferences()
    assert {(j.rater, j.kind) for j in kept} == {("ann", "simulated"), ("bob", "simulated")} and len(kept) == 6
    by = {j.comparison.prompt.text: (j.p, j.strength, j.tie) for j in kept}
    assert by == {f"question {i}": (0.5, 0.0, True) if i == 1 else (1.0, 2 / 3, False) for i in (0, 1, 3)}
    assert store.open_items("batch") == 1
    assert said == [f"rater {k}: 3 answers, 1 left to others; Nothing to label now" for k in (1, 2)]


def test_so_many_at_most(store):
    store.ask([pair(i) for i in range(4)], "batch")
    with served(store, simulated=True) as site:
        answer([site.url + site.links["ann"]], CONFIG.model_copy(update={"most": 3}))
    assert len(store.preferences()) == 3


def test_the_texts_come_as_they_were_written(store):
    talk = ({"role": "user", "content": "a\n\n1. b"}, {"role": "assistant", "content": HOSTILE[::-1]})
    prompt = Prompt((*talk, {"role": "user", "content": HOSTILE}))
    asked = Comparison(prompt, (Completion(HOSTILE), Completion("short", "length")))
    store.ask([Asked(asked)], "batch")
    with served(store) as site, Rater(site.url + site.links["ann"]) as ann:
        page = ann.look()
    assert page.comparison.prompt == prompt
    assert set(page.comparison.completions) == set(asked.completions)
    assert not page.simulated


def test_a_program_does_not_label_as_a_human(store):
    store.ask([pair(0)], "batch")
    with served(store) as site, pytest.raises(UserError, match="this rater is a human there"):
        answer([site.url + site.links["ann"]], CONFIG)
    assert not store.preferences()


def test_an_account_signs_in_with_its_password(store):
    store.ask([pair(0)], "batch")
    accounts = Accounts(store)
    accounts.add("root", role="manager", password="correct horse battery")
    accounts.add("robot", kind="simulated", password="correct horse battery")
    with served(store) as site:
        config = CONFIG.model_copy(update={"name": "robot"})
        with pytest.raises(UserError, match="not signed in"):
            answer([site.url], config, "wrong")
        answer([site.url], config, "correct horse battery")
    assert [(j.rater, j.kind) for j in store.preferences()] == [("robot", "simulated")]


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("ftp://x", "expected the link that trueup label prints"),
        ("http://127.0.0.1:9/enter?token=x", "127.0.0.1:9: no answer"),
    ],
)
def test_a_wrong_address_is_told(link, said):
    with pytest.raises(UserError, match=said):
        Rater(link)


def test_a_link_of_a_stopped_server_is_told(store):
    with served(store) as site, pytest.raises(UserError, match="Not allowed: not signed in"):
        Rater(f"{site.url}/enter?token=old")


def test_the_surer_the_stronger():
    assert [grade_of(p) for p in (1.0, 0.9, 0.75, 0.51, 0.5, 0.4, 0.0)] == [3, 2, 2, 1, 0, -1, -3]
