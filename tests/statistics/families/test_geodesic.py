"""Numeric geodesics: closed forms, the geodesic equation, and what a distance must fulfil."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import polygamma
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    Uniform,
    Weibull,
)

from ewc.statistics import (
    fisher_metric,
    fisher_rao_distance,
    geodesic,
    geodesic_distance,
    parametric_fisher,
)


def t(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def categorical(p):
    return Categorical(torch.cat([p["p"], 1 - p["p"].sum(0, keepdim=True)]))


def gamma(p):
    return Gamma(p["shape"], p["rate"])


def beta(p):
    return Beta(p["a"], p["b"])


def normal(p):
    return Normal(p["mean"], p["deviation"])


PAIRS = {
    "Bernoulli": (lambda p: Bernoulli(p["p"]), {"p": t(0.01)}, {"p": t(0.9)}),
    "Poisson": (lambda p: Poisson(p["rate"]), {"rate": t(0.1)}, {"rate": t(30.0)}),
    "exponential": (lambda p: Exponential(p["rate"]), {"rate": t(0.1)}, {"rate": t(30.0)}),
    "categorical": (categorical, {"p": t(0.01, 0.01)}, {"p": t(0.8, 0.19)}),
    "normal": (
        normal,
        {"mean": t(0.0), "deviation": t(1.0)},
        {"mean": t(2.0), "deviation": t(0.5)},
    ),
    "normal far away": (
        normal,
        {"mean": t(0.0), "deviation": t(0.1)},
        {"mean": t(10.0), "deviation": t(0.1)},
    ),
    "normal of one mean": (
        lambda p: MultivariateNormal(t(1.0, 2.0), torch.diag(p["variances"])),
        {"variances": t(1.0, 2.0)},
        {"variances": t(0.3, 9.0)},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_distances_are_those_in_closed_form(name):
    family, start, end = PAIRS[name]
    expected = fisher_rao_distance(family(start), family(end)).item()
    assert geodesic_distance(family, start, end) == pytest.approx(expected, rel=1e-9)


TRIPLES = {
    "gamma": (
        gamma,
        [{"shape": t(a), "rate": t(b)} for a, b in ((1.0, 2.0), (5.0, 0.5), (0.5, 3))],
    ),
    "beta": (beta, [{"a": t(a), "b": t(b)} for a, b in ((1.0, 2.0), (5.0, 0.5), (0.5, 3.0))]),
    "Dirichlet": (
        lambda p: Dirichlet(p["a"]),
        [{"a": t(*a)} for a in ((1.0, 2.0, 3.0), (4.0, 0.5, 1.0), (0.5, 0.5, 0.5))],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIPLES)
def test_it_is_symmetric_and_has_the_triangle_inequality(name):
    family, (a, b, c) = TRIPLES[name]
    ab, bc, ac, ba = (geodesic_distance(family, *pair) for pair in ((a, b), (b, c), (a, c), (b, a)))
    assert ab == pytest.approx(ba, rel=1e-9)
    assert ab < ac + bc
    assert ac < ab + bc
    assert bc < ab + ac
    assert geodesic_distance(family, a, a) == 0


@pytest.mark.slow
def test_it_is_the_same_in_all_parameters():
    ends = ((1.0, 2.0), (5.0, 0.5))
    expected = geodesic_distance(gamma, *({"shape": t(a), "rate": t(b)} for a, b in ends))
    by_mean = geodesic_distance(
        lambda p: Gamma(p["shape"].exp(), p["shape"].exp() / p["mean"]),
        *({"shape": t(a).log(), "mean": t(a / b)} for a, b in ends),
    )
    assert by_mean == pytest.approx(expected, rel=1e-9)
    as_vector = geodesic_distance(
        lambda p: Gamma(p["both"][0].square(), 1 / p["both"][1]),
        *({"both": t(a**0.5, 1 / b)} for a, b in ends),
    )
    assert as_vector == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("forwards", "back"),
    [(torch.log, torch.exp), (torch.square, torch.sqrt), (lambda s: 1 / s**2, lambda p: p**-0.5)],
    ids=["log deviation", "variance", "precision"],
)
def test_of_normal_distributions_it_is_the_same_in_all_parameters(forwards, back):
    ends = (t(-3.0), t(4.0)), (t(2.0), t(0.1))
    found = geodesic_distance(
        lambda p: Normal(p["mean"], back(p["spread"])),
        *({"mean": m, "spread": forwards(s)} for m, s in ends),
    )
    expected = fisher_rao_distance(*(Normal(m, s) for m, s in ends)).item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_path_is_a_half_circle_at_equal_distances():
    family, start, end = PAIRS["normal"]
    found = geodesic(fisher_metric(family), start, end, num_points=9)
    assert {name: len(points) for name, points in found.path.items()} == {"mean": 9, "deviation": 9}
    points = [family({n: x[i] for n, x in found.path.items()}) for i in range(9)]
    for one, two in pairwise(points):
        step = fisher_rao_distance(one, two).item()
        assert step == pytest.approx(found.distance / 8, rel=1e-6)
    # Mean over sqrt(2) and deviation lie on a circle around a point of the axis.
    x, y = found.path["mean"] / math.sqrt(2), found.path["deviation"]
    middle = ((x[-1] ** 2 + y[-1] ** 2) - (x[0] ** 2 + y[0] ** 2)) / (2 * (x[-1] - x[0]))
    radii = ((x - middle).square() + y.square()).sqrt()
    torch.testing.assert_close(radii, radii[:1].expand(9), rtol=1e-6, atol=0)
    for name in start:
        assert found.path[name][0] == start[name]
        assert found.path[name][-1] == end[name]


def test_the_path_solves_the_geodesic_equation():
    """Shot off with the path's first velocity, the equation's solution arrives at its end."""

    def information(theta):  # of a Gamma distribution, in closed form
        a, b = theta
        return np.array([[polygamma(1, a), -1 / b], [-1 / b, a / b**2]])

    def acceleration(_, state):
        theta, v = state[:2], state[2:]
        h = 1e-5
        slopes = np.stack(
            [(information(theta + h * e) - information(theta - h * e)) / (2 * h) for e in np.eye(2)]
        )  # [k, i, j]: along k
        force = np.einsum("kij,k,j->i", slopes, v, v) - 0.5 * np.einsum("ijk,j,k->i", slopes, v, v)
        return np.concatenate([v, -np.linalg.solve(information(theta), force)])

    start, end = np.array([1.0, 2.0]), np.array([5.0, 0.5])
    ends = ({"shape": t(a), "rate": t(b)} for a, b in (start, end))
    found = geodesic(fisher_metric(gamma), *ends, num_points=1001)
    x = torch.stack([found.path["shape"], found.path["rate"]], 1).numpy()
    velocity = (-3 * x[0] + 4 * x[1] - x[2]) * 1000 / 2
    speed = math.sqrt(velocity @ information(start) @ velocity)
    assert speed == pytest.approx(found.distance, rel=1e-4)
    shot = solve_ivp(acceleration, (0, 1), np.concatenate([start, velocity]), rtol=1e-9)
    assert shot.y[:2, -1] == pytest.approx(end, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "theta"),
    [
        (gamma, {"shape": t(1.3), "rate": t(0.8)}),
        (beta, {"a": t(1.3), "b": t(0.8)}),
        (normal, {"mean": t(1.3), "deviation": t(0.8)}),
        (categorical, {"p": t(0.2, 0.3)}),
        (lambda p: Binomial(7, p["p"]), {"p": t(0.3)}),
    ],
)
def test_the_metric_is_the_fisher_information(family, theta):
    expected = parametric_fisher(family, theta).to_dense()
    torch.testing.assert_close(fisher_metric(family)(theta), expected, rtol=1e-8, atol=1e-10)


def test_components_of_a_batch_are_independent():
    expected = fisher_rao_distance(Normal(t(0.0), t(1.0)), Normal(t(2.0), t(0.5))).item()
    found = geodesic_distance(
        normal,
        {"mean": t(0.0, 0.0), "deviation": t(1.0, 1.0)},
        {"mean": t(2.0, 2.0), "deviation": t(0.5, 0.5)},
    )
    assert found == pytest.approx(math.sqrt(2) * expected, rel=1e-9)
    ends = t(0.1, 0.2), t(0.3, 0.8)
    coins = fisher_rao_distance(*(Bernoulli(p) for p in ends))
    found = geodesic_distance(lambda p: Bernoulli(p["p"]), *({"p": p} for p in ends))
    assert found == pytest.approx(coins.norm().item(), rel=1e-9)


def test_a_metric_in_closed_form_in_single_precision():
    found = geodesic(
        lambda p: torch.diag(torch.stack([1 / p["s"] ** 2, 2 / p["s"] ** 2])),
        {"m": torch.tensor(0.0), "s": torch.tensor(1.0)},
        {"s": torch.tensor(1.0), "m": torch.tensor(2.0)},
    )
    expected = fisher_rao_distance(Normal(t(0.0), t(1.0)), Normal(t(2.0), t(1.0))).item()
    assert found.distance == pytest.approx(expected, rel=1e-9)
    assert list(found.path) == ["m", "s"]


def test_mistakes_are_named():
    start, end = {"shape": t(1.0), "rate": t(1.0)}, {"shape": t(2.0), "rate": t(1.0)}
    metric = fisher_metric(gamma)
    with pytest.raises(ValueError, match="The end lacks parameter 'rate'"):
        geodesic(metric, start, {"shape": t(2.0)})
    with pytest.raises(ValueError, match="num_points must be a whole number, 2 or more, got 1"):
        geodesic(metric, start, end, num_points=1)
    with pytest.raises(ValueError, match="tolerance must be a finite number above 0, got 0"):
        geodesic(metric, start, end, tolerance=0)
    with pytest.raises(ValueError, match="to satisfy the constraint GreaterThan"):
        geodesic_distance(gamma, start, {"shape": t(-1.0), "rate": t(1.0)})
    counts = {"count": t(2.0), "p": t(0.5)}
    with pytest.raises(NotImplementedError, match="no divergence of NegativeBinomial: give its"):
        geodesic_distance(lambda p: NegativeBinomial(p["count"], p["p"]), counts, counts)
    # One logit too many: a number added to all changes nothing.
    logits = {"logits": t(0.0, 1.0, 2.0)}, {"logits": t(2.0, 0.0, 0.0)}
    with pytest.raises(ArithmeticError, match="the metric is singular or infinite on the way"):
        geodesic_distance(lambda p: Categorical(logits=p["logits"]), *logits)
    # A metric with a jump has geodesics with a corner.
    with pytest.raises(ArithmeticError, match="with 192 polynomials the length"):
        geodesic(
            lambda p: (1 + (p["x"][0] > 0.3).double()) * torch.eye(2, dtype=torch.float64),
            {"x": t(0.0, 0.0)},
            {"x": t(1.0, 1.0)},
        )


def test_parameters_are_checked_where_torch_was_told_not_to():
    # The first torch.compile of a process does that.
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        good, bad = ({"shape": t(a), "rate": t(1.0)} for a in (1.0, -1.0))
        with pytest.raises(ValueError, match="to satisfy the constraint GreaterThan"):
            geodesic_distance(gamma, good, bad)
        with pytest.raises(ValueError, match="to satisfy the constraint GreaterThan"):
            parametric_fisher(gamma, bad)
        assert Distribution._validate_args is False
    finally:
        Distribution.set_default_validate_args(before)


def test_the_checks_of_distributions_are_left_as_they_were():
    before = Distribution._validate_args
    geodesic_distance(gamma, *({"shape": t(a), "rate": t(1.0)} for a in (1.0, 2.0)))
    with pytest.raises(RuntimeError, match="broken"):
        fisher_metric(broken)({"a": t(1.0)})
    assert Distribution._validate_args is before


def broken(_):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        (lambda p: Weibull(p["a"], p["b"]), {"a": t(1.0), "b": t(2.0)}),
        (lambda p: Kumaraswamy(p["a"], p["b"]), {"a": t(1.0), "b": t(2.0)}),
        (lambda p: Pareto(p["a"], p["b"]), {"a": t(1.0), "b": t(2.0)}),
        (lambda p: Uniform(0.0, p["b"]), {"b": t(2.0)}),
    ],
)
def test_divergences_that_give_no_metric_are_refused(family, parameters):
    with pytest.raises(ValueError, match="depends on the parameters"):
        fisher_metric(family)(parameters)
    farther = {name: 2 * value for name, value in parameters.items()}
    with pytest.raises(ValueError, match="depends on the parameters"):
        geodesic_distance(family, parameters, farther)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        (lambda p: Laplace(p["a"], p["b"]), {"a": t(0.3), "b": t(2.0)}),
        (lambda p: Bernoulli(p["a"]), {"a": t(1e-20)}),
        (lambda p: Pareto(2.0, p["a"]), {"a": t(0.3)}),
        (lambda p: LogNormal(p["a"], p["b"]), {"a": t(0.3), "b": t(0.01)}),
        (lambda p: InverseGamma(p["a"], p["b"]), {"a": t(0.3), "b": t(0.01)}),
    ],
)
def test_the_metric_is_the_information(family, parameters):
    expected = parametric_fisher(family, parameters).to_dense()
    torch.testing.assert_close(fisher_metric(family)(parameters), expected, rtol=1e-8, atol=1e-8)
