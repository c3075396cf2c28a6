"""Errors, intervals and tests, against statsmodels on real data and in simulations."""

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

from ewc import (
    Bernoulli,
    Dense,
    Diagonal,
    Empirical,
    Kronecker,
    LowRank,
    Poisson,
    fisher_information,
)
from ewc.statistics import (
    confidence_intervals,
    likelihood_ratio_test,
    robust_covariance,
    score_test,
    standard_errors,
    wald_test,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def tumours():
    x, y = load_breast_cancer(return_X_y=True)
    return standard(x[:, [0, 1, 4, 8]]), torch.from_numpy(y).double()[:, None]


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return standard(x[:, :5]), torch.from_numpy(y).double()[:, None]


def standard(x):
    x = torch.from_numpy(x)
    return (x - x.mean(0)) / x.std(0)


REGRESSIONS = {
    "logistic": (tumours, Bernoulli(), sm.families.Binomial()),
    "Poisson": (diabetes, Poisson(), sm.families.Poisson()),
}


def log_likelihood(likelihood, model, x, y):
    outputs = model(x)
    if isinstance(likelihood, Bernoulli):
        return -nn.functional.binary_cross_entropy_with_logits(outputs, y, reduction="sum")
    return (y * outputs - outputs.exp() - torch.lgamma(y + 1)).sum()


def fitted(likelihood, x, y, held=()):
    """Fisher scoring; the weights of the inputs ``held`` stay at 0."""
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 1).double()
    free = torch.ones_like(model.weight)
    free[:, list(held)] = 0.0
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(float(y.mean().log()) if isinstance(likelihood, Poisson) else 0.0)
    kept = torch.cat([free.flatten(), torch.ones(1, dtype=torch.float64)]) > 0
    for _ in range(40):
        value = log_likelihood(likelihood, model, x, y)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())])
        information = len(x) * fisher(likelihood, model, x, y).to_dense()
        step = torch.zeros_like(gradient)
        step[kept] = torch.linalg.solve(information[kept][:, kept], gradient[kept])
        with torch.no_grad():
            model.weight += step[:-1]
            model.bias += step[-1:]
    return model


def fisher(likelihood, model, x, y, structure=Dense(), **options):
    return fisher_information(model, [(x, y)], likelihood, structure=structure, **options)


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def in_our_order(values):
    """Statsmodels has the constant first, the parameters of a linear layer have it last."""
    return torch.from_numpy(np.roll(np.asarray(values), -1).copy())


@pytest.fixture(params=REGRESSIONS)
def regression(request):
    data, likelihood, family = REGRESSIONS[request.param]
    x, y = data()
    design = sm.add_constant(x.numpy())
    theirs = sm.GLM(y.numpy()[:, 0], design, family=family).fit(tol=1e-13)
    return likelihood, x, y, fitted(likelihood, x, y), theirs, design, family


def test_estimates_errors_and_intervals_are_those_of_statsmodels(regression):
    likelihood, x, y, model, theirs, _, _ = regression
    flat = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    torch.testing.assert_close(flat, in_our_order(theirs.params), **CLOSE)
    information = fisher(likelihood, model, x, y)
    errors = standard_errors(information)
    found = torch.cat([errors["weight"].flatten(), errors["bias"]])
    torch.testing.assert_close(found, in_our_order(theirs.bse), **CLOSE)
    for level in (0.95, 0.5):
        ends = confidence_intervals(parameters_of(model), errors, level)
        for end in (0, 1):
            expected = in_our_order(theirs.conf_int(1 - level)[:, end])
            mine = torch.cat([ends["weight"][end].flatten(), ends["bias"][end]])
            torch.testing.assert_close(mine, expected, **CLOSE)


def test_robust_errors_are_those_of_statsmodels(regression):
    likelihood, x, y, model, _, design, family = regression
    theirs = sm.GLM(y.numpy()[:, 0], design, family=family).fit(tol=1e-13, cov_type="HC0")
    information = fisher(likelihood, model, x, y)
    scores = fisher(likelihood, model, x, y, estimator=Empirical())
    found = robust_covariance(information, scores)
    expected = np.roll(np.roll(theirs.cov_params(), -1, 0), -1, 1)
    torch.testing.assert_close(found, torch.from_numpy(expected.copy()), **CLOSE)
    # The progression of diabetes varies more than counts do: the plain errors are too small.
    ratio = found.diagonal().sqrt() / in_our_order(
        sm.GLM(y.numpy()[:, 0], design, family=family).fit().bse
    )
    assert (float(ratio.mean()) > 1.3) == isinstance(likelihood, Poisson)
    fewer = fisher_information(
        model, [(x[:-1], y[:-1])], likelihood, structure=Dense(), estimator=Empirical()
    )
    with pytest.raises(ValueError, match=f"must be over the same .*, got {len(x) - 1}"):
        robust_covariance(information, fewer)


