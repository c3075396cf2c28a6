r"""The Fisher information of a parametric family :math:`p_\theta(x)`.

With the score :math:`s = \nabla_\theta \log p_\theta(x)` it is

.. math:: F(\theta) = E_{x \sim p_\theta}[s s^\top]
          = - E_{x \sim p_\theta}[\nabla_\theta^2 \log p_\theta(x)] ,

where the support does not depend on :math:`\theta` and the order of derivative and integral
may be exchanged (Lehmann & Casella 1998, Theory of Point Estimation, section 2.5).  The two
differ where ``x`` comes from elsewhere than the family: :func:`formulations`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from ewc.checks import check_count
from ewc.fisher.dense import DenseFisher
from ewc.parameters import Parameters, Shapes, flatten, shapes_of, unflatten
from ewc.statistics.expectation import Density, expectation

Family = Callable[[Parameters], Distribution | Density]
r"""From parameters by name to :math:`p_\theta`."""


def parametric_fisher(family: Family, parameters: Parameters) -> DenseFisher:
    r"""The Fisher information :math:`E[s s^\top]` of one draw, exact.

    By a sum over whole numbers or a quadrature over an interval
    (:func:`~ewc.statistics.expectation.expectation`)::

        fisher = parametric_fisher(
            lambda p: Normal(p["mean"], p["variance"].sqrt()),
            {"mean": torch.tensor(0.0), "variance": torch.tensor(2.0)},
        )

    Args:
        family: from parameters to a distribution of a scalar, or a
            :class:`~ewc.statistics.expectation.Density`.
        parameters: :math:`\theta`, scalars or tensors by name.

    Returns:
        The matrix, in double precision, in nats per squared unit of the parameters.

    Raises:
        ValueError: the distribution is not of a scalar, or its support is neither a set of
            integers nor an interval.
        ArithmeticError: the expectation does not converge.
    """
    theta, shapes = _flat(parameters)
    log_prob = _log_prob(family, shapes)

    def squares(x: Tensor) -> Tensor:
        score = _score(log_prob, theta, x)
        return score[:, :, None] * score[:, None, :]

    matrix = expectation(squares, family(unflatten(theta, shapes)))
    return DenseFisher(matrix, shapes, num_examples=1)


def sampled_parametric_fisher(
    family: Family, parameters: Parameters, num_samples: int, seed: int = 0
) -> tuple[DenseFisher, Tensor]:
    r"""The mean of :math:`s s^\top` over draws, and the standard error of every entry.

    For distributions of any shape that can be sampled.

    Args:
        family: from parameters to a distribution, without a batch.
        parameters: :math:`\theta`.
        num_samples: the draws, 2 or more.
        seed: of the draws; the global random state stays as it is.

    Returns:
        The matrix, and the standard errors ``[p, p]``.

    Raises:
        ValueError: ``num_samples`` is below 2.
        TypeError: the family is a :class:`~ewc.statistics.expectation.Density`.
    """
    check_count(num_samples, "num_samples", least=2)
    theta, shapes = _flat(parameters)
    distribution = family(unflatten(theta, shapes))
    if isinstance(distribution, Density):
        raise TypeError("A Density cannot be sampled: take parametric_fisher.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = distribution.sample((num_samples,))
    score = _score(_log_prob(family, shapes), theta, x)
    mean = score.T @ score / num_samples
    second = score.square().T @ score.square() / num_samples
    variance = (second - mean.square()).clamp_min(0.0) / (num_samples - 1)
    return DenseFisher(mean, shapes, num_examples=1), variance.sqrt()


@dataclass(frozen=True)
class Formulations:
    r"""The two formulations of the information, under one distribution of ``x``.

    Attributes:
        score: :math:`E[s s^\top]`, ``[p, p]``.
        curvature: :math:`- E[\nabla^2 \log p_\theta]`, ``[p, p]``.
    """

    score: Tensor
    curvature: Tensor

    @property
    def gap(self) -> float:
        r"""The relative distance :math:`\|S - H\|_F / \|H\|_F`; 0 where the family is right."""
        return float((self.score - self.curvature).norm() / self.curvature.norm())

    @property
    def sandwich(self) -> Tensor:
        r"""The covariance :math:`H^{-1} S H^{-1}` of :math:`\sqrt N (\hat\theta - \theta)`.

        That of the maximum of the likelihood, whether the family is right or not (White
        1982, doi:10.2307/1912526); :math:`F^{-1}` where it is.

        Raises:
            torch.linalg.LinAlgError: the curvature is singular.
        """
        left = torch.linalg.solve(self.curvature, self.score)
        covariance: Tensor = torch.linalg.solve(self.curvature, left.T)
        return covariance


def formulations(
    family: Family, parameters: Parameters, truth: Distribution | Density | None = None
) -> Formulations:
    r"""Both formulations of the Fisher information, exact.

    Args:
        family: from parameters to a distribution of a scalar.
        parameters: :math:`\theta`.
        truth: where ``x`` comes from; ``None`` for :math:`p_\theta` itself.

    Raises:
        ValueError: as :func:`parametric_fisher`.
        ArithmeticError: likewise.
    """
    theta, shapes = _flat(parameters)
    log_prob = _log_prob(family, shapes)
    hessian = torch.func.jacfwd(torch.func.jacrev(log_prob))

    def both(x: Tensor) -> Tensor:
        score = _score(log_prob, theta, x)
        # A reverse pass holds a vector of all draws for each: few at once.
        curvature = -torch.cat([hessian(theta, part) for part in torch.split(x, 256)])
        return torch.stack([score[:, :, None] * score[:, None, :], curvature], dim=1)

    under = family(unflatten(theta, shapes)) if truth is None else truth
    score, curvature = expectation(both, under)
    return Formulations(score, curvature)


def _flat(parameters: Parameters) -> tuple[Tensor, Shapes]:
    return flatten(parameters).detach().double(), shapes_of(parameters)


def _log_prob(family: Family, shapes: Shapes) -> Callable[[Tensor, Tensor], Tensor]:
    """The log-density of ``x`` as a function of the flat parameters."""

    def log_prob(theta: Tensor, x: Tensor) -> Tensor:
        density: Tensor = family(unflatten(theta, shapes)).log_prob(x)
        return density

    return log_prob


def _score(log_prob: Callable[[Tensor, Tensor], Tensor], theta: Tensor, x: Tensor) -> Tensor:
    """The scores of some draws, ``[n, p]``."""
    # Forward, as there are few parameters and many draws.
    score: Tensor = torch.func.jacfwd(log_prob)(theta, x)
    return score
