"""What is known of models that people compared blindly: who wins how often, and how sure that is.

In order: read what people and judges said of an arena's comparisons; ask a judge about the others; estimate each pair
of models by itself, then all models on one scale.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from pydantic import Field

from trueup.arena.asked import ORIGIN
from trueup.config import Config, Seed, numbers, override, parse
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.math import decisive_pairs, prediction_powered_mean
from trueup.records import Comparison, Completion, Judge, UserError, write_json
from trueup.run import now
from trueup.store import ADJUDICATION, Judged, Store, as_prompt, live
from trueup.store.tables import comparisons, completions, items, preferences, prompts

RESAMPLES = 1000
CHUNK = 32
"""Comparisons that a judge is asked about at once: no more than these verdicts are lost to a kill."""


class ResultsConfig(Config):
    """What `trueup arena` is told."""

    judge: JudgeSpec | None = None
    """Asked about every comparison of different answers that it has not judged yet."""
    share: float = Field(0.55, gt=0.5, lt=1)
    """The share of wins that is worth finding."""
    seed: Seed = 0


def report(
    place: str, assignments: Sequence[str], *, origin: str | None, by: str | None, out: Path | None, device: str
) -> None:
    """Asks the judge, where one is named, and says how the models stand."""
    if not Path(place).exists() and "://" not in place:
        raise UserError(f"{place}: no such store")
    config = parse(ResultsConfig, numbers(override({}, assignments)), "trueup arena")
    store = Store(place)
    name = arena_of(store, origin)
    if config.judge is not None:
        from trueup.engine.mesh import Mesh

        judge = make_judge(config.judge, Mesh.from_env(device), seed=config.seed)
        new, silent = ask_judge(store, name, judge)
        print(f"{judge.name}: {new} new verdicts" + (f"; of {silent} comparisons none" if silent else ""))
        by = by or judge.name
    rows, kinds = arena_rows(store, name)
    found = {
        "arena": name.removeprefix(ORIGIN),
        **standings(rows, kinds, judge=by, share=config.share, seed=config.seed),
    }
    print(shown(found))
    if out:
        write_json(out, found)
    store.close()


@dataclass
class Row:
    """Two models on a prompt, in the order of their names: what people said of their answers (p that the first one's is
    better, the mean over them; None where nobody has) and what each judge did. In an arena that no human has labelled
    `people` are the simulated raters, and everything that is said of them says so."""

    prompt: str
    pair: tuple[str, str]
    same: bool
    people: float | None = None
    judges: dict[str, float] = field(default_factory=dict)


def arena_rows(store: Store, origin: str) -> tuple[list[Row], Counter[str]]:
    """The pairs of models of an arena on each prompt, and how many verdicts there are of each kind of people."""
    i, c, p = items, comparisons, preferences
    with store.reading() as db:
        found = db.execute(
            sa.select(i.c.comparison, i.c.meta, c.c.prompt, c.c.first, c.c.second)
            .join(c, c.c.id == i.c.comparison)
            .where(c.c.origin == origin)
            .order_by(i.c.id)
        ).all()
        votes = db.execute(
            sa.select(p.c.comparison, p.c.p, p.c.kind, p.c.rater, p.c.meta)
            .join(c, c.c.id == p.c.comparison)
            .where(c.c.origin == origin, *live())
            .order_by(p.c.id)
        ).all()
    if not found:
        raise UserError(f"{store.name}: no arena '{origin.removeprefix(ORIGIN)}'")
    labels: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    judges: dict[int, dict[str, float]] = defaultdict(dict)
    last: dict[str, dict[int, float]] = defaultdict(dict)
    kinds: Counter[str] = Counter()
    for vote in votes:
        purpose = vote.meta.get("purpose", "label")
        if vote.kind not in ("human", "simulated"):
            judges[vote.comparison][vote.rater] = vote.p
        elif purpose == ADJUDICATION:
            last[vote.kind][vote.comparison] = vote.p
        elif purpose == "label":
            labels[vote.kind][vote.comparison].append(vote.p)
            kinds[vote.kind] += 1
    rows, kind = [], _kind(kinds)
    for one in found:
        said = labels[kind].get(one.comparison)
        p_people = last[kind].get(one.comparison, sum(said) / len(said)) if said else None
        for models in one.meta["pairs"]:
            turned = models[0] > models[1]
            rows.append(
                Row(
                    one.prompt,
                    (models[1], models[0]) if turned else (models[0], models[1]),
                    one.first == one.second,
                    None if p_people is None else 1 - p_people if turned else p_people,
                    {name: 1 - v if turned else v for name, v in judges[one.comparison].items()},
                )
            )
    return rows, kinds


def _kind(kinds: Mapping[str, int]) -> str:
    """Whose verdicts count: people's, or where there are none, simulated raters'. Never both together."""
    return "human" if kinds.get("human") or not kinds.get("simulated") else "simulated"


def arena_of(store: Store, wanted: str | None) -> str:
    """The origin of the store's only arena, or of the one that is named: its models, with commas."""
    c = comparisons
    with store.reading() as db:
        found = db.execute(sa.select(c.c.origin).distinct().where(c.c.origin.startswith(ORIGIN))).scalars().all()
    names = [origin.removeprefix(ORIGIN) for origin in found]
    if wanted is None and len(names) == 1:
        return ORIGIN + names[0]
    if wanted in names:
        return ORIGIN + str(wanted)
    if not names:
        raise UserError(f"{store.name}: no models are compared here yet: trueup label {store.name} --arena RUN RUN ...")
    told = "; ".join(f"'{name}'" for name in sorted(names))
    raise UserError(f"{store.name}: origin {wanted!r}; expected one of {told}")


