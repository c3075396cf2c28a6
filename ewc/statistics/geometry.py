r"""Information geometry: the Fisher information as a metric (Rao 1945; Amari 2016).

The length of a small step is :math:`\sqrt{d\theta^\top F(\theta)\, d\theta}`, which is
:math:`\sqrt{2 KL}` to second order and the same in any parameters. The distance of two
distributions is the length of the shortest path between them.
"""

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from itertools import pairwise
from typing import Any

import torch
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
from ewc.fisher.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, shapes_of


@singledispatch
def fisher_rao_distance(first: Distribution, second: Distribution) -> Any:
    r"""The Fisher-Rao distance of two distributions of one family, in closed form.

    For Bernoulli, categorical, Poisson, exponential and normal distributions, batches
    included, and for multivariate normal ones with equal means or equal covariances (Atkinson
    & Mitchell 1981, Sankhya A 43(3); Nielsen 2020, doi:10.3390/e22101100). Of others
    :func:`~ewc.statistics.geodesic_distance` finds it.

    Args:
        first: one.
        second: the other, of the same class.

    The result is a tensor in the batch shape.

    Raises:
        TypeError: the family has no closed form here, or there are two of them.
        ValueError: of multivariate normals means and covariances both differ.
    """
    name = type(first).__name__
    raise TypeError(
        f"{name} and {type(second).__name__} have no closed form of their distance: within a "
        "family geodesic_distance finds it."
    )


def _check_family(first: Any, second: Any) -> None:
    if type(second) is not type(first):
        raise TypeError(
            f"{type(first).__name__} and {type(second).__name__} are two families: a distance "
            "is one within a family."
        )


@fisher_rao_distance.register
def _(first: Bernoulli, second: Any) -> Any:
    _check_family(first, second)
    angles = [torch.atan2(d.probs.sqrt(), (1 - d.probs).sqrt()) for d in (first, second)]
    return 2 * (angles[0] - angles[1]).abs()


@fisher_rao_distance.register
def _(first: Categorical, second: Any) -> Any:
    _check_family(first, second)
    one, two = first.probs.sqrt(), second.probs.sqrt()
    # The angle of two unit vectors, without the loss of digits of an arccosine near 1.
    return 4 * torch.atan2((one - two).norm(dim=-1), (one + two).norm(dim=-1))


@fisher_rao_distance.register
def _(first: Poisson, second: Any) -> Any:
    _check_family(first, second)
    return 2 * (first.rate.sqrt() - second.rate.sqrt()).abs()


@fisher_rao_distance.register
def _(first: Exponential, second: Any) -> Any:
    _check_family(first, second)
    return (first.rate.log() - second.rate.log()).abs()


@fisher_rao_distance.register
def _(first: Normal, second: Any) -> Any:
    _check_family(first, second)
    # The hyperbolic plane of (mean / sqrt 2, deviation), of curvature -1/2.
    across = (first.loc - second.loc).square() / 2
    near = (across + (first.scale - second.scale).square()).sqrt()
    far = (across + (first.scale + second.scale).square()).sqrt()
    return 2 * math.sqrt(2) * torch.atanh(near / far)


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
            "Means and covariances both differ: multivariate normal distributions then have no "
            "closed form of their distance: geodesic_distance finds it."
        )
    # Logarithms of the relative eigenvalues, twice those of singular values.
    left = torch.linalg.solve_triangular(root, other, upper=False)
    logs = 2 * torch.linalg.svdvals(left).log()
    return (logs.square().sum(-1) / 2).sqrt()


def path_length(
    path: Sequence[Parameters], fisher_at: Callable[[Parameters], FisherMatrix]
) -> float:
    r"""The length of a path of networks.

    .. math:: \sum_s \sqrt{\Delta_s^\top F(\bar\theta_s) \Delta_s}

    With the metric in the middle of every step: its error falls as the square of the steps.

    Args:
        path: the parameters along it, two or more.
        fisher_at: the Fisher information of a network with given parameters.

    Raises:
        ValueError: there are fewer than two points, or their names or shapes differ.
    """
    check_count(len(path), "The number of points", least=2)
    length = 0.0
    for here, there in pairwise(path):
        check_same_shapes(shapes_of(there), shapes_of(here), "A point of the path")
        middle = {name: (tensor + there[name]) / 2 for name, tensor in here.items()}
        fisher = fisher_at(middle)
        step = {name: there[name] - here[name] for name in fisher.shapes}
        length += math.sqrt(max(float(fisher.quadratic_form(step)), 0.0))
    return length
