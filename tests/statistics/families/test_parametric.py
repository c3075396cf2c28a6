"""The Fisher information of parametric families, against closed forms."""

import math
from functools import partial

import pytest
import torch
from scipy.special import i0e, i1e
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Chi2,
    Exponential,
    Gamma,
    Geometric,
    HalfCauchy,
    InverseGamma,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
    constraints,
)

from ewc.statistics import (
    Density,
    cramer_rao_bound,
    expectation,
    formulations,
    parametric_fisher,
    sampled_parametric_fisher,
)

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def t(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def trigamma(x):
    return float(torch.polygamma(1, t(x)))


def categorical(p):
    return Categorical(logits=torch.cat([p["logits"], torch.zeros(1, dtype=torch.float64)]))


PROBABILITIES = torch.softmax(t(0.3, -1.0, 0.0), 0)[:2]
FAMILIES = {
    "Bernoulli": (lambda p: Bernoulli(p["p"]), {"p": t(0.3)}, [[1 / 0.21]]),
    "Bernoulli by its logit": (lambda p: Bernoulli(logits=p["z"]), {"z": t(-2.0)},
        [[float(torch.sigmoid(t(2.0)) * torch.sigmoid(t(-2.0)))]]),
    "Gaussian, mean and variance": (lambda p: Normal(p["m"], p["v"].sqrt()),
        {"m": t(1000.0), "v": t(1e-3)}, [[1e3, 0], [0, 5e5]]),
    "Gaussian far out": (lambda p: Normal(p["m"], p["s"]), {"m": t(-1e6), "s": t(1e4)},
        [[1e-8, 0], [0, 2e-8]]),
    "Poisson": (lambda p: Poisson(p["rate"]), {"rate": t(0.02)}, [[50.0]]),
    "Poisson of many": (lambda p: Poisson(p["rate"]), {"rate": t(3e4)}, [[1 / 3e4]]),
    "exponential": (lambda p: Exponential(p["rate"]), {"rate": t(2.5)}, [[0.16]]),
    "categorical": (categorical, {"logits": t(0.3, -1.0)},
        (PROBABILITIES.diag() - torch.outer(PROBABILITIES, PROBABILITIES)).tolist()),
    "binomial": (lambda p: Binomial(20, p["p"]), {"p": t(0.3)}, [[20 / 0.21]]),
    "geometric": (lambda p: Geometric(p["p"]), {"p": t(0.01)}, [[1 / (1e-4 * 0.99)]]),
    "Cauchy": (lambda p: Cauchy(p["l"], p["s"]), {"l": t(5.0), "s": t(2.0)},
        [[1 / 8, 0], [0, 1 / 8]]),
    "Gamma, infinite at 0": (lambda p: Gamma(p["a"], p["b"]), {"a": t(0.5), "b": t(2.0)},
        [[trigamma(0.5), -0.5], [-0.5, 0.125]]),
    "Beta, infinite at 0": (lambda p: Beta(p["a"], p["b"]), {"a": t(0.5), "b": t(2.0)},
        [[trigamma(0.5) - trigamma(2.5), -trigamma(2.5)],
         [-trigamma(2.5), trigamma(2.0) - trigamma(2.5)]]),
    "Student": (lambda p: StudentT(t(3.0), p["m"], t(2.0)), {"m": t(0.5)}, [[4 / 6 / 4]]),
    "Pareto's shape": (lambda p: Pareto(t(2.0), p["a"]), {"a": t(1.5)}, [[1 / 2.25]]),
    "log-normal": (lambda p: LogNormal(p["m"], p["s"]), {"m": t(0.3), "s": t(0.5)},
        [[4.0, 0], [0, 8.0]]),
    "a density of one's own": (
        lambda p: Density(lambda x: -(x - p["m"]).cosh().square().log() - math.log(2),
                          location=40.0), {"m": t(40.0)}, [[4 / 3]]),
    "one below a bound": (
        lambda p: Density(lambda x: p["r"].log() + p["r"] * x, constraints.less_than(0.0),
                          location=-2.0), {"r": t(0.5)}, [[4.0]]),
}  # fmt: skip


def check(found, expected):
    """The entries in units in which the expected diagonal is 1."""
    expected = torch.tensor(expected, dtype=torch.float64)
    scale = expected.diagonal().sqrt()
    unit = scale * scale[:, None]
    torch.testing.assert_close(found / unit, expected / unit, **EXACT)


@pytest.mark.parametrize("name", FAMILIES)
def test_closed_forms(name):
    family, parameters, expected = FAMILIES[name]
    fisher = parametric_fisher(family, parameters)
    found, expected = fisher.to_dense(), t(*expected).view(fisher.num_parameters, -1)
    scale = expected.diagonal().sqrt()
    torch.testing.assert_close(
        found / scale / scale[:, None], expected / scale / scale[:, None], **EXACT
    )
    assert (fisher.num_examples, list(fisher.shapes)) == (1, list(parameters))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_formulations_agree_where_the_family_is_right(name):
    family, parameters, expected = FAMILIES[name]
    found = formulations(family, parameters)
    check(found.score, expected)
    check(found.curvature, expected)
    assert found.gap < 1e-8


def gamma_information(a, b):
    return [[trigamma(a), -1 / b], [-1 / b, a / b**2]]


def beta_information(a, b):
    both = trigamma(a + b)
    return [[trigamma(a) - both, -both], [-both, trigamma(b) - both]]


def von_mises_information(k):
    """By scipy's scaled Bessel functions, or their asymptotic series."""
    ratio = i1e(k) / i0e(k)
    spread = 1 - ratio / k - ratio**2 if k < 1e3 else 0.5 / k**2 + 0.25 / k**3 + 0.375 / k**4
    return [[k * ratio, 0], [0, spread]]


def normal_information(scale):
    return [[1 / scale**2, 0], [0, 2 / scale**2]]


EULER = 0.5772156649015329
WEIBULL = (1 - EULER) ** 2 + math.pi**2 / 6
EXTREMES = [
    *((LogNormal, ab, normal_information(ab[1]))
      for ab in ((0.0, 0.01), (5.0, 1e-6), (-300.0, 0.5), (0.0, 500.0))),
    *((Normal, ab, normal_information(ab[1])) for ab in ((0.0, 1e-100), (1e6, 1.0), (3e100, 1e99))),
    *((Beta, ab, beta_information(*ab))
      for ab in ((2e3, 5e3), (1e-3, 1e-3), (2.0, 0.01), (0.5, 0.5), (1e5, 0.1), (1e6, 1e6))),
    *((Gamma, ab, gamma_information(*ab))
      for ab in ((1e5, 1e-3), (1e9, 1e5), (1e-3, 1.0), (0.01, 1e3), (20.0, 1e-10))),
    *((InverseGamma, ab, gamma_information(*ab)) for ab in ((1e5, 1e-3), (0.01, 1.0))),
    *((VonMises, (1.0, k), von_mises_information(k))
      for k in (1e-3, 0.5, 3.7, 3.75, 29.0, 100.0, 1e5, 1e8)),
    *((Weibull, (s, k), [[k**2 / s**2, -(1 - EULER) / s], [-(1 - EULER) / s, WEIBULL / k**2]])
      for s, k in ((1.0, 0.002), (1e5, 30.0), (1e-5, 1e4))),
    *((Cauchy, ab, [[0.5 / ab[1] ** 2, 0], [0, 0.5 / ab[1] ** 2]])
      for ab in ((1e3, 1e-3), (0.0, 1e-100))),
    *((Chi2, (k,), [[trigamma(k / 2) / 4]]) for k in (1e-3, 1e5)),
    *((HalfCauchy, (s,), [[0.5 / s**2]]) for s in (1e-100, 1e10)),
    *((Geometric, (p,), [[1 / (p**2 * (1 - p))]]) for p in (1e-20, 1e-6, 0.999, 1 - 1e-12)),
    *((Bernoulli, (p,), [[1 / (p * (1 - p))]]) for p in (1e-20, 1 - 1e-12)),
    *((Poisson, (r,), [[1 / r]]) for r in (1e-100, 1e6, 1e12)),
    *((partial(Binomial, n), (p,), [[n / (p * (1 - p))]])
      for n, p in ((20, 1e-20), (10**6, 0.5), (10**10, 1e-12), (10**10, 0.3))),
    *((partial(NegativeBinomial, t(r)), (p,), [[r / (p * (1 - p) ** 2)]])
      for r, p in ((0.01, 1 - 1e-9), (5.0, 1e-12), (1e6, 0.999))),
]  # fmt: skip


def extreme(case):
    name = getattr(case[0], "__name__", "") or f"{case[0].func.__name__}{case[0].args}"
    return f"{name}{case[1]}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if place % 3 else case
        for place, case in enumerate(EXTREMES)
    ],
    ids=extreme,
)
def test_densities_that_are_narrow_wide_singular_or_far_away(case):
    family, values, expected = case
    names = [f"p{index}" for index in range(len(values))]
    parameters = {name: t(value) for name, value in zip(names, values, strict=True)}

    def member(p):
        return family(*(p[name] for name in names))

    check(parametric_fisher(member, parameters).to_dense(), expected)
    found = formulations(member, parameters)
    check(found.score, expected)
    check(found.curvature, expected)


