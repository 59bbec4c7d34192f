"""Every vector of vectors.json that concerns trueup.math holds to 1e-9 in float64."""

import math

import pytest
import torch

from trueup.math import (
    AdaptiveKL,
    best_of_n,
    best_of_n_bound,
    best_of_n_kl,
    bradley_terry_loss,
    center_penalty,
    clip_fraction,
    dpo_loss,
    exact_kl,
    gae,
    kl_estimate,
    masked_mean,
    masked_var,
    ppo_policy_loss,
    ppo_value_loss,
    shape_rewards,
    whiten,
)


@pytest.mark.parametrize("name", ["hand_3step_terminal_reward", "discounted_4step", "limit_lam_0", "limit_lam_1"])
def test_gae(vector, close, name):
    given, expected = vector("gae", name)
    rewards, values = given["rewards"][None], given["values"][None]
    advantages, returns = gae(rewards, values, torch.ones_like(rewards), gamma=given["gamma"], lam=given["lam"])
    close(advantages[0], expected["advantages"])
    close(returns[0], expected["returns"])


def test_whiten(vector, close):
    given, expected = vector("whiten", "masked_5_values")
    x, mask = given["x"], given["mask"]
    close(masked_mean(x, mask), expected["mean"])
    close(masked_var(x, mask), expected["var_biased"])
    close(masked_var(x, mask, unbiased=True), expected["var_unbiased"])
    close(whiten(x, mask), expected["whitened_biased_shift"])
    close(whiten(x, mask, unbiased=True), expected["whitened_unbiased_shift"])
    close(whiten(x, mask, shift_mean=False), expected["whitened_biased_noshift"])
    close(whiten(x, mask, shift_mean=False, unbiased=True), expected["whitened_unbiased_noshift"])


def test_score_lands_on_the_last_valid_token(vector):
    given, expected = vector("postprocess", "truncate_and_masks")
    mask = expected["padding_mask"] == 0
    rewards = shape_rewards(given["raw_scores"], torch.zeros(4, 5, dtype=torch.float64), mask, kl_coef=1.0)
    where = expected["score_index_convention_last_token"].long()
    assert torch.equal(rewards.nonzero(), torch.stack([torch.arange(4), where], 1))
    assert torch.equal(rewards.sum(1), given["raw_scores"])


def test_kl_of_a_categorical(vector, close):
    given, expected = vector("kl", "categorical_exact")
    p, q = given["p_policy"], given["q_ref"]
    logp, logq = p.log(), q.log()
    close(exact_kl(logp, logq), expected["kl_pq"])
    close(exact_kl(logq, logp), expected["kl_qp"])
    for kind in ("k1", "k2", "k3"):
        estimate = kl_estimate(logp, logq, kind=kind)
        mean = (p * estimate).sum()
        close(estimate, expected[kind])
        close(mean, expected[f"E_{kind}"])
        close((p * (estimate - mean).square()).sum().sqrt(), expected[f"std_{kind}"])
    inverted = kl_estimate(logq, logp, kind="k3")
    close(inverted, expected["k3_inverted_ratio"])
    close((p * inverted).sum(), expected["E_k3_inverted_ratio"])


def test_kl_per_token(vector, close):
    given, expected = vector("kl", "per_token_batch")
    mask = given["mask"]
    for kind in ("k1", "k2", "k3"):
        estimate = kl_estimate(given["logp"], given["logp_ref"], kind=kind)
        close(estimate, expected[kind])
        close((estimate * mask).sum(1).mean(), expected[f"mean_seq_kl_{kind}"])
    close((kl_estimate(given["logp"], given["logp_ref"], kind="k1") * mask).sum(1), expected["seq_sum_k1"])


@pytest.mark.parametrize(("name", "mean"), [("gaussian_mean_shift_0.1", 0.1), ("gaussian_mean_shift_1", 1.0)])
def test_kl_bias_and_spread_of_two_gaussians(vector, close, name, mean):
    # Samples from N(0, 1), the other N(mean, 1); the trapezoid rule is exact here to far below 1e-9.
    _, expected = vector("kl", name)
    x = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    logq = -x.square() / 2 - math.log(2 * math.pi) / 2
    logp = -(x - mean).square() / 2 - math.log(2 * math.pi) / 2
    true = expected["true_kl"]
    for kind in ("k1", "k2", "k3"):
        estimate = kl_estimate(logq, logp, kind=kind)
        average = torch.trapezoid(logq.exp() * estimate, x)
        spread = torch.trapezoid(logq.exp() * (estimate - average).square(), x).sqrt()
        close((average - true) / true, expected[f"{kind}_bias_over_true"])
        close(spread / true, expected[f"{kind}_std_over_true"])


