"""Outputs of every shape: one number, tokens, pixels."""

import pytest
import reference
import torch
from conftest import EXACT, batches
from torch import nn

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Diagonal,
    Empirical,
    Exact,
    Gaussian,
    Implicit,
    LowRank,
    MonteCarlo,
    Poisson,
    fisher_information,
)
from ewc.parameters import flatten

N = 7


class OneNumber(nn.Module):
    """Outputs ``[n]``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)[:, 0]


class Scaled(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale.sin()


def tokens():
    """Outputs ``[n, 2, 4]``."""
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.LayerNorm(4), Scaled(), nn.Linear(4, 4)
    )


def pixels():
    """Outputs ``[n, 4, 2, 3]``."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 4, 1)
    )


SHAPES = {"one_number": OneNumber, "tokens": tokens, "pixels": pixels}
LIKELIHOODS = [Gaussian(0.7), Bernoulli(), Poisson()]


class Flat(nn.Module):
    """The network with its outputs in one row, as the oracle takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).reshape(len(x), -1)


def inputs():
    return torch.randn(N, 6, dtype=torch.float64)


def entries_for(likelihood, outputs):
    """Targets of independent entries."""
    if isinstance(likelihood, Gaussian):
        return torch.randn_like(outputs)
    return torch.randint(2, outputs.shape).to(outputs)


def expected_entries(model, x, likelihood):
    examples = [(row,) for row in x]
    if isinstance(likelihood, Gaussian):
        return reference.gaussian_fisher(Flat(model), examples, likelihood.variance)
    if isinstance(likelihood, Bernoulli):
        log_prob, support = reference.log_bernoulli, range(2)
    else:
        log_prob, support = reference.log_poisson, range(60)
    return reference.fisher_by_moments(Flat(model), examples, log_prob, list(support))


@pytest.fixture(params=SHAPES)
def shaped(request):
    return SHAPES[request.param]().double()


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_outputs_of_every_shape_equal_brute_force(shaped, likelihood):
    x = inputs()
    y = entries_for(likelihood, shaped(x).detach())
    expected = expected_entries(shaped, x, likelihood)
    v = {n: torch.randn_like(p) for n, p in shaped.named_parameters()}
    for size in (1, 3, N):
        data = batches(x, y, size)
        for structure in (Dense(), LowRank(rank=len(expected)), Implicit(), Diagonal()):
            found = fisher_information(shaped, data, likelihood, structure=structure)
            torch.testing.assert_close(flatten(found.diagonal()), expected.diagonal(), **EXACT)
            if structure != Diagonal():
                product = flatten(found.matvec(v))
                torch.testing.assert_close(product, expected @ flatten(v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_observed_targets_of_every_shape_equal_brute_force(shaped, likelihood):
    x = inputs()
    y = entries_for(likelihood, shaped(x).detach())
    if isinstance(likelihood, Gaussian):
        expected = reference.empirical_fisher(
            Flat(shaped), [(row,) for row in x], y.reshape(N, -1), likelihood.variance
        )
    else:
        names = {Bernoulli: reference.log_bernoulli, Poisson: reference.log_poisson}
        expected = reference.empirical_by(
            Flat(shaped), [(row,) for row in x], y.reshape(N, -1), names[type(likelihood)]
        )
    found = fisher_information(
        shaped, batches(x, y, 3), likelihood, estimator=Empirical(), structure=Dense()
    )
    torch.testing.assert_close(found.to_dense(), expected, **EXACT)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_draws_for_outputs_of_every_shape_are_unbiased(shaped, likelihood):
    x = inputs()
    y = torch.zeros(N)
    expected = expected_entries(shaped, x, likelihood).diagonal()
    draws = []
    for seed in range(60):
        found = [
            flatten(
                fisher_information(
                    shaped, batches(x, y, size), likelihood, estimator=MonteCarlo(10, seed)
                ).diagonal()
            )
            for size in ((3, N) if seed == 0 else (N,))
        ]
        torch.testing.assert_close(found[0], found[-1], **EXACT)
        draws.append(found[0])
    draws = torch.stack(draws)
    z = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.square().mean()) < 3


def test_a_tolerance_holds_for_every_shape(shaped):
    x = inputs()
    data = batches(x, torch.zeros(N), 3)
    whole = fisher_information(shaped, data, Poisson()).trace()
    none = fisher_information(shaped, data, Poisson(), estimator=Exact(1e-12)).trace()
    torch.testing.assert_close(none, whole)
    most = fisher_information(shaped, data, Poisson(), estimator=Exact(0.3)).trace()
    assert most <= whole


def test_one_output_has_no_classes():
    data = [(inputs(), torch.zeros(N, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"^Batch 0: .*\[7\].*categorical.*take Bernoulli\(\)"):
        fisher_information(OneNumber().double(), data, Categorical())
