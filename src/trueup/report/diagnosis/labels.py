"""Sampled answers, their labels, and the reward model that learns from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trueup.agreement import wilson
from trueup.report.diagnosis.finding import (
    ENDS,
    ERROR,
    LN2,
    NOTE,
    WARNING,
    Finding,
    Say,
    too_long,
)
from trueup.report.figures import ends, num, percent
from trueup.report.read import RunData, Stage, number


def generate(run: RunData, stage: Stage) -> Iterator[Finding]:
    end, n = number(stage.results, "end_rate"), number(stage.results, "completions")
    if end is not None and n and wilson(end, n)[1] < ENDS:
        yield Say(stage)(
            WARNING,
            "cut-answers",
            "the sampled answers are cut",
            f"{percent(end)} of {num(n, 0)} answers end by themselves",
            "Raters compare fragments, and the reward model learns from them.",
            "a model that stops (see its SFT), or a higher ~sampling.max_tokens",
        )


def judge(run: RunData, stage: Stage) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    kept, asked = number(r, "comparisons") or 0.0, number(r, "asked") or 0.0
    yield from _against_gold(say, number(r, "label_accuracy"), kept, "~judge")
    yield from _same(say, r, asked)
    silent = number(r, "dropped", "the judge abstained") or 0.0
    total = asked + (number(r, "asked_twice") or 0.0)
    if silent > 0.6 * total > 0:
        yield say(
            WARNING,
            "abstains",
            "the judge mostly abstains",
            f"{percent(silent / total)} of the questions",
            "Few comparisons are left, and they are not a fair sample.",
            "another ~judge, or answers that differ more",
        )
    unread = number(r, "dropped", "the judge could not be read") or 0.0
    if unread > 0.2 * total > 0:
        yield say(
            WARNING,
            "unreadable",
            "much of what the judge says cannot be read",
            f"{percent(unread / total)} of the questions",
            "No label is made of it, and what is left is not a fair sample.",
            "examples in its constitution, a larger max_tokens where it thinks first, or another model",
        )


def route(run: RunData, stage: Stage) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    kept, left = (number(r, key) or 0.0 for key in ("comparisons", "left"))
    yield from _against_gold(say, number(r, "gold", "labels"), kept, "~judge, ~people")
    yield from _same(say, r, number(r, "pairs") or 0.0)
    right, n = number(r, "trusted", "accuracy"), number(r, "trusted", "pairs") or 0.0
    if left <= 0.5 * kept:
        return
    if right is None or n < 20:
        yield say(
            WARNING,
            "small-audit",
            "hardly anything is known of the judge",
            f"{num(n, 0)} audited pairs of the kind that is left to it, and it labels {num(left, 0)} of {num(kept, 0)}",
            "Which pairs are hard is learned from the audit, and so is how sure the judge’s labels are.",
            "a larger ~audit, 100 pairs or more; ~history, the audits of earlier rounds",
        )
    elif wilson(right, n)[0] <= 0.5:
        yield say(
            WARNING,
            "judge-chance",
            "the judge cannot be told from a coin where it decides",
            f"{percent(right)} of {num(n, 0)} audited pairs, and it labels {num(left, 0)} of {num(kept, 0)}",
            "Most of the labels then say nothing.",
            "another ~judge; a larger ~budget leaves less to it; a larger ~audit, if it may be better than it looks",
        )


def _against_gold(say: Say, right: float | None, kept: float, keys: str) -> Iterator[Finding]:
    if right is None or wilson(right, kept)[1] >= 0.6:
        return
    reversed_ = wilson(right, kept)[1] < 0.5
    yield say(
        ERROR if reversed_ else WARNING,
        "labels-reversed" if reversed_ else "labels-noisy",
        "the labels prefer the worse answer" if reversed_ else "the labels hardly follow the gold score",
        f"{percent(right)} of {num(kept, 0)} labels agree with the gold score’s order",
        "The reward model learns what the labels say.",
        f"the judge: whether p is the first answer’s; {keys}",
    )


def _same(say: Say, results: Mapping[str, Any], others: float) -> Iterator[Finding]:
    """`others`: the pairs of different answers."""
    same = number(results, "dropped", "both answers the same") or 0.0
    if same > 0.3 * (same + others):
        yield say(
            WARNING,
            "same-answers",
            "the model says the same thing twice",
            f"both answers are equal in {percent(same / (same + others))} of the pairs",
            "Equal answers teach the reward model nothing, and so few different ones leave PPO little to choose from.",
            "SFT for fewer epochs; sampling.temperature of the stage that sampled them",
        )


def critique(run: RunData, stage: Stage) -> Iterator[Finding]:
    rounds = [r for r in stage.results.get("rounds") or [] if isinstance(r, Mapping)]
    lost, made = (sum(number(r, key) or 0.0 for r in rounds) for key in ("unusable", "revised"))
    if lost > 0.2 * (lost + made):
        yield Say(stage)(
            WARNING,
            "revisions-lost",
            "many revisions are empty or cut",
            f"{percent(lost / (lost + made))} of {num(lost + made, 0)}",
            "They are left out, and the answers stay as they were: those that needed the longest mending, most of all.",
            "a higher ~max_tokens; ~by, a model that knows how to revise; `revisions` (examples) in the constitution",
        )


def reward(run: RunData, stage: Stage) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    share, n = number(r, "accuracy"), number(r, "pairs") or 0.0
    cut = r.get("cut")
    chosen, rejected = number(cut, "chosen") or 0.0, number(cut, "rejected") or 0.0
    drop = r.get("dropped") if isinstance(r.get("dropped"), Mapping) else {}
    equal, rows = number(drop, "chosen == rejected") or 0.0, number(r, "rows") or 0.0
    if max(chosen, rejected) > 0.1:
        whole = min(chosen, rejected) > 0.9
        yield say(
            ERROR if whole else WARNING,
            "no-end-token",
            "it never saw an end token" if whole else "many replies that it learned from have no end token",
            f"{percent(chosen)} of the chosen and {percent(rejected)} of the rejected replies were cut",
            "PPO reads the score at the end token. A reward model that has not seen it there extrapolates; one that "
            "saw it more often on one side learned to tell cut from whole.",
            "`chosen_ended`, `rejected_ended` of ~data where they are wrong; else a higher sampling.max_tokens for the "
            "answers that were compared",
        )
    if equal > 0.05 * (equal + rows + n):
        yield say(
            WARNING,
            "identical-pairs",
            "many pairs are two equal replies",
            f"{num(equal, 0)} of {num(equal + rows + n, 0)} rows have chosen == rejected",
            "They were dropped: they teach nothing. So many of them mean that the answers hardly differ, or that a "
            "column was written twice.",
            "the columns of ~data; a higher temperature for the answers that were compared",
        )
    yield from too_long(stage)
    if not r:
        return
    if share is None or n < 20:
        yield say(
            NOTE,
            "nothing-held-out",
            "its accuracy is not known",
            f"{num(n, 0)} held-out pairs",
            "A reward model that orders pairs no better than a coin cannot be told from a good one.",
            "~held_out=0.1, and more comparisons",
        )
        return
    loss = stage.curve("loss")[1]
    text = f"{percent(share)} of {num(n, 0)} held-out pairs"
    labels, gold = number(r, "clean", "label_accuracy"), number(r, "clean", "pairs") or 0.0
    if labels is not None and gold and wilson(labels, gold)[1] < 0.5:
        yield say(
            ERROR,
            "labels-reversed",
            "the labels prefer the worse answer",
            f"{percent(labels)} of {num(gold, 0)} held-out labels agree with the gold score’s order",
            "It learned them faithfully, and PPO will make the model worse.",
            "`chosen` and `rejected` (or `label`) of ~data are exchanged",
        )
        return
    if wilson(share, n)[0] <= 0.5:
        learned = bool(loss) and ends(loss)[1] < 0.8 * LN2
        yield say(
            ERROR if share <= 0.55 else WARNING,
            "chance",
            "it is no better than a coin" if share <= 0.55 else "it cannot be told from a coin",
            f"{text} ordered as labelled; training loss {num(ends(loss)[1] if loss else None)} (a coin’s: 0.69)",
            "It fits the pairs that it was trained on, and nothing of that holds for others: the labels do not depend "
            "on the answers, or the pairs are too few."
            if learned
            else "It found nothing in the labels: they do not depend on the answers (rows out of step, random choices) "
            "or it hardly trained.",
            "look at ten rows of ~data; then "
            + (
                "more comparisons"
                if learned
                else "~train.optim.lr (higher), ~train.epochs; below about 2,000 comparisons: more"
            ),
        )
        return
    yield from _length(stage, share, n)
    yield from _blind(stage, share)
    top = number(r, "ceiling")
    if top is not None and wilson(share, n)[1] < 0.5 + (top - 0.5) / 3:
        yield say(
            WARNING,
            "below-ceiling",
            "it is far below what its raters’ agreement allows",
            f"{text} ordered as labelled; a perfect model would reach {percent(top)}",
            "The labels hold more than it learned.",
            "more comparisons (below about 2,000 little is learned); ~train.epochs, ~train.optim.lr; a larger ~model",
        )
    if top is not None and wilson(share, n)[0] > top + 0.03:
        yield say(
            WARNING,
            "above-ceiling",
            "it is better than its raters’ agreement allows",
            f"{text} ordered as labelled; a perfect model would reach {percent(top)}",
            "Held-out prompts are in the training part under other words, or one rater’s rows are in ~data twice.",
            "near duplicates in ~data",
        )
    yield from _calibration(stage, n)
    validation = stage.curve("validation_loss")[1]
    if validation and validation[-1] - min(validation) > 0.1:
        yield say(
            WARNING,
            "memorized",
            "it memorized its comparisons",
            f"held-out loss {num(min(validation))} at its lowest, {num(validation[-1])} at the end; training loss "
            f"{num(ends(loss)[1] if loss else None)}",
            "The weights of the lowest point were kept; what came after made it overconfident.",
            "fewer ~train.epochs, or ~train.patience=2; more comparisons",
        )


def _length(stage: Stage, share: float, n: float) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    longer, prefers = number(r, "longer_wins"), number(r, "prefers_longer")
    if longer is None:
        return
    figure = f"accuracy {percent(share)}, “the longer one wins” {percent(longer)}"
    if prefers is not None:
        figure += f"; it prefers the longer of two in {percent(prefers)}"
    follows = prefers is None or prefers > 0.8
    alone = prefers is not None and wilson(prefers, n)[0] > 0.9
    if longer > 0.5 and (alone or (wilson(share, n)[0] <= longer and follows)):
        yield say(
            ERROR,
            "length-only",
            "it does little but choose the longer answer",
            figure,
            "Length is what it learned, or all that the labels hold: PPO will write longer answers, not better ones.",
            "pairs of like length, or with the better one shorter, in ~data; a length penalty in the scorer",
        )
    elif prefers is not None and wilson(prefers, n)[0] > max(0.85, longer + 0.2):
        yield say(
            WARNING,
            "likes-length",
            "it likes length more than its raters do",
            figure,
            "PPO follows the reward model, and answers grow.",
            "balance lengths in ~data; a length penalty in the scorer",
        )


def _blind(stage: Stage, share: float) -> Iterator[Finding]:
    """Categories in which it is near chance while it is better elsewhere."""
    groups = stage.results.get("by_category")
    if not isinstance(groups, Mapping) or len(groups) < 2:
        return
    blind = []
    for name, figures in groups.items():
        right, n = number(figures, "accuracy"), number(figures, "pairs") or 0.0
        if right is not None and n >= 20 and right < 0.58 and wilson(right, n, len(groups))[1] < share:
            blind.append(f"{percent(right)} of {num(n, 0)} pairs in “{name}”")
    if blind:
        yield Say(stage)(
            WARNING,
            "blind-category",
            f"it is blind in {'a category' if len(blind) == 1 else f'{len(blind)} categories'}",
            f"{', '.join(blind)}; {percent(share)} over all",
            "There PPO climbs noise: scores move, answers do not get better.",
            "more comparisons of that kind in ~data; look whether its labels are right",
        )


def _calibration(stage: Stage, n: float) -> Iterator[Finding]:
    error = number(stage.results, "calibration_error")
    table = stage.results.get("reliability")
    rows = [t for t in table if isinstance(t, Mapping)] if isinstance(table, list) else []
    # A calibrated model's error is not 0: each bin's share is off by its own noise, sqrt(2/pi) s.d. on average.
    noise = sum(
        math.sqrt(2 / math.pi * max(c * (1 - c), 0.0) * k) / n
        for t in rows
        if (c := number(t, "confidence")) is not None and (k := number(t, "n"))
    )
    if error is None or error < 0.1 + noise:
        return
    surer = sum(((number(t, "confidence") or 0) - (number(t, "observed") or 0)) * (number(t, "n") or 0) for t in rows)
    yield Say(stage)(
        WARNING,
        "calibration",
        "its probabilities are too " + ("sure" if surer > 0 else "timid"),
        f"calibration error {num(error)}, of which noise makes about {num(noise)}",
        "A margin of one no longer means the same odds: large scores are noise that PPO climbs."
        if surer > 0
        else "Scores are squeezed together: a KL coefficient that suits other reward models weighs too much here.",
        "fewer ~train.epochs or a lower ~train.optim.lr" if surer > 0 else "more ~train.epochs; a smaller ~center",
    )
