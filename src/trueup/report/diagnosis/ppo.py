"""PPO: where it starts, whether it moves, and whether what it climbs is still what was meant."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trueup.agreement import wilson
from trueup.named import CALLABLE
from trueup.report.alarm import alarm_step, words
from trueup.report.diagnosis.finding import (
    ENDS,
    ERROR,
    NOTE,
    WARNING,
    Finding,
    Say,
    moved,
    same_judge,
    samples,
)
from trueup.report.figures import ends, num, percent, running_mean, short, smoothing
from trueup.report.headline import models_of
from trueup.report.read import RunData, Stage, number, pair


def ppo(run: RunData, stage: Stage) -> Iterator[Finding]:
    if not stage.metrics:
        return
    yield from _start(run, stage)
    yield from _updates(run, stage)
    yield from _critic(stage)
    yield from _endings(stage)
    hacked = list(_hacking(run, stage))
    yield from hacked
    yield from _alarm(stage)
    yield from _second_opinion(run, stage)
    yield from _drift(run, stage, bool(hacked))


def _start(run: RunData, stage: Stage) -> Iterator[Finding]:
    """What stands in the first rollout: it is the start's own, before any update."""
    say, first = Say(stage), stage.metrics[0]
    batch = number(stage.config, "batch") or 64
    end = number(first, "end_rate")
    if end is not None and wilson(end, batch)[1] < ENDS:
        maker = run.stage_of(stage.config.get("model")) or next(iter(run.of("sft")), None)
        before = number(maker.results, "end_rate") if maker else None
        figure = f"{percent(end)} of the first {num(batch, 0)} answers end by themselves"
        room, had = number(stage.config, "sampling", "max_tokens"), None
        if maker and before is not None and wilson(before, samples(maker))[0] > wilson(end, batch)[1]:
            had = number(maker.config, "sampling", "max_tokens")
            figure += f"; of stage {maker.name}’s {percent(before)}"
            if room and had and room < had:
                yield say(
                    ERROR,
                    "max-tokens",
                    "answers are cut before they can end",
                    f"{figure}; {num(room, 0)} tokens here, {num(had, 0)} there",
                    "PPO learns from the score of a missing end token, not from the answers.",
                    f"~sampling.max_tokens={num(had, 0)}",
                )
            else:
                yield say(
                    ERROR,
                    "template",
                    "the model does not read PPO’s prompts as it read those of its fine-tuning",
                    figure,
                    "Before any update the policy is the fine-tuned model, which does stop: the chat template, the "
                    "tokenizer or the system message beside ~model is another one, or the prompts are of another kind.",
                    "~model with the tokenizer and chat template that it was fine-tuned with; ~prompts",
                )
        elif not maker or before is None:
            yield say(
                WARNING,
                "starts-unended",
                "the start of PPO does not stop",
                figure,
                "PPO learns from the score of a missing end token, not from the answers.",
                "an SFT model that stops as ~model, or a higher ~sampling.max_tokens",
            )
        return
    spread, score = number(first, "score_std"), number(first, "score")
    if spread is not None and spread < 1e-6:
        yield say(
            ERROR,
            "flat-scores",
            "every answer scores alike",
            f"spread {short(spread)} at step 0, mean {num(score)}",
            "Where no answer is better than another there is nothing to learn.",
            "~scorer: a rule that no answer meets, or all do; prompts of fitting difficulty in ~prompts",
        )
    elif score is not None and _reward_model(stage) and abs(score) > 1 + 2 / math.sqrt(batch):
        yield say(
            WARNING,
            "score-offset",
            "the reward model does not know these answers",
            f"mean score {num(score)} at step 0, in s.d. of the samples on which it was normalized (mean 0)",
            "Before any update the answers should look like those: the prompts, the chat template or the model are not "
            "those that it was trained on.",
            "~scorer: the reward model trained from this ~model; ~prompts like those of its comparisons",
        )


def _reward_model(stage: Stage) -> bool:
    scorer = stage.config.get("scorer")
    return isinstance(scorer, str) and not CALLABLE.fullmatch(scorer) and "://" not in scorer


