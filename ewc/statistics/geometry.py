r"""Information geometry: the Fisher information as a metric (Rao 1945; Amari 2016).

The length of a small step is :math:`\sqrt{d\theta^\top F(\theta)\, d\theta}`.  To second order
it is :math:`\sqrt{2 KL}`, and it does not depend on the choice of parameters.  The distance of
two distributions is the length of the shortest path between them.
"""

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Exponential,
    MultivariateNormal,
    Normal,
    Poisson,
)

from ewc.checks import check_count
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, shapes_of

ROUNDING = 1e-6
"""The largest rounding error that is accepted, relative to the distance or to 1."""


@singledispatch
def fisher_rao_distance(first: Distribution, second: Distribution) -> Any:
    r"""The Fisher-Rao distance of two distributions of one family, in closed form.

    It exists for Bernoulli, categorical, Poisson, exponential and normal distributions, also in
    batches, and for multivariate normal ones with equal means or equal covariances (Atkinson
    & Mitchell 1981, Sankhya A 43(3); Nielsen 2020, doi:10.3390/e22101100).
    :func:`~ewc.statistics.geodesic_distance` serves the others.

    Args:
        first: one distribution.
        second: another one, of the same class.

    The result is a tensor of the batch shape.

    Raises:
        TypeError: the family has no closed form here, or the families differ.
        ValueError: multivariate normals differ both in mean and in covariance.
        ArithmeticError: the covariances of multivariate normals are too far apart for the digits
            of their type.
    """
    name = type(first).__name__
    raise TypeError(
        f"{name} and {type(second).__name__} have no closed form of their distance: take "
        "geodesic_distance within one family."
    )


def _check_family(first: Any, second: Any) -> None:
    if type(second) is not type(first):
        raise TypeError(
            f"{type(first).__name__} and {type(second).__name__} are two families: both must be "
            "of one."
        )


@fisher_rao_distance.register
def _(first: Bernoulli, second: Any) -> Any:
    _check_family(first, second)
    if all(d._param is d.logits for d in (first, second)):
        # The angles are arctangents of exp(z / 2), alike where a probability rounds to 1; their
        # difference is that of sinh((z - w) / 4) over cosh((z + w) / 4), here without overflow.
        apart, sum_ = (first.logits - second.logits) / 4, (first.logits + second.logits).abs() / 4
        top = torch.maximum(apart.abs(), sum_)
        across = (apart.abs() - top).exp() - (-apart.abs() - top).exp()
        along = (sum_ - top).exp() + (-sum_ - top).exp()
        return 2 * torch.atan2(across, along)
    p, q = first.probs, second.probs
    cosines, cross = (p * q).sqrt() + ((1 - p) * (1 - q)).sqrt(), (p * (1 - q)).sqrt()
    sines = _quotient((p - q).abs(), cross + (q * (1 - p)).sqrt())
    return 2 * torch.atan2(sines, cosines)


@fisher_rao_distance.register
def _(first: Categorical, second: Any) -> Any:
    _check_family(first, second)
    p, q = first.probs, second.probs
    root_p, root_q = p.sqrt(), q.sqrt()
    # The angle of two unit vectors, without the loss of digits of an arccosine near 1.
    apart = _quotient(p - q, root_p + root_q)
    return 4 * torch.atan2(apart.norm(dim=-1), (root_p + root_q).norm(dim=-1))


@fisher_rao_distance.register
def _(first: Poisson, second: Any) -> Any:
    _check_family(first, second)
    p, q = first.rate, second.rate
    return 2 * _quotient((p - q).abs(), p.sqrt() + q.sqrt())


@fisher_rao_distance.register
def _(first: Exponential, second: Any) -> Any:
    _check_family(first, second)
    p, q = first.rate, second.rate
    return 2 * torch.asinh(_over_roots((p - q).abs(), p, q) / 2)


@fisher_rao_distance.register
def _(first: Normal, second: Any) -> Any:
    _check_family(first, second)
    # The hyperbolic plane of (mean / sqrt 2, deviation), of curvature -1/2.  An inverse hyperbolic
    # sine has its digits for near and for far pairs, where an inverse tangent rounds to that of 1.
    across = (first.loc - second.loc) / math.sqrt(2)
    chord = torch.hypot(across, first.scale - second.scale)
    return 2 * math.sqrt(2) * torch.asinh(_over_roots(chord, first.scale, second.scale) / 2)


@fisher_rao_distance.register
def _(first: MultivariateNormal, second: Any) -> Any:
    _check_family(first, second)
    away = first.loc - second.loc
    root, other = first.scale_tril, second.scale_tril
    if torch.equal(root, other):
        # Mahalanobis' distance.
        solved = torch.linalg.solve_triangular(root, away[..., None], upper=False)
        return solved[..., 0].norm(dim=-1)
    if bool(away.any()):
        raise ValueError(
            "Means and covariances both differ: multivariate normals then have no closed form of "
            "their distance, so take geodesic_distance."
        )
    # The logarithms of the relative eigenvalues are twice those of singular values.  These have the
    # absolute rounding of the largest, so each is taken from the quotient with the smaller error.
    deviations = torch.linalg.svdvals(torch.linalg.solve_triangular(root, other, upper=False))
    inverses = torch.linalg.svdvals(torch.linalg.solve_triangular(other, root, upper=False)).flip(
        -1
    )
    errors = deviations[..., :1] / deviations, inverses[..., -1:] / inverses
    rounding = torch.finfo(deviations.dtype).eps * torch.minimum(*errors)
    logs = 2 * torch.where(errors[0] < errors[1], deviations.log(), -inverses.log())
    distance = (logs.square().sum(-1) / 2).sqrt()
    if bool((rounding.amax(-1) > ROUNDING * distance.clamp_min(1)).any()):
        raise ArithmeticError(
            f"The relative deviations range from {float(1 / inverses.max()):.2g} to "
            f"{float(deviations.max()):.2g}, which leaves too few digits of those between."
        )
    return distance


def _over_roots(above: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The quotient by the roots of both, the larger root first."""
    return above / torch.maximum(p, q).sqrt() / torch.minimum(p, q).sqrt()


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, 0 where both are 0."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)


def path_length(
    path: Sequence[Parameters], fisher_at: Callable[[Parameters], FisherMatrix]
) -> float:
    r"""The length of a path of networks.

    .. math:: \sum_s \sqrt{\Delta_s^\top F(\bar\theta_s) \Delta_s}

    The metric is taken in the middle of every step.  The error falls as the square of the steps.

    Args:
        path: the parameters along the path, two or more.
        fisher_at: the Fisher information of a network at given parameters.

    Raises:
        ValueError: there are fewer than two points, or their names or shapes differ.
    """
    check_count(len(path), "The number of points", least=2)
    length = 0.0
    for start, end in pairwise(path):
        check_same_shapes(shapes_of(end), shapes_of(start), "A point of the path")
        middle = {name: (tensor + end[name]) / 2 for name, tensor in start.items()}
        fisher = fisher_at(middle)
        step = {name: end[name] - start[name] for name in fisher.shapes}
        length += math.sqrt(max(float(fisher.quadratic_form(step)), 0.0))
    return length
