"""Losses of what learns from people's choices: reward models, and policies without one (DPO and its kin, KTO)."""

from __future__ import annotations

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from trueup.math.masked import same_shape


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0, label: float | Tensor = 1.0
) -> Tensor:
    """Negative log-likelihood of a label under the Bradley-Terry model, with s the logistic function:

        -y log s(c - r - m) - (1 - y) log s(r - c - m)

    chosen c [B], rejected r [B]: scores; margin m: a number or [B], in the unit of the scores, by which the
    better one should lead; label y: a number or [B] in [0, 1], the probability that chosen is better (1
    certain, 0.5 a tie) -> [B] nats. At equal scores without a margin it is ln 2. ValueError where the shapes
    differ. Source: Bradley and Terry 1952; Ouyang et al. 2022, equation 1; the margin: Touvron et al. 2023
    (Llama 2), equation 2; soft labels: Bai et al. 2022 (Constitutional AI), section 4.1.
    """
    given = {"margin": margin, "label": label}
    per_pair = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
    same_shape(chosen=chosen, rejected=rejected, **per_pair)
    gap = chosen - rejected
    return -label * logsigmoid(gap - margin) - (1 - label) * logsigmoid(-gap - margin)


def center_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(c + r)^2, which ties down the constant that `bradley_terry_loss` leaves free.

    chosen c [B], rejected r [B] -> [B] in the unit of the scores squared; small weights (0.01) do. ValueError
    where the shapes differ. Source: Eisenstein et al. 2023 ("Helping or herding?"), as in TRL's
    `center_rewards`.
    """
    same_shape(chosen=chosen, rejected=rejected)
    return (chosen + rejected).square()


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The losses of direct preference optimization. With h = (c - ref c) - (r - ref r), s the logistic function and
    e the label smoothing:

        sigmoid  -log s(beta h)                                                  Rafailov et al. 2023, equation 7
        cdpo     -(1 - e) log s(beta h) - e log s(-beta h)                       Mitchell 2023, equation 3
        robust   (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e)          Chowdhury et al. 2024, equation 12
        ipo      (h - 1 / (2 beta))^2                                            Azar et al. 2024, equation 17
        hinge    max(0, 1 - beta h)                                              Zhao et al. 2023 (SLiC), as in TRL

    All four [B]: log-probs of whole replies, summed over their tokens, in nats -> [B]; ipo in nats squared, its
    length-averaged form from log-probs divided by their lengths. `cdpo` and `robust` alone read `label_smoothing`, the
    share of labels that are wrong: under cdpo h ends at log((1 - e) / e) / beta, robust has the clean loss's mean. At
    policy = reference the first three are ln 2. ValueError where the shapes differ, for another kind, for a beta that
    is not positive, and for a smoothing outside [0, 1/2).
    """
    reference = {"ref_chosen": ref_chosen_logprobs, "ref_rejected": ref_rejected_logprobs}
    same_shape(chosen=chosen_logprobs, rejected=rejected_logprobs, **reference)
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} is not positive, or label_smoothing {label_smoothing} not in [0, 1/2)")
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    if kind == "sigmoid":
        return -logsigmoid(beta * h)
    if kind == "cdpo":
        return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    if kind == "robust":
        wrong = label_smoothing * logsigmoid(-beta * h)
        return (wrong - (1 - label_smoothing) * logsigmoid(beta * h)) / (1 - 2 * label_smoothing)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    if kind == "hinge":
        return relu(1 - beta * h)
    raise ValueError(f"kind is 'sigmoid', 'cdpo', 'robust', 'ipo' or 'hinge', not {kind!r}")


def kto_loss(
    logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, baseline: float | Tensor, *, beta: float
) -> Tensor:
    """The loss of single replies that are good or bad, with s the logistic function and z the baseline:

        1 - s(beta (l - ref l - z)) of a desirable reply,   1 - s(beta (z - l + ref l)) of an undesirable one

    logprobs l [B], ref_logprobs [B]: of whole replies, in nats; desirable [B]: True or False; baseline: a number or
    [B], without a gradient (`kto_baseline`) -> [B] in (0, 1), 1/2 at the start. ValueError where the shapes differ.
    Source: Ethayarajh et al. 2024, equation 8; its weights of the two sides are weights of rows here.
    """
    per_row = {"baseline": baseline} if isinstance(baseline, Tensor) and baseline.ndim else {}
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable, **per_row)
    ahead = beta * (logprobs - ref_logprobs - baseline)
    return 1 - sigmoid(torch.where(desirable.bool(), ahead, -ahead))


def kto_baseline(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """max(0, mean(l - ref l)): an estimate of KL(policy || reference) from replies to other prompts, in nats.

    logprobs l [B], ref_logprobs [B]: of prompts with the replies of other rows -> []. It couples the rows of a batch.
    ValueError where the shapes differ. Source: Ethayarajh et al. 2024, section 4.2.
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return (logprobs - ref_logprobs).mean().clamp(min=0)
