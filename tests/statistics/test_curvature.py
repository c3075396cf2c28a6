"""Curvature of networks, against second derivatives target by target and the divergence itself."""

import math

import pytest
import reference
import torch
from torch import nn

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Empirical,
    Exact,
    Gaussian,
    Kronecker,
    MonteCarlo,
    Poisson,
    fisher_information,
)
from ewc.statistics import divergence_profile, network_formulations, robust_covariance

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LIKELIHOODS = {
    "categorical": Categorical(),
    "Bernoulli": Bernoulli(),
    "Gaussian": Gaussian(0.3),
    "Poisson": Poisson(),
}


def targets_of(likelihood, n, c):
    if isinstance(likelihood, Categorical):
        return torch.randint(c, (n,))
    if isinstance(likelihood, Gaussian):
        return torch.randn(n, c, dtype=torch.float64)
    return torch.randint(2 if isinstance(likelihood, Bernoulli) else 5, (n, c)).double()


@pytest.fixture(params=LIKELIHOODS)
def case(request):
    torch.manual_seed(1)
    likelihood = LIKELIHOODS[request.param]
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2), nn.Softplus()
    ).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    return likelihood, model, x, targets_of(likelihood, 6, 2)


def hessian(model, x, y, log_prob):
    """The Hessian matrix of log p of one example, row by row."""
    parameters = list(model.parameters())
    value = log_prob(model(x[None])[0], y)
    first = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def log_density(likelihood):
    """By the definition of each density; what does not depend on the output is left out."""
    return {
        Categorical: lambda f, y: f[y] - torch.logsumexp(f, 0),
        Bernoulli: lambda f, y: (y * f - torch.log(1 + torch.exp(f))).sum(),
        Gaussian: lambda f, y: -((y - f) ** 2).sum() / (2 * 0.3),
        Poisson: lambda f, y: (y * f - torch.exp(f)).sum(),
    }[type(likelihood)]


def own_targets(likelihood, output):
    """Targets and weights whose sum is the expectation of the second derivatives."""
    if isinstance(likelihood, Categorical):
        return [(k, float(p)) for k, p in enumerate(torch.softmax(output.detach(), 0))]
    # Densities whose second derivatives are affine in the target: its mean will do.
    mean = {Bernoulli: torch.sigmoid, Gaussian: lambda f: f, Poisson: torch.exp}
    return [(mean[type(likelihood)](output).detach(), 1.0)]


def test_the_curvature_is_that_of_the_observed_targets(case):
    likelihood, model, x, y = case
    found = network_formulations(model, [(x, y)], likelihood, estimator=Empirical())
    model.eval()
    each = [hessian(model, a, b, log_density(likelihood)) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(found.curvature, -sum(each) / 6, **EXACT)
    scores = 0
    for a, b in zip(x, y, strict=True):
        value = log_density(likelihood)(model(a[None])[0], b)
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))]
        )
        scores = scores + torch.outer(gradient, gradient) / 6
    torch.testing.assert_close(found.score, scores, **EXACT)
    assert found.gap > 0.05


def test_under_the_model_both_are_the_fisher_information(case):
    likelihood, model, x, y = case
    found = network_formulations(model, [(x, y)], likelihood)
    model.eval()
    expected = 0
    for a in x:
        for target, weight in own_targets(likelihood, model(a[None])[0]):
            expected = expected - weight * hessian(model, a, target, log_density(likelihood)) / 6
    torch.testing.assert_close(found.curvature, expected, **EXACT)
    torch.testing.assert_close(found.score, expected, **EXACT)
    assert found.gap < 1e-12


def test_of_a_linear_model_the_curvature_is_that_of_any_targets(case):
    likelihood, _, x, y = case
    model = nn.Linear(3, 2).double()
    under = network_formulations(model, [(x, y)], likelihood)
    observed = network_formulations(model, [(x, y)], likelihood, estimator=Empirical())
    torch.testing.assert_close(observed.curvature, under.score, **EXACT)
    assert observed.gap > 0.05  # of the scores
    if isinstance(likelihood, Categorical):
        return  # its two rows of weights have one direction too many
    scores = fisher_information(
        model, [(x, y)], likelihood, structure=Dense(), estimator=Empirical()
    )
    fisher = fisher_information(model, [(x, y)], likelihood, structure=Dense())
    torch.testing.assert_close(observed.sandwich / 6, robust_covariance(fisher, scores))


