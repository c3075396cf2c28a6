"""Distances of distributions: what a metric must fulfil, and lengths by quadrature."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Exponential,
    Gamma,
    MultivariateNormal,
    Normal,
    Poisson,
    kl_divergence,
)

from ewc import Bernoulli as BernoulliLikelihood
from ewc import Dense, fisher_information
from ewc.statistics import fisher_rao_distance, parametric_fisher, path_length


def t(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
TRIPLES = {
    "Bernoulli": [Bernoulli(t(p)) for p in (0.01, 0.3, 0.99)],
    "categorical": [
        Categorical(t(*p)) for p in ((0.2, 0.3, 0.5), (0.8, 0.1, 0.1), (0.0, 0.5, 0.5))
    ],
    "Poisson": [Poisson(t(r)) for r in (0.1, 4.0, 50.0)],
    "exponential": [Exponential(t(r)) for r in (0.1, 4.0, 50.0)],
    "normal": [Normal(t(m), t(s)) for m, s in ((0.0, 1.0), (2.0, 0.5), (-3.0, 4.0))],
    "normal of one covariance": [
        MultivariateNormal(t(*m), COVARIANCE) for m in ((0.0, 1.0), (2.0, 0.5), (-3.0, 4.0))
    ],
    "normal of one mean": [
        MultivariateNormal(t(1.0, 2.0), c)
        for c in (COVARIANCE, COVARIANCE.inverse(), 3 * torch.eye(2, dtype=torch.float64))
    ],
}


@pytest.mark.parametrize("name", TRIPLES)
def test_a_distance_is_symmetric_and_has_the_triangle_inequality(name):
    a, b, c = TRIPLES[name]
    for one, two in ((a, b), (b, c), (a, c)):
        assert fisher_rao_distance(one, two).item() == pytest.approx(
            fisher_rao_distance(two, one).item(), rel=1e-12
        )
        assert fisher_rao_distance(one, two).item() > 0
    ab, bc, ac = (fisher_rao_distance(*pair).item() for pair in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-12
    assert ab <= ac + bc + 1e-12
    assert fisher_rao_distance(a, a).item() == 0


NEAR = {
    "Bernoulli": lambda e: Bernoulli(t(0.3) + e),
    "categorical": lambda e: Categorical(t(0.2, 0.3, 0.5) + e * t(1.0, -0.4, -0.6)),
    "Poisson": lambda e: Poisson(t(3.0) + e),
    "exponential": lambda e: Exponential(t(3.0) + e),
    "normal": lambda e: Normal(t(1.0) + e, t(0.5) - 2 * e),
    "normal of one covariance": lambda e: MultivariateNormal(t(1.0, 2.0) + e, COVARIANCE),
    "normal of one mean": lambda e: MultivariateNormal(
        t(1.0, 2.0), COVARIANCE + e * torch.tensor([[1.0, 0.3], [0.3, -0.5]], dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_by_it_is_the_root_of_twice_the_divergence(name):
    gaps = []
    for e in (1e-2, 1e-3):
        distance = fisher_rao_distance(NEAR[name](0.0), NEAR[name](e)).item()
        root = (2 * kl_divergence(NEAR[name](0.0), NEAR[name](e))).sqrt().item()
        gaps.append(abs(distance / root - 1))
    assert gaps[0] < 0.05
    assert gaps[1] < max(0.15 * gaps[0], 1e-6)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        (Bernoulli, (0.05, 0.8)),
        pytest.param(Poisson, (0.5, 20.0), marks=pytest.mark.slow),
        (Exponential, (0.5, 20.0)),
    ],
)
def test_with_one_parameter_it_is_the_integral_of_the_root_of_the_information(family, ends):
    def speed(theta):
        return parametric_fisher(lambda p: family(p["t"]), {"t": t(theta)}).to_dense().item() ** 0.5

    expected, _ = quad(speed, *ends, epsrel=1e-9)
    found = fisher_rao_distance(family(t(ends[0])), family(t(ends[1])))
    assert found.item() == pytest.approx(expected, rel=1e-7)


def test_the_geodesics_of_normal_distributions_are_half_circles():
    """Along mean = sqrt(2) r cos(a), deviation = r sin(a) distances add up."""
    points = [Normal(math.sqrt(2) * 2 * t(a).cos(), 2 * t(a).sin()) for a in (0.3, 1.0, 1.2, 2.5)]
    steps = sum(fisher_rao_distance(a, b).item() for a, b in pairwise(points))
    assert fisher_rao_distance(points[0], points[-1]).item() == pytest.approx(steps, rel=1e-12)
    # Of one mean: the root of two times the logarithm.
    found = fisher_rao_distance(Normal(t(3.0), t(1.0)), Normal(t(3.0), t(math.e)))
    assert found.item() == pytest.approx(math.sqrt(2))


def test_it_is_the_same_in_any_units():
    a, b = Normal(t(0.0), t(1.0)), Normal(t(2.0), t(0.5))
    moved = [Normal(-7 * n.loc + 3, 7 * n.scale) for n in (a, b)]
    assert fisher_rao_distance(*moved).item() == pytest.approx(fisher_rao_distance(a, b).item())
    change = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    for name in ("normal of one mean", "normal of one covariance"):
        pair = TRIPLES[name][:2]
        moved = [
            MultivariateNormal(change @ n.loc, change @ n.covariance_matrix @ change.T)
            for n in pair
        ]
        expected = fisher_rao_distance(*pair).item()
        assert fisher_rao_distance(*moved).item() == pytest.approx(expected, rel=1e-9)
    # Of independent components: the squares add up.
    spreads = t(0.5, 3.0), t(2.0, 0.1)
    both = [MultivariateNormal(t(0.0, 0.0), torch.diag(s.square())) for s in spreads]
    single = fisher_rao_distance(Normal(t(0.0), spreads[0]), Normal(t(0.0), spreads[1]))
    assert fisher_rao_distance(*both).item() == pytest.approx(single.norm().item())


def test_batches_and_far_and_near_pairs():
    found = fisher_rao_distance(Bernoulli(t(0.0, 0.5)), Bernoulli(t(1.0, 0.5 + 1e-9)))
    assert found[0].item() == pytest.approx(math.pi)
    assert found[1].item() == pytest.approx(2e-9, rel=1e-6)
    # An arccosine near 1 would have no digits left.
    close = [Categorical(t(0.5, 0.5 - e, e)) for e in (0.1, 0.1 + 1e-9)]
    expected = (1e-18 * (1 / 0.4 + 1 / 0.1)) ** 0.5
    assert fisher_rao_distance(*close).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Normal(t(0.0), t(1e-3)), Normal(t(10.0), t(1e-3)), 25.070518449342345),
        (Normal(t(0.0), t(1.0)), Normal(t(0.0), t(1e16)), math.sqrt(2) * 16 * math.log(10)),
        (Normal(t(0.0), t(1e-150)), Normal(t(0.0), t(1e150)), math.sqrt(2) * 300 * math.log(10)),
        (Normal(t(0.0), t(1.0)), Normal(t(1e-9), t(1.0)), 1e-9),
        (Normal(t(0.0), t(1e-200)), Normal(t(1e-200), t(1e-200)), 0.9802581434685472),
        (Exponential(t(3.0)), Exponential(t(3 * (1 + 2.0**-40))), 2.0**-40),
        (Exponential(t(1e-300)), Exponential(t(1e300)), 600 * math.log(10)),
        (Poisson(t(4.0)), Poisson(t(4 * (1 + 2.0**-40))), 2.0**-39),
        (Bernoulli(logits=t(40.0)), Bernoulli(logits=t(50.0)), 2 * (math.exp(-20) - math.exp(-25))),
        (Bernoulli(logits=t(4000.0)), Bernoulli(logits=t(0.0)), math.pi / 2),
        (Bernoulli(t(0.5)), Bernoulli(t(0.5 + 2.0**-40)), 2.0**-39),
        (
            MultivariateNormal(t(0.0, 0.0), torch.diag(t(1e-32, 1.0))),
            MultivariateNormal(t(0.0, 0.0), torch.diag(t(1.0, 4.0))),
            math.hypot(32 * math.log(10), math.log(4)) / math.sqrt(2),
        ),
    ],
)
def test_very_far_and_very_near_pairs_keep_their_digits(first, second, expected):
    assert fisher_rao_distance(first, second).item() == pytest.approx(expected, rel=1e-11)
    assert fisher_rao_distance(second, first).item() == pytest.approx(expected, rel=1e-11)


def test_covariances_too_far_apart_are_right_or_refused():
    """Relative deviations 10^k, 1 and 10^-k in turned axes."""
    axes, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    mean = torch.zeros(3, dtype=torch.float64)
    unit = MultivariateNormal(mean, torch.eye(3, dtype=torch.float64))
    for k in (2, 3):
        turned = axes @ torch.diag(10.0 ** (2 * k * t(1.0, 0.0, -1.0))) @ axes.T
        found = fisher_rao_distance(unit, MultivariateNormal(mean, (turned + turned.T) / 2))
        assert found.item() == pytest.approx(2 * k * math.log(10), rel=1e-4)
    lower = torch.tensor([[1e12, 0, 0], [1, 1, 0], [1, 1, 1e-12]], dtype=torch.float64)
    far = MultivariateNormal(mean, scale_tril=lower)
    with pytest.raises(ArithmeticError, match="too few digits of those between"):
        fisher_rao_distance(unit, far)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="Bernoulli and Poisson are two families"):
        fisher_rao_distance(Bernoulli(t(0.5)), Poisson(t(1.0)))
    with pytest.raises(TypeError, match="Gamma and Gamma have no closed form"):
        fisher_rao_distance(Gamma(t(1.0), t(1.0)), Gamma(t(2.0), t(1.0)))
    with pytest.raises(ValueError, match="Means and covariances both differ"):
        fisher_rao_distance(
            TRIPLES["normal of one mean"][0], MultivariateNormal(t(0.0, 0.0), 2 * COVARIANCE)
        )
    with pytest.raises(
        ValueError, match="number of points must be a whole number, 2 or more, got 1"
    ):
        path_length([{"w": t(0.0)}], lambda _: None)


def test_the_length_of_a_path_of_networks():
    """A logistic regression with one weight and the input 1 is a Bernoulli by its logit."""
    model = nn.Linear(1, 1, bias=False).double()
    data = [(torch.ones(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))]

    def fisher_at(parameters):
        with torch.no_grad():
            model.weight.copy_(parameters["weight"])
        return fisher_information(model, data, BernoulliLikelihood(), structure=Dense())

    ends = Bernoulli(logits=t(-2.0)), Bernoulli(logits=t(1.5))
    expected = fisher_rao_distance(*ends).item()
    errors = []
    for steps in (8, 16, 32):
        path = [{"weight": w.view(1, 1)} for w in torch.linspace(-2.0, 1.5, steps + 1).double()]
        errors.append(path_length(path, fisher_at) - expected)
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.05)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.05)
    # There and back again is twice as long.
    there_and_back = [*path, *path[::-1]]
    assert path_length(there_and_back, fisher_at) == pytest.approx(2 * (errors[2] + expected))
