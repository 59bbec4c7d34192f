"""Files into the store and out of it: comparisons to ask, verdicts that others collected, what was said here.

ask        prompt, first, second (or chosen, rejected; or a completions.jsonl of stage `generate`), and where known
           gold (first, second, tie), explanation, sensitive, priority, wanted
import     the ecosystem's prompt, chosen, rejected, label, rater, strength, time; Argilla's records, nested
           (`to_json`) or flat (`to_datasets`); Label Studio's JSON with a Pairwise tag
export     labels, one row a verdict; preferences, one row a comparison; demonstrations

What was exported comes in as it was: on the same comparisons, an adjudication as one. Answers to what is known, and
second askings, are no opinion and are left out.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from trueup.data.completions import read_completions
from trueup.data.files import raw_rows
from trueup.data.readers import Useless, preference_of
from trueup.label.queue import TEST
from trueup.records import Comparison, Prompt, UserError, write_jsonl
from trueup.run import now
from trueup.store import ADJUDICATION, LONGEST_TIME, Asked, Judged, Kind, Store, as_row, completion_id

GOLD = {"first": 1.0, "second": 0.0, "tie": 0.5}
OWN = (
    "strength",
    "time",
    "kind",
    "tie",
    "both_bad",
    "note",
    "origin",
    "purpose",
    "explanation",
    "sensitive",
    "priority",
    "flags",
    "turned",
)
"""Columns that say something of a verdict or an asking, not of the prompt."""


@dataclass
class Told:
    """What became of a file's rows."""

    new: int
    rows: int
    dropped: Counter[str]

    def __str__(self) -> str:
        parts = [f"{self.new} new of {self.rows} rows", *(f"{n} left out: {why}" for why, n in self.dropped.items())]
        return "; ".join(parts)


def ask_file(
    store: Store, path: Path, *, origin: str, wanted: int = 1, overlap: int = 1, share: float = 0.0, seed: int = 0
) -> Told:
    """Puts a file's comparisons into the queue. A `share` of them, drawn by the seed, is asked of `overlap` raters."""
    rng = Coin(seed)
    asked, dropped = [], Counter[str]()
    for where, row in _pairs(path, dropped):
        try:
            preference = preference_of({**row, "chosen": row["first"], "rejected": row["second"]}, where)
        except Useless as error:
            dropped[str(error)] += 1
            continue
        prompt = Prompt(preference.prompt.messages, _without(preference.prompt.meta))
        gold = row.get("gold")
        if gold is not None and gold not in GOLD:
            raise UserError(f"{where}: column 'gold': {gold!r}; expected one of {', '.join(GOLD)}")
        many = overlap if rng(prompt.id, preference.chosen.text) < share else wanted
        asked.append(
            Asked(
                Comparison(prompt, (preference.chosen, preference.rejected)),
                wanted=int(row.get("wanted") or many),
                priority=float(row.get("priority") or 0.0),
                gold=None if gold is None else GOLD[gold],
                explanation=str(row.get("explanation") or ""),
                sensitive=bool(row.get("sensitive")),
                meta={"models": row["models"]} if row.get("models") else {},
            )
        )
    return Told(store.ask(asked, origin), len(asked) + sum(dropped.values()), dropped)