def _updates(run: RunData, stage: Stage) -> Iterator[Finding]:
    """Too small, held back, or too large."""
    say = Say(stage)
    score, kl = stage.curve("score")[1], stage.curve("kl_k3")[1] or stage.curve("kl")[1]
    step, clip = stage.curve("approx_kl")[1], stage.curve("clip_fraction")[1]
    lr, coef = number(stage.config, "optim", "lr"), number(stage.config, "kl_coef") or 0.0
    if len(score) < 8 or not kl or not step:
        return
    first, last = ends(score)
    size, far = float(np.median(step)), ends(kl)[1]
    figure = f"score {num(first)} → {num(last)}, KL {num(far, 3)} nats, an update’s own KL {short(size)} nats per token"
    # With minibatches beyond the first, an update's KL is measured after earlier ones: 0 means that they did nothing.
    if far < 0.1 and size < 1e-6:
        yield say(
            ERROR,
            "no-updates",
            "the policy does not move",
            f"{figure}; rate {short(lr)}",
            "The updates are too small to change an answer.",
            f"a higher ~optim.lr (ten times {short(lr)} and more); look at clip_fraction, 0.01 to 0.2 is common",
        )
        return
    early, late, scatter = moved(score, 4)
    spread = (stage.curve("score_std")[1] or [1.0])[0]
    still = abs(late - early) < max(2 * scatter, 0.1 * spread)
    if still and (far < 0.1 or (far < 1 and coef * far > spread)):
        yield say(
            ERROR,
            "held-still",
            "the KL penalty holds the policy where it was",
            f"{figure}; kl_coef {short(coef)}",
            f"A nat costs {short(coef)} of score, more than a nat can win: the best policy under it is the reference."
            if coef
            else "It moves at random about its start.",
            "~kl_coef: lower, 0.05 to 0.25 for scores in s.d." if coef else "~optim.lr, ~batch: higher",
        )
        return
    reward = stage.curve("reward")[1]
    a, b, noise = moved(reward) if len(reward) >= 8 else (0.0, 0.0, 0.0)
    clipped = float(np.mean(clip)) if clip else 0.0
    large = clipped > 0.3 or size > 0.05
    falls = b < a - max(3 * noise, 0.1)
    if large or (falls and far > 0.1):
        yield say(
            ERROR if falls else WARNING,
            "updates-too-large",
            "the updates are too large" if large else "PPO makes its own reward worse",
            f"{percent(clipped)} of the tokens clipped, an update’s own KL {short(size)} nats per token; "
            f"reward {num(a)} → {num(b)}",
            "Each step goes further than its samples can tell; what is learned is torn down again.",
            f"~optim.lr={short((lr or 0) / 3)} or lower, fewer ~epochs, or ~target_kl=0.02",
        )


def _critic(stage: Stage) -> Iterator[Finding]:
    variance = stage.curve("explained_variance")[1]
    if len(variance) < 10:
        return
    last = ends(variance)[1]
    values = stage.curve("value_loss")[1]
    own, policy = number(stage.config, "critic_optim", "lr"), number(stage.config, "optim", "lr")
    if last > 0:
        return
    settled = (stage.curve("score_std")[1] or [1.0])[-1] < 0.05 * max((stage.curve("score_std")[1] or [1.0])[0], 1e-9)
    yield Say(stage)(
        NOTE if settled else WARNING,
        "critic",
        "the critic explains nothing",
        f"explained variance {num(last)} over the last tenth; value loss {short(ends(values)[1]) if values else '–'}; "
        f"rates: critic {short(own)}, policy {short(policy)}",
        "All answers score alike by now: there is little left to explain."
        if settled
        else "It is worse than one constant, so that advantages are noise and the policy follows it.",
        "a higher ~critic_optim.lr"
        if own and policy and own < policy / 10
        else "~critic_optim.lr (lower where value_loss rises, else higher); ~critic: start it from the reward model; "
        "~advantage=rloo ~samples=4 needs none",
    )