def test_the_three_tests_are_those_of_statsmodels(regression):
    likelihood, x, y, model, theirs, design, family = regression
    information = fisher(likelihood, model, x, y)
    held = (1, 2)
    restrict = np.zeros((2, design.shape[1]))
    restrict[0, 2] = restrict[1, 3] = 1.0
    expected = theirs.wald_test(restrict, use_f=False, scalar=True)
    found = wald_test(lambda p: p["weight"][0, list(held)], parameters_of(model), information)
    assert found.statistic == pytest.approx(float(expected.statistic), rel=1e-6)
    assert found.p_value == pytest.approx(float(expected.pvalue), rel=1e-5)
    assert found.degrees_of_freedom == 2
    # The same by a covariance that is given, and for a curved restriction by any structure.
    covariance = information.precision.to_dense().inverse()
    again = wald_test(
        lambda p: p["weight"][0, list(held)],
        parameters_of(model),
        information,
        covariance=covariance,
    )
    assert again.statistic == pytest.approx(found.statistic, rel=1e-9)

    null = fitted(likelihood, x, y, held)
    smaller = np.delete(design, [2, 3], axis=1)
    at_null = sm.GLM(y.numpy()[:, 0], smaller, family=family).fit(tol=1e-13)
    with torch.no_grad():
        full = float(log_likelihood(likelihood, model, x, y))
        restricted = float(log_likelihood(likelihood, null, x, y))
    assert full == pytest.approx(theirs.llf, rel=1e-9)
    ratio = likelihood_ratio_test(full, restricted, 2)
    assert ratio.statistic == pytest.approx(2 * (theirs.llf - at_null.llf), rel=1e-6)
    assert ratio.p_value == pytest.approx(
        float(stats.chi2.sf(2 * (theirs.llf - at_null.llf), 2)), rel=1e-5
    )
    value = log_likelihood(likelihood, null, x, y)
    score = dict(
        zip(("weight", "bias"), torch.autograd.grad(value, null.parameters()), strict=True)
    )
    found = score_test(score, fisher(likelihood, null, x, y), 2)
    exog = design[:, [2, 3]]
    expected = at_null.model.score_test(at_null.params, exog_extra=exog)
    assert found.statistic == pytest.approx(float(np.squeeze(expected[0])), rel=1e-6)
    assert found.p_value == pytest.approx(float(np.squeeze(expected[1])), rel=1e-5)


def test_a_restriction_is_met_however_it_is_written(regression):
    """Two ways of one linear restriction have the same statistic; of a curved one they differ."""
    likelihood, x, y, model, *_ = regression
    information, here = fisher(likelihood, model, x, y), parameters_of(model)
    ways = [
        lambda p: p["weight"][0, 0] - p["weight"][0, 1],
        lambda p: -3 * (p["weight"][0, 0] - p["weight"][0, 1]),
    ]
    one, two = (wald_test(way, here, information).statistic for way in ways)
    assert one == pytest.approx(two, rel=1e-9)
    with pytest.raises(ValueError, match="The set of parameters"):
        wald_test(ways[0], {"weight": here["weight"]}, information)


@pytest.mark.slow
def test_intervals_cover_and_p_values_are_uniform():
    """2,000 fits of a logistic regression with three inputs, all at once by Newton's method."""
    generator = torch.Generator().manual_seed(0)
    fits, n = 2000, 300
    truth = torch.tensor([0.5, -0.3, 0.0], dtype=torch.float64)
    x = torch.randn(fits, n, 3, generator=generator, dtype=torch.float64)
    y = torch.bernoulli(torch.sigmoid(x @ truth), generator=generator)
    theta = torch.zeros(fits, 3, dtype=torch.float64)
    for _ in range(15):
        p = torch.sigmoid((x @ theta[:, :, None])[..., 0])
        information = torch.einsum("fni,fn,fnj->fij", x, p * (1 - p), x)
        gradient = torch.einsum("fni,fn->fi", x, y - p)
        theta = theta + torch.linalg.solve(information, gradient)
    model = nn.Linear(3, 1, bias=False).double()
    covered, tests = [], []
    for one in range(fits):
        with torch.no_grad():
            model.weight.copy_(theta[one][None])
        matrix = fisher(Bernoulli(), model, x[one], y[one][:, None])
        here = parameters_of(model)
        lower, upper = confidence_intervals(here, standard_errors(matrix))["weight"]
        covered.append((lower[0] <= truth) & (truth <= upper[0]))
        tests.append(wald_test(lambda p: p["weight"][0, 2:], here, matrix).p_value)
    coverage = torch.stack(covered).double().mean(0)
    # Three standard errors of 2,000 draws are 1.5 points.
    assert float((coverage - 0.95).abs().max()) < 0.02
    assert stats.kstest(tests, "uniform").pvalue > 1e-3


def test_errors_of_whole_networks_by_structure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64).round()
    for structure in (
        Diagonal(),
        Kronecker(),
        LowRank(rank=4),
        Dense(),
    ):
        matrix = fisher(Bernoulli(), model, x, y, structure)
        precision = 50 * matrix.to_dense() + 0.5 * torch.eye(65, dtype=torch.float64)
        expected = precision.inverse().diagonal().sqrt()
        errors = standard_errors(matrix, prior_precision=0.5)
        found = torch.cat([errors[name].flatten() for name in matrix.shapes])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(torch.linalg.LinAlgError):
        standard_errors(fisher(Bernoulli(), model, x[:3], y[:3]))


def test_mistakes_are_named():
    here = {"weight": torch.zeros(2)}
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"level must lie between 0 and 1, got {level}"):
            confidence_intervals(here, here, level)
    with pytest.raises(ValueError, match="bias"):
        confidence_intervals(here, {"bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"restricted must not be above .*, got -3"):
        likelihood_ratio_test(-4.0, -3.0, 1)
    assert likelihood_ratio_test(-3.0, -3.0, 1).p_value == 1.0
    with pytest.raises(ValueError, match=r"degrees_of_freedom must .*, got 0"):
        likelihood_ratio_test(-3.0, -4.0, 0)