class Coin:
    """Draws that depend on nothing but the seed and what is drawn for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, *parts: str) -> float:
        """In [0, 1), the same for the same parts."""
        import hashlib

        digest = hashlib.sha256(json.dumps([self.seed, *parts]).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def _pairs(path: Path, dropped: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with first and second, whatever the file calls them."""
    for place, row in raw_rows(path):
        where = f"{path}, {place}"
        if "completions" in row:
            break
        if "first" in row and "second" in row:
            yield where, row
        elif "chosen" in row and "rejected" in row:
            yield where, {**row, "first": row["chosen"], "second": row["rejected"]}
        else:
            found = ", ".join(map(repr, row))
            raise UserError(f"{where}: found columns {found}; expected prompt, first, second, or completions")
    else:
        return
    for number, (row, prompt, answers) in enumerate(read_completions(path), 1):
        if len(answers) % 2:
            dropped["answers without a partner"] += 1
        for a, b in zip(answers[::2], answers[1::2], strict=False):
            yield (
                f"{path}, row {number}",
                {
                    **{k: v for k, v in row.items() if k != "completions"},
                    "prompt": [dict(m) for m in prompt.messages],
                    **{"first": a["text"], "second": b["text"]},
                    **{"chosen_ended": a["stop"] != "length", "rejected_ended": b["stop"] != "length"},
                    **({"models": [a["model"], b["model"]]} if "model" in a and "model" in b else {}),
                },
            )


def _without(meta: Any) -> dict[str, Any]:
    left_out = {*OWN, "first", "second", "gold", "wanted", "models", "label", "rater"}
    left_out |= {"chosen_ended", "rejected_ended", "completions", "kind"}
    return {k: v for k, v in meta.items() if k not in left_out}


def import_file(store: Store, path: Path, *, origin: str, kind: Kind = "human") -> Told:
    """Appends the verdicts of a file, of whichever form it is; what is there already is not added again."""
    dropped: Counter[str] = Counter()
    judged: list[Judged] = []
    for place, row in raw_rows(path):
        judged += _verdicts(row, f"{path}, {place}", origin, kind, dropped)
    if not judged and not dropped:
        raise UserError(f"{path}: no rows")
    new = store.append(_one_way_round(store, judged))
    return Told(new, len(judged) + sum(dropped.values()), dropped)


def _one_way_round(store: Store, judged: Sequence[Judged]) -> list[Judged]:
    """A file puts what was chosen first, so that two who disagree name one comparison in two orders: in each origin it
    is the one of the store, or that of the file's first row."""
    known, out = store.pairs({j.origin for j in judged}), []
    for j in judged:
        prompt, sides = j.comparison.prompt, j.comparison.completions
        pair = (j.origin, *(completion_id(prompt, side) for side in sides))
        if pair not in known and (pair[0], pair[2], pair[1]) in known:
            j = replace(j, comparison=Comparison(prompt, sides[::-1]), p=1 - j.p)
        else:
            known.add(pair)
        out.append(j)
    return out


def _verdicts(row: dict[str, Any], where: str, origin: str, kind: Kind, dropped: Counter[str]) -> list[Judged]:
    if "annotations" in row and "data" in row:
        return _label_studio(row, where, origin, kind, dropped)
    if isinstance(row.get("responses"), dict) and isinstance(row.get("fields"), dict):
        said = [
            (one.get("value"), str(one.get("user_id") or "someone"), one.get("status") or "submitted")
            for question in row["responses"].values()
            for one in question or ()
        ]
        return _argilla(row["fields"], said, where, origin, kind, dropped)
    flat = [k for k in row if k.endswith(".responses")]
    if flat:
        said = [
            (value, str(user), status or "submitted")
            for k in flat
            for value, user, status in zip(
                row[k] or (), row.get(f"{k}.users") or (), row.get(f"{k}.status") or (), strict=False
            )
        ]
        return _argilla(row, said, where, origin, kind, dropped)
    try:
        p = preference_of(row, where)
    except Useless as error:
        dropped[str(error)] += 1
        return []
    of_row = row.get("kind") or kind
    if of_row not in get_args(Kind):
        raise UserError(f"{where}: column 'kind': {of_row!r}; expected one of {', '.join(get_args(Kind))}")
    purpose = row.get("purpose")
    if purpose in (*TEST, "repeat"):
        dropped["second askings" if purpose == "repeat" else "answers to what is known"] += 1
        return []
    strength, time = row.get("strength"), str(row.get("time") or now())
    try:
        strength = None if strength is None else float(strength)
    except (TypeError, ValueError):
        raise UserError(f"{where}: column 'strength': {strength!r}; expected a number") from None
    if len(time) > LONGEST_TIME:
        raise UserError(f"{where}: column 'time': more than {LONGEST_TIME} characters: {time!r}")
    sides, p_first = (p.chosen, p.rejected), p.label
    if row.get("turned"):
        sides, p_first = sides[::-1], 1 - p_first
    return [
        Judged(
            Comparison(Prompt(p.prompt.messages, _without(p.prompt.meta)), sides),
            p_first,
            p.rater or "someone",
            of_row,
            str(row.get("origin") or origin),
            time,
            strength=strength,
            tie=p.label == 0.5 and not row.get("both_bad"),
            both_bad=bool(row.get("both_bad")),
            note=str(row.get("note") or ""),
            meta={"purpose": ADJUDICATION} if purpose == ADJUDICATION else {},
        )
    ]


