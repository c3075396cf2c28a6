r"""The Fisher information of a family as a metric that torch can differentiate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.func import jacfwd, jacrev

from ewc.parameters import Parameters, flatten, shapes_of, unflatten

Metric = Callable[[Parameters], Tensor]
r"""From parameters by name to :math:`F(\theta)`, ``[p, p]``, in torch operations."""


def fisher_metric(family: Callable[[Parameters], Distribution]) -> Metric:
    r"""The Fisher information of a family, differentiable and under ``torch.vmap``.

    Over a finite set it is the sum :math:`E[s s^\top]`; else the second derivative of the
    divergence in its second argument, :math:`F(\theta) = \nabla^2_{\theta'} KL(p_\theta \|
    p_{\theta'})` at :math:`\theta' = \theta`, wherever ``torch.distributions`` has that in
    closed form (Kullback 1959, Information Theory and Statistics, section 2.6).
    :func:`~ewc.statistics.parametric_fisher` takes every family, but cannot be differentiated.

    Args:
        family: from parameters to a distribution; the components of a batch are independent.

    Returns:
        The metric; it raises a ``NotImplementedError`` where there is no divergence.
    """

    def metric(parameters: Parameters) -> Tensor:
        shapes = shapes_of(parameters)
        here = flatten(parameters)

        def member(theta: Tensor) -> Distribution:
            return family(unflatten(theta, shapes))

        with _unchecked():
            distribution = family(parameters)
            if distribution.has_enumerate_support:
                return _by_sum(member, distribution, here)
            matrix: Tensor = jacfwd(jacrev(lambda there: _divergence(distribution, member(there))))(
                here
            )
        return matrix

    return metric


def _by_sum(
    member: Callable[[Tensor], Distribution], distribution: Distribution, here: Tensor
) -> Tensor:
    """The expectation over all values."""
    values = distribution.enumerate_support(expand=False)

    def log_prob(theta: Tensor) -> Tensor:
        found: Tensor = member(theta).log_prob(values)
        return found.flatten()

    scores: Tensor = jacrev(log_prob)(here)
    return torch.einsum("x,xi,xj->ij", log_prob(here).exp(), scores, scores)


def _divergence(first: Distribution, second: Distribution) -> Tensor:
    try:
        found: Tensor = kl_divergence(first, second).sum()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"torch.distributions has no divergence of {type(first).__name__}: give its "
            "information to geodesic as a metric."
        ) from error
    return found


@contextmanager
def _unchecked() -> Iterator[None]:
    """Without the distributions' checks of their parameters, which look at values."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
