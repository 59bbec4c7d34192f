"""What happened, in plain words, from the results alone: what the evaluation found, then how each stage went.

In order: the claim (with its interval, its KL, and who judged); points for the rest; warnings; what is unfinished.
A claim about quality is made only from the evaluation on held-out prompts, never from the proxy that was optimized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trueup.agreement import wilson
from trueup.report.figures import (
    Interval,
    bracket,
    duration,
    ends,
    num,
    paired_gain,
    percent,
    running_mean,
    smoothing,
    title_of,
)
from trueup.report.read import ABSENT, DONE, RunData, Stage, number, pair
from trueup.run import TRAINED

FEW = 30  # fewer measurements than this warn of nothing


@dataclass
class Headline:
    """`claim`: one or two sentences. `tiles`: (label, figure, note)."""

    claim: str
    points: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str, str]] = field(default_factory=list)


def headline(run: RunData) -> Headline:
    out = Headline("")
    evaluation = next((s for s in reversed(run.of("evaluate")) if models_of(s.results)), None)
    ppo = next((s for s in reversed(run.of("ppo")) if s.metrics), None)
    if evaluation:
        _evaluated(out, run, evaluation)
    elif ppo:
        _only_ppo(out, ppo)
    elif trained := [s for s in run.stages if s.status == DONE and s.phase in ("sft", "reward", "ensemble", "dpo")]:
        out.claim = " ".join(_stage_line(s) for s in trained)
    else:
        done = [s.name for s in run.stages if s.status == DONE]
        out.claim = (
            f"Done so far: {', '.join(done)}. Nothing is trained or measured yet." if done else "No stage is done yet."
        )
    for stage in run.stages:
        if evaluation or ppo:
            line = _stage_line(stage)
            if line and stage is not (ppo if not evaluation else None):
                out.points.append(line)
        out.warnings += _warnings(stage)
        if stage.status != DONE:
            out.unfinished.append(_unfinished(stage))
    return out


def models_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Model -> {"sampled": figures, "greedy": figures}, of an evaluation's results."""
    models = results.get("models")
    if not isinstance(models, Mapping):
        return {}
    return {
        str(n): {m: f for m, f in t.items() if isinstance(f, Mapping)}
        for n, t in models.items()
        if isinstance(t, Mapping)
    }


# who judged


def optimized_specs(run: RunData) -> list[Any]:
    """What PPO optimized, as written in the recipe's stages: reward models, callables, parts of weighted sums, or
    ensembles and their members."""
    found: list[Any] = []
    for stage in run.of("ppo"):
        scorer = stage.config.get("scorer")
        parts = scorer.get("ensemble", list(scorer)) if isinstance(scorer, Mapping) else []
        found += [scorer, *([parts] if isinstance(parts, str) else parts)]
    return [s for s in found if s]


def judged_by(run: RunData, stage: Stage) -> str:
    """One or two sentences: who decided the win rates, and whether it is what PPO optimized."""
    results, config = stage.results, stage.config
    gold, judge = results.get("gold"), results.get("judge")
    optimized = optimized_specs(run)
    if gold:
        if config.get("gold") in optimized:
            return (
                f"Win rates are judged by the gold score ({gold}). PPO optimized that very score here: a control that "
                "tells the optimizer's faults from a reward model's, not a fair measurement."
            )
        learned = " and ".join(p.upper() for p in ("ppo", "dpo") if run.of(p))
        by = f"{learned} never" if learned else "nothing here"
        text = f"Win rates are judged by the gold score ({gold}), which {by} optimized"
        labels = [s.name for s in run.of("judge") if _use(s.config.get("judge")) == config.get("gold")]
        return f"{text}; it also gave the labels of stage “{labels[0]}”." if labels else f"{text}."
    if not judge:
        return "No gold score is known here, and no judge was named, so there are no win rates."
    spec = config.get("judge")
    made = run.stage_of(spec if isinstance(spec, str) else judge)
    who = f"the reward model of stage “{made.name}”" if made else str(judge)
    text = f"No gold score is known here. Win rates are judged by {who}."
    proxy = config.get("proxy")
    same = {id(x) for x in [proxy, *optimized] if x and x in (spec, judge)}
    if same:
        return text + " WARNING: PPO optimized this very judge, so these win rates are no measure of quality."
    against = next((s for s in [*optimized, proxy] if isinstance(s, str)), None)
    if against is None:
        return text
    other = run.stage_of(against)
    name = f"the reward model of stage “{other.name}”" if other else against
    text += f" It is not the proxy that PPO optimized ({name})"
    if made and other and _apart(made, other):
        text += ", and was trained on other prompts of the same data"
    return text + "."