FIRST = ("first", "left", "a", "chosen")
SIDES = (
    *(("response1", "response2"), ("response_1", "response_2"), ("response-1", "response-2")),
    *(("answer1", "answer2"), ("answer_1", "answer_2"), ("answer_a", "answer_b"), ("response_a", "response_b")),
    *(("text1", "text2"), ("left", "right"), ("first", "second"), ("chosen", "rejected"), ("a", "b")),
)
"""Names that two answers have in others' exports."""
ASKED = ("prompt", "instruction", "question", "context", "input", "text")


def _pair_of(fields: dict[str, Any], where: str) -> tuple[Comparison, tuple[str, str]]:
    sides = next((pair for pair in SIDES if pair[0] in fields and pair[1] in fields), None)
    asked = next((name for name in ASKED if name in fields), None)
    if sides is None or asked is None:
        known = "; ".join("/".join(pair) for pair in SIDES)
        raise UserError(
            f"{where}: found {', '.join(map(repr, fields))}; expected the prompt as one of {', '.join(ASKED)} and two "
            f"answers as {known}"
        )
    as_rows = {"prompt": fields[asked], "chosen": fields[sides[0]], "rejected": fields[sides[1]]}
    p = preference_of(as_rows, where)
    return Comparison(Prompt(p.prompt.messages), (p.chosen, p.rejected)), sides


def _argilla(
    fields: dict[str, Any], said: list[tuple[Any, str, str]], where: str, origin: str, kind: Kind, dropped: Counter[str]
) -> list[Judged]:
    try:
        comparison, sides = _pair_of(fields, where)
    except Useless as error:
        dropped[str(error)] += 1
        return []
    out = []
    for value, user, status in said:
        p = _choice(value, sides)
        if status != "submitted":
            dropped[f"responses that are {status}"] += 1
        elif p is None:
            dropped["answers to other questions"] += 1
        else:
            out.append(Judged(comparison, p, user, kind, origin, now(), tie=p == 0.5))
    return out


