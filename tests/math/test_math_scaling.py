"""The forms of over-optimization against the published vectors, against torch's own least squares, and by hand."""

import math

import pytest
import torch

from trueup.math import fit_scaling, scaling_curve, scaling_peak

FORMS = ["bon", "rl"]


@pytest.mark.parametrize("form", FORMS)
def test_values_and_peaks(vector, close, form):
    given, expected = vector("overopt_forms", "values_and_peaks")
    alpha, beta = (torch.tensor(given[f"{name}_{form}"], dtype=torch.float64) for name in ("alpha", "beta"))
    close(scaling_curve(given["d"], alpha, beta, form=form), expected[f"R_{form}"])
    d, height = scaling_peak(alpha, beta, form=form)
    close(d, expected[f"d_star_{form}"])
    close(height, expected[f"R_star_{form}"])


@pytest.mark.parametrize("form", FORMS)
def test_at_the_start_nothing_is_gained(form):
    assert scaling_curve(torch.zeros(2), 0.5, 0.1, form=form).tolist() == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_least_squares(vector, close, form):
    given, expected = vector("overopt_forms", "least_squares_fit")
    fit = fit_scaling(given["d"], given["gold"], form=form)
    for name in ("alpha", "beta", "r2"):
        close(getattr(fit, name), expected[form][name])
    close(scaling_peak(fit.alpha, fit.beta, form=form)[0], expected[form]["d_star"])


@pytest.mark.parametrize("form", FORMS)
def test_aicc_against_the_line(close, form):
    # n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) of each model with its coefficients and a variance; n = 8.
    d = torch.tensor([0.6, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 3.1], dtype=torch.float64)
    gold = torch.tensor([0.25, 0.3, 0.4, 0.49, 0.52, 0.51, 0.44, 0.46], dtype=torch.float64)
    fit = fit_scaling(d, gold, form=form)
    rest = (gold - scaling_curve(d, fit.alpha, fit.beta, form=form)).square().sum()
    rest_of_line = (gold - d * (d * gold).sum() / d.square().sum()).square().sum()
    of_form = 8 * math.log(rest / 8) + 2 * 3 + 24 / 4
    of_line = 8 * math.log(rest_of_line / 8) + 2 * 2 + 12 / 5
    close(fit.over_line, torch.tensor(of_line - of_form, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_the_line_wins_where_there_is_no_bend(form):
    d = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    noise = torch.tensor([0.01, -0.01, 0.005, 0.0, -0.005, 0.01, -0.01])
    assert fit_scaling(d, d / 2 + noise, form=form).over_line < 0


@pytest.mark.parametrize("form", FORMS)
def test_only_masked_points_count_and_rows_are_fitted_apart(close, form):
    d = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
    gain = scaling_curve(d, 0.6, 0.2, form=form) + 0.05 * torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, ::3] = False, False
    junk = torch.where(mask, gain, float("nan"))
    together = fit_scaling(torch.where(mask, d, float("nan")), junk, form=form, mask=mask)
    for i in range(3):
        x, y = d[i][mask[i]].double(), gain[i][mask[i]].double()
        alone = fit_scaling(x, y, form=form)
        for a, b in zip(together, alone, strict=True):
            close(a[i], b)
        columns = torch.stack([x, -x.square() if form == "bon" else -x * x.log()], 1)
        alpha, beta = torch.linalg.lstsq(columns, y).solution
        close(alone.alpha, alpha)
        close(alone.beta, beta)
    assert together.alpha.dtype == torch.float64


def test_refusals():
    d = torch.arange(1.0, 7.0)
    for call in (
        lambda: fit_scaling(d, d, form="quadratic"),
        lambda: scaling_curve(d, 1.0, 1.0, form="quadratic"),
        lambda: scaling_peak(d, d, form="quadratic"),
    ):
        with pytest.raises(ValueError, match="form is 'bon' or 'rl', not 'quadratic'"):
            call()
    with pytest.raises(ValueError, match=r"mask \(6,\)"):
        fit_scaling(d, d[:5], form="bon")
    for x, y, some in ((d, d, 5), (d[:5], d, 6), (d, d[:5], 6)):
        with pytest.raises(ValueError, match="shape"):
            fit_scaling(x, y, form="bon", mask=torch.ones(some, dtype=torch.bool))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with pytest.raises(ValueError, match="4 points"):
        fit_scaling(d.expand(2, 6), d.square().expand(2, 6), form="bon", mask=mask)
    mask[1, 4] = True
    fit_scaling(d.expand(2, 6), d.square().expand(2, 6), form="bon", mask=mask)
