r"""Integrals of functions with any number of entries, by Gauss's rule on adaptive panels.

A panel is halved until its two halves agree with the whole.  Corners, narrow peaks and long tails
cost a few more panels.  Nothing that the first panels have seen can be missed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

POINTS = 20
"""The number of points of Gauss's rule on a panel."""

TOLERANCE = 1e-13
"""The largest error of a panel, relative to the whole integral."""

EVALUATIONS = 12_000
"""The number of points after which no panel is halved; the rest is reported as error."""


@dataclass(frozen=True)
class Integral:
    r"""An integral over panels.

    Attributes:
        value: the sum, ``[entries]``.
        size: the sum of the absolute values of the panels' integrals.
        error: an estimate of the error, too large rather than too small.
        ends: the absolute integrals over the first and the last panel, ``[2, entries]``.
    """

    value: Tensor
    size: Tensor
    error: Tensor
    ends: Tensor


def integral(function: Callable[[Tensor], Tensor], breaks: Tensor) -> Integral:
    r"""The integral of a function from the first of some points to the last.

    Args:
        function: from ``[n]`` abscissae to ``[n, entries]``.
        breaks: the ends of the first panels, ascending.
    """
    places, weights = (torch.from_numpy(a) for a in leggauss(POINTS))

    def gauss(left: Tensor, right: Tensor) -> Tensor:
        half = (right - left) / 2
        abscissae = (left + half)[:, None] + half[:, None] * places
        values = function(abscissae.flatten()).view(len(left), POINTS, -1)
        return half[:, None] * torch.einsum("q,mqe->me", weights, values)

    left, right = breaks[:-1], breaks[1:]
    whole = gauss(left, right)
    ends = whole[[0, -1]].abs()
    value, size, error = (torch.zeros_like(whole[0]) for _ in range(3))
    used = POINTS * len(left)
    while len(left):
        used += 2 * POINTS * len(left)
        middle = (left + right) / 2
        left, right = torch.stack([left, middle], 1), torch.stack([middle, right], 1)
        halves = gauss(left.flatten(), right.flatten()).view(len(left), 2, -1)
        change = (halves.sum(1) - whole).abs()
        scale = size + halves.abs().sum((0, 1))
        # What is not a number is not mended by halving.
        done = (change <= TOLERANCE * scale).all(1) | ~halves.isfinite().all(2).all(1)
        if used > EVALUATIONS:
            done = torch.ones_like(done)
        value = value + halves[done].sum((0, 1))
        size = size + halves[done].abs().sum((0, 1))
        error = error + change[done].sum(0)
        left, right = left[~done].flatten(), right[~done].flatten()
        whole = halves[~done].flatten(0, 1)
    return Integral(value, size, error, ends)
