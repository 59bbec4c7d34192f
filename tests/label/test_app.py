"""The pages over HTTP: a rater's day, a manager's, and what attackers try."""

from __future__ import annotations

import json
import re
import sqlite3
import threading

import httpx
import pytest
import sqlalchemy as sa

from tests.label.ask import Clock, pair, queue
from tests.label.serving import TOKEN, served
from trueup.label.accounts import Accounts, TooMany
from trueup.label.app import LabelConfig, make_app
from trueup.label.queue import Answer, Rules
from trueup.records import UserError
from trueup.store import Store
from trueup.store.tables import log, raters, sessions

PASSWORD = "correct horse battery"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    store.ask([pair(i, wanted=2) for i in range(6)], "batch")
    yield store
    store.close()


@pytest.fixture
def site(store):
    with served(store) as site:
        yield site


@pytest.fixture
def accounts(store):
    """With passwords, behind a proxy that speaks https, as it is run for other machines."""
    found = Accounts(store)
    found.add("root", role="manager", password=PASSWORD)
    found.add("eve", password=PASSWORD[::-1])
    with served(store, proxy=True) as site:
        yield site


# the rater's day


def test_a_rater_answers_undoes_and_corrects(site):
    ann = site.visitor("ann")
    said = ann.answer("3", note="because", flag_left=["false", "nonsense"], own="mine", seconds="4.5")
    assert "Kept." in said.text and "1 today, 1 in all" in said.text
    (kept,) = site.store.preferences()
    assert (kept.note, kept.strength, kept.meta["seconds"], kept.rater) == ("because", 1.0, 4.5, "ann")
    assert sorted(kept.meta["flags"]) == [[], ["false"]]
    again = ann.send_form("/undo")
    assert "Correct your last answer" in again.text and ">because</textarea>" in again.text
    assert ">mine</textarea>" in again.text
    assert re.search(r'value="3" data-key="1" required checked', again.text)
    assert re.search(r'value="false" checked', again.text)
    place, old = (re.search(p, again.text)[1] for p in (r'action="(/label/\d+)"', r'name="corrects" value="(\d+)"'))
    ann.send_form(place, grade="bad", do="keep", corrects=old, own="mine, too")
    assert [(j.both_bad, j.supersedes) for j in site.store.preferences()] == [(True, int(old))]
    assert [d.reply for d, _, _ in site.store.demonstrations()] == ["mine, too"]


def test_a_reload_shows_the_same_and_two_raters_different_ones(site):
    ann, bob = site.visitor("ann"), site.visitor("bob")
    first = re.search(r"question \d", ann.get("/label").text)[0]
    assert all(re.search(r"question \d", ann.get("/label").text)[0] == first for _ in range(3))
    bob.answer()
    assert re.search(r"question \d", ann.get("/label").text)[0] == first


def test_all_is_said_when_there_is_nothing_left(site):
    ann = site.visitor("ann")
    for _ in range(6):
        ann.answer()
    end = ann.get("/label")
    assert 'href="/guideline"' in end.text.partition("<main")[2]
    assert "Nothing to label now" in end.text and "Undo the last" in end.text
    assert len(site.store.preferences()) == 6


def test_nobody_is_told_the_model_or_the_ai_s_opinion(store):
    store.ask([pair(99, priority=9.0, meta={"models": ["secret-model-a", "secret-model-b"], "ai": 0.93})], "arena")
    with served(store) as site:
        page = site.visitor("ann").get("/label").text
    assert "question 99" in page and "secret-model" not in page and "0.93" not in page


def test_onboarding_tells_the_known_answer(store):
    store.ask([pair(50, gold=1.0, explanation="**Good** is better.")], "gold")
    with served(store, rules=Rules(onboarding=1)) as site:
        ann = site.visitor("ann")
        page = ann.get("/label").text
        assert "Practice 1 of 1" in page and "Skip it" not in page
        left_is_good = page.index("good answer 50") < page.index("bad answer 50")
        said = ann.answer("2" if left_is_good else "-2").text
        assert 'href="/guideline"' in said and "Right." in said and "<strong>Good</strong> is better." in said
        assert "question 0" in ann.get("/label").text


