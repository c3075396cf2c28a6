r"""Log-densities of the families of ``torch.distributions``, without loss of digits.

Near the end of a support the logarithm of the distance to the end says more than ``x``.  For a
Gamma distribution of shape 0.001 half of the mass lies below the smallest number.  So the points
of a quadrature carry both, and densities that are singular there use the logarithm.  For large
counts and shapes the terms are grouped so that they do not cancel (Loader 2000, Fast and accurate
computation of binomial probabilities).

Other densities are those of ``torch.distributions``, with two exceptions.  Torch rounds
probabilities near 0 up to the resolution of its numbers.  It knows the normalisation of the von
Mises distribution to seven digits only.
"""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    FisherSnedecor,
    Gamma,
    Geometric,
    InverseGamma,
    Kumaraswamy,
    LogNormal,
    NegativeBinomial,
    Pareto,
    Poisson,
    RelaxedBernoulli,
    VonMises,
    Weibull,
)
from torch.nn.functional import logsigmoid, softplus

LOG_ROOT = math.log(2 * math.pi) / 2

MANY = 30.0
"""The concentration from which the asymptotic series of Bessel's function is exact."""


@dataclass(frozen=True)
class Points:
    r"""Values of one variable.

    Attributes:
        x: the values, ``[n]``.
        log_x: :math:`\log x`, also where ``x`` itself underflows.
        log_rest: :math:`\log (1 - x)`, also where ``x`` rounds to 1.
    """

    x: Tensor
    log_x: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Points":
        """Points from their values alone."""
        return cls(x, x.log(), (-x).log1p())

    def __getitem__(self, index: Any) -> "Points":
        """Some of the points."""
        return Points(self.x[index], self.log_x[index], self.log_rest[index])


KNOWN_BY_LOGARITHMS = (
    Beta,
    FisherSnedecor,
    Gamma,
    InverseGamma,
    Kumaraswamy,
    LogNormal,
    Pareto,
    RelaxedBernoulli,
    Weibull,
)
"""Families whose densities need only the logarithms of the distances to the ends."""


@singledispatch
def log_density(distribution: Any, points: Points) -> Tensor:
    r""":math:`\log p(x)` in nats, ``[n]``."""
    log_prob: Tensor = distribution.log_prob(points.x)
    return log_prob


@log_density.register
def _(distribution: Gamma, points: Points) -> Tensor:
    return _log_gamma(distribution, points.log_x) - points.log_x


@log_density.register
def _(distribution: InverseGamma, points: Points) -> Tensor:
    return _log_gamma(distribution, -points.log_x) - points.log_x


def _log_gamma(distribution: Any, log_x: Tensor) -> Tensor:
    """The log-density of the logarithm of a Gamma variable, in which no large terms cancel."""
    a = distribution.concentration
    away = log_x + distribution.rate.log() - a.log()
    log_prob: Tensor = a.log() - stirling(a) - a * (away.expm1() - away)
    return log_prob


@log_density.register
def _(distribution: LogNormal, points: Points) -> Tensor:
    away = (points.log_x - distribution.loc) / distribution.scale
    return -away.square() / 2 - distribution.scale.log() - LOG_ROOT - points.log_x


@log_density.register
def _(distribution: Weibull, points: Points) -> Tensor:
    k = distribution.concentration
    power = k * (points.log_x - distribution.scale.log())
    return k.log() + power - power.exp() - points.log_x


@log_density.register
def _(distribution: Pareto, points: Points) -> Tensor:
    a = distribution.alpha
    return a.log() + a * distribution.scale.log() - (a + 1) * points.log_x


@log_density.register
def _(distribution: FisherSnedecor, points: Points) -> Tensor:
    a, b = distribution.df1 / 2, distribution.df2 / 2
    ratio = a.log() - b.log() + points.log_x
    normaliser = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return normaliser + a * ratio - (a + b) * softplus(ratio, threshold=50) - points.log_x


@log_density.register
def _(distribution: Beta, points: Points) -> Tensor:
    a, b = distribution.concentration1, distribution.concentration0
    normaliser = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return normaliser + (a - 1) * points.log_x + (b - 1) * points.log_rest


@log_density.register
def _(distribution: Kumaraswamy, points: Points) -> Tensor:
    a, b = distribution.concentration1, distribution.concentration0
    power = a * points.log_x
    near, far = power.clamp_min(-1.0), power.clamp_max(-0.5)
    rest = torch.where(power > -0.7, (-near.expm1()).log(), (-far.exp()).log1p())
    return a.log() + b.log() + power - points.log_x + (b - 1) * rest