def ask_judge(store: Store, origin: str, judge: Judge) -> tuple[int, int]:
    """Asks a judge about every comparison of two different answers that it has not judged yet, and keeps what it says
    in the store: (new verdicts, comparisons of which it gave none)."""
    a, b, c, i = completions.alias(), completions.alias(), comparisons, items
    with store.reading() as db:
        asked = db.execute(
            sa.select(c.c.id, prompts.c.messages, prompts.c.meta, a.c.text, a.c.stop, b.c.text, b.c.stop)
            .select_from(
                i.join(c, c.c.id == i.c.comparison)
                .join(prompts, prompts.c.id == c.c.prompt)
                .join(a, a.c.id == c.c.first)
                .join(b, b.c.id == c.c.second)
            )
            .where(c.c.origin == origin, c.c.first != c.c.second)
            .order_by(c.c.id)
        ).all()
        known = set(
            db.execute(
                sa.select(preferences.c.comparison)
                .join(c, c.c.id == preferences.c.comparison)
                .where(c.c.origin == origin, preferences.c.rater == judge.name, preferences.c.kind == "ai", *live())
            ).scalars()
        )
    todo = [
        Comparison(as_prompt(messages, meta), (Completion(x, r), Completion(y, s)))
        for number, messages, meta, x, r, y, s in asked
        if number not in known
    ]
    new = silent = 0
    for start in range(0, len(todo), CHUNK):
        part = todo[start : start + CHUNK]
        verdicts = verdicts_of(judge, part)
        silent += sum(v.p is None for v in verdicts)
        time = now()
        new += store.append(
            Judged(one, v.p, judge.name, "ai", origin, time, tie=v.p == 0.5, note=v.note)
            for one, v in zip(part, verdicts, strict=True)
            if v.p is not None
        )
    return new, silent


def standings(
    rows: Sequence[Row], kinds: Mapping[str, int], *, judge: str | None = None, share: float = 0.55, seed: int = 0
) -> dict[str, Any]:
    """What is known of each pair of models and of each model.

    Of a pair, with its first model's share of wins (ties one half) over all its prompts: `people`, from those that
    people judged (`simulated` in its place where no human has, and `by` says so); `judge`, the judge's own; `both`,
    theirs with the judge's verdicts to narrow it
    (`trueup.math.prediction_powered_mean`), None each where there is nothing. Equal answers are ties and known. Of a
    model its Bradley-Terry rating on Elo's scale, mean 1000, by those shares, with a 95% interval over prompts.
    """
    if judge is None:
        known = sorted({name for row in rows for name in row.judges})
        if len(known) > 1:
            raise UserError(f"several judges have been asked: by={' or by='.join(known)}")
        judge = known[0] if known else None
    simulated = _kind(kinds) == "simulated"
    of: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        of[row.pair].append(row)
    pairs, weights = [], {}
    for pair, its in sorted(of.items()):
        apart = [r for r in its if not r.same]
        labelled = [r for r in apart if r.people is not None]
        people = [r.people for r in labelled if r.people is not None]
        f, rest = _predictions(labelled, judge), _predictions([r for r in apart if r.people is None], judge)
        same = len(its) - len(apart)
        alone = both = None
        if len(people) > 1:
            alone = prediction_powered_mean(people, [0.5] * len(people), [])
            both = prediction_powered_mean(people, f, rest) if judge else None
        best = both or alone
        weights[pair] = both.weight if both else 0.0
        decisive = [p for p in people if p != 0.5]
        pairs.append(
            {
                "models": pair,
                "comparisons": len(its),
                "same": same,
                "labelled": len(people),
                "decisive": len(decisive),
                "wins": sum(p > 0.5 for p in decisive),
                "needed": decisive_pairs(share),
                "people": None if simulated else _whole(alone, same, len(its)),
                "simulated": _whole(alone, same, len(its)) if simulated else None,
                "judge": float(np.mean(f + rest)) * len(apart) / len(its) + 0.5 * same / len(its)
                if judge and apart
                else None,
                "both": _whole(both, same, len(its)),
                "share": None if best is None else _whole(best, same, len(its))["mean"],
            }
        )
    return {
        "by": "simulated raters, not people" if simulated else "people",
        "judge": judge,
        "raters": dict(kinds),
        "pairs": pairs,
        "models": _ratings(of, weights, judge, seed),
    }


def _predictions(rows: Sequence[Row], judge: str | None) -> list[float]:
    """The judge's p; one half where it has none, so that what it cannot read says nothing."""
    return [r.judges.get(judge, 0.5) if judge else 0.5 for r in rows]