def test_practice_counts_practice_alone(store):
    q = queue(store)
    q.submit(q.next("ann").assignment, "ann", Answer(1))
    store.ask([pair(50 + i, gold=1.0) for i in range(3)], "gold")
    with served(store, rules=Rules(onboarding=3)) as site:
        assert "Practice 1 of 3" in site.visitor("ann").get("/label").text


def test_what_tests_a_rater_looks_like_any_other_item(store):
    """Known answers and second askings may be skipped, too, or the page would tell which they are."""
    store.ask([pair(50, gold=1.0)], "gold")

    def shape(page):
        return re.sub(r"question \d+|(good|bad) answer \d+|/label/\d+|\d+ (today|in all|waiting)", "", page)

    with served(store, rules=Rules(onboarding=0, gold_every=2, repeat_every=3, repeat_gap=1)) as site:
        ann = site.visitor("ann")
        pages = []
        for _ in range(6):
            pages.append(shape(ann.get("/label").text))
            ann.answer()
    kept = [j.meta["purpose"] for j in store.preferences()]
    assert set(kept) == {"label", "gold", "repeat"} and "Skip it" in pages[0]
    assert all(page == pages[0] for page in pages)


def test_a_choice_is_needed(site):
    ann = site.visitor("ann")
    for grade in ("", "9", "-3.5", "x"):
        assert ann.answer(grade).status_code == 400
    assert site.store.preferences() == []


def test_sensitive_content_is_behind_a_click(store):
    store.ask([pair(77, priority=5.0, sensitive=True)], "harm")
    with served(store) as site:
        assert "question 77" not in site.visitor("bob").get("/label").text
        Accounts(store).add("ann", sensitive=True)
        page = site.visitor("ann").get("/label").text
        assert page.index('<details class="card warn">') < page.index("question 77") < page.index("</details>")


def test_a_sensitive_dispute_is_behind_a_click(store):
    store.ask([pair(77, priority=5.0, sensitive=True, wanted=2)], "harm")
    with served(store) as site:
        for name, better in (("ann", "good"), ("bob", "bad")):
            Accounts(store).add(name, sensitive=True)
            visitor = site.visitor(name)
            shown = re.findall(r"(good|bad) answer 77", visitor.get("/label").text)
            visitor.answer("2" if shown[0] == better else "-2")
        page = site.visitor("boss").get("/manage").text
    summary = re.search(r"<summary>Comparison 7: (.*?)<span", page)[1]
    assert "question 77" not in summary and "harmful content" in summary and "question 77" in page


# the manager's


def test_the_manager_sees_and_settles(site):
    boss, ann, bob = site.visitor("boss"), site.visitor("ann"), site.visitor("bob")
    for visitor, better in ((ann, "good"), (bob, "bad")):
        for _ in range(6):
            page = visitor.get("/label").text
            grade = (
                "2"
                if page.index(f"{better} answer") < page.index("bad answer" if better == "good" else "good")
                else "-2"
            )
            visitor.answer(grade)
    page = boss.get("/manage").text
    assert "<b>12</b> of 12 answers" in page and "Comparison 1: question 0" in page
    assert "Krippendorff's alpha <b>-0.833</b>" in page  # 1 - 1 / (6 * 6 / (12 * 11 / 2))
    assert '<td>ann</td><td>bob</td><td class="n">6</td>' in page
    token = TOKEN.search(page)[1]
    done = boss.send_form("/adjudicate/1", csrf=token, grade="3", note="it is")
    assert "the item is closed" in done.text and "Comparison 1: question 0" not in done.text
    assert "Let ann go on" in boss.send_form("/pause", csrf=token, rater="ann", why="a word first").text
    assert "You are paused" in ann.get("/label").text and "a word first" in ann.get("/label").text
    lines = [json.loads(x) for x in boss.get("/export?what=preferences").text.splitlines()]
    assert [(x["raters"], x["adjudicated"], x["label"]) for x in lines] == [(1, True, 1.0), *[(2, False, 0.5)] * 5]
    assert "adjudicated" in boss.get("/log").text and "paused" in boss.get("/log").text