def test_a_mixture_of_far_parts():
    """Mixed of parts that do not overlap: the information of each, times its share."""
    found = parametric_fisher(
        lambda p: MixtureSameFamily(Categorical(t(0.3, 0.7)), Normal(p["m"], t(1.0, 0.5))),
        {"m": t(0.0, 20.0)},
    )
    check(found.to_dense(), [[0.3, 0], [0, 2.8]])


@pytest.mark.parametrize(
    ("family", "parameters", "message"),
    [
        (lambda p: Uniform(t(0.0), p["a"]), {"a": t(1.0)}, "expected score of parameter 0 is -1"),
        (lambda p: Pareto(p["a"], t(2.0)), {"a": t(1.0)}, "expected score of parameter 0 is 2,"),
        (lambda p: Normal(p["a"], 1e-9), {"a": t(1e6)}, "does not converge"),
        (lambda p: StudentT(t(0.01), p["a"]), {"a": t(0.0)}, "does not converge"),
        (lambda p: Bernoulli(p["a"]), {"a": t(1.0)},
         "expected score of parameter 0 is 1,|is not finite"),
        (lambda p: Density(lambda x: -(x - p["a"]).square(), location=0.3), {"a": t(0.3)},
         r"The mass of the Density must be 1, got 1\.77245385"),
    ],
)  # fmt: skip
def test_what_has_no_right_value_is_refused(family, parameters, message):
    for function in (parametric_fisher, formulations):
        with pytest.raises(ArithmeticError, match=message):
            function(family, parameters)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        (lambda p: Laplace(p["a"], t(1.0)), {"a": t(0.0)}),
        (lambda p: StudentT(p["a"], t(0.0), t(1.0)), {"a": t(1e4)}),
    ],
)
def test_second_derivatives_that_say_nothing_are_refused(family, parameters):
    with pytest.raises(ArithmeticError, match="the formulations differ by"):
        formulations(family, parameters)