def _endings(stage: Stage) -> Iterator[Finding]:
    end = stage.curve("end_rate")[1]
    batch = number(stage.config, "batch") or 64
    if len(end) < 2:
        return
    last = ends(end)[1]
    n = batch * max(1, len(end) // 10)
    if wilson(last, n)[1] >= ENDS or wilson(end[0], batch)[1] < ENDS:
        return
    missing, start = number(stage.results, "missing_eos_score"), (stage.curve("score")[1] or [0.0])[0]
    if missing is None:
        missing = number(stage.config, "missing_eos_score")
    pays = missing is not None and missing >= start
    yield Say(stage)(
        ERROR,
        "stops-ending",
        "it learned not to end its answers",
        f"{percent(end[0])} → {percent(last)} end by themselves; a cut answer scores {num(missing)}, an answer of the "
        f"start {num(start)} on average",
        "A cut answer scores as well as a whole one, so running on pays."
        if pays
        else "Longer answers score so well that the limit is reached.",
        "leave ~missing_eos_score out: it is then set below every sample’s score"
        if pays
        else "a lower ~missing_eos_score; a reward model that does not pay for length; a higher ~sampling.max_tokens",
    )


def _hacking(run: RunData, stage: Stage) -> Iterator[Finding]:
    """The audit falls from its peak while the score rises (Gao et al. 2022)."""
    steps, audit = stage.curve("audit")
    score = stage.curve("score")[1]
    if len(audit) < 10 or len(score) != len(audit) or stage.control or same_judge(run, stage, "audit"):
        return
    window = max(3, smoothing(len(audit)))
    smooth, proxy = np.asarray(running_mean(audit, window)), running_mean(score, window)
    scatter = float(np.std(np.diff(audit))) / math.sqrt(2) * math.sqrt(2 / window)
    tail = len(audit) - window // 2 - 1  # the last point whose mean covers a whole window
    peak = int(smooth[: tail + 1].argmax())
    start, top, now = float(smooth[0]), float(smooth[peak]), float(smooth[tail])
    lost, gained = top - now, top - start
    if lost <= max(3 * scatter, 0.01) or proxy[tail] <= proxy[peak] or lost < 0.25 * gained:
        return
    coef, kl = number(stage.config, "kl_coef") or 0.0, stage.curve("kl")[1]
    yield Say(stage)(
        ERROR if now < start or lost > 0.5 * gained else WARNING,
        "hacking",
        "the reward model is exploited: its score rises while the audit falls",
        f"{stage.audit_name} {num(start)} → {num(top)} at step {num(steps[peak], 0)} → {num(now)}; score "
        f"{num(proxy[peak])} → {num(proxy[tail])} since; KL {num(ends(kl)[1] if kl else None, 1)} nats, "
        f"kl_coef {short(coef)}",
        "Far from the SFT model the reward model has seen nothing, and its errors are what is climbed (Goodhart).",
        ("~kl_coef=0.05 to 0.25: there is no penalty now" if not coef else f"a higher ~kl_coef (3 times {short(coef)})")
        + f"; fewer ~steps (the audit’s best: {num(steps[peak], 0)}); then comparisons of this policy’s answers for "
        "the reward model",
    )


def _alarm(stage: Stage) -> Iterator[Finding]:
    """The alarm was set off while PPO ran: nothing is judged anew here."""
    at, act = alarm_step(stage), (stage.config.get("watch") or {}).get("act")
    if at is None:
        return
    delivered = number(stage.results, "watch", "delivered")
    done = {
        "stop": "PPO stopped there, and the last policy is what was made",
        "back": f"PPO stopped there and went back to step {num(delivered, 0)}",
    }.get(str(act), "PPO went on, as act=warn says")
    yield Say(stage)(
        NOTE if act == "back" else WARNING if act == "stop" else ERROR,
        "alarm",
        f"the alarm was set off at step {num(at, 0)}: {done}",
        words(stage),
        "From here on the proxy can no longer be believed: its score is more and more a score of its errors.",
        "a higher ~kl_coef; comparisons of this policy’s answers for the reward model"
        + ("" if act == "back" else "; ~watch.act=back delivers the version that the audits say is best"),
    )


def _drift(run: RunData, stage: Stage, hacked: bool) -> Iterator[Finding]:
    """What a hacked score looks like where no audit tells. Where an independent one rises it is a note: a task may
    ask for short answers, or for the same one."""
    say = Say(stage)
    severity = NOTE if hacked or _confirmed(run, stage) else WARNING
    kl, length = stage.curve("kl")[1], stage.curve("length")[1]
    entropy, distinct = stage.curve("entropy")[1], stage.curve("distinct")[1]
    if kl and length and ends(kl)[1] > 0.3 * ends(length)[1]:
        far = ends(kl)[1]
        yield say(
            severity,
            "kl-far",
            "the policy is far from its reference",
            f"KL {num(far, 1)} nats over {num(ends(length)[1], 0)} tokens",
            "So far away the reward model has seen nothing, and its score says little.",
            "a higher ~kl_coef, fewer ~steps; ~adaptive_kl.target holds KL to a budget",
        )
    if len(entropy) < 8:
        return
    for values, name, what, low, high, why, change in (
        (
            entropy,
            "entropy",
            "the entropy",
            0.33,
            1.5,
            "Too low and every answer is the same one; rising, and the policy is coming apart.",
            "a higher ~kl_coef, a lower ~optim.lr",
        ),
        (
            length,
            "length",
            "the answers’ length",
            0.5,
            1.6,
            "A reward model often pays for length, and nobody asked for it.",
            "pairs of like length for the reward model; a length penalty in ~scorer; a higher ~kl_coef",
        ),
        (
            distinct,
            "duplicates",
            "the share of different answers",
            0.5,
            math.inf,
            "One answer serves every prompt: a sign of a hole in the reward model.",
            "a higher ~kl_coef; read the samples",
        ),
    ):
        if len(values) < 8:
            continue
        first, last = values[0] if name != "length" else ends(values)[0], ends(values)[1]
        if last < low * first or last > high * first:
            figure = f"{num(first)} → {num(last)}"
            yield say(severity, name, f"{what} {'fell' if last < first else 'rose'} far", figure, why, change)


def _confirmed(run: RunData, stage: Stage) -> bool:
    """Whether someone else says that it got better: the audit, or a judge on prompts of an evaluation."""
    audit = stage.curve("audit")[1]
    if len(audit) >= 8 and not same_judge(run, stage, "audit"):
        first, last, noise = moved(audit, 4)
        return last > first + 2 * noise
    for evaluation in run.of("evaluate"):
        models = models_of(evaluation.results)
        name = next((n for n, path in (evaluation.config.get("models") or {}).items() if stage.holds(path)), None)
        low = pair(models.get(str(name), {}).get("sampled"), "win_rate_interval")
        if low and low[0] > 0.5 and not same_judge(run, evaluation, "judge"):
            return True
    return False


def _second_opinion(run: RunData, stage: Stage) -> Iterator[Finding]:
    say = Say(stage)
    if why := same_judge(run, stage, "audit"):
        yield say(
            WARNING,
            "audit-is-proxy",
            "the audit is not independent of what is optimized",
            why,
            "It rises with the score whatever happens to the answers.",
            "~audit: a reward model trained on comparisons of other prompts (`part`), or a gold score",
        )
    elif not stage.config.get("audit"):
        yield say(
            NOTE,
            "no-audit",
            "nothing but the optimized score was watched",
            "no audit",
            "A hacked reward model looks like success.",
            "~audit: a reward model trained on comparisons of other prompts (`part`), or a gold score",
        )
    validation = stage.curve("validation")[1]
    reward = stage.curve("reward")[1]
    if len(validation) >= 4 and len(reward) >= 8:
        first, last, noise = moved(reward)
        if max(validation) - validation[-1] > max(0.2, 2 * noise) and last > first:
            yield say(
                WARNING,
                "overfits-prompts",
                "it gets better on its own prompts alone",
                f"reward {num(first)} → {num(last)}; on held-out prompts {num(max(validation))} at its best, "
                f"{num(validation[-1])} at the end",
                "It learns these prompts by heart. The best policy was kept.",
                "more prompts in ~prompts, fewer ~steps, or ~patience=3",
            )
