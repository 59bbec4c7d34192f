"""The alarm: over-optimization seen while PPO runs, where no gold score is known.

In order: what the start says of some prompts is kept, to measure drift from; at every step the rollout is described by
signals that cost nothing (`follow`); every few steps a judge compares a few of the policy's fresh answers with the
start's (`check`): audits. Three rules set off the alarm: the proxy has promised more wins than the judge gives, the win
rate has fallen from what it was (each wrong in at most a share `error` of runs), KL is over its budget. Then the labels
that are left tell which kept version is best (`delivered`). Not in it: what is done then (phases/ppo.py), the
statistics (math/sequential.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from trueup.config import Config
from trueup.data.chat import Chat, describe
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.math import betting_bounds, drop_bound, unimodal_fit
from trueup.models.roles import recorded
from trueup.records import Comparison, Completion, Judge, Prompt, Scorer, UserError
from trueup.scorers import Spec, logits_of, make_scorer, reward_model_in

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh
    from trueup.engine.rollout import Rollout
    from trueup.engine.sampler import Sampler, Sampling
    from trueup.models.roles import Models
    from trueup.run import Run

AUDIT, AGAINST, AGAIN, START = 2**30, 2**29 + 2**30, 2**28, -1 % 2**31
"""Steps whose random numbers no rollout uses: of the policy's and the start's audited answers, what is added where a
version is audited again, and of the start's own answers."""
WORDS = 3
"""Words in a phrase."""
KL_STEPS, KL_LEAST = 10, 5
"""KL at the next check is foretold from so many last steps, at the most and at the least."""
RARE, OFTEN = 0.01, 0.1
"""A phrase is new style where at most this share of the start's answers has it, and at least that of the policy's."""
AUDITOR = 500_000
"""Added to the seed of a judge that takes one: simulated auditors are other people than the comparisons' raters."""


class Watch(Config):
    """Watches PPO for over-optimization where no gold score is known."""

    judge: JudgeSpec | None = None
    """Who audits: compares the policy's answers with the start's. As in phase judge, but not what is optimized."""
    labels: int = Field(200, gt=0)
    """Verdicts of the judge in the whole run, spread evenly over its checks. A pair on which it abstains is replaced by
    another, and counts for none."""
    every: int = Field(10, gt=0)
    """Steps between two checks."""
    heldout: Spec | None = None
    """A reward model trained on comparisons that the proxy never saw (`part` of phase reward); only logged."""
    kl_budget: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Alarm where KL is above this, in nats per completion, or will be by the next check as the policy goes; tried at
    every step. auto: `kl_budget` of the answers that the proxy learned from, where its config.json says how many; null:
    never."""
    error: float = Field(0.05, gt=0, lt=1)
    """The chance that a rule sets off a false alarm in a run, at any of its checks."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """So much may the predicted win rate be above the audited one without alarm."""
    act: Literal["warn", "stop", "back"] = "warn"
    """What an alarm does. warn: it is said. stop: PPO stops there. back: PPO stops, the labels that are left are spent
    on the versions kept so far, and `final/` is the one that the audits say is best. The policy is kept at every check,
    in `snapshots/`."""


def kl_budget(answers: int) -> float:
    """How far from the start, in nats per completion, a proxy that learned from so many answers can be believed; at
    least 1. Gains grow about as sqrt(KL) (Gao et al. 2022, section 3): a policy that wins three of four at d nats wins
    another 1 / (8 d) with the next nat. About answers x e^-d of the answers are like its own, so that win rates are
    known there within 2 x .5 / sqrt(answers x e^-d), two standard errors. Where that is more than the next nat's gain,
    what the proxy promises for it cannot be told from its error: d^2 e^d = answers / 64."""
    low, high = 1.0, 1.0
    while high * high * math.exp(high) < answers / 64:
        high += 1
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * middle * math.exp(middle) < answers / 64 else (low, middle)
    return high


def kl_at_next(kl: Sequence[float], every: int, rest: float = math.inf) -> tuple[float, float] | None:
    """KL now and at the next check, from that of the last steps, no further ahead than it looks back; a fall is not
    foretold. None of fewer than `KL_LEAST`. At an even speed KL grows as the square of the way, so the line goes
    through sqrt(KL). The nearer to `rest`, in sqrt(nats), where a penalty holds the policy, the slower it goes: in
    proportion to the way that is left, as what climbs a x sqrt(KL) less a penalty of KL does."""
    last = np.sqrt(np.maximum(np.asarray(kl[-KL_STEPS:], dtype=np.float64), 0))
    if len(last) < KL_LEAST:
        return None
    speed, now = np.polyfit(np.arange(len(last)) - len(last) + 1, last, 1)
    now, on, left = max(float(now), 0.0), max(float(speed), 0.0) * min(every, len(last)), rest - float(now)
    if left < math.inf:
        on = left * -math.expm1(-on / left) if left > 0 else 0.0
    return now**2, (now + on) ** 2


def held_at(gain: float, error: float, way: float, kl_coef: float) -> float:
    """sqrt(KL) at which a penalty surely holds a policy that `way`, in sqrt(nats), gained `gain` with this standard
    error. With a gain of a x sqrt(KL), less kl_coef x KL, that is a / (2 kl_coef). Gains grow slower (Gao et al. 2022),
    so it is the farthest; a is taken two standard errors low, lest chance set off an alarm."""
    return max(gain - 2 * error, 0.0) / max(way, 1e-6) / (2 * kl_coef) if kl_coef else math.inf


@dataclass
class Check:
    """The audits of one version. `predicted`, `audited`: for each pair on which the judge decided, the probability that
    the policy's answer is better, by the proxy (empty where it has no logits) and by the judge."""

    step: int
    asked: int
    predicted: list[float]
    audited: list[float]
    phrases: list[tuple[str, float]]