def _use(spec: Any) -> Any:
    """What a judge's spec names: "module:function", or that under `use`."""
    return spec.get("use") if isinstance(spec, Mapping) else spec


def _apart(one: Stage, other: Stage) -> bool:
    """Whether two reward models learned from parts of the same data that share no prompt."""
    a, b = pair(one.config, "part"), pair(other.config, "part")
    return bool(a and b and one.config.get("data") == other.config.get("data") and (a[1] <= b[0] or b[1] <= a[0]))


# the claim


def _evaluated(out: Headline, run: RunData, stage: Stage) -> None:
    models, results = models_of(stage.results), stage.results
    baseline = str(results.get("baseline", ""))
    others = [n for n in models if n != baseline]
    prompts = results.get("prompts")
    trained_on = {d for s in run.stages if s.phase in TRAINED for k in ("prompts", "data") for d in s.data(k)}
    kind = (
        "prompts (not held out: training used this file)"
        if trained_on & set(stage.data("prompts"))
        else "held-out prompts"
    )
    on = f"on {num(prompts, 0)} {kind}" if isinstance(prompts, int) else f"on {kind}"
    if baseline not in models or not others:
        out.claim = f"{len(models)} model{'s' if len(models) > 1 else ''} measured {on}; no pair to compare."
        return
    after = others[-1]
    new, old = models[after].get("sampled", {}), models[baseline].get("sampled", {})
    who, base = title_of(after), title_of(baseline)
    kl, reference = number(new, "kl"), title_of(str(results.get("reference", "")))
    at_kl = f" at a KL of {num(kl, 1)} nats from {reference}" if kl is not None else ""
    win, win_interval = number(new, "win_rate"), pair(new, "win_rate_interval")
    judge = judged_by(run, stage)

    a, b = number(old, "gold"), number(new, "gold")
    if a is not None and b is not None:
        gain = gold_gain(stage, baseline, after, "sampled")
        out.claim = f"{_moved(who, a, b, gain, 'the gold score')} {on}{at_kl}."
        if gain:
            out.claim += f" The gain is {num(gain[0])}, 95% interval {num(gain[1][0])} to {num(gain[1][1])}."
        if win is not None:
            out.claim += (
                f" Its answers win {percent(win)} {bracket(win_interval, 0, scale=100)} of comparisons with {base}’s."
            )
        out.tiles.append(("Gold score", f"{num(a)} → {num(b)}", f"{base} → {who}, sampled answers"))
        g, h = number(models[baseline], "greedy", "gold"), number(models[after], "greedy", "gold")
        if g is not None and h is not None:
            best = gold_gain(stage, baseline, after, "greedy")
            note = f" (gain {num(best[0])} {bracket(best[1])})" if best else ""
            out.points.append(f"Answering greedily, {base} scores {num(g)} and {who} {num(h)}{note}.")
    elif win is not None:
        low, high = win_interval or (win, win)
        verb = (
            "are preferred to" if low > 0.5 else "are liked less than" if high < 0.5 else "are liked about as well as"
        )
        out.claim = (
            f"{who}’s answers {verb} {base}’s: they win {percent(win)} {bracket(win_interval, 0, scale=100)} "
            f"of comparisons {on}{at_kl}."
        )
        if low <= 0.5 <= high:
            out.claim += " The interval includes one half: no clear difference."
        out.claim += f" {judge}"
    else:
        out.claim = f"{who} and {base} were measured {on}{at_kl}, without gold score or judge: no claim of quality."
    if judge not in out.claim:
        out.points.insert(0, judge)
    if "WARNING" in judge:
        out.warnings.append("The win rates come from what PPO optimized; name another judge in the evaluation.")
    if win is not None:
        out.tiles.append(("Win rate", percent(win), f"{who} against {base} {bracket(win_interval, 0, scale=100)}"))
    if kl is not None:
        out.tiles.append(("KL", f"{num(kl, 1)} nats", f"per completion, from {reference}"))
    ended = number(new, "end_rate")
    if ended is not None:
        out.tiles.append(
            ("Ends by itself", percent(ended), f"{who}, {num(number(new, 'length'), 0)} tokens on average")
        )
    first = others[0]
    x, y = number(models[first], "sampled", "gold"), number(models[baseline], "sampled", "gold")
    if first != after and x is not None and y is not None:
        out.points.append(
            f"Before: the gold score of {title_of(first)} is {num(x)}, of {base} {num(y)}; "
            f"{percent(number(models[first], 'sampled', 'end_rate'))} and {percent(number(old, 'end_rate'))} "
            "of their answers end by themselves."
        )


