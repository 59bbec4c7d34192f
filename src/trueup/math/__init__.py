"""The tensor functions of the field: pure and unreduced, on torch alone.

Tensors and keyword coefficients in, a tensor out; formula, shapes, units and source in each docstring. No
config, no device, no logging. Values outside a mask are zero and never read.
"""

from trueup.math.advantages import RunningBaseline, grpo_advantages, rloo_advantages
from trueup.math.best_of_n import best_of_n, best_of_n_bound, best_of_n_kl
from trueup.math.ensemble import disagreement, ensemble_score
from trueup.math.kl import AdaptiveKL, exact_kl, kl_estimate, kl_loss
from trueup.math.logistic import fit_logistic
from trueup.math.masked import masked_mean, masked_var, whiten
from trueup.math.powered import Powered, decisive_pairs, prediction_powered_mean
from trueup.math.ppo import (
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    ppo_policy_loss,
    ppo_value_loss,
    shape_rewards,
)
from trueup.math.preference import bradley_terry_loss, center_penalty, dpo_loss, kto_baseline, kto_loss
from trueup.math.scaling import ScalingFit, fit_scaling, scaling_curve, scaling_peak
from trueup.math.sequential import betting_bounds, drop_bound, log_capital, unimodal_fit
from trueup.math.statistics import (
    bootstrap_interval,
    expected_calibration_error,
    nested_bootstrap,
    student_mass,
    student_quantile,
)
from trueup.math.temperature import at_temperature, fit_temperature

__all__ = [
    "AdaptiveKL",
    "Powered",
    "RunningBaseline",
    "ScalingFit",
    "approx_kl",
    "at_temperature",
    "best_of_n",
    "best_of_n_bound",
    "best_of_n_kl",
    "betting_bounds",
    "bootstrap_interval",
    "bradley_terry_loss",
    "center_penalty",
    "clip_fraction",
    "decisive_pairs",
    "disagreement",
    "dpo_loss",
    "drop_bound",
    "ensemble_score",
    "exact_kl",
    "expected_calibration_error",
    "explained_variance",
    "fit_logistic",
    "fit_scaling",
    "fit_temperature",
    "gae",
    "grpo_advantages",
    "kl_estimate",
    "kl_loss",
    "kto_baseline",
    "kto_loss",
    "log_capital",
    "masked_mean",
    "masked_var",
    "nested_bootstrap",
    "ppo_policy_loss",
    "ppo_value_loss",
    "prediction_powered_mean",
    "rloo_advantages",
    "scaling_curve",
    "scaling_peak",
    "shape_rewards",
    "student_mass",
    "student_quantile",
    "unimodal_fit",
    "whiten",
]