def test_what_every_rater_left_is_settled_by_the_manager(tmp_path):
    """Nobody else would: the run that asked would wait for ever."""
    store = Store(tmp_path / "left.sqlite")
    store.ask([pair(0), pair(1, sensitive=True)], "batch")
    with served(store) as site:
        for name in ("ann", "bob"):
            visitor = site.visitor(name)
            page = visitor.get("/label").text
            csrf, where = TOKEN.search(page)[1], re.search(r'action="(/label/\d+)"', page)[1]
            visitor.send_form(where, csrf=csrf, do="skip", reason=f"{name} cannot tell")
        boss = site.visitor("boss")
        page = boss.get("/manage").text
        assert "left by 2" in page and "ann left it: ann cannot tell" in page and "bob left it" in page
        assert store.open_items("batch") == 2 and "question 1" not in page  # nobody left that one
        page = boss.send_form("/adjudicate/1", csrf=TOKEN.search(page)[1], grade="bad", note="neither").text
        assert "nothing waits that a rater left" in page
    assert store.open_items("batch") == 1
    assert [(j.p, j.both_bad, j.rater) for j in store.preferences(origins=["batch"])] == [(0.5, True, "boss")]
    store.close()


def test_simulated_raters_are_marked(store):
    with served(store, simulated=True) as site:
        ann = site.visitor("ann")
        ann.answer()
        assert "simulated" in site.visitor("boss").get("/manage").text
    assert {j.kind for j in store.preferences()} == {"simulated"}
    with pytest.raises(UserError, match="rater 'ann' is simulated, and stays so"):
        Accounts(store).add("ann")


def test_a_program_does_not_take_a_human_s_name_nor_a_human_a_program_s(store):
    with served(store):
        pass
    with pytest.raises(UserError, match=r"rater 'boss' is human in this store.*raters=\[boss-program, \.\.\.\]"):
        make_app(store, LabelConfig(raters=("boss",), simulated=True))
    Accounts(store).add("robot", kind="simulated")
    with pytest.raises(UserError, match="rater 'robot' is simulated in this store"):
        make_app(store, LabelConfig(raters=("robot",)))


# attacks


def test_nothing_is_shown_to_who_is_not_signed_in(site):
    stranger = site.visitor()
    for path in ("/label", "/manage", "/log", "/export", "/guideline", "/feedback/1", "/"):
        assert str(stranger.get(path).url).endswith("/sign-in")
    for path in ("/label/1", "/undo", "/pause", "/adjudicate/1", "/sign-out"):
        assert str(stranger.post(path, data={"csrf": "x"}).url).endswith("/sign-in")
    for token in ("", "x", "../", "é"):
        assert stranger.get("/enter", params={"token": token}).status_code == 403
    assert stranger.get("/docs").status_code == stranger.get("/openapi.json").status_code == 404
    assert stranger.get("/static/../app.py").status_code == stranger.get("/static/%2e%2e/app.py").status_code == 404


def test_a_link_is_of_one_server_and_one_rater(store):
    with served(store) as one:
        links = one.links
        assert len(set(links.values())) == 3 and all(len(link) > 50 for link in links.values())
        assert one.visitor("ann").get("/manage").status_code == 403
    with served(store) as other:
        assert other.visitor().get(links["boss"]).status_code == 403


def test_cookies_are_kept_from_scripts_and_other_sites(site, accounts):
    raw = httpx.get(site.url + site.links["ann"]).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {p.strip() for p in raw.split(";")}
    raw = httpx.post(accounts.url + "/sign-in", data={"name": "eve", "password": PASSWORD[::-1]}).headers["set-cookie"]
    assert raw.startswith("__Host-trueup=") and {"Secure", "HttpOnly"} <= {p.strip() for p in raw.split(";")}


def test_a_session_cannot_be_chosen_or_used_after_its_end(site):
    fixed = httpx.get(site.url + site.links["ann"], cookies={"trueup": "chosen"})
    token = fixed.cookies["trueup"]
    assert token != "chosen" and httpx.get(site.url + "/label", cookies={"trueup": "chosen"}).status_code == 303
    ann = site.visitor("ann")
    stolen = dict(ann.cookies)
    assert httpx.get(site.url + "/label", cookies=stolen).status_code == 200
    ann.send_form("/sign-out")
    assert httpx.get(site.url + "/label", cookies=stolen).status_code == 303
    with site.store.reading() as db:
        assert stolen["trueup"] not in str(db.execute(sa.select(sessions)).all())


