"""Criteria and evidence, against closed forms, statsmodels and what they are there for."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from ewc import (
    Dense,
    Diagonal,
    Empirical,
    Gaussian,
    Kronecker,
    fisher_information,
)
from ewc.statistics import aic, bic, effective_parameters, laplace_log_evidence, tic

NOISE = 0.3


def polynomial(degree, n=60, seed=0, noise=NOISE):
    """A cubic with normal noise, and the powers of its input."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    y = 0.5 - x - 1.5 * x**2 + 2.5 * x**3
    y = y + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.stack([x**k for k in range(1, degree + 1)], 1), y[:, None]


def fitted(x, y, prior_precision=0.0, noise=NOISE):
    """The mode of the posterior, in closed form; and its log-likelihood."""
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    precision = design.T @ design / noise**2 + prior_precision * torch.eye(
        design.shape[1], dtype=torch.float64
    )
    theta = torch.linalg.solve(precision, design.T @ y / noise**2)[:, 0]
    model = nn.Linear(x.shape[1], 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :-1])
        model.bias.copy_(theta[-1:])
    residual = y - model(x).detach()
    density = -0.5 * (residual / noise).square() - 0.5 * math.log(2 * math.pi * noise**2)
    return model, float(density.sum())


def information(model, x, y, structure=Dense(), noise=NOISE, **options):
    likelihood = Gaussian(variance=noise**2)
    return fisher_information(model, [(x, y)], likelihood, structure=structure, **options)


def mode(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("prior_precision", [0.1, 7.0])
@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_the_evidence_of_a_linear_model_is_that_of_its_normal_distribution(prior_precision, mean):
    x, y = polynomial(4)
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    covariance = NOISE**2 * torch.eye(60) + design @ design.T / prior_precision
    expected = MultivariateNormal(design.sum(1) * mean, covariance).log_prob(y[:, 0])
    # A prior around another mean is one around 0 of shifted targets.
    model, _ = fitted(x, y - mean * design.sum(1, keepdim=True), prior_precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(mean)
    residual = y - model(x).detach()
    density = -0.5 * (residual / NOISE).square() - 0.5 * math.log(2 * math.pi * NOISE**2)
    prior_mean = {name: torch.full_like(p, mean) for name, p in mode(model).items()}
    found = laplace_log_evidence(
        density.sum(), information(model, x, y), mode(model), prior_precision,
        prior_mean=prior_mean if mean else None,
    )  # fmt: skip
    assert found == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
def test_the_evidence_takes_every_structure(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    matrix = information(model, x, y, structure)
    found = laplace_log_evidence(-12.0, matrix, mode(model), 2.0)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    precision = 20 * matrix.to_dense() + 2.0 * torch.eye(26, dtype=torch.float64)
    # The Gaussian integral of the posterior's quadratic, with the prior's normalisation.
    prior = -theta.square().sum() + 13 * math.log(2.0 / (2 * math.pi))
    expected = -12.0 + prior + 13 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_the_criteria_are_those_of_statsmodels():
    x, y = polynomial(3)
    design = sm.add_constant(x.numpy())
    theirs = sm.GLM(y.numpy()[:, 0], design, family=sm.families.Gaussian()).fit(scale=NOISE**2)
    _, log_likelihood = fitted(x, y)
    assert log_likelihood == pytest.approx(
        float(theirs.model.loglike(theirs.params, scale=NOISE**2)), rel=1e-9
    )
    assert aic(log_likelihood, 4) == pytest.approx(-2 * log_likelihood + 8)
    assert bic(log_likelihood, 4, 60) == pytest.approx(-2 * log_likelihood + 4 * math.log(60))


def test_the_true_degree_is_found():
    found = {"bic": [], "evidence": []}
    for seed in range(20):
        scores = {"bic": [], "evidence": []}
        for degree in range(1, 9):
            x, y = polynomial(degree, 200, seed)
            _, log_likelihood = fitted(x, y)
            scores["bic"].append(-bic(log_likelihood, degree + 1, 200))
            model, log_likelihood = fitted(x, y, 0.5)
            matrix = information(model, x, y)
            scores["evidence"].append(
                laplace_log_evidence(log_likelihood, matrix, mode(model), 0.5)
            )
        for name, values in scores.items():
            found[name].append(int(np.argmax(values)) + 1)
    for name, degrees in found.items():
        assert degrees.count(3) >= 18, (name, degrees)


def test_takeuchis_penalty_is_the_number_of_parameters_only_where_the_model_is_right():
    """Of a linear model: the sum of leverage times squared residual, over the noise assumed."""
    x, y = polynomial(3, 2000)
    for assumed in (NOISE, 2 * NOISE):
        model, log_likelihood = fitted(x, y, noise=assumed)
        matrix = information(model, x, y, noise=assumed)
        scores = information(model, x, y, noise=assumed, estimator=Empirical())
        penalty = effective_parameters(matrix, scores)
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        leverage = (design @ torch.linalg.inv(design.T @ design) * design).sum(1)
        residual = (y - model(x).detach())[:, 0]
        expected = float((leverage * residual.square()).sum()) / assumed**2
        assert penalty == pytest.approx(expected, rel=1e-9)
        assert penalty == pytest.approx(4 * (NOISE / assumed) ** 2, rel=0.15)
        assert tic(log_likelihood, matrix, scores) == pytest.approx(
            -2 * log_likelihood + 2 * penalty
        )
    damped = effective_parameters(matrix, scores, prior_precision=50.0)
    precision = 2000 * matrix.to_dense() + 50 * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(precision, 2000 * scores.to_dense()).trace()
    assert damped == pytest.approx(float(expected), rel=1e-9)
    assert damped < penalty


def test_mistakes_are_named():
    x, y = polynomial(2)
    model, _ = fitted(x, y)
    matrix = information(model, x, y)
    with pytest.raises(ValueError, match="prior_precision must be a finite number above 0, got 0"):
        laplace_log_evidence(0.0, matrix, mode(model), 0.0)
    with pytest.raises(ValueError, match="The set of parameters"):
        laplace_log_evidence(0.0, matrix, {"weight": torch.zeros(1, 2)}, 1.0)
    with pytest.raises(ValueError, match=r"num_examples must .*, got 0"):
        bic(0.0, 1, 0)
    with pytest.raises(ValueError, match=r"num_parameters must .*, got -1"):
        aic(0.0, -1)
