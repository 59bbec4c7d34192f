"""What is logged at each step, what is healthy, and what to do when it is not. `docs/metrics.md` is written from this.

python -c "from trueup.report.metrics import markdown; print(markdown(), end='')" > docs/metrics.md
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A logged figure: its title, its unit, how it looks when all is well, and what to do when it does not."""

    title: str
    unit: str
    healthy: str
    if_not: str


SUPERVISED: dict[str, Metric] = {
    "loss": Metric(
        "Training loss",
        "nats, per token (SFT) or per pair (reward model)",
        "Falls fast, then slowly. A reward model starts at 0.69, which is a coin toss.",
        "Flat: raise `train.optim.lr`, and look whether the data is what you think. Jumps or rises: lower it, "
        "or give it more `warmup`.",
    ),
    "validation_loss": Metric(
        "Validation loss",
        "nats, on prompts held out",
        "Falls with the training loss and levels off; the weights at its lowest point are kept.",
        "Rises while the training loss falls: it memorizes. Fewer `train.epochs`, more data, a lower rate, or "
        "`train.patience` to stop early.",
    ),
    "accuracy": Metric(
        "Accuracy",
        "share of pairs that are ordered as labelled (of a reward model: held out)",
        "Above the longer-wins rule, and under the ceiling that the raters' own noise sets.",
        "At 0.5: nothing is learned, check that `chosen` and `rejected` are not swapped or alike. No better than "
        "longer-wins: it learned length.",
    ),
    "center": Metric(
        "Centring penalty",
        "score² × weight",
        "Small beside the loss.",
        "Large: scores drift away from zero; raise `center`.",
    ),
    "grad_norm": Metric(
        "Gradient norm before clipping",
        "norm",
        "Settles within the first tenth, with rare spikes; clipping (`clip_norm`, 1 by default) takes those.",
        "Growing without end: lower the rate. Always far above the clipping norm: the rate is in truth set by "
        "clipping; lower it.",
    ),
    "lr": Metric("Learning rate", "per step", "Follows the schedule that was chosen.", "Set `train.optim`."),
    "tokens": Metric(
        "Tokens of the batch",
        "tokens per step",
        "Varies with the texts alone.",
        "A few very long rows set the time and the memory: lower `max_length`.",
    ),
    "seconds": Metric(
        "Time of the step",
        "seconds",
        "Steady, in proportion to the tokens.",
        "Rising: memory is short, lower `micro_tokens`.",
    ),
}

DPO: dict[str, Metric] = {
    "margin": Metric(
        "Implicit reward margin",
        "beta × nats: reward of the chosen reply minus that of the rejected one",
        "Rises from 0. A reward here is beta × (log-prob by the policy - log-prob by the reference).",
        "Flat: raise `train.optim.lr`. Rises in training and not on held-out prompts: fewer `train.epochs`.",
    ),
    "chosen_reward": Metric(
        "Implicit reward of chosen (liked) replies",
        "beta × nats, 0 at the start",
        "Stays near 0, or falls more slowly than that of the rejected ones.",
        "Falls far: see `chosen_logprobs`.",
    ),
    "rejected_reward": Metric(
        "Implicit reward of rejected (disliked) replies",
        "beta × nats, 0 at the start",
        "Falls.",
        "Rises: see `margin`.",
    ),
    "chosen_logprobs": Metric(
        "Log-prob of chosen (liked) replies",
        "nats per reply",
        "May fall a little: the loss sees only the difference to the rejected reply, and where the two are alike "
        "both are pushed down together.",
        "Falls by many nats while `kl` grows: the probability has gone to replies that nobody has judged. Raise "
        "`beta`, lower the rate, or give `sft_coef` a weight.",
    ),
    "rejected_logprobs": Metric(
        "Log-prob of rejected (disliked) replies",
        "nats per reply",
        "Falls.",
        "Rises with the chosen one: see `margin`.",
    ),
    "sft": Metric(
        "SFT term",
        "nats per token of the chosen reply × `sft_coef`",
        "Falls or holds.",
        "Rises: raise `sft_coef`.",
    ),
}