def _moved(who: str, before: float, after: float, gain: tuple[float, Interval] | None, what: str) -> str:
    low, high = gain[1] if gain else (after - before, after - before)
    if low > 0:
        return f"{who} raised {what} from {num(before)} to {num(after)}"
    if high < 0:
        return f"{who} lowered {what} from {num(before)} to {num(after)}"
    return f"{who} did not clearly change {what} ({num(before)} before, {num(after)} after)"


def gold_gain(stage: Stage, before: str, after: str, mode: str) -> tuple[float, Interval] | None:
    """The paired gain in gold over the same prompts, from the evaluation's samples; None where some are missing."""
    a, b = (
        [r for r in stage.samples if r.get("model") == name and r.get("mode") == mode and number(r, "gold") is not None]
        for name in (before, after)
    )
    same = len(a) == len(b) > 1 and all(
        (x.get("prompt"), x.get("earlier")) == (y.get("prompt"), y.get("earlier")) for x, y in zip(a, b, strict=True)
    )
    return paired_gain([r["gold"] for r in a], [r["gold"] for r in b]) if same else None


def _only_ppo(out: Headline, stage: Stage) -> None:
    score, kl = stage.curve("score")[1], stage.curve("kl")[1]
    if not score:
        out.claim = "PPO ran; it logged no scores."
        return
    a, b = ends(score)
    out.claim = (
        f"PPO moved the score that it optimizes (the proxy) from {num(a)} to {num(b)}"
        f"{f' at a KL of {num(ends(kl)[1], 1)} nats' if kl else ''} in {len(stage.metrics)} steps. "
        "No evaluation is done, so nothing is claimed yet of whether the answers are better."
    )
    if audit := stage.curve("audit")[1]:
        c, d = ends(audit)
        out.claim += f" On the training prompts the {stage.audit_name} went from {num(c)} to {num(d)}."
    out.tiles.append(("Proxy score", f"{num(a)} → {num(b)}", "first and last tenth of the steps"))
    if kl:
        out.tiles.append(("KL", f"{num(ends(kl)[1], 1)} nats", "per completion, from the reference"))


# a line for each stage


