"""Families, ways to draw from them, and estimators of what they depend on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from scipy.special import gammaincinv
from torch import Tensor
from torch.distributions import Exponential, Laplace, Normal, Poisson

from ewc.parameters import Parameters
from ewc.statistics import Density
from ewc.statistics.bounds import Function
from ewc.statistics.families.parametric import Family

LATER = 1.0
"""The time at which the survival of an exponential distribution is estimated."""

Estimator = Callable[[Tensor], Tensor]
"""A function from data sets ``[s, n]`` to estimates ``[s]``."""


@dataclass(frozen=True)
class Estimated:
    r"""An estimator and its properties.

    Attributes:
        estimate: the function from data sets to estimates.
        maximum_likelihood: whether it is the maximum of the likelihood, or as good for large ``N``.
        function: the function of the parameters that it estimates; ``None`` for the parameter.
        bias: its bias as a function of the parameters, by the number of draws.
    """

    estimate: Estimator
    maximum_likelihood: bool = False
    function: Function | None = None
    bias: Callable[[int], Function] | None = None


@dataclass(frozen=True)
class Situation:
    """A family with its parameter, and estimators of it."""

    family: Family
    parameters: Parameters
    draw: Callable[[tuple[int, int], torch.Generator], Tensor]
    estimators: dict[str, Estimated] = field(default_factory=dict)


def scalar(value: float) -> Tensor:
    """A parameter in double precision."""
    return torch.tensor(value, dtype=torch.float64)


def normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal draws with mean 1 and standard deviation 2."""
    return 1.0 + 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(2.0**-54)


def _laplace(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    u = 2 * _uniform(shape, generator) - 1
    return 1.0 - u.sign() * torch.log1p(-u.abs())


def _logistic(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return 1.0 + torch.logit(_uniform(shape, generator))


def _exponential(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return -_uniform(shape, generator).log() / 2.0


def _poisson(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.poisson(torch.full(shape, 3.0, dtype=torch.float64), generator)


def _trimmed(x: Tensor) -> Tensor:
    """The mean without the lowest and the highest tenth."""
    cut = x.shape[1] // 10
    return x.sort(1).values[:, cut : x.shape[1] - cut].mean(1)


def _logistic_location(x: Tensor) -> Tensor:
    """The maximum of the likelihood of a logistic distribution's location."""
    m = x.median(1).values
    for _ in range(20):
        half = ((x - m[:, None]) / 2).tanh()
        step = half.sum(1) / ((1 - half.square()).sum(1) / 2)
        m = m + step
        if float(step.abs().max()) < 1e-10:
            break
    return m


def _survival(p: Parameters) -> Tensor:
    return (-p["rate"] * LATER).exp()


def _censored(x: Tensor) -> Tensor:
    """The unbiased rate if only the shorter half is seen, and that the others are longer."""
    size = x.shape[1]
    seen = (size + 1) // 2
    shorter = x.topk(seen, 1, largest=False).values
    longest = shorter.amax(1)
    return (seen - 1) / (shorter.sum(1) + (size - seen) * longest)


def _bias_of_survival(size: int) -> Function:
    """The bias, from quantiles of the Gamma distribution of the scaled sum of the draws."""
    shares = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    sums = torch.from_numpy(gammaincinv(size, shares.numpy()))
    return lambda p: (-size * LATER * p["rate"] / sums).exp().mean() - _survival(p)


MEAN = Estimated(lambda x: x.mean(1))
MEDIAN = Estimated(lambda x: x.median(1).values)
BEST_MEAN = Estimated(MEAN.estimate, maximum_likelihood=True)

SITUATIONS = {
    "normal mean": Situation(
        lambda p: Normal(p["m"], 2.0),
        {"m": scalar(1.0)},
        normal,
        {
            "mean": BEST_MEAN,
            "median": MEDIAN,
            "trimmed mean": Estimated(_trimmed),
            "0.8 times the mean": Estimated(
                lambda x: 0.8 * x.mean(1), bias=lambda _: lambda p: -0.2 * p["m"]
            ),
        },
    ),
    "Laplace location": Situation(
        lambda p: Laplace(p["m"], 1.0),
        {"m": scalar(1.0)},
        _laplace,
        {"median": Estimated(MEDIAN.estimate, maximum_likelihood=True), "mean": MEAN},
    ),
    "logistic location": Situation(
        lambda p: Density(lambda x: -2 * ((x - p["m"]) / 2).cosh().log() - math.log(4), location=1),
        {"m": scalar(1.0)},
        _logistic,
        {
            "maximum": Estimated(_logistic_location, maximum_likelihood=True),
            "mean": MEAN,
            "median": MEDIAN,
        },
    ),
    "exponential rate": Situation(
        lambda p: Exponential(p["rate"]),
        {"rate": scalar(2.0)},
        _exponential,
        {
            "1 / mean": Estimated(
                lambda x: 1 / x.mean(1),
                maximum_likelihood=True,
                bias=lambda n: lambda p: p["rate"] / (n - 1),
            ),
            "unbiased": Estimated(lambda x: (x.shape[1] - 1) / x.sum(1), maximum_likelihood=True),
            "longer half censored": Estimated(_censored),
        },
    ),
    "exponential survival": Situation(
        lambda p: Exponential(p["rate"]),
        {"rate": scalar(2.0)},
        _exponential,
        {
            "exp(-1 / mean)": Estimated(
                lambda x: (-LATER / x.mean(1)).exp(),
                maximum_likelihood=True,
                function=_survival,
                bias=_bias_of_survival,
            ),
            "unbiased of least variance": Estimated(
                lambda x: (1 - LATER / x.sum(1)).clamp_min(0) ** (x.shape[1] - 1),
                maximum_likelihood=True,
                function=_survival,
            ),
            "share that survives": Estimated(
                lambda x: (x > LATER).double().mean(1), function=_survival
            ),
        },
    ),
    "Poisson rate": Situation(
        lambda p: Poisson(p["rate"]),
        {"rate": scalar(3.0)},
        _poisson,
        {"mean": BEST_MEAN, "sample variance": Estimated(lambda x: x.var(1))},
    ),
}
"""Families, and several estimators each."""