PPO: dict[str, Metric] = {
    "score": Metric(
        "Score of the proxy: what is optimized",
        "s.d. of the SFT model's scores, mean of the batch",
        "Rises, fast at first, then slower.",
        "Flat: the penalty is too strong (lower `kl_coef`), the rate too low (`optim.lr`), or all answers score alike. "
        "Soars while answers look odd: the reward model is being exploited; raise `kl_coef`.",
    ),
    "audit": Metric(
        "Audit: logged and never optimized",
        "score of the audit, mean of the batch: gold where it is known, else a reward model trained on other prompts",
        "Rises with the score.",
        "Falls or stalls while the score rises: over-optimization. Stop earlier, raise `kl_coef`, or train the reward "
        "model on fresh answers of this policy.",
    ),
    "kl": Metric(
        "KL from the reference (k1)",
        "nats per completion",
        "Starts at 0, rises and levels off where score and penalty balance. Single steps are noisy, even below 0.",
        "Runs away: raise `kl_coef`, or hold it to a target with `adaptive_kl`. Stays at 0: the policy does not move; "
        "lower `kl_coef` or raise `optim.lr`.",
    ),
    "kl_k3": Metric(
        "KL from the reference (k3)",
        "nats per completion",
        "Near k1, less noisy, never negative.",
        "Far above k1: a few tokens that the reference finds almost impossible; read the samples of that step.",
    ),
    "kl_coef": Metric(
        "KL coefficient",
        "score per nat",
        "Constant, or, when adaptive, moving slowly until KL meets its target.",
        "Swings: raise `adaptive_kl.horizon`. Pinned far from its start: the target does not suit this scorer.",
    ),
    "reward": Metric(
        "Reward: score minus penalty",
        "score, mean of the batch",
        "Rises. This is what PPO maximizes, so it should rise even where the score is held back.",
        "Falls: updates are too large or the critic misleads; lower `optim.lr`, see explained variance, clip fraction.",
    ),
    "entropy": Metric(
        "Entropy of the policy",
        "nats per token",
        "Falls gently as the policy grows surer.",
        "Drops towards 0 early: answers become all the same; raise `kl_coef` or give a small `entropy_coef`. "
        "Rises: the policy is coming apart; lower `optim.lr`.",
    ),
    "clip_fraction": Metric(
        "Clip fraction",
        "share of tokens",
        "About 0.01 to 0.2.",
        "Above 0.3: each update goes too far; lower `optim.lr` or `epochs`, or set `target_kl`. "
        "Exactly 0: updates are tiny; the rate may go up.",
    ),
    "approx_kl": Metric(
        "KL of one step's update",
        "nats per token, new policy to the one that sampled",
        "Below about 0.02.",
        "Above 0.05: as for the clip fraction; `target_kl` ends a step's epochs there.",
    ),
    "kl_loss": Metric(
        "KL loss (`kl_in=loss`)",
        "advantage × `kl_coef`, per token",
        "0 at first, then small beside the advantages; never negative.",
        "Grows past them: the policy is far from the reference and is being pulled back; lower `optim.lr` or `epochs`.",
    ),
    "policy_loss": Metric(
        "Policy loss",
        "advantage: whitened (gae), s.d. of the group (grpo), score (rloo, reinforce)",
        "A little below 0. Its size says nothing of quality.",
        "Far from 0 or jumping: look at clip fraction and gradient norm.",
    ),
    "entropy_bonus": Metric(
        "Entropy bonus", "loss", "Small beside the policy loss.", "Outweighs it: lower `entropy_coef`."
    ),
    "value_loss": Metric(
        "Value loss",
        "half of squared score",
        "Falls in the first steps, then follows the spread of the returns.",
        "Rises without end: lower `critic_optim.lr`, or loosen `clip_value`.",
    ),
    "explained_variance": Metric(
        "Explained variance of the critic",
        "share, 1 is perfect",
        "Above 0 within a few steps, and rising; 0.3 to 0.9 is common.",
        "Below 0: the critic is worse than a constant, and advantages are noise. Raise `critic_optim.lr` or `epochs`; "
        "start the critic from the reward model (`critic`).",
    ),
    "policy_grad_norm": Metric(
        "Policy gradient norm before clipping",
        "norm",
        "Steady, with rare spikes.",
        "Growing: lower `optim.lr`. Spikes with the entropy falling: raise `kl_coef`.",
    ),
    "critic_grad_norm": Metric(
        "Critic gradient norm before clipping",
        "norm",
        "Large in the first steps, then steady.",
        "Growing: lower `critic_optim.lr`.",
    ),
    "length": Metric(
        "Length of the answers",
        "tokens, end token included",
        "Moves little, or for a reason that the samples show.",
        "Climbs with the score while the audit does not: the reward model pays for length. Balance lengths in the "
        "comparisons or put a length penalty into the `scorer`.",
    ),
    "end_rate": Metric(
        "Answers that end by themselves",
        "share of the batch",
        "Stays near 1.",
        "Falls: an answer that is cut off must score below every ended one; lower `missing_eos_score`, or raise "
        "`sampling.max_tokens` where answers need more room.",
    ),
    "score_std": Metric(
        "Spread of the scores",
        "s.d. within the batch",
        "Shrinks slowly as answers improve.",
        "Near 0: every answer scores alike, nothing is left to learn from; new prompts or a new reward model.",
    ),
    "distinct": Metric(
        "Different answers",
        "different texts of the batch / its answers",
        "Falls little: prompts differ, so answers should.",
        "Falls far while the entropy falls: one answer serves every prompt. Read it; raise `kl_coef`, or give a small "
        "`entropy_coef`.",
    ),
    "disagreement": Metric(
        "Disagreement of the ensemble's members",
        "s.d. over the members, in the unit of the score",
        "Stays near its value at step 0.",
        "Climbs with the KL: answers leave what the comparisons cover; read those with the highest disagreement, raise "
        "`kl_coef`, or combine by `wco` or `uwo`. Flat proves nothing: members that share an error agree on it.",
    ),
    "audited_win_rate": Metric(
        "Audited win rate (`watch`)",
        "share of the audited pairs that the judge gives to the policy, over the start",
        "Rises from 0.5, then holds.",
        "Falls while the score rises: over-optimization. Go back to the check before, raise `kl_coef`, or label pairs "
        "of this policy's answers and train the reward model on them too.",
    ),
    "predicted_win_rate": Metric(
        "Predicted win rate (`watch`)",
        "mean over the audited pairs of the sigmoid of the proxy's raw difference",
        "Rises, and stays near the audited one.",
        "Far above the audited one: see `gap`.",
    ),
    "gap": Metric(
        "Gap: predicted less audited win rate (`watch`)",
        "share of pairs, mean over all audits so far",
        "Near 0: a right proxy promises what the judge gives.",
        "Above 0 and growing: the proxy is being exploited. `gap_low` says whether it is more than chance.",
    ),
    "gap_low": Metric(
        "Lower bound of the gap (`watch`)",
        "share of pairs; wrong at any check with chance `watch.error`",
        "Below `watch.tolerance`, 0 by default.",
        "Above: the alarm is set off. See docs/alarm.md.",
    ),
    "gap_high": Metric(
        "Upper bound of the gap (`watch`)",
        "share of pairs; wrong at any check with chance `watch.error`",
        "Falls with each audit towards the gap.",
        "Far above the gap at the end: few labels; raise `watch.labels`.",
    ),
    "win_rate_drop": Metric(
        "How far the audited win rate has surely fallen (`watch`)",
        "share of pairs; wrong at any check with chance `watch.error`",
        "Below 0: no fall is sure.",
        "Above 0: the alarm is set off.",
    ),
    "audit_labels": Metric(
        "Audit labels spent so far (`watch`)",
        "verdicts of the judge",
        "Grows by the same number at every check.",
        "Less than that: few answers differ from the start's (equal ones are not asked about), or the judge abstains.",
    ),
    "audit_pairs": Metric(
        "Pairs of this check on which the judge decided (`watch`)",
        "pairs",
        "As many at every check.",
        "See `audit_labels`.",
    ),
    "alarm": Metric(
        "Alarm (`watch`)",
        "1 from the version on at which it was set off, else 0",
        "0.",
        "1: results.json says by which rule; `watch.act` says what is done.",
    ),
    "heldout_gain": Metric(
        "Gain by the held-out reward model (`watch.heldout`)",
        "s.d. of its scores of the start's answers, mean of the batch",
        "Rises with the score.",
        "Levels off or falls while the score rises: what the proxy alone pays for is climbed. Rising proves less: "
        "two reward models of the same raters share their tastes.",
    ),
    "heldout_disagreement": Metric(
        "Disagreement of the proxy and the held-out reward model (`watch.heldout`)",
        "s.d. of the two scores of an answer, each in s.d. of the start's answers; mean of the batch",
        "Steady.",
        "Rises: the policy goes where the two learned different things. Steady proves nothing: gold may fall while two "
        "reward models agree in what they overrate.",
    ),
    "kl_ahead": Metric(
        "KL that is foretold for the next check (`watch`)",
        "nats per completion",
        "Below the budget (`kl_budget` in results.json), and level once a penalty holds the policy.",
        "Above the budget the alarm is set off. It knows `kl_coef`, and of 0 that nothing will hold the policy: raise "
        "it, or stop at the alarm.",
    ),
    "style_share": Metric(
        "New style (`watch`)",
        "share of answers with a three-word phrase that at most 1% of the start's answers have and at least 10% of "
        "these",
        "Low, or for a reason that the phrases show (results.json names them).",
        "Near 1: every answer has taken on a phrase. Read it: a compliment, a boast, a stock opening is style that the "
        "reward model pays for.",
    ),
    "length_drift": Metric(
        "Drift of the answers' length (`watch`)",
        "s.d. of the start's lengths, from their mean",
        "Within half an s.d.",
        "See `length`.",
    ),
    "flat_groups": Metric(
        "Groups whose completions all score alike (`samples` above 1)",
        "share of the groups",
        "Well below 1: only the other groups teach anything.",
        "Near 1: the prompts are too hard or too easy for this policy, or its samples are all the same. Choose other "
        "prompts, more `samples`, or a scorer with degrees; look at the entropy.",
    ),
    "baseline": Metric(
        "Running baseline (reinforce)",
        "score, less the penalty where that is part of the reward",
        "Follows the reward a few steps behind.",
        "Far behind for long: the reward rises faster than a mean over about ten steps; lower `optim.lr`.",
    ),
    "value": Metric(
        "Value predicted by the critic",
        "score, mean over tokens",
        "Follows the reward.",
        "Lags far behind: raise `critic_optim.lr`.",
    ),
    "validation": Metric(
        "Validation: reward on held-out prompts",
        "score minus penalty",
        "Rises and levels off; the best policy is kept.",
        "Falls while the training reward rises: too few prompts; add some, or stop early with `patience`.",
    ),
    "epochs": Metric(
        "Epochs done in the step",
        "epochs",
        "As configured.",
        "Cut short at every step: `target_kl` binds; lower `optim.lr`.",
    ),
    "policy_lr": Metric("Learning rate of the policy", "per update", "Follows its schedule.", "Set `optim`."),
    "critic_lr": Metric("Learning rate of the critic", "per update", "Follows its schedule.", "Set `critic_optim`."),
    "seconds_generate": Metric(
        "Time to sample", "seconds per step", "The largest part, or near it.", "Lower `sampling.max_tokens`."
    ),
    "seconds_score": Metric(
        "Time to score", "seconds per step", "Small.", "A slow scorer sets the pace: use a smaller reward model."
    ),
    "seconds_logprobs": Metric(
        "Time for log-probs and values",
        "seconds per step",
        "About a third of the update.",
        "Raise `optim.micro_tokens` while memory lasts.",
    ),
    "seconds_update": Metric(
        "Time to update",
        "seconds per step",
        "In proportion to `epochs`.",
        "Raise `optim.micro_tokens` while memory lasts.",
    ),
    "peak_memory_mb": Metric(
        "Peak memory so far",
        "MB",
        "Flat after the first steps.",
        "Rising: longer answers; lower `optim.micro_tokens` or `sampling.max_tokens`.",
    ),
}