def test_a_session_ends_by_itself_and_with_a_new_password(store):
    clock = Clock()
    with served(store, clock=clock) as site:
        ann, bob = site.visitor("ann"), site.visitor("bob")
        Accounts(store).add("bob", password=PASSWORD)
        assert str(bob.get("/label").url).endswith("/sign-in")
        clock.now += 15 * 86400
        assert str(ann.get("/label").url).endswith("/sign-in")


def test_a_forged_request_changes_nothing(site):
    ann, bob = site.visitor("ann"), site.visitor("bob")
    page, others = ann.get("/label").text, TOKEN.search(bob.get("/label").text)[1]
    place, own = re.search(r'action="(/label/\d+)"', page)[1], TOKEN.search(page)[1]
    fields = {"grade": "2", "do": "keep"}
    assert ann.post(place, data=fields).status_code == 403
    assert ann.post(place, data={**fields, "csrf": others}).status_code == 403
    assert ann.post(place, data={**fields, "csrf": own}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert ann.post(place, data={**fields, "csrf": own}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert ann.get(place).status_code == 405
    assert site.store.preferences() == []
    assert ann.post(place, data={**fields, "csrf": own}, headers={"Origin": site.url}).status_code == 200
    assert len(site.store.preferences()) == 1


def test_another_s_item_cannot_be_answered(site):
    ann, bob = site.visitor("ann"), site.visitor("bob")
    place = re.search(r'action="(/label/\d+)"', ann.get("/label").text)[1]
    assert bob.send_form(place, grade="2", do="keep").status_code == 400
    assert bob.send_form(place, do="skip", reason="x").status_code == 400
    assert bob.send_form("/label/999", grade="2", do="keep").status_code == 400
    assert site.store.preferences() == []


def test_a_rater_is_no_manager(site):
    ann = site.visitor("ann")
    token = TOKEN.search(ann.get("/label").text)[1]
    assert [ann.get(p).status_code for p in ("/manage", "/log", "/export")] == [403] * 3
    for path, fields in (("/pause", {"rater": "bob", "why": "x"}), ("/adjudicate/1", {"grade": "3"})):
        assert ann.send_form(path, csrf=token, **fields).status_code == 403
    with site.store.reading() as db:
        assert db.execute(sa.select(raters.c.paused)).scalars().all() == ["", "", ""]


def test_passwords_are_hashed_and_guessing_is_stopped(store, tmp_path):
    clock = Clock()
    accounts = Accounts(store)
    accounts.add("root", role="manager", password=PASSWORD)
    accounts.add("eve", password=PASSWORD[::-1])
    with sqlite3.connect(store.path) as db:
        assert db.execute("SELECT password FROM raters WHERE name = 'root'").fetchone()[0].startswith("$argon2id$")
    assert PASSWORD.encode() not in b"".join(p.read_bytes() for p in tmp_path.glob("s.sqlite*"))

    def tries(site, name, password):
        return httpx.post(site.url + "/sign-in", data={"name": name, "password": password}).status_code

    with served(store, clock=clock, proxy=True) as site:
        assert [tries(site, "root", f"guess {i}") for i in range(5)] == [403] * 5
        assert tries(site, "root", PASSWORD) == 429  # the right one, too: who guesses is not told
        assert tries(site, "eve", PASSWORD[::-1]) == 303
    with served(store, clock=clock, proxy=True) as site:  # a restart does not forget
        assert tries(site, "root", PASSWORD) == 429
        with store.writing() as db:
            for address in ["127.0.0.1"] * 14 + ["1.2.3.4"]:
                row = {"time": clock.now, "who": "n", "what": "sign-in failed", "details": {"address": address}}
                db.execute(log.insert().values(**row))
        assert tries(site, "eve", "wrong") == 403
        assert tries(site, "eve", PASSWORD[::-1]) == 429  # twenty from one address
        clock.now += 901
        assert tries(site, "root", PASSWORD) == 303
        assert tries(site, "", "") == tries(site, "root", "x" * 5000) == 403


def test_guesses_at_the_same_time_are_counted_one_after_the_other(store):
    accounts, said = Accounts(store), []
    accounts.add("root", role="manager", password=PASSWORD)

    def guess(k):
        try:
            said.append(accounts.sign_in("root", f"guess {k}", "1.2.3.4"))
        except TooMany:
            said.append("not tried")

    threads = [threading.Thread(target=guess, args=(k,)) for k in range(12)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    assert sorted(map(str, said)) == ["None"] * 5 + ["not tried"] * 7


def test_there_is_no_secret_or_account_to_begin_with(tmp_path):
    store = Store(tmp_path / "new.sqlite")
    with served(store) as site:
        page = site.visitor().get("/sign-in").text
        assert "Open the link" in page and 'name="password"' not in page
        for name, password in (("admin", "admin"), ("boss", ""), ("boss", "boss"), ("root", "root")):
            data = {"name": name, "password": password}
            assert httpx.post(site.url + "/sign-in", data=data).status_code == 403
    with pytest.raises(UserError, match="a password has 12 characters or more"):
        Accounts(store).add("root", password="short")
    with pytest.raises(UserError, match="a password has at most 256 characters"):
        Accounts(store).add("root", password="x" * 257)
    store.close()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"host": "0.0.0.0"}, "need https"),
        ({"host": "::"}, "need https"),
        ({"host": "0.0.0.0", "proxy": True}, "needs accounts"),
        ({"proxy": True}, "needs accounts"),
        ({"certificate": "c.pem"}, "both keys, certificate and key"),
        ({"guideline": "no/such.md"}, "no/such.md: the guideline cannot be read"),
    ],
)
def test_it_does_not_open_without_what_it_needs(store, keys, said):
    Accounts(store).add("root", role="manager")  # without a password
    Accounts(store).add("eve", password=PASSWORD)  # no manager
    with pytest.raises(UserError, match=said):
        make_app(store, LabelConfig(**keys))