def _stage_line(stage: Stage) -> str:
    r, m = stage.results, stage.manifest
    head = f"{title_of(stage.name)}: "
    if stage.phase == "sft" and r:
        loss, ended = number(r, "best_validation_loss"), number(r, "end_rate")
        parts = []
        if loss is not None:
            parts.append(f"held-out loss {num(loss)} nats per token at step {r.get('best_step')}")
        if ended is not None:
            parts.append(
                f"{percent(ended)} of held-out answers end by themselves, {num(number(r, 'length'), 0)} tokens long"
            )
        parts.append(f"{r.get('steps', '?')} steps over {num(number(r, 'rows'), 0)} demonstrations")
        return head + "; ".join(parts) + "."
    if stage.phase in ("reward", "ensemble") and number(r, "accuracy") is not None:
        share, pairs = number(r, "accuracy") or 0.0, number(r, "pairs") or 0.0
        together, alone = number(r, "all_wrong"), number(r, "all_wrong_if_independent")
        parts = [
            f"orders {percent(share)} {bracket(wilson(share, pairs), 0, scale=100)} of {num(pairs, 0)} held-out pairs "
            "as labelled"
        ]
        if number(r, "longer_wins") is not None:
            parts.append(f"“the longer answer wins” gets {percent(number(r, 'longer_wins'))}")
        if number(r, "ceiling") is not None:
            parts.append(f"the raters’ own noise allows {percent(number(r, 'ceiling'))}")
        clear = number(r, "clean", "clear_accuracy")
        if clear is not None:
            parts.append(f"{percent(clear)} of pairs with a clear gold margin are ordered right")
        if together is not None:
            parts.append(
                f"all {r.get('members')} members are wrong on {percent(together)} of the pairs, where independent "
                f"errors would meet on {percent(alone)}"
            )
        return head + "; ".join(parts) + "."
    if stage.phase in ("reward", "ensemble") and r:
        return head + f"trained on {num(number(r, 'rows'), 0)} pairs; none were held out, so its accuracy is not known."
    if stage.phase == "ppo" and stage.metrics:
        text = f"{len(stage.metrics)} steps"
        for name, what in (("score", "proxy score"), ("audit", stage.audit_name)):
            values = stage.curve(name)[1]
            if values:
                a, b = ends(values)
                text += f"; {what} {num(a)} → {num(b)}"
        return head + text + " on the training prompts (first and last tenth of the steps)."
    if stage.phase == "dpo" and r:
        parts = [f"{num(number(r, 'steps'), 0)} steps over {num(number(r, 'rows'), 0)} rows"]
        if number(r, "validation_accuracy") is not None:
            parts.append(f"{percent(number(r, 'validation_accuracy'))} of held-out rows are ordered as labelled")
        for side in ("chosen", "rejected"):
            values = stage.curve(f"validation_{side}_logprobs")[1]
            if len(values) > 1:
                moved = f"{num(values[0], 1)} → {num(values[-1], 1)} nats"
                parts.append(f"log-prob of held-out {side} replies {moved}")
        if number(r, "kl") is not None:
            parts.append(f"KL {num(number(r, 'kl'), 1)} nats on its own answers")
        return head + "; ".join(parts) + "."
    if stage.phase == "critique" and r.get("rounds"):
        revised = ", ".join(num(number(one, "revised"), 0) for one in r["rounds"])
        means = [num(number(one, "mean")) for one in r.get("audit") or []]
        gold = f"; {stage.audit_name} {' → '.join(means)}" if means else ""
        return head + f"{revised} revisions of {num(number(r, 'answers'), 0)} answers by {r.get('by')}{gold}."
    if stage.phase in ("judge", "ai-feedback") and r.get("comparisons"):
        label = number(r, "label_accuracy")
        right = f"; {percent(label)} of the labels agree with the gold score" if label is not None else ""
        return head + f"{num(number(r, 'comparisons'), 0)} comparisons by {r.get('judge')}{right}."
    if stage.phase == "route" and r.get("comparisons"):
        who = "simulated raters (not people)" if set(r.get("kinds") or ()) == {"simulated"} else "people"
        agrees, n = number(r.get("audit"), "accuracy"), number(r.get("audit"), "pairs")
        right = ""
        if agrees is not None and n:
            on = f"{percent(agrees)} {bracket(wilson(agrees, n), 0, scale=100)}"
            right = f"; it agrees with them on {on} of a random audit"
        labels, left = num(number(r, "labels"), 0), num(number(r, "left"), 0)
        return head + f"{labels} labels of {who}, {left} pairs left to {r.get('judge')}{right}."
    if (
        stage.status == DONE
        and m.get("phase")
        and stage.phase not in ("world", "evaluate", "generate", "score", "sft", "reward", "ensemble", "dpo")
    ):
        return head + f"done in {duration(number(m, 'seconds'))}."
    return ""


