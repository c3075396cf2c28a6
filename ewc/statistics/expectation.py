r"""Expectations under a distribution of one variable, exact where they can be.

Over a finite set they are sums; over the counts a sum that ends when nothing is left of the
mass; over an interval the tanh-sinh quadrature of scipy, which endures singular ends
(Takahasi & Mori 1974, doi:10.2977/prims/1195192451).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import tanhsinh
from torch import Tensor
from torch.distributions import Distribution, constraints

COUNTS = 2**24
"""So many counts are summed before an expectation is given up."""

TOLERANCE = 1e-12
"""The relative error that quadrature and sums over counts aim at."""


@dataclass(frozen=True)
class Density:
    r"""A log-density of one's own, for what ``torch.distributions`` does not have.

    Attributes:
        log_prob: :math:`\log p(x)` in nats for ``x`` of shape ``[n]``, normalised.
        support: where ``x`` may lie, as in ``torch.distributions``.
        location: about where the mass lies, for the quadrature.
        scale: about how wide it lies.
    """

    log_prob: Callable[[Tensor], Tensor]
    support: Any = constraints.real
    location: float = 0.0
    scale: float = 1.0


def expectation(function: Callable[[Tensor], Tensor], under: Distribution | Density) -> Tensor:
    r""":math:`E[f(x)]`, in double precision.

    Args:
        function: ``f``, from ``x`` of shape ``[n]`` to ``[n, ...]``.
        under: the distribution of a scalar ``x``.

    Raises:
        ValueError: ``x`` is no scalar, or its support is neither a set of integers nor an
            interval.
        ArithmeticError: the sum or the integral does not converge.
    """
    if isinstance(under, Distribution) and (under.batch_shape or under.event_shape):
        shape = [*under.batch_shape, *under.event_shape]
        raise ValueError(f"The distribution is of shape {shape}: only that of a scalar is summed.")
    support: Any = under.support
    if isinstance(support, constraints.independent):
        support = support.base_constraint

    def weighted(x: Tensor) -> Tensor:
        p = under.log_prob(x).detach().double().exp()
        # Far out the density underflows before the function overflows.
        there = p > 0
        values = function(x[there]).detach().double()
        terms = torch.zeros(len(x), *values.shape[1:], dtype=torch.float64)
        terms[there] = p[there].view(-1, *[1] * (values.dim() - 1)) * values
        return terms

    lower, upper, whole = _range(support)
    if whole and math.isfinite(upper):
        return weighted(torch.arange(lower, upper + 1, dtype=torch.float64)).sum(0)
    if whole:
        return _sum_over_counts(weighted, under, lower)
    return _integral(weighted, under, lower, upper)


def _range(support: Any) -> tuple[float, float, bool]:
    """The ends of a support, and whether only whole numbers lie in it."""
    if support is constraints.boolean:
        return 0.0, 1.0, True
    whole = isinstance(support, _WHOLE)
    if not (whole or support is constraints.real or isinstance(support, _CONTINUOUS)):
        raise ValueError(
            f"The support is {support}: expectations are taken over whole numbers and intervals; "
            "for others take samples."
        )
    lower = float(getattr(support, "lower_bound", -math.inf))
    return lower, float(getattr(support, "upper_bound", math.inf)), whole


_WHOLE = (constraints.integer_interval, type(constraints.nonnegative_integer))
_CONTINUOUS = (
    constraints.interval,
    constraints.half_open_interval,
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
)


def _sum_over_counts(
    weighted: Callable[[Tensor], Tensor], under: Distribution | Density, lower: float
) -> Tensor:
    """Blocks of counts, each as long as all before it, until the mass is used up."""
    total: Tensor | None = None
    mass, start, length = 0.0, lower, 256
    while start - lower < COUNTS:
        x = torch.arange(start, start + length, dtype=torch.float64)
        block = weighted(x).sum(0)
        found = float(under.log_prob(x).detach().double().exp().sum())
        total = block if total is None else total + block
        mass, start, length = mass + found, start + length, 2 * length
        small = float(block.abs().max()) <= TOLERANCE * float(total.abs().max())
        if small and mass > 1 - 1e-9 and found < TOLERANCE:
            return total
    raise ArithmeticError(
        f"The sum over counts has not ended after {COUNTS} of them, with {mass} of the mass."
    )


def _integral(
    weighted: Callable[[Tensor], Tensor],
    under: Distribution | Density,
    lower: float,
    upper: float,
) -> Tensor:
    """The integral over an interval, by a variable that runs over all real numbers."""
    location, scale = _place(under, lower, upper)
    shape = weighted(torch.tensor([location], dtype=torch.float64)).shape[1:]

    def substituted(u: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and its derivative; the ends of the support are far away."""
        if math.isfinite(lower) and math.isfinite(upper):
            width = upper - lower
            return lower + width * u.sigmoid(), width * u.sigmoid() * (-u).sigmoid()
        if math.isfinite(lower):
            away = abs(location - lower) * u.exp()
            return lower + away, away
        if math.isfinite(upper):
            away = abs(location - upper) * u.exp()
            return upper - away, away
        return location + scale * u, torch.full_like(u, scale)

    def integrand(u: NDArray[np.float64]) -> NDArray[np.float64]:
        # All entries have the same abscissae, [entries] or [entries, points].
        x, slope = substituted(torch.from_numpy(u.reshape(len(u), -1)[0]))
        inside = (x > lower) & (x < upper) & x.isfinite()
        values = torch.zeros(len(x), len(u), dtype=torch.float64)
        # Where rounding has reached an end, the density may be infinite.
        values[inside] = slope[inside, None] * weighted(x[inside]).reshape(-1, len(u))
        return values.T.contiguous().numpy().reshape(u.shape)

    middle, end = np.zeros(max(1, math.prod(shape))), np.full(max(1, math.prod(shape)), np.inf)
    # In two halves: many densities have their only corner, if they have one, in the middle.
    # Entries that are 0 never reach a relative error: the error is compared below.
    halves = [
        tanhsinh(integrand, *ends, rtol=TOLERANCE, preserve_shape=True, maxlevel=9)
        for ends in ((-end, middle), (middle, end))
    ]
    value = sum((torch.from_numpy(half.integral) for half in halves), torch.zeros(()))
    error, size = float(max(half.error.max() for half in halves)), float(value.abs().max())
    if not (bool(value.isfinite().all()) and error <= 1e-8 * size):
        raise ArithmeticError(
            f"The integral over the density does not converge, its error is {error}: a Density "
            "wants a location and a scale near its mass."
        )
    return value.view(shape)


def _place(under: Distribution | Density, lower: float, upper: float) -> tuple[float, float]:
    """About where the mass lies, within the support, and how wide."""
    location, scale = _moments(under)
    if not lower < location < upper:
        location = lower + scale if math.isfinite(lower) else upper - scale
    return location, scale


def _moments(under: Distribution | Density) -> tuple[float, float]:
    if isinstance(under, Density):
        return under.location, under.scale
    try:
        location, scale = float(under.mean), float(under.stddev)
    except (NotImplementedError, RuntimeError):  # StudentT of mixed types
        location, scale = math.nan, math.nan
    if not (math.isfinite(location) and math.isfinite(scale) and scale > 0):
        parameters = under.__dict__
        location, scale = (float(parameters.get(k, d)) for k, d in (("loc", 0.0), ("scale", 1.0)))
    return location, scale