def test_the_gap_and_the_sandwich_of_a_wrong_family():
    """A Gaussian fitted to a Laplace distribution: moments 2 b^2 and 24 b^4 in closed form."""
    b, m = 1.5, 0.7
    variance, fourth = 2 * b**2, 24 * b**4
    found = formulations(
        lambda p: Normal(p["m"], p["v"].sqrt()),
        {"m": t(m), "v": t(variance)},
        truth=Laplace(t(m), t(b)),
    )
    curvature = torch.diag(t(1 / variance, 0.5 / variance**2))
    score = torch.diag(t(1 / variance, (fourth - variance**2) / (4 * variance**4)))
    torch.testing.assert_close(found.curvature, curvature, **EXACT)
    torch.testing.assert_close(found.score, score, **EXACT)
    assert found.gap == pytest.approx(float((score - curvature).norm() / curvature.norm()))
    # The variance of the sample variance is (mu_4 - sigma^4) / N; the inverse of the
    # information says 2 sigma^4 / N.
    sandwich = torch.diag(t(variance, fourth - variance**2))
    torch.testing.assert_close(found.sandwich, sandwich, **EXACT)
    assert fourth - variance**2 > 2 * variance**2


def test_sampled_matrices_lie_within_their_standard_errors():
    family, parameters = FAMILIES["Gaussian, mean and variance"][:2]
    state = torch.random.get_rng_state()
    expected = torch.diag(t(1e3, 5e5))
    scores = []
    for seed in range(40):
        fisher, error = sampled_parametric_fisher(family, parameters, 2000, seed)
        scores.append((fisher.to_dense() - expected) / error)
    z = torch.stack(scores)
    assert float(z.abs().max()) < 5
    assert 0.8 < float(z.std()) < 1.2
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"num_samples must .*, got 1"):
        sampled_parametric_fisher(family, parameters, 1)
    with pytest.raises(TypeError, match="A Density cannot be sampled"):
        sampled_parametric_fisher(*FAMILIES["one below a bound"][:2], 10)