def test_rewards_and_gae_with_the_score_on_the_last_valid_token(vector, close):
    given, outputs = vector("reward_and_gae", "two_sequences")
    expected = outputs["convention_last_token"]
    mask = torch.arange(5) <= given["last_valid_index"][:, None]
    kl = kl_estimate(given["logp"], given["logp_ref"], kind="k1")
    close((kl * mask).sum(1).mean(), outputs["mean_seq_kl"])
    close(shape_rewards(torch.zeros(2), kl, mask, kl_coef=given["kl_coef"]), outputs["non_score_reward"])
    rewards = shape_rewards(given["score"], kl, mask, kl_coef=given["kl_coef"])
    close(rewards, expected["rewards"])
    advantages, returns = gae(rewards, given["values"], mask, gamma=given["gamma"], lam=given["lam"])
    close(advantages, expected["advantages_raw"])
    close(returns, expected["returns"])
    close(whiten(advantages, mask), expected["adv_whitened_biased"])


def test_ppo_losses_and_what_is_logged(vector, close):
    given, expected = vector("ppo", "clipped_policy_and_value_loss")
    new, old, advantages, mask = (given[k] for k in ("new_logp", "old_logp", "advantages", "mask"))
    loss = ppo_policy_loss(new, old, advantages, clip=given["cliprange"])
    close(loss, expected["pg_per_token"])
    close(masked_mean(loss, mask), expected["pg_loss_token_mean"])
    close(((loss * mask).sum(1) / mask.sum(1)).mean(), expected["pg_loss_seq_mean"])
    clipped = clip_fraction(new, old, advantages, clip=given["cliprange"])
    close(masked_mean(clipped, mask), expected["pg_clipfrac"])
    close(masked_mean(kl_estimate(old, new, kind="k2"), mask), expected["approxkl_masked"])
    close(kl_estimate(old, new, kind="k2").mean(), expected["approxkl_unmasked"])
    close(masked_mean(kl_estimate(old, new, kind="k1"), mask), expected["old_minus_new_masked"])

    values = given["new_values"], given["old_values"], given["returns"]
    value_loss = ppo_value_loss(*values, clip=given["cliprange_value"])
    close(2 * value_loss, expected["vf_per_token"])
    close(masked_mean(value_loss, mask), expected["vf_loss"])
    moved = (value_loss > ppo_value_loss(*values, clip=None)).double()
    close(masked_mean(moved, mask), expected["vf_clipfrac"])
    total = masked_mean(loss, mask) + given["vf_coef"] * masked_mean(value_loss, mask)
    close(total, expected["total_loss"])


def test_ppo_policy_gradient(vector, close):
    given, _ = vector("ppo", "clipped_policy_and_value_loss")
    _, expected = vector("ppo", "policy_gradient_wrt_new_logp")
    new = given["new_logp"].requires_grad_()
    masked_mean(ppo_policy_loss(new, given["old_logp"], given["advantages"], clip=0.2), given["mask"]).backward()
    close(new.grad, expected["grad"])


def test_adaptive_kl(vector, close):
    given, expected = vector("kl_controller", "openai_horizon")
    controller = AdaptiveKL(given["init"], given["target"], given["horizon"])
    for kl, value in zip(given["kl_sequence"], expected["beta_after_each"], strict=True):
        controller.update(kl.item(), given["n_steps"])
        close(controller.value, value)


def test_bradley_terry(vector, close):
    given, expected = vector("bradley_terry", "loss_margin_center")
    chosen, rejected, margin = given["chosen"], given["rejected"], given["margin"]
    for kwargs, key in (({}, ""), ({"margin": margin}, "_margin")):
        scores = chosen.clone().requires_grad_()
        loss = bradley_terry_loss(scores, rejected, **kwargs)
        close(loss, expected[f"per_pair{key}"])
        close(loss.mean(), expected[f"loss{key}"])
        loss.mean().backward()
        close(scores.grad, expected[f"grad_chosen{key}"])
    close((-bradley_terry_loss(chosen, rejected)).exp(), expected["p_chosen"])
    center = given["center_coef"] * center_penalty(chosen, rejected).mean()
    close(center, expected["center_term"])
    close(bradley_terry_loss(chosen, rejected, margin=margin).mean() + center, expected["loss_margin_center"])


def test_bradley_terry_with_flipped_labels(vector, close):
    given, expected = vector("bradley_terry", "label_smoothed_flip_eps")
    label = 1 - given["eps"]
    close(bradley_terry_loss(given["chosen"], given["rejected"], label=label).mean(), expected["loss"])
    gap = torch.tensor([expected["optimal_gap"]], dtype=torch.float64, requires_grad=True)
    at_optimum = bradley_terry_loss(gap, torch.zeros_like(gap), label=label)
    close(at_optimum, torch.tensor([expected["loss_at_optimum"]], dtype=torch.float64))
    at_optimum.sum().backward()
    close(gap.grad, torch.zeros(1, dtype=torch.float64))


