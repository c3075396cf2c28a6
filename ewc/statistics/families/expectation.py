r"""Expectations under a distribution of one variable, exact where possible.

Over a finite set an expectation is a sum.  Over counts the sum starts at the most likely count
and ends when no mass is left.  Over an interval it is a quadrature in a variable that runs over
all real numbers, such as the logarithm of the distance to an end.  Singular ends thus become tails.

The log-density leads to the mass, so no density is too narrow, too wide or too far away.  The
density is integrated together with the function.  Missing mass is therefore noticed, and refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, VonMises, constraints
from torch.nn.functional import logsigmoid

from ewc.statistics.families.densities import KNOWN_BY_LOGARITHMS, Points, log_density
from ewc.statistics.families.quadrature import integral

COUNTS = 2**24
"""The largest number of counts in a sum."""

TOLERANCE = 1e-12
"""The largest relative rest at the end of a sum or an integral."""

SET = 256
"""Up to this many numbers are summed at once; larger sets begin with such a block."""

WIDE = 2**13
"""The sums over more counts are integrals, but for the first of them: see :func:`_sum`."""

ACCEPTED = 1e-7
"""The largest accepted relative error of the mass and of an entry."""

LEVELS = (100.0, 300.0, 750.0)
"""Depths at which tails are cut, in nats below the largest density, tried in turn."""

OFFSETS = 2.0 ** torch.arange(-60, 61, dtype=torch.float64)
"""The distances at which to look for the mass."""


@dataclass(frozen=True)
class Density:
    r"""A log-density of your own, for families that ``torch.distributions`` lacks.

    Attributes:
        log_prob: :math:`\log p(x)` in nats for ``x`` of shape ``[n]``, normalised.
        support: the constraint on ``x``, as in ``torch.distributions``.
        location: the approximate location of the mass, for the quadrature.
        scale: the approximate width of the mass.
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
        ValueError: ``x`` is not a scalar, or its support is neither a set of integers nor an
            interval.
        ArithmeticError: the sum or the integral does not converge, or the density is not
            normalised to seven digits.  The points may be too close for double precision, or
            the mass may lie outside its range.
    """
    return expectation_at(lambda points: function(points.x), under)


def expectation_at(function: Callable[[Points], Tensor], under: Distribution | Density) -> Tensor:
    """The expectation of a function of :class:`~ewc.statistics.families.densities.Points`.

    Arguments, result and errors are those of :func:`expectation`.
    """
    if isinstance(under, Distribution) and (under.batch_shape or under.event_shape):
        shape = [*under.batch_shape, *under.event_shape]
        raise ValueError(f"The distribution must be of a scalar, got shape {shape}.")
    entry_shape = torch.Size()  # known once the function was called

    def weighted(points: Points, log_weights: Tensor) -> Tensor:
        """The weights and the weighted entries, ``[n, 1 + entries]``."""
        nonlocal entry_shape
        weights = log_weights.exp()
        # Far out the density underflows before the function overflows.
        positive = weights > 0
        positive[:1] |= not bool(positive.any())  # the shape of an entry is needed all the same
        values = function(points[positive]).detach().double()
        entry_shape = values.shape[1:]
        share, entries = weights[positive, None], values.reshape(int(positive.sum()), -1)
        terms = torch.zeros(len(weights), 1 + entries.shape[1], dtype=torch.float64)
        terms[:, 0] = weights
        terms[positive, 1:] = torch.where(share > 0, share * entries, 0.0)
        return terms

    lower, upper, whole = _range(under)
    if whole:
        total = _sum(weighted, under, lower, upper)
    else:
        total = _integral(weighted, under, lower, upper)
    if not bool(total.isfinite().all()):
        raise ArithmeticError(
            f"The expectation under {_name(under)} is not finite: the function must be finite "
            "wherever there is mass."
        )
    mass = float(total[0])
    if not abs(mass - 1) <= ACCEPTED:
        raise ArithmeticError(
            f"The mass of {_name(under)} must be 1, got {mass:.9g}: its density is not normalised, "
            "loses digits, or underflows; a Density needs a location and a scale near its mass."
        )
    return (total[1:] / mass).view(entry_shape)


Weighted = Callable[[Points, Tensor], Tensor]


def _log_density(under: Distribution | Density, points: Points) -> Tensor:
    return log_density(under, points).detach().double().expand(len(points.x))


def _name(under: Distribution | Density) -> str:
    return f"the {type(under).__name__}"


def _range(under: Distribution | Density) -> tuple[float, float, bool]:
    """The ends of a support, and whether only whole numbers lie in it."""
    support: Any = under.support
    if isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if isinstance(under, VonMises):  # an angle, although torch says a real number
        centre = float(under.loc)
        return centre - math.pi, centre + math.pi, False
    if support is constraints.boolean:
        return 0.0, 1.0, True
    whole = isinstance(support, _WHOLE)
    if not (whole or support is constraints.real or isinstance(support, _CONTINUOUS)):
        raise ValueError(
            f"The support must be a set of whole numbers or an interval, got {support}: take "
            "samples instead."
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


def _sum(weighted: Weighted, under: Distribution | Density, lower: float, upper: float) -> Tensor:
    """Blocks of whole numbers from the likeliest on, each as long as all before it."""

    def block(start: float, end: float) -> Tensor:
        points = Points.of(torch.arange(start, end, dtype=torch.float64))
        return weighted(points, _log_density(under, points))

    if upper - lower < SET:
        return block(lower, upper + 1).sum(0)

    def log_weights(x: Tensor) -> Tensor:
        x = x.round()
        inside = (x >= lower) & (x <= upper) & (x < 2**53)
        log_weight = torch.full_like(x, -math.inf)
        log_weight[inside] = _log_density(under, Points.of(x[inside]))
        return log_weight.nan_to_num(-math.inf, -math.inf, -math.inf)

    location, _ = _moments(under)
    start = min(max(location, lower), upper, 2.0**52) if math.isfinite(location) else lower
    centre = round(_highest(log_weights, start))
    if not isinstance(under, Density):
        breaks = _breaks(log_weights, centre, LEVELS[0])
        if breaks[-1] - breaks[0] > WIDE:
            return block(lower, lower + WIDE).sum(0) + _integral(
                weighted, under, lower + WIDE - 0.5, upper + 0.5
            )
    first = block(centre, centre + 1)
    total, size = first.sum(0), first.abs().sum(0)
    below, above, length = float(centre), float(centre + 1), SET  # summed from here to there
    while above - below < COUNTS:
        reach = max(lower, below - length), min(upper + 1, above + length)
        spans = [(reach[0], below), (above, reach[1])]
        added_blocks = [block(*span) for span in spans if span[0] < span[1]]
        below, above = reach
        length *= 2
        added = torch.stack([terms.abs().sum(0) for terms in added_blocks])
        total = total + torch.stack([terms.sum(0) for terms in added_blocks]).sum(0)
        size = size + added.sum(0)
        finished = (below == lower and above == upper + 1) or not bool(total.isfinite().all())
        if finished or (bool((added <= TOLERANCE * size).all()) and total[0] > 1 - ACCEPTED):
            return total
    raise ArithmeticError(
        f"The sum over counts did not end after {COUNTS} counts, with a mass of {float(total[0])}."
    )


def _highest(function: Callable[[Tensor], Tensor], start: float) -> float:
    """The approximate maximum of a function, by uphill steps of all lengths."""
    steps = torch.cat([-OFFSETS.flip(0), torch.zeros(1, dtype=torch.float64), OFFSETS])
    here, before = start, -math.inf
    for _ in range(200):
        values = function(here + steps).nan_to_num(-math.inf, -math.inf, -math.inf)
        best = int(values.argmax())
        value = float(values[best])
        if not value > before + 0.01:
            break
        here, before = here + float(steps[best]), value
    return here


def _integral(
    weighted: Weighted, under: Distribution | Density, lower: float, upper: float
) -> Tensor:
    """The integral over an interval, by a variable that runs over all real numbers."""
    location, scale = _place(under, lower, upper)
    points_at = _chart(location, scale, lower, upper)

    def log_weights(u: Tensor) -> Tensor:
        points, log_slope = points_at(u)
        # Where rounding has reached an end, a density that torch has may be infinite.
        log_weight = torch.full_like(u, -math.inf)
        inside = (points.x > lower) & (points.x < upper) & points.x.isfinite()
        inside |= isinstance(under, KNOWN_BY_LOGARITHMS)
        log_weight[inside] = _log_density(under, points[inside]) + log_slope[inside]
        return log_weight.nan_to_num(-math.inf, -math.inf, -math.inf)

    def integrand(u: Tensor) -> Tensor:
        return weighted(points_at(u)[0], log_weights(u))

    top = _highest(log_weights, _start(location, lower, upper))
    reached = None
    for level in LEVELS:
        breaks = _breaks(log_weights, top, level)
        if reached is not None and torch.equal(breaks[[0, -1]], reached):
            raise _diverges(under)  # there are no numbers farther out
        reached = breaks[[0, -1]]
        result = integral(integrand, breaks)
        # The last panels hold what is left in the tails.
        if bool((result.ends <= TOLERANCE * result.size).all()):
            break
    else:
        raise _diverges(under)
    if not bool((result.value.isfinite() & (result.error <= ACCEPTED * result.size)).all()):
        raise _diverges(under)
    return result.value


def _diverges(under: Distribution | Density) -> ArithmeticError:
    return ArithmeticError(
        f"The integral over {_name(under)} does not converge: the function has no expectation, or "
        "the mass lies where numbers underflow or overflow."
    )


def _breaks(log_weights: Callable[[Tensor], Tensor], top: float, level: float) -> Tensor:
    """The ends of panels around the top, doubling in length, up to the level.

    The first and the last panel hold tails that should contain nothing.
    """
    peak = log_weights(torch.tensor([top], dtype=torch.float64))

    def reach(drop: float, side: int) -> float:
        """The distance at which the density has dropped so far, to a part in 2^24."""
        inside = torch.nonzero(peak - log_weights(top + side * OFFSETS) < drop)
        if not len(inside):
            return float(OFFSETS[0])
        inner = float(OFFSETS[inside[-1]])
        width = inner
        for _ in range(4):
            width /= 64
            between = inner + width * torch.arange(65, dtype=torch.float64)
            last = torch.nonzero(peak - log_weights(top + side * between) < drop)
            inner = float(between[last[-1]]) if len(last) else inner
        return inner

    breaks = [torch.tensor([top], dtype=torch.float64)]
    for side in (-1, 1):
        end, wide = reach(level, side), reach(1.0, side)
        tail = min(reach(0.6 * level, side), 0.9 * end)
        lengths = wide * 2.0 ** torch.arange(-1, 122, dtype=torch.float64)
        ends = torch.cat([lengths[lengths < tail], lengths.new_tensor([tail, end])])
        breaks.append(top + side * ends)
    return torch.cat(breaks).sort().values


def _chart(
    location: float, scale: float, lower: float, upper: float
) -> Callable[[Tensor], tuple[Points, Tensor]]:
    """From all real numbers to points, with the logarithm of the derivative."""

    def points_at(u: Tensor) -> tuple[Points, Tensor]:
        if math.isfinite(lower) and math.isfinite(upper):
            width = upper - lower
            left, right = math.log(width) + logsigmoid(u), math.log(width) + logsigmoid(-u)
            x, slope = lower + left.exp(), left + logsigmoid(-u)
        elif math.isfinite(lower):
            left, right, slope = u, None, u
            x = lower + u.exp()
            if lower > 0:
                left = torch.logaddexp(u, torch.full_like(u, math.log(lower)))
        elif math.isfinite(upper):
            left, right, slope = None, u, u
            x = upper - u.exp()
        else:
            left, right = None, None
            x = location + scale * u.sinh()
            slope = math.log(scale / 2) + u.abs() + (-2 * u.abs()).exp().log1p()
        # Of the distances to the ends as much is known as of the variable.
        plain = Points.of(x)
        log_x = left if left is not None and lower >= 0 else plain.log_x
        log_rest = right if right is not None and upper == 1 else plain.log_rest
        return Points(x, log_x, log_rest), slope

    return points_at


def _start(location: float, lower: float, upper: float) -> float:
    """Where the location lies on the chart."""
    if math.isfinite(lower) and math.isfinite(upper):
        return math.log(location - lower) - math.log(upper - location)
    if math.isfinite(lower):
        return math.log(location - lower)
    return math.log(upper - location) if math.isfinite(upper) else 0.0


def _place(under: Distribution | Density, lower: float, upper: float) -> tuple[float, float]:
    """About where the mass lies, within the support, and how wide."""
    location, scale = _moments(under)
    if not lower < location < upper:
        if math.isfinite(lower) and math.isfinite(upper):
            location = (lower + upper) / 2
        else:
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