def _whole(found: Any, same: int, total: int) -> Any:
    """A share among the comparisons of different answers as one among all: equal answers are ties. How many of those
    there would be with other prompts is uncertain, too."""
    if found is None:
        return None
    apart = 1 - same / total
    extra = 1.959964 * abs(found.mean - 0.5) * math.sqrt(apart * (1 - apart) / total)
    mean = 0.5 + apart * (found.mean - 0.5)
    low, high = (math.hypot(apart * (found.mean - x), extra) for x in (found.low, found.high))
    return {
        "weight": found.weight,
        "mean": mean,
        "low": max(0.0, mean - low),
        "high": min(1.0, mean + high),
    }


def _ratings(
    of: Mapping[tuple[str, str], Sequence[Row]], weights: Mapping[tuple[str, str], float], judge: str | None, seed: int
) -> list[dict[str, Any]]:
    """Ratings and their intervals: whole prompts are resampled, with all that was said of them."""
    order = sorted(of)
    names = sorted({name for pair in order for name in pair})
    places = {p: k for k, p in enumerate(dict.fromkeys(r.prompt for its in of.values() for r in its))}
    same, lab, left, rest, f = (np.zeros((len(order), len(places))) for _ in range(5))
    for k, pair in enumerate(order):
        for r in of[pair]:
            at, said = places[r.prompt], _predictions([r], judge)[0]
            if r.same:
                same[k, at] = 1
            elif r.people is not None:
                lab[k, at], left[k, at] = 1, r.people - weights[pair] * said
            else:
                rest[k, at], f[k, at] = 1, said
    weight = np.array([weights[pair] for pair in order])
    if not (lab.sum(1) > 0).all():
        return [{"name": name, "rating": None, "interval": None} for name in names]

    def shares(counts: Any) -> Any:
        """[pairs] the first model's share of wins, prompts counted so often; NaN where no label was drawn."""
        n = lab @ counts
        with np.errstate(invalid="ignore", divide="ignore"):
            base = np.where(weight > 0, (f @ counts) / (rest @ counts), 0.0)
            apart = np.clip((left @ counts) / n + weight * base, 0, 1)
            ties = (same @ counts) / ((same + lab + rest) @ counts)
        half = 0.5 / np.maximum(n, 1)
        return 0.5 + (1 - ties) * (np.clip(apart, half, 1 - half) - 0.5)

    ones = np.ones(len(places))
    point = _elo(order, names, shares(ones))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = shares(np.bincount(rng.integers(len(places), size=len(places)), minlength=len(places)).astype(float))
        if np.isfinite(drawn).all():
            draws.append(_elo(order, names, drawn))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    ranked = sorted(zip(names, point, low, high, strict=True), key=lambda row: -row[1])
    return [{"name": n, "rating": float(x), "interval": [float(a), float(b)]} for n, x, a, b in ranked]


def _elo(order: Sequence[tuple[str, str]], names: Sequence[str], shares: Any) -> Any:
    """Bradley-Terry by maximum likelihood on the shares, as 1000 + 400 log10 of the strength."""
    import evalica

    xs = [name for pair in order for name in pair]
    ys = [name for pair in order for name in pair[::-1]]
    wins = np.stack([shares, 1 - shares], 1).ravel()
    found = evalica.bradley_terry(xs, ys, [evalica.Winner.X] * len(xs), weights=wins.tolist())
    return 1000 + 400 * np.log10(found.scores.reindex(names).to_numpy())


def shown(found: Mapping[str, Any]) -> str:
    """The standings for a terminal."""
    of, by = found["raters"], found["by"]
    left_out = " (left out)" if len(of) > 1 else ""
    raters = ", ".join(
        f"{n} verdicts of {kind} raters" + (left_out if kind == "simulated" else "") for kind, n in sorted(of.items())
    )
    lines = [(raters or "no verdicts") + (f"; judge: {found['judge']}" if found["judge"] else "")]
    for pair in found["pairs"]:
        a, b = pair["models"]
        lines.append(
            f"{a} against {b}: {pair['labelled']} judged by {by}, {pair['decisive']} no ties, {pair['wins']} of "
            f"them won by {a}; {pair['same']} of {pair['comparisons']} answers equal"
        )
        for what, name in (("people", by), ("simulated", by), ("both", f"{by}, narrowed by the judge")):
            if pair[what]:
                one = pair[what]
                lines.append(f"  {name:30} {one['mean']:6.1%} [{one['low']:.1%}, {one['high']:.1%}]")
        if pair["judge"] is not None:
            lines.append(f"  {'the judge alone':30} {pair['judge']:6.1%}")
        if pair["decisive"] < pair["needed"]:
            lines.append(f"  {pair['needed']} that are no ties are needed for the difference that was asked for")
    for model in found["models"]:
        if model["rating"] is None:
            lines.append(f"{model['name']:32} no rating yet: a pair of models has no verdict of people")
        else:
            low, high = model["interval"]
            marked = "" if by == "people" else f"  by {by}"
            lines.append(f"{model['name']:32} {model['rating']:6.0f} [{low:.0f}, {high:.0f}]{marked}")
    return "\n".join(lines)
