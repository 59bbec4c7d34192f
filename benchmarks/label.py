"""The labelling page under load, and the store when it is large.

    python benchmarks/label.py load --raters 50 --seconds 60    raters over HTTP; kill -9 in the midst; nothing lost
    python benchmarks/label.py large --comparisons 100000        time of next item and submit at the server
        --gold-every 0                                      and where no answer is known; else every 1000th is

Both take --store postgresql://... instead of a file of their own. docs/labelling.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

from trueup.label.accounts import Accounts
from trueup.label.queue import Answer, Nothing, Queue, Rules
from trueup.records import Comparison, Completion, Prompt
from trueup.store import Asked, Store

TOKEN = re.compile(r'name="csrf" value="([^"]+)"')
PLACE = re.compile(r'action="(/label/(\d+))"')


def pair(i: int, **more) -> Asked:
    sides = (Completion(f"The first answer to {i}."), Completion(f"Another answer, a little longer, to {i}."))
    return Asked(Comparison(Prompt.of(f"Question {i}?"), sides), **more)


class Server:
    """`trueup label` as a process of its own."""

    def __init__(self, store: str, raters: int, port: int = 0) -> None:
        names = [f"r{i}" for i in range(raters)]
        keys = [f"port={port}", f"raters={json.dumps(names)}", "simulated=true", "per_minute=100000"]
        command = [sys.executable, "-m", "trueup", "label", store, *keys, "rules.onboarding=0", "rules.repeat_every=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.links = dict(self.process.stdout.readline().strip().split(": ", 1) for _ in names)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def work(link: str, seed: int, until: threading.Event, acknowledged: Counter[int], times: list[float]) -> None:
    """One rater: takes what is shown, answers, and notes each assignment whose answer the server acknowledged."""
    rng = random.Random(seed)
    with httpx.Client(follow_redirects=False, timeout=60) as client:
        try:
            client.get(link)
            base = link.split("/enter")[0]
            while not until.is_set():
                page = client.get(f"{base}/label").text
                found = PLACE.search(page)
                if found is None:
                    return
                data = {"csrf": TOKEN.search(page)[1], "grade": str(rng.randint(-3, 3)), "do": "keep"}
                began = time.perf_counter()
                said = client.post(base + found[1], data=data)
                if said.status_code == 303 and said.headers["location"].endswith("said=kept"):
                    times.append(time.perf_counter() - began)
                    acknowledged[int(found[2])] += 1
                    if rng.random() < 0.1:  # an impatient one, who sends it twice
                        again = client.post(base + found[1], data=data)
                        assert again.headers["location"].endswith("said=again"), again.headers
        except (httpx.TransportError, TypeError):
            if not until.is_set():  # the server was killed: what was not acknowledged is not counted
                return


def run(server: Server, seconds: float, kill: bool, acknowledged: Counter[int], times: list[float], seed: int) -> None:
    until = threading.Event()
    threads = [
        threading.Thread(target=work, args=(link, seed + i, until, acknowledged, times))
        for i, link in enumerate(server.links.values())
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    if kill:
        server.kill()
    until.set()
    for thread in threads:
        thread.join(120)


def load(store: str, raters: int, seconds: float) -> dict[str, object]:
    """Half of the time, kill -9, restart, the other half: then every acknowledged answer must be there once."""
    kept = Store(store)
    kept.ask([pair(i, wanted=3) for i in range(int(raters * seconds * 4))], "load")
    acknowledged: Counter[int] = Counter()
    times: list[float] = []
    server = Server(store, raters)
    run(server, seconds / 2, True, acknowledged, times, 0)
    before = len(acknowledged)
    server = Server(store, raters)
    run(server, seconds / 2, False, acknowledged, times, 1000)
    server.kill()
    there = Counter(j.assignment for j in kept.preferences())
    by_item = Counter((j.comparison, j.rater) for j in kept.preferences())
    kept.close()
    times.sort()
    return {
        "raters": raters,
        "seconds": seconds,
        "acknowledged": sum(acknowledged.values()),
        "before_the_kill": before,
        "stored": sum(there.values()),
        "lost": sum(there[a] < 1 for a in acknowledged),
        "twice": sum(n > 1 for n in there.values()) + sum(n > 1 for n in by_item.values()),
        "a_second": round(len(times) / seconds, 1),
        "submit_ms": {q: round(1000 * times[int(q / 100 * (len(times) - 1))], 1) for q in (50, 95, 99)}
        if times
        else {},
    }


def large(store: str, comparisons: int, answers: int, gold_every: int) -> dict[str, object]:
    """Time of `next` and `submit`, without HTTP, when the store holds so many comparisons and half of them answered."""
    kept = Store(store)
    kept.ask(
        [
            pair(i, wanted=1 + i % 10 // 9 * 2, gold=1.0 if gold_every and i % gold_every == 0 else None)
            for i in range(comparisons)
        ],
        "l",
    )
    accounts = Accounts(kept)
    names = [f"r{i}" for i in range(20)]
    for name in names:
        accounts.add(name, kind="simulated")
    queue = Queue(kept, Rules(gold_bar=0))
    fill(kept, comparisons // 2, names)
    took: dict[str, list[float]] = {"next": [], "submit": [], "next_cpu": [], "submit_cpu": []}
    rng = random.Random(0)
    for i in range(answers):
        name = names[i % len(names)]
        grade = rng.randint(-3, 3)
        marks = [(time.perf_counter(), time.process_time())]
        task = queue.next(name)
        marks.append((time.perf_counter(), time.process_time()))
        assert not isinstance(task, Nothing)
        queue.submit(task.assignment, name, Answer(grade))
        marks.append((time.perf_counter(), time.process_time()))
        for k, what in enumerate(("next", "submit")):
            took[what].append(marks[k + 1][0] - marks[k][0])
            took[f"{what}_cpu"].append(marks[k + 1][1] - marks[k][1])
    kept.close()
    out: dict[str, object] = {"comparisons": comparisons, "gold_every": gold_every, "answers": answers}
    for name, values in took.items():
        values.sort()
        out[f"{name}_ms"] = {q: round(1000 * values[int(q / 100 * (len(values) - 1))], 2) for q in (50, 95, 99)}
    return out


def fill(store: Store, count: int, names: list[str]) -> None:
    """Answers to the first `count` items, written at once: the state that many days of labelling leave."""
    import sqlalchemy as sa

    from trueup.store.tables import assignments, items, preferences

    with store.writing() as db:
        rows = db.execute(sa.select(items.c.id, items.c.comparison).where(items.c.gold.is_(None)).limit(count)).all()
        lent = {"round": 1, "purpose": "label", "swapped": False, "state": "done", "leased": 0.0, "expires": 0.0}
        said = {"p": 1.0, "strength": 1.0, "tie": False, "both_bad": False, "kind": "simulated", "time": "", "note": ""}
        start = db.execute(sa.select(sa.func.coalesce(sa.func.max(assignments.c.id), 0))).scalar_one()
        who = [names[i % len(names)] for i in range(len(rows))]
        made = [{"item": r.id, "rater": w, "finished": 1.0, **lent} for r, w in zip(rows, who, strict=True)]
        db.execute(assignments.insert(), made)
        db.execute(
            preferences.insert(),
            [
                {"comparison": r.comparison, "rater": w, "assignment": start + 1 + i, "meta": {}, **said}
                for i, (r, w) in enumerate(zip(rows, who, strict=True))
            ],
        )
        done = items.c.done + 1
        chosen = items.c.id.in_([r.id for r in rows[:500]]) if len(rows) <= 500 else items.c.id <= rows[-1].id
        chosen = sa.and_(chosen, items.c.gold.is_(None))
        db.execute(items.update().where(chosen).values(done=done, open=done < items.c.wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "large"])
    parser.add_argument("--store", default=None)
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--comparisons", type=int, default=100_000)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--gold-every", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = asked.store or str(Path(folder) / "s.sqlite")
        if asked.what == "load":
            found = load(store, asked.raters, asked.seconds)
        else:
            found = large(store, asked.comparisons, asked.answers, asked.gold_every)
    print(json.dumps({**found, "processors": os.cpu_count()}, indent=2))
    sys.exit(bool(found.get("lost") or found.get("twice")))


if __name__ == "__main__":
    main()