def _unfinished(stage: Stage) -> str:
    if stage.status == ABSENT:
        return f"{stage.name}: not started."
    seconds, steps = number(stage.manifest, "seconds"), number(stage.config, "steps")
    last = stage.metrics[-1].get("step") if stage.metrics else None
    where = f", {last + 1}{f' of {steps:.0f}' if steps else ''} steps logged" if isinstance(last, int) else ""
    how = "stopped" if stage.manifest.get("status") == "stopped" else "started, its end is not recorded"
    return f"{stage.name}: unfinished ({how}{where}{f', {duration(seconds)} spent' if seconds else ''})."


# what to look at


def over_optimization(stage: Stage) -> str | None:
    """Whether the audited gold score has fallen from its peak by more than its noise, while the proxy rose."""
    steps, audit = stage.curve("audit")
    score = stage.curve("score")[1]
    if len(audit) < 15 or len(score) < 15:
        return None
    window = smoothing(len(audit))
    smooth = np.asarray(running_mean(audit, window))
    noise = float(np.std(np.asarray(audit) - smooth)) * (2 / window) ** 0.5
    tail = len(audit) - window // 2 - 1  # the last point whose mean covers a whole window
    peak = int(smooth[: tail + 1].argmax())
    proxy = running_mean(score, window)
    if (
        smooth[peak] - smooth[tail] > max(3 * noise, 0.01)
        and proxy[min(tail, len(proxy) - 1)] > proxy[min(peak, len(proxy) - 1)]
    ):
        return (
            f"{title_of(stage.name)}: the {stage.audit_name} peaked near step {steps[peak]:.0f} at "
            f"{num(float(smooth[peak]))} and fell to {num(float(smooth[tail]))} while the proxy went on rising. "
            "That is over-optimization."
        )
    return None


def _warnings(stage: Stage) -> list[str]:
    found, name = [], title_of(stage.name)
    if stage.phase == "ppo":
        if over := over_optimization(stage):
            found.append(over)
        end = stage.curve("end_rate")[1]
        if end and ends(end)[1] < 0.9:
            found.append(f"{name}: only {percent(ends(end)[1])} of the last answers end by themselves.")
        variance = stage.curve("explained_variance")[1]
        if len(variance) >= 10 and ends(variance)[1] < 0:
            found.append(f"{name}: the critic explains nothing (explained variance {num(ends(variance)[1])}).")
        clip = stage.curve("clip_fraction")[1]
        if clip and ends(clip)[1] > 0.3:
            found.append(f"{name}: {percent(ends(clip)[1])} of the tokens are clipped; the updates are too large.")
    if stage.phase in ("reward", "ensemble") and (number(stage.results, "pairs") or 0) >= FEW:
        share, longer = number(stage.results, "accuracy"), number(stage.results, "longer_wins")
        if share is not None and longer is not None and share <= longer:
            found.append(
                f"{name}: no better than choosing the longer answer ({percent(share)} against {percent(longer)})."
            )
    if stage.phase == "dpo":
        end = stage.curve("end_rate")[1]
        if end and end[-1] < 0.9:
            found.append(f"{name}: only {percent(end[-1])} of its answers end by themselves.")
    if stage.phase == "sft" and len(stage.samples) >= FEW:
        end_rate = number(stage.results, "end_rate")
        if end_rate is not None and end_rate < 0.9:
            found.append(f"{name}: only {percent(end_rate)} of its answers end by themselves.")
    return found


def side_by_side(stage: Stage) -> Sequence[Mapping[str, Any]]:
    """The examples of an evaluation: prompt, category, earlier, answers {model: {mode: text}}."""
    found = stage.results.get("examples")
    return (
        [e for e in found if isinstance(e, Mapping) and isinstance(e.get("answers"), Mapping)]
        if isinstance(found, list)
        else []
    )