@log_density.register
def _(distribution: RelaxedBernoulli, points: Points) -> Tensor:
    logits = log_density(distribution.base_dist, Points.of(points.log_x - points.log_rest))
    return logits - points.log_x - points.log_rest


@log_density.register
def _(distribution: VonMises, points: Points) -> Tensor:
    k = distribution.concentration
    # k (cos - 1), which has its digits where k is large and the angle small.
    exponent = -2 * k * ((points.x - distribution.loc) / 2).sin().square()
    return exponent - math.log(2 * math.pi) - log_scaled_bessel(k)


def log_scaled_bessel(k: Tensor) -> Tensor:
    r""":math:`\log (e^{-k} I_0(k))` for :math:`k \ge 0`, with two derivatives to all digits.

    Large ``k`` take the asymptotic series (Abramowitz & Stegun 1964, 9.7.1).  Their second
    derivative is of the order of :math:`1/k^2`, a small difference of Bessel functions.
    """
    small = torch.special.i0e(k.clamp_max(MANY)).log()
    large = k.clamp_min(MANY)
    term, series = torch.ones_like(k), torch.ones_like(k)
    for n in range(1, 25):
        term = term * (2 * n - 1) ** 2 / (8 * n * large)
        series = series + term
    return torch.where(k > MANY, series.log() - 0.5 * (2 * math.pi * large).log(), small)


@log_density.register
def _(distribution: Poisson, points: Points) -> Tensor:
    return -stirling(points.x) - deviance(points.x, distribution.rate)


@log_density.register
def _(distribution: Categorical, points: Points) -> Tensor:
    index = points.x.long()
    if "probs" in vars(distribution) and distribution._param is distribution.probs:
        return distribution.probs[index].log()
    return distribution.logits[index]


def _log_odds(distribution: Any) -> tuple[Tensor, Tensor]:
    """The logarithms of a probability and of its complement, from whichever was given."""
    attributes = vars(distribution)  # reading the other one has stored it there too
    given = attributes.get("_param", attributes.get("logits", attributes.get("probs")))
    if given is attributes.get("probs"):
        return given.log(), (-given).log1p()
    return logsigmoid(distribution.logits), logsigmoid(-distribution.logits)


@log_density.register
def _(distribution: Bernoulli, points: Points) -> Tensor:
    yes, no = _log_odds(distribution)
    return _times(points.x, yes) + _times(1 - points.x, no)


@log_density.register
def _(distribution: Geometric, points: Points) -> Tensor:
    yes, no = _log_odds(distribution)
    return yes + _times(points.x, no)


@log_density.register
def _(distribution: Binomial, points: Points) -> Tensor:
    return _log_binomial(points.x, distribution.total_count - points.x, *_log_odds(distribution))


@log_density.register
def _(distribution: NegativeBinomial, points: Points) -> Tensor:
    yes, no = _log_odds(distribution)
    r = distribution.total_count.expand_as(points.x)
    return _log_binomial(points.x, r, yes, no) + r.log() - (r + points.x).log()


def _log_binomial(x: Tensor, rest: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """The binomial log-probability of ``x`` of ``x + rest`` (Loader 2000)."""
    n = x + rest
    chances = stirling(n) - stirling(x) - stirling(rest)
    return chances - deviance(x, n * yes.exp()) - deviance(rest, n * no.exp())


def stirling(x: Tensor) -> Tensor:
    r""":math:`\log \Gamma(x + 1) - x \log x + x`, without the cancellation of large terms."""
    large, small = x.clamp_min(16.0), x.clamp_max(16.0)
    inverse = 1 / large
    square = inverse.square()
    series = 1 / 1260 - square * (1 / 1680 - square * (1 / 1188 - square * 691 / 360360))
    series = inverse * (1 / 12 - square * (1 / 360 - square * series))
    direct = torch.lgamma(small + 1) - torch.xlogy(small, small) + small
    return torch.where(x > 16, (2 * math.pi * large).log() / 2 + series, direct)


def deviance(x: Tensor, mean: Tensor) -> Tensor:
    r""":math:`x \log (x / m) - x + m`, without the cancellation of large terms, for 0 too."""
    share = (torch.where(x > 0, x, mean) - mean) / mean
    return torch.where(x > 0, mean * ((1 + share) * share.log1p() - share), mean)


def _times(count: Tensor, logarithm: Tensor) -> Tensor:
    """The product, 0 where the count is 0 and the logarithm infinite."""
    return torch.where(count == 0, 0.0, count * logarithm)
