"""Judges and people asked within a run, and what they said as labels.

People are asked in a file that they fill in, or in the queue of the labelling page; a run waits for them (`Waiting`),
and asks nobody again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from trueup.data.files import raw_rows
from trueup.engine.mesh import Mesh
from trueup.judges import verdicts_of
from trueup.math import at_temperature
from trueup.records import Comparison, Judge, UserError, Verdict, Waiting, write_jsonl
from trueup.run import Run, now
from trueup.store import Asked, Judged, Kind, Store

PEOPLE, TO_LABEL = "people", "to-label.jsonl"
CHOICES = {"first": 1.0, "second": 0.0, "tie": 0.5, "skip": None}
"""What people may write, as the probability that the first is better."""


def ask(judge: Judge, comparisons: Sequence[Comparison], index: range) -> list[dict[str, Any]]:
    """Verdicts on some of the comparisons, as rows of a journal."""
    return [asdict(verdict) for verdict in verdicts_of(judge, [comparisons[i] for i in index])]


def scaled(verdict: Verdict, temperature: float | None) -> Verdict:
    if verdict.p is None or temperature is None:
        return verdict
    return replace(verdict, p=float(at_temperature([verdict.p], temperature)))


def as_judged(comparison: Comparison, verdict: Verdict, gold: np.ndarray | None, kind: Kind, origin: str) -> Judged:
    """With the gold score's margin, first minus second, where it is known."""
    assert verdict.p is not None
    meta: dict[str, Any] = {} if gold is None else {"gold_margin": float(gold[0] - gold[1])}
    if verdict.readings:
        meta |= {"principles": verdict.principles, "spread": verdict.spread, "cost": verdict.cost}
    tie = verdict.p == 0.5
    return Judged(comparison, verdict.p, verdict.rater, kind, origin, now(), tie=tie, note=verdict.note, meta=meta)


def samples(rows: Sequence[dict[str, Any]], most: int = 25) -> list[dict[str, Any]]:
    """The first labelled pairs as a run shows them, a row a side."""
    return [
        {
            "prompt": r["prompt"][-1]["content"],
            "category": r["category"],
            "completion": r[side],
            "side": side,
            "pair": i,
            "rater": r["rater"],
        }
        for i, r in enumerate(rows[:most])
        for side in ("chosen", "rejected")
    ]


def write_labels(
    run: Run, mesh: Mesh, rows: list[dict[str, Any]], verdicts: Sequence[Judged], place: str | None
) -> None:
    """comparisons.jsonl, samples of it, and what was said into the store at `place`, where there is one."""
    if mesh.is_main:
        write_jsonl(run.folder / "comparisons.jsonl", rows)
        if place:
            store = Store(place)
            run.say(f"{store.append(verdicts)} verdicts appended to {place}")
            store.close()
        run.show(0, samples(rows))
    mesh.barrier()


def people_say(run: Run, mesh: Mesh, comparisons: Sequence[Comparison], name: str = TO_LABEL) -> list[Verdict]:
    """What people wrote into the file `name` of the stage's folder, which is made where it is not there.

    Raises Waiting while a choice is missing."""
    path = run.folder / name
    rows = [
        {
            "id": i,
            "choice": None,
            "rater": "people",
            "prompt": [dict(m) for m in c.prompt.messages],
            "first": c.completions[0].text,
            "second": c.completions[1].text,
        }
        for i, c in enumerate(comparisons)
    ]
    run.begin()
    if mesh.is_main and not path.exists():
        write_jsonl(path, rows)
    mesh.barrier()
    verdicts, open_rows = [], 0
    found = {row.get("id"): row for _, row in raw_rows(path)}
    for row in rows:
        said = found.get(row["id"], {})
        if any(said.get(key) != row[key] for key in ("prompt", "first", "second")):
            raise UserError(
                f"{path}: comparison {row['id']} is missing or altered; only choice and rater are to be filled"
            )
        choice = said.get("choice")
        if choice is None:
            open_rows += 1
        elif choice not in CHOICES:
            raise UserError(f"{path}, id {row['id']}: choice {choice!r}; expected one of {', '.join(CHOICES)}")
        else:
            verdicts.append(Verdict(CHOICES[choice], str(said.get("rater") or "people")))
    if open_rows:
        raise Waiting(
            f"{open_rows} of {len(rows)} comparisons to be labelled in {path}: write {', '.join(CHOICES)} into 'choice'"
        )
    return verdicts


def on_page(run: Run, mesh: Mesh, place: str, asked: Sequence[Asked], origin: str) -> list[list[Judged]]:
    """What each rater said on the labelling page of each comparison, which are put into the store's queue; nothing
    where nobody could judge. Raises Waiting while one of them is open."""
    run.begin()
    store = Store(place)
    if mesh.is_main:
        store.ask(asked, origin)
    mesh.barrier()
    waiting, said = store.open_items(origin), store.preferences(origins=[origin])
    store.close()
    if waiting:
        raise Waiting(f"{waiting} of {len(asked)} comparisons to be labelled: trueup label {place}")
    found: dict[tuple[str, ...], list[Judged]] = defaultdict(list)
    for one in said:
        found[_known_by(one.comparison)].append(one)
    return [found[_known_by(one.comparison)] for one in asked]


def _known_by(comparison: Comparison) -> tuple[str, ...]:
    return (comparison.prompt.id, *(c.text for c in comparison.completions))