def test_the_residuals_times_second_derivatives_are_the_gap():
    """Of a normal likelihood the gap is proportional to the residuals."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, noise = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    fisher = network_formulations(model, [(x, model(x).detach())], Gaussian()).score
    gaps = []
    for size in (0.0, 1e-3, 1.0):
        data = [(x, model(x).detach() + size * noise)]
        found = network_formulations(model, data, Gaussian(), estimator=Empirical())
        gaps.append(found.curvature - fisher)
    torch.testing.assert_close(gaps[0], torch.zeros_like(fisher), **EXACT)
    torch.testing.assert_close(gaps[1] * 1e3, gaps[2], rtol=1e-9, atol=1e-9)
    assert float(gaps[2].norm() / fisher.norm()) > 0.05


def test_any_batches_and_some_parameters_and_nothing_is_disturbed(case):
    likelihood, model, x, y = case
    model.train()
    whole = network_formulations(model, [(x, y)], likelihood, estimator=Empirical())
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    parts = network_formulations(model, iter(halves), likelihood, estimator=Empirical())
    torch.testing.assert_close(parts.curvature, whole.curvature, **EXACT)
    some = network_formulations(
        model, halves, likelihood, estimator=Empirical(), parameters=["3.*"]
    )
    torch.testing.assert_close(some.curvature, whole.curvature[16:, 16:], **EXACT)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_more_examples_and_parameters_than_are_taken_at_once(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    whole = network_formulations(model, [(x, y)])
    monkeypatch.setattr("ewc.statistics.curvature.EXAMPLES", 2)
    monkeypatch.setattr("ewc.statistics.curvature.ROWS", 3)
    parts = network_formulations(model, [(x, y)])
    torch.testing.assert_close(parts.curvature, whole.curvature, **EXACT)
    torch.testing.assert_close(
        parts.curvature, reference.categorical_fisher(model, [(a,) for a in x]), **EXACT
    )


def line(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def test_the_divergence_is_the_quadratic_to_third_order(case):
    likelihood, model, x, y = case
    model.eval()
    direction = line(model)
    steps = [sign * t for t in (1e-3, 2e-3, 4e-3, 8e-3) for sign in (1, -1)]
    fisher = fisher_information(model, [(x, y)], likelihood, structure=Dense())
    found = divergence_profile(
        model, [(x[:2], y[:2]), (x[2:], y[2:])], fisher, likelihood,
        direction=direction, steps=steps,
    )  # fmt: skip
    assert found.order == pytest.approx(3, abs=0.1)
    # A larger matrix is wrong in the second order.
    wrong = divergence_profile(
        model, [(x, y)], 1.1 * fisher, likelihood, direction=direction, steps=steps
    )
    torch.testing.assert_close(wrong.quadratic, 1.1 * found.quadratic)
    torch.testing.assert_close(wrong.divergence, found.divergence, **EXACT)
    assert wrong.order == pytest.approx(2, abs=0.1)


def test_of_a_softmax_it_is_the_divergence_by_hand():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    fisher = fisher_information(model, [(x, y)], structure=Kronecker())
    direction = line(model)
    weight, bias = model.weight.detach(), model.bias.detach()
    found = divergence_profile(model, [(x, y)], fisher, direction=direction, steps=[-0.5, 2.0])
    for step, value, quadratic in zip((-0.5, 2.0), found.divergence, found.quadratic, strict=True):
        moved = x @ (weight + step * direction["weight"]).T
        moved = moved + bias + step * direction["bias"]
        p, q = torch.softmax(x @ weight.T + bias, 1), torch.softmax(moved, 1)
        expected = float((p * (p / q).log()).sum() / 5)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        form = float(fisher.quadratic_form(direction))
        assert float(quadratic) == pytest.approx(step**2 * form / 2, rel=1e-6)
    assert model.training


def test_of_a_linear_gaussian_model_it_is_the_quadratic():
    model = nn.Linear(3, 2).double()
    data = [(torch.randn(5, 3).double(), torch.zeros(5, 2).double())]
    fisher = fisher_information(model, data, Gaussian(0.5), structure=Dense())
    found = divergence_profile(
        model, data, fisher, Gaussian(0.5), direction=line(model), steps=[0.1, 3.0]
    )
    torch.testing.assert_close(found.divergence, found.quadratic, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found.error, (found.divergence - found.quadratic).abs(), rtol=0, atol=0
    )


def test_mistakes_are_named():
    model = nn.Linear(3, 2)
    data = [(torch.randn(5, 3), torch.zeros(5).long())]
    with pytest.raises(TypeError, match=r"must be Exact\(\) or Empirical\(\), got MonteCarlo"):
        network_formulations(model, data, estimator=MonteCarlo())
    with pytest.raises(ValueError, match="data is empty"):
        network_formulations(model, [], estimator=Exact())
    fisher = fisher_information(model, data)
    for steps in ([], [0.1, 0.0], [math.inf]):
        with pytest.raises(ValueError, match="one or more finite numbers, none of them 0, got"):
            divergence_profile(model, data, fisher, direction=line(model), steps=steps)
    with pytest.raises(ValueError, match="at least one example, got none"):
        divergence_profile(model, [], fisher, direction=line(model), steps=[1.0])
    direction = {"weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="The direction lacks parameter 'bias'"):
        divergence_profile(model, data, fisher, direction=direction, steps=[1.0])
