r"""The Fisher information of a family as a metric that torch can differentiate."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Kumaraswamy,
    Laplace,
    Pareto,
    TransformedDistribution,
    Weibull,
    kl_divergence,
)
from torch.func import jacfwd, jacrev

from ewc.parameters import Parameters, flatten, shapes_of, unflatten
from ewc.statistics.families.densities import Points, log_density
from ewc.statistics.families.validation import validation

Metric = Callable[[Parameters], Tensor]
r"""From parameters by name to :math:`F(\theta)`, ``[p, p]``, in torch operations."""


def fisher_metric(family: Callable[[Parameters], Distribution]) -> Metric:
    r"""The Fisher information of a family, differentiable and fit for ``torch.vmap``.

    Over a finite set it is the sum :math:`E[s s^\top]`.  Otherwise it is the second derivative
    :math:`F(\theta) = \nabla^2_{\theta'} KL(p_\theta \| p_{\theta'})` at
    :math:`\theta' = \theta`, where ``torch.distributions`` has the divergence in closed form
    (Kullback 1959, Information Theory and Statistics, section 2.6).
    :func:`~ewc.statistics.parametric_fisher` takes every family, but cannot be differentiated.

    Args:
        family: from parameters to a distribution; the components of a batch are independent.

    Returns:
        The metric.  It raises a ``NotImplementedError`` where there is no divergence.  It raises
        a ``ValueError`` where the support or the transform of the variable depends on the
        parameters, for then the divergence is not smooth or not known.
    """

    def metric(parameters: Parameters) -> Tensor:
        shapes = shapes_of(parameters)
        here = flatten(parameters)

        def member(theta: Tensor) -> Distribution:
            return family(unflatten(theta, shapes))

        # The checks read values, which vmap does not allow.
        with validation(False):
            distribution = family(parameters)
            _check_fixed(member, here, type(distribution).__name__)
            if distribution.has_enumerate_support:
                return _by_sum(member, distribution, here)
            slope = jacrev(lambda theta: _divergence(distribution, member(theta)))
            matrix: Tensor = jacfwd(slope)(here)
        return matrix

    return metric


def _by_sum(
    member: Callable[[Tensor], Distribution], distribution: Distribution, here: Tensor
) -> Tensor:
    """The expectation over all values."""
    values = distribution.enumerate_support(expand=False)

    def log_prob(theta: Tensor) -> Tensor:
        at_theta = member(theta)
        if at_theta.batch_shape or at_theta.event_shape:
            logarithms: Tensor = at_theta.log_prob(values)
            return logarithms.flatten()
        return log_density(at_theta, Points.of(values))

    scores: Tensor = jacrev(log_prob)(here)
    return torch.einsum("x,xi,xj->ij", log_prob(here).exp(), scores, scores)


def _check_fixed(member: Callable[[Tensor], Distribution], here: Tensor, name: str) -> None:
    """Check that the support and the transforms of a family are fixed.

    Raises:
        ValueError: one depends on the parameters.
    """

    def features(theta: Tensor) -> Tensor:
        distribution = member(theta)
        by_transforms = type(distribution) in _BY_TRANSFORMS
        holders = [distribution.support]
        holders += getattr(distribution, "transforms", []) if by_transforms else []
        values = [vars(holder).get(key) for holder in holders for key in _FEATURES]
        tensors = [value.flatten() for value in values if isinstance(value, Tensor)]
        return torch.cat([theta[:0], *(value.to(theta) for value in tensors)])

    slopes = jacfwd(features)(here)
    try:
        moved = bool((slopes != 0).any())
    except RuntimeError:  # under vmap, where values cannot be read
        return
    if moved:
        raise ValueError(
            f"The support or the transform of {name} depends on the parameters, so its divergence "
            "gives no metric: give its information to geodesic as a metric."
        )


_BY_TRANSFORMS = (TransformedDistribution, Kumaraswamy, Pareto, Weibull)
"""Families whose divergence is that of the variable before the transform."""

_FEATURES = ("lower_bound", "upper_bound", "loc", "scale", "exponent", "_exponent")


def _divergence(first: Distribution, second: Distribution) -> Tensor:
    if isinstance(first, Laplace) and isinstance(second, Laplace):
        # Up to second order: what torch has is made of absolute values, which it derives to 0.
        ratio = first.scale / second.scale
        apart = (first.loc - second.loc).square() / (2 * first.scale * second.scale)
        return (ratio - 1 - ratio.log() + apart).sum()
    try:
        divergence: Tensor = kl_divergence(first, second).sum()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"torch.distributions has no divergence of {type(first).__name__}: give its "
            "information to geodesic as a metric."
        ) from error
    return divergence