def test_every_answer_carries_the_policy(site):
    ann = site.visitor("ann")
    for path in ("/label", "/sign-in", "/manage", "/no-such", "/static/label.css", "/static/label.js", "/enter"):
        headers = ann.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "same-origin"
    page = ann.get("/label").text
    assert " style=" not in page and not re.search(r"<script(?! src)|\son\w+=", page)


def test_a_name_that_is_not_ours_is_refused(site):
    """What a page that was bound anew to 127.0.0.1 (DNS rebinding) would ask."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert site.visitor().get("/sign-in", headers={"Host": host}).status_code in (400, 421)


def test_odd_texts_and_numbers_are_refused(site):
    boss = site.visitor("boss")
    for number in (2**31, 2**63, 2**70, -1):
        for path in (f"/label/{number}", f"/adjudicate/{number}"):
            assert boss.send_form(path, grade="2", do="keep").status_code == 404
        for path in (f"/feedback/{number}", f"/log?before={number}", f"/label?again={number}"):
            assert boss.get(path).status_code == 404
    for field in ("note", "own"):
        assert boss.answer(**{field: "a\0b"}).status_code == 400
    assert boss.send_form("/pause", rater="a\0b", why="x").status_code == 400
    assert boss.send_form("/sign-in", name="a\0b", password="x").status_code == 400
    assert site.store.preferences() == []


def test_too_much_is_refused(site, store):
    ann = site.visitor("ann")
    assert ann.send_form("/label/1", csrf="x", note="x" * 300_000).status_code == 413
    assert ann.post("/undo", content=iter([b"csrf=x"])).status_code == 413  # no length is said
    assert ann.send_form("/label/1", **{f"f{i}": "x" for i in range(200)}, grade="2").status_code in (400, 413)
    with served(store, per_minute=5, clock=Clock()) as slow:
        bob, stranger = slow.visitor("bob"), slow.visitor()
        codes = [bob.get("/guideline").status_code for _ in range(6)]
        assert codes[0] == 200 and codes[-1] == 429
        assert slow.visitor("ann").get("/guideline").status_code == 200
        codes = [stranger.get("/static/label.js", headers={"Cookie": f"trueup={i}"}).status_code for i in range(100)]
        assert codes[0] == 200 and codes[-1] == 429  # another cookie each time does not help
