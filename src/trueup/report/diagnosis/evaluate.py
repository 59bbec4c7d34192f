"""The measurement itself: prompts that were trained on, a judge that is the proxy, a result that is worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trueup.report.diagnosis.finding import (
    ERROR,
    WARNING,
    Finding,
    Say,
    same_judge,
)
from trueup.report.figures import num, percent
from trueup.report.headline import models_of
from trueup.report.read import RunData, Stage, number, pair


def evaluate(run: RunData, stage: Stage) -> Iterator[Finding]:
    say, r = Say(stage), stage.results
    prompts, seen = number(r, "prompts") or 0.0, r.get("seen_in_training")
    leaked = {str(p): c for p, n in (seen.items() if isinstance(seen, Mapping) else []) if (c := number({"n": n}, "n"))}
    if leaked and max(leaked.values()) > 0.01 * prompts:
        yield say(
            ERROR if max(leaked.values()) > 0.1 * prompts else WARNING,
            "leaked",
            "it was measured on prompts that were trained on",
            ", ".join(f"{num(n, 0)} of {num(prompts, 0)} prompts are in {path}" for path, n in leaked.items()),
            "What was learned by heart counts as ability; every figure of the table is too good.",
            "~prompts: prompts that no stage has seen",
        )
    if why := same_judge(run, stage, "judge"):
        yield say(
            WARNING,
            "judge-is-proxy",
            "the judge is not independent of what was optimized",
            why,
            "Its win rates rise with the reward model’s errors.",
            "~judge: a reward model on a `part` of the comparisons that shares no prompt with the optimized one’s",
        )
    models, baseline = models_of(r), str(r.get("baseline", ""))
    base = models.get(baseline, {}).get("sampled", {})
    for name, modes in models.items():
        path = (stage.config.get("models") or {}).get(name)
        made = run.stage_of(path)
        if name == baseline or made is None or made.phase != "ppo":
            continue
        mine = modes.get("sampled", {})
        gold, was, win = pair(mine, "gold_interval"), pair(base, "gold_interval"), pair(mine, "win_rate_interval")
        worse = bool(gold and was and gold[1] < was[0])
        if worse or (win and win[1] < 0.5 and not gold):
            yield say(
                WARNING,
                "worse",
                f"{name} is worse than {baseline}",
                f"gold {num(number(mine, 'gold'))}, {baseline}’s {num(number(base, 'gold'))}"
                if worse
                else f"wins {percent(number(mine, 'win_rate'))} of comparisons with {baseline}",
                "PPO made the answers worse on prompts that it had not seen.",
                f"what is said of {made.name} and of the reward model above; {made.name}.kl_coef",
            )