class Watcher:
    """`policy` samples from the policy as it is, `start` from its start, `proxy` is what PPO optimizes."""

    def __init__(
        self,
        config: Watch,
        chat: Chat,
        mesh: Mesh,
        models: Models,
        *,
        policy: Sampler,
        start: Sampler,
        proxy: Scorer,
        sampling: Sampling,
        seed: int,
        steps: int,
    ) -> None:
        self.config, self.chat, self.mesh, self.proxy = config, chat, mesh, proxy
        self.policy, self.start, self.sampling, self.seed, self.steps = policy, start, sampling, seed, steps
        if config.judge == "people":
            raise UserError("watch.judge: people are asked by phase judge alone, a check of PPO does not wait for them")
        self.judge: Judge | None = make_judge(config.judge, mesh, seed=seed + AUDITOR) if config.judge else None
        self.heldout = make_scorer(config.heldout, mesh, models) if config.heldout else None
        answers = recorded(folder).get("answers", 0) if (folder := reward_model_in(proxy)) else 0
        auto = kl_budget(answers) if answers else None
        self.budget = auto if config.kl_budget == "auto" else config.kl_budget
        self.answers = answers
        self.checks: list[Check] = []
        self.alarm: dict[str, Any] | None = None
        self.last: list[tuple[float, float, float]] = []  # of the last steps: KL, gain, its error squared
        self.recent: list[str] = []  # answers since the last check

    # the start, and drift from it

    def begin(self, prompts: Sequence[Prompt], missing_eos_score: float, count: int = 256) -> None:
        """The start's answers to `count` of the prompts, the same ones at every call: they are no part of the state."""
        act = self.config.act
        if not self.judge and self.budget is None and act != "warn":
            raise UserError(f"watch.act={act} needs what can set off the alarm: watch.judge or watch.kl_budget")
        self.prompts = list(prompts)
        asked = [prompts[i % len(prompts)] for i in range(count)]
        said = self._answers(self.start, asked, START)
        scores = self.proxy.score(asked, said).value
        scores = np.where([c.ended for c in said], scores, missing_eos_score)
        lengths = np.array([len(c.ids) for c in said], dtype=np.float64)
        self.length = float(lengths.mean()), max(float(lengths.std()), 1.0)
        self.phrases = Counter(p for c in said for p in phrases(c.text))
        self.said = count
        self.by_category: dict[str, float] = _means(asked, scores)
        self.own = float(scores.mean()), max(float(scores.std()), 1e-6)
        if self.heldout:
            values = self.heldout.score(asked, said).value
            self.held = float(values.mean()), max(float(values.std()), 1e-6)

    def follow(self, step: int, rollout: Rollout, run: Run, kl_coef: float) -> dict[str, float]:
        """The signals of a step, from its rollout; KL is tried against its budget. `kl_coef`: the present one, taken to
        be in the score's unit."""
        texts, scores = [c.text for c in rollout.completions], rollout.scores.numpy()
        own = float(scores.mean()) - self.own[0], float(scores.var()) / len(scores)
        self.last = [*self.last, (float(rollout.k1.sum(1).mean()), *own)][-KL_STEPS:]
        coming = kl_at_next([kl for kl, _, _ in self.last], self.config.every, self._held(kl_coef))
        if self.budget is not None and coming is not None and coming[1] > self.budget:
            now, then = coming
            far = f"KL is {now:.1f} nats a completion" + (
                f", {then:.1f} by the next check," if now <= self.budget else ""
            )
            why = f": {self.answers} answers taught the proxy, too few to tell what more is worth"
            why = why if self.config.kl_budget == "auto" else ""
            self._set_off(step + 1, "kl", f"{far} over its budget of {self.budget:.1f}{why}", run)
        self.recent += texts
        out = {
            "length_drift": (float(np.mean([len(c.ids) for c in rollout.completions])) - self.length[0])
            / self.length[1],
            "style_share": self._style(texts)[0],
            "alarm": self._raised(step),
        }
        if coming is not None:
            out["kl_ahead"] = coming[1]
        if self.heldout:
            theirs = (self.heldout.score(rollout.prompts, rollout.completions).value - self.held[0]) / self.held[1]
            ours = (scores - self.own[0]) / self.own[1]
            out["heldout_gain"] = float(theirs.mean())
            out["heldout_disagreement"] = float(np.abs(ours - theirs).mean()) / math.sqrt(2)
        for category, mean in _means(rollout.prompts, scores).items():
            if category in self.by_category:
                out[f"gain/{category}"] = mean - self.by_category[category]
        return out

    def _held(self, kl_coef: float) -> float:
        """`held_at` of the last steps, together long enough to know their gain."""
        kl, gains, errors = np.array(self.last[-KL_LEAST:]).T
        error = math.sqrt(errors.sum() / len(errors) ** 2 + self.own[1] ** 2 / self.said)
        return held_at(float(gains.mean()), error, float(np.sqrt(np.maximum(kl, 0)).mean()), kl_coef)

    def _style(self, texts: Sequence[str]) -> tuple[float, list[tuple[str, float]]]:
        """The share of the answers with a phrase that is new style, and those phrases with their shares."""
        said = [phrases(text) for text in texts]
        counts = Counter(p for one in said for p in one)
        new = {
            p: n / len(texts)
            for p, n in counts.items()
            if n >= OFTEN * len(texts) and self.phrases[p] <= RARE * self.said
        }
        return float(np.mean([bool(one & new.keys()) for one in said])), sorted(
            new.items(), key=lambda item: (-item[1], item[0])
        )

    # audits

    def due(self, step: int) -> bool:
        """Whether the policy after `step` updates is checked."""
        return 0 < step <= self.steps and step % self.config.every == 0

    def check(self, step: int, run: Run) -> dict[str, float]:
        """The check after `step` updates, where one is due: asks the judge, says what was found, tries the rules."""
        if not self.due(step):
            return {"alarm": 1.0} if self._raised(step) else {}
        found: dict[str, float] = {}
        named = self._style(self.recent)[1][:5] if self.recent else []
        if self.judge:
            self.checks.append(self._audit(step, self._budget(step), named, run))
            found |= self._figures()
        self.recent = []
        if found.get("gap_low", -1) > self.config.tolerance:
            more = f"{100 * found['gap']:.0f} points too many, surely {100 * found['gap_low']:.0f} or more by now"
            self._set_off(step, "gap", f"the proxy promised more wins over the start than the judge gives, {more}", run)
        elif found.get("win_rate_drop", -1) > 0:
            points = f"surely by {100 * found['win_rate_drop']:.0f} points"
            self._set_off(step, "win_rate", f"the judge’s win rate over the start has fallen, {points}", run)
        return {**found, "alarm": self._raised(step)}

    def _raised(self, step: int) -> float:
        """1 from the version on at which the alarm was set off."""
        return float(self.alarm is not None and self.alarm["step"] <= step)

    def _set_off(self, step: int, rule: str, text: str, run: Run) -> None:
        """The first alarm counts. `step`: updates done."""
        if not self.alarm:
            self.alarm = {"step": step, "rule": rule, "text": text}
            run.say(f"ALARM at step {step}: {text}")

    def _budget(self, step: int) -> int:
        """Labels for this check: what is left, shared by the checks that are left. Of a judge who abstains often, no
        more than twice the labels are asked in all."""
        left = self.config.labels - sum(len(c.audited) for c in self.checks)
        left = min(left, 2 * self.config.labels - sum(c.asked for c in self.checks))
        return left // (self.steps // self.config.every - step // self.config.every + 1)

    def _audit(self, step: int, wanted: int, named: list[tuple[str, float]], run: Run, *, again: bool = False) -> Check:
        """The policy's answers against the start's, which of them stands first drawn by chance. What both say alike is
        not asked; for each pair on which the judge abstains another one is."""
        rng = np.random.default_rng([self.seed, step, 3, int(again)])
        drawn = rng.permutation(len(self.prompts))[: 2 * wanted]
        asked = [self.prompts[i] for i in drawn]
        fresh = step + AGAIN * again
        mine, theirs = (
            self._answers(self.policy, asked, AUDIT + fresh),
            self._answers(self.start, asked, AGAINST + fresh),
        )
        pairs = [(p, a, b) for p, a, b in zip(asked, mine, theirs, strict=True) if a.text != b.text]
        turned = rng.random(len(pairs)) < 0.5
        won: list[float | None] = []
        while missing := min(wanted - sum(p is not None for p in won), len(pairs) - len(won)):
            some = slice(len(won), len(won) + missing)
            shown = [
                Comparison(p, (b, a) if turn else (a, b))
                for (p, a, b), turn in zip(pairs[some], turned[some], strict=True)
            ]
            found = self.mesh.from_main(
                partial(run.once, "audits", f"{step} {_hash(shown)}", partial(self._ask, shown))
            )
            said = [row["p"] for row in found]
            won += [None if p is None else 1 - p if turn else p for p, turn in zip(said, turned[some], strict=True)]
        pairs = pairs[: len(won)]
        prompts = [p for p, _, _ in pairs]
        values = [self._logits(prompts, [pair[side] for pair in pairs]) for side in (1, 2)] if pairs else [None, None]
        predicted = np.array([]) if values[0] is None or values[1] is None else _sigmoid(values[0] - values[1])
        kept = [i for i, p in enumerate(won) if p is not None]
        run.show(step, _rows(pairs, won, predicted))
        return Check(
            step,
            len(pairs),
            [float(predicted[i]) for i in kept] if len(predicted) else [],
            [float(won[i]) for i in kept],  # type: ignore[arg-type]
            named,
        )

    def _ask(self, comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
        assert self.judge
        return [asdict(verdict) for verdict in verdicts_of(self.judge, comparisons)]

    def _answers(self, sampler: Sampler, prompts: Sequence[Prompt], step: int) -> list[Completion]:
        ids = [self.chat.prompt_ids(p.messages) for p in prompts]
        return sampler.sample(ids, self.sampling, seed=self.seed, step=step)

    def _logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> np.ndarray | None:
        return logits_of(self.proxy, self.proxy.score(prompts, completions))

    # what the audits say

    def _figures(self) -> dict[str, float]:
        """Of the last check: its win rates; over all checks so far: the gap with its bounds."""
        last = self.checks[-1]
        out = {"audit_labels": float(sum(len(c.audited) for c in self.checks)), "audit_pairs": float(len(last.audited))}
        if last.audited:
            out["audited_win_rate"] = float(np.mean(last.audited))
        gaps = [p - a for c in self.checks for p, a in zip(c.predicted, c.audited, strict=bool(c.predicted))]
        if last.predicted:
            out["predicted_win_rate"] = float(np.mean(last.predicted))
        if gaps:
            # Bets may begin at any check, the coming ones too: the same mixture at every look.
            begins = np.cumsum([0] + [len(c.predicted) for c in self.checks]).tolist()
            planned = self.steps // self.config.every
            starts = [*begins[:-1], *[len(gaps)] * (planned - len(self.checks))]
            low, high = betting_bounds(gaps, error=self.config.error, low=-1, high=1, starts=starts)
            out |= {"gap": float(np.mean(gaps)), "gap_low": low, "gap_high": high}
        won = [a for c in self.checks for a in c.audited]
        ends = np.cumsum([len(c.audited) for c in self.checks])[:-1].tolist()
        planned = self.steps // self.config.every - 1
        if ends and planned:
            out["win_rate_drop"] = drop_bound(won, ends, error=self.config.error, planned=planned)
        return out

    @property
    def stop(self) -> bool:
        return self.alarm is not None and self.config.act != "warn"

    def finalists(self) -> list[int]:
        """Where an alarm goes back: the kept versions on which the labels that are left are spent."""
        if not (self.alarm and self.judge and self.config.act == "back"):
            return []
        return sorted({*range(self.config.every, self.alarm["step"], self.config.every), self.alarm["step"]})

    def audit_again(self, step: int, run: Run) -> None:
        """Spends on the finalist `step`, whose weights the policy has now, its share of the labels that are left."""
        left = [s for s in self.finalists() if s >= step]
        spent = sum(len(c.audited) for c in self.checks)
        more = self._audit(step, (self.config.labels - spent) // len(left), [], run, again=True)
        known = next((c for c in self.checks if c.step == step), None)
        if known is None:
            self.checks = sorted([*self.checks, more], key=lambda c: c.step)
        else:
            known.asked += more.asked
            known.predicted += more.predicted
            known.audited += more.audited

    def delivered(self) -> int | None:
        """The version that an alarm goes back to, 0 for the start; None for the last one."""
        if not self.alarm or self.config.act != "back":
            return None
        audited = [c for c in self.checks if c.audited]
        if not audited:
            return max(s for s in range(0, self.alarm["step"], self.config.every))
        rates = [float(np.mean(c.audited)) for c in audited]
        return best_check([c.step for c in audited], rates, [len(c.audited) for c in audited])

    # resume, and the closing record

    def state(self) -> dict[str, Any]:
        checks = [asdict(c) for c in self.checks]
        return {"checks": checks, "alarm": self.alarm, "last": list(self.last), "recent": list(self.recent)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.checks = [Check(**c) for c in state["checks"]]
        self.alarm, self.last, self.recent = state["alarm"], list(state["last"]), list(state["recent"])

    def results(self) -> dict[str, Any]:
        return {
            "alarm": self.alarm,
            "act": self.config.act,
            "kl_budget": self.budget,
            "labels": sum(len(c.audited) for c in self.checks),
            "asked": sum(c.asked for c in self.checks),
            "checks": [
                {
                    "step": c.step,
                    "pairs": len(c.audited),
                    "audited": float(np.mean(c.audited)) if c.audited else None,
                    "predicted": float(np.mean(c.predicted)) if c.predicted else None,
                    "phrases": [{"text": text, "share": share} for text, share in c.phrases],
                }
                for c in self.checks
            ],
        }


def best_check(steps: Sequence[int], rates: Sequence[float], pairs: Sequence[int]) -> int:
    """The step whose version the audits say is best, 0 for the start: the peak of the curve that first rises and then
    falls and is nearest to the win rates, each counted by its pairs; the start's, 1/2, is known."""
    fit = unimodal_fit([0.5, *rates], [float(sum(pairs)), *map(float, pairs)])
    return [0, *steps][int(fit.argmax())]


def phrases(text: str) -> set[str]:
    """The runs of `WORDS` words or marks of a text."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def _hash(comparisons: Sequence[Comparison]) -> str:
    texts = [[c.prompt.id, *(one.text for one in c.completions)] for c in comparisons]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _rows(
    pairs: Sequence[tuple[Prompt, Completion, Completion]], won: Sequence[float | None], predicted: np.ndarray
) -> list[dict[str, Any]]:
    """The audited pairs for samples.jsonl. `wins`: the probability that this answer is the better one, by the judge;
    `promised`: by the proxy."""
    out = []
    for i, (prompt, *both) in enumerate(pairs):
        for completion, side in zip(both, ("policy", "start"), strict=True):
            figures = {"wins": won[i], **({"promised": float(predicted[i])} if len(predicted) else {})}
            if side == "start":
                figures = {name: None if p is None else 1 - p for name, p in figures.items()}
            out.append(
                {**describe(prompt), "completion": completion.text, "stop": completion.stop, "side": side, "pair": i}
                | figures
            )
    return out


def _means(prompts: Sequence[Prompt], scores: np.ndarray) -> dict[str, float]:
    """Mean score of each category."""
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        if prompt.category:
            found[prompt.category].append(float(score))
    return {category: float(np.mean(values)) for category, values in sorted(found.items())}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))