def test_bradley_terry_at_extremes(vector, close):
    given, expected = vector("bradley_terry", "extremes")
    close(bradley_terry_loss(given["diff"], torch.zeros_like(given["diff"])), expected["neg_logsigmoid"], 1e-19)


DPO = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo_summed", "cdpo": "cdpo", "robust": "robust_rdpo"}


@pytest.mark.parametrize(("kind", "key"), DPO.items())
def test_dpo(vector, close, kind, key):
    given, expected = vector("dpo", "three_pairs")
    logprobs = [given[k].requires_grad_() for k in ("chosen_logp", "rejected_logp")]
    reference = [given[k] for k in ("ref_chosen_logp", "ref_rejected_logp")]
    loss = dpo_loss(*logprobs, *reference, beta=given["beta"], kind=kind, label_smoothing=given["eps"])
    close(loss, expected[key])
    close(loss.mean(), expected[f"{key}_mean"])
    if kind in ("sigmoid", "cdpo", "robust"):
        chosen, rejected = torch.autograd.grad(loss.sum(), logprobs)
        close(chosen, expected[f"grad_{'rdpo' if kind == 'robust' else kind}_wrt_h"])
        close(chosen, -rejected)


def test_dpo_ipo_averaged_over_length(vector, close):
    given, expected = vector("dpo", "three_pairs")
    sides = ("chosen", "rejected")
    averaged = [given[f"{ref}{side}_logp"] / given[f"{side}_len"] for ref in ("", "ref_") for side in sides]
    close(dpo_loss(*averaged, beta=given["beta"], kind="ipo"), expected["ipo_length_averaged"])


def test_dpo_at_the_start(vector, close):
    given, expected = vector("dpo", "zero_margin")
    same = torch.tensor([-3.0], dtype=torch.float64)
    for kind, key in {**DPO, "robust": "robust"}.items():
        loss = dpo_loss(same, same - 1, same, same - 1, beta=given["beta"], kind=kind, label_smoothing=0.1)
        close(loss.sum(), expected[key])


def test_cdpo_has_its_minimum_where_the_vector_says(vector, close):
    given, expected = vector("dpo", "three_pairs")
    h = torch.tensor([expected["cdpo_minimiser_h"]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(h)
    dpo_loss(h, zero, zero, zero, beta=given["beta"], kind="cdpo", label_smoothing=given["eps"]).sum().backward()
    close(h.grad, zero.detach())


def test_best_of_n(vector, close):
    given, expected = vector("best_of_n", "unbiased_estimator_N6")
    ns = [int(n) for n in expected]
    for score in ("gold", "proxy"):
        close(
            best_of_n(given["proxy"], given[score], ns),
            torch.stack([torch.tensor(expected[str(n)][score], dtype=torch.float64) for n in ns]),
        )
    for n in ns:
        order = given["proxy"].argsort()
        weights = [best_of_n(given["proxy"], (order[i] == torch.arange(6)).double(), [n])[0] for i in range(6)]
        close(torch.stack(weights), expected[str(n)]["weights_by_ascending_rank"])
        close(best_of_n_bound(n), expected[str(n)]["kl_formula"])


def test_best_of_n_bound(vector, close):
    given, expected = vector("best_of_n", "kl_formula")
    bounds = torch.tensor([best_of_n_bound(int(n)) for n in given["n"]], dtype=torch.float64)
    close(bounds, expected["kl"])
    close(bounds.sqrt(), expected["d"])


def test_best_of_n_of_a_discrete_policy(vector, close):
    given, expected = vector("best_of_n", "discrete_policy_exact_kl")
    ns = [int(n) for n in expected]
    kl = best_of_n_kl(given["rewards_ascending"], ns, probs=given["p"])
    close(kl, torch.tensor([expected[str(n)]["exact_kl"] for n in ns], dtype=torch.float64))
    backwards = best_of_n_kl(given["rewards_ascending"].flip(0), ns, probs=given["p"].flip(0))
    close(backwards, kl)


def test_best_of_n_of_many_samples(vector, close):
    given, expected = vector("best_of_n", "large_N_numerics")
    proxy = torch.arange(given["N"], dtype=torch.float64)
    top, second = (best_of_n(proxy, (proxy == given["N"] - k).double(), [given["n"]])[0] for k in (1, 2))
    close(top, expected["weight_of_top_sample"])
    close(second, expected["weight_of_second"])
    close(best_of_n(proxy, torch.ones_like(proxy), [given["n"]])[0], expected["sum_weights"])