def test_distributions_of_vectors_are_sampled():
    mean = t(1.0, -1.0)
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    fisher, error = sampled_parametric_fisher(
        lambda p: MultivariateNormal(p["m"], covariance), {"m": mean}, 20000
    )
    z = (fisher.to_dense() - covariance.inverse()) / error
    assert float(z.abs().max()) < 4
    with pytest.raises(ValueError, match=r"must be of a scalar, got shape \[2\]"):
        parametric_fisher(lambda p: MultivariateNormal(p["m"], covariance), {"m": mean})
    with pytest.raises(ValueError, match=r"must be of a scalar, got shape \[2\]"):
        parametric_fisher(lambda p: Normal(p["m"], 1.0), {"m": mean})


@pytest.mark.slow
def test_what_does_not_converge_says_so():
    with pytest.raises(ArithmeticError, match="does not converge"):
        expectation(lambda x: x.abs(), Cauchy(t(0.0), t(1.0)))  # no mean
    slow = Density(
        lambda x: -2 * (x + 1).log() - math.log(math.pi**2 / 6), constraints.nonnegative_integer
    )
    with pytest.raises(ArithmeticError, match="did not end"):
        expectation(lambda x: x, slow)
    with pytest.raises(ValueError, match="take samples instead"):
        expectation(lambda x: x, Density(lambda x: x, constraints.simplex))


def test_the_bound_of_functions_and_of_biased_estimators():
    family, parameters = FAMILIES["Gaussian, mean and variance"][:2]
    fisher = parametric_fisher(family, parameters)
    v = float(parameters["v"])
    bound = cramer_rao_bound(fisher, 10)
    torch.testing.assert_close(bound, torch.diag(t(v / 10, 2 * v**2 / 10)), rtol=1e-9, atol=1e-15)
    # The standard deviation: d sqrt(v) / dv = 1 / (2 sqrt v), so v / (2 N).
    deviation = cramer_rao_bound(
        fisher, 10, parameters=parameters, function=lambda p: p["v"].sqrt()
    )
    assert deviation.item() == pytest.approx(v / 20)
    # The variance with divisor N has mean (N - 1) / N v and variance 2 (N - 1) / N^2 v^2.
    n = 10
    biased = cramer_rao_bound(
        fisher, n, parameters=parameters, function=lambda p: p["v"], bias=lambda p: -p["v"] / n
    )
    assert biased.item() == pytest.approx(2 * v**2 / n * ((n - 1) / n) ** 2)
    assert 2 * (n - 1) / n**2 * v**2 > biased.item()
    both = cramer_rao_bound(
        fisher, n, parameters=parameters, bias=lambda p: torch.stack([0 * p["m"], -p["v"] / n])
    )
    assert both[1, 1].item() == pytest.approx(biased.item())
    for arguments, message in [
        ({"num_examples": 0}, "num_examples must .*, got 0"),
        ({"function": lambda p: p["v"]}, "parameters must be given"),
        (
            {"parameters": parameters, "bias": lambda p: p["v"]},
            "as many .* as function, 2, got 1",
        ),
        ({"parameters": {"m": t(1.0)}, "bias": lambda p: p["m"]}, "The set of parameters"),
    ]:
        with pytest.raises(ValueError, match=message):
            cramer_rao_bound(fisher, **{"num_examples": 5} | arguments)


def test_simulated_estimators_are_not_below_the_bound_and_reach_it():
    """The rate of an exponential distribution: 1 / mean has variance N^2 r^2 / ((N-1)^2 (N-2))."""
    rate = 2.0
    fisher = parametric_fisher(lambda p: Exponential(p["rate"]), {"rate": t(rate)})
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for n in (5, 50, 500):
        draws = torch.empty(20000, n, dtype=torch.float64).exponential_(rate, generator=generator)
        unbiased = (n - 1) / n / draws.mean(1)  # uniformly of least variance
        bound = cramer_rao_bound(fisher, n).item()
        assert bound == pytest.approx(rate**2 / n)
        ratio = unbiased.var().item() / bound
        # The fourth moment of the estimate decides the chance of its sample variance.
        error = ((unbiased - unbiased.mean()).square().std() / 20000**0.5).item() / bound
        assert ratio == pytest.approx(n / (n - 2), abs=5 * error)
        assert ratio > 1 - 3 * error
        ratios.append(ratio)
    assert ratios[0] > 1.4
    assert abs(ratios[-1] - 1) < 0.05