METRICS: dict[str, Metric] = {**SUPERVISED, **DPO, **PPO}

INTRODUCTION = """# The metrics

Every stage writes `metrics.jsonl`, one line a step; `report.html` draws them. This page says for each figure what is
healthy and what to do when it is not. It is written from `trueup.report.metrics`.

When something is wrong, read the samples first, and ask `trueup diagnose RUN` ([what it knows](diagnose.md)). Then
look in this order: end rate and length, KL, entropy, explained variance, clip fraction, and only then the losses.
Losses of PPO say little by themselves.

## The self-check before step 0 of DPO

Policy and reference are the same weights, so the loss is known: ln 2 for sigmoid, cdpo and robust, 1 for hinge,
1/(4 beta²) for ipo, 1/2 for kto. DPO computes it on the first rows, says both figures, and stops where they differ, or
where any log-prob of the policy is not the reference's within 1e-3 nats. When not: what lies in
`runs/.reference-logprobs` is not of these weights; delete that folder.

## The self-check at step 0 of PPO

Before the first update PPO checks itself, prints what it found, and stops where a check fails:

- **Sampler and training path agree.** Log-probs are computed twice, by the sampler and by the path that is trained.
  Their ratio is 1 within 1e-4 (2e-2 in bf16). When not: the two see different tokens, positions or weights.
- **KL to the reference is 0** where policy and reference are the same weights. When not: they are not the same, or one
  of them drops out or is in another precision.
- **The score sits on the last token**, which is the end token where there is one. When not: masks are shifted.
- **End rate and peak memory** are printed, not judged. An SFT model that ends fewer than about nine answers in ten
  should be trained longer, or be given more `max_tokens`, before PPO.
"""


def markdown() -> str:
    """The text of `docs/metrics.md`."""
    parts = [INTRODUCTION]
    for title, metrics in (("SFT and reward model", SUPERVISED), ("DPO", DPO), ("PPO", PPO)):
        parts.append(f"## {title}\n")
        for name, m in metrics.items():
            parts.append(
                f"### `{name}`\n\n{m.title}. Unit: {m.unit}.\n\n- Healthy: {m.healthy}\n- When not: {m.if_not}\n"
            )
    parts.append(
        "## By category\n\n`score/CATEGORY` and `audit/CATEGORY` are the means over the batch's prompts of that "
        "category. All\ncategories should rise or hold; one whose score rises while its audit falls shows where the "
        "reward model is fooled. `gain/CATEGORY` is the score less the start's own mean in that category (`watch`).\n"
    )
    return "\n".join(parts)