def _choice(value: Any, sides: tuple[str, str]) -> float | None:
    """p that the first is better; None where the value names neither. A ranking names the best one first."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "rank" in v for v in value):
        ranks = {str(v["value"]): v["rank"] for v in value}
        if set(ranks) >= set(sides):
            a, b = (ranks[side] for side in sides)
            return 0.5 if a == b else float(a < b)
        return None
    if isinstance(value, list) and value:
        value = value[0]
    text = str(value).lower().replace("-", "_")
    if text in ("tie", "equal", "same", "both"):
        return 0.5
    names = [{side.lower().replace("-", "_"), *words} for side, words in zip(sides, (FIRST, ()), strict=True)]
    names[1] |= {"second", "right", "b", "rejected"}
    names[0] |= {"1", "response_1", "response1", "answer_1"}
    names[1] |= {"2", "response_2", "response2", "answer_2"}
    return 1.0 if text in names[0] else 0.0 if text in names[1] else None


def _label_studio(row: dict[str, Any], where: str, origin: str, kind: Kind, dropped: Counter[str]) -> list[Judged]:
    try:
        comparison, _ = _pair_of(row["data"], where)
    except Useless as error:
        dropped[str(error)] += 1
        return []
    out = []
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled"):
            dropped["skipped annotations"] += 1
            continue
        chosen = [r["value"].get("selected") for r in annotation.get("result", ()) if r.get("type") == "pairwise"]
        if len(chosen) != 1 or chosen[0] not in ("left", "right"):
            dropped["annotations without one pairwise choice"] += 1
            continue
        by = annotation.get("completed_by")
        rater = str(by.get("email") or by.get("id")) if isinstance(by, dict) else str(by or "someone")
        p = float(chosen[0] == "left")
        time = str(annotation.get("created_at") or now())[:LONGEST_TIME]
        seconds = annotation.get("lead_time")
        meta = {} if seconds is None else {"seconds": seconds}
        out.append(Judged(comparison, p, rater, kind, origin, time, meta=meta))
    return out


def label_rows(store: Store) -> Iterator[dict[str, Any]]:
    """One row a verdict that stands: the ecosystem's columns, who, what, when, how sure, and for what it was asked.
    `turned`: what was chosen is the second of the comparison as it is stored."""
    for j in store.preferences():
        yield {
            **as_row(j),
            "turned": j.p < 0.5,
            **{"kind": j.kind, "strength": j.strength, "tie": j.tie, "both_bad": j.both_bad, "time": j.time},
            **{"note": j.note, "origin": j.origin, "purpose": j.meta.get("purpose"), "flags": j.meta.get("flags")},
        }


def preference_rows(store: Store) -> Iterator[dict[str, Any]]:
    """One row a comparison: the mean of its verdicts, or what was adjudicated; `raters` counts them. Known answers, by
    which raters are tested, are no opinion and are left out, as are second askings of the same rater."""
    by_pair: dict[tuple[Comparison, str], list[Judged]] = defaultdict(list)
    for j in store.preferences():
        if j.meta.get("purpose") not in (*TEST, "repeat"):
            by_pair[j.comparison, j.origin].append(j)
    for said in by_pair.values():
        settled = [j for j in said if j.meta.get("purpose") == ADJUDICATION] or said
        p = sum(j.p for j in settled) / len(settled)
        kinds = {j.kind for j in settled}
        strengths = [j.strength for j in settled if j.strength is not None]
        one = Judged(settled[0].comparison, p, ", ".join(sorted({j.rater for j in settled})), *_common(settled))
        yield {
            **as_row(one),
            **{
                "kind": kinds.pop() if len(kinds) == 1 else "mixed",
                "raters": len(settled),
                "time": max(j.time for j in said),
            },
            **{"strength": sum(strengths) / len(strengths) if strengths else None, "origin": said[0].origin},
            "both_bad": all(j.both_bad for j in settled),
            "adjudicated": settled is not said,
        }


def _common(said: list[Judged]) -> tuple[Kind, str, str]:
    return said[0].kind, said[0].origin, said[0].time


def demonstration_rows(store: Store) -> Iterator[dict[str, Any]]:
    for demonstration, rater, kind in store.demonstrations():
        prompt = [dict(m) for m in demonstration.prompt.messages]
        yield {"prompt": prompt, "completion": demonstration.reply, "rater": rater, "kind": kind}


FORMATS = {"labels": label_rows, "preferences": preference_rows, "demonstrations": demonstration_rows}


def export_lines(store: Store, what: str) -> Iterator[str]:
    for row in FORMATS[what](store):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def export_file(store: Store, what: str, path: Path) -> int:
    """Writes JSONL or Parquet, whole or not at all; returns the number of rows."""
    rows = list(FORMATS[what](store))
    if path.suffix == ".parquet":
        _write_parquet(path, rows)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        raise UserError(f"{path}: unknown kind of file; expected .jsonl or .parquet")
    return len(rows)


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    os.replace(temporary, path)
