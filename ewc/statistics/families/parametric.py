r"""The Fisher information of a parametric family :math:`p_\theta(x)`.

With the score :math:`s = \nabla_\theta \log p_\theta(x)` it is

.. math:: F(\theta) = E_{x \sim p_\theta}[s s^\top]
          = - E_{x \sim p_\theta}[\nabla_\theta^2 \log p_\theta(x)] ,

where the support does not depend on :math:`\theta`, and derivative and integral may be exchanged
(Lehmann & Casella 1998, Theory of Point Estimation, section 2.5).  The two formulations differ
where ``x`` does not come from the family: :func:`formulations`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from ewc.checks import check_count
from ewc.matrices.dense import DenseFisher
from ewc.parameters import Parameters, Shapes, flatten, shapes_of, unflatten
from ewc.statistics.families.densities import Points, log_density
from ewc.statistics.families.expectation import Density, expectation_at
from ewc.statistics.families.validation import validation

MEAN = 1e-7
"""Relative values below this count as 0, for expected scores and for gaps."""

Family = Callable[[Parameters], Distribution | Density]
r"""From parameters by name to :math:`p_\theta`."""


def parametric_fisher(family: Family, parameters: Parameters) -> DenseFisher:
    r"""The exact Fisher information :math:`E[s s^\top]` of one draw.

    It is a sum over whole numbers or a quadrature over an interval
    (:func:`~ewc.statistics.families.expectation.expectation`)::

        fisher = parametric_fisher(
            lambda p: Normal(p["mean"], p["variance"].sqrt()),
            {"mean": torch.tensor(0.0), "variance": torch.tensor(2.0)},
        )

    Args:
        family: from parameters to a distribution of a scalar, or a
            :class:`~ewc.statistics.families.expectation.Density`.
        parameters: :math:`\theta`, scalars or tensors by name.

    Returns:
        The matrix, in double precision, in nats per squared unit of the parameters.

    Raises:
        ValueError: the distribution is not of a scalar, or its support is neither a set of
            integers nor an interval.
        ArithmeticError: the expectation does not converge or loses digits, or the expected score
            is not 0, for example because the support depends on the parameters.
    """
    theta, shapes = _flat(parameters)
    log_prob = _log_prob(family, shapes)

    def moments(points: Points) -> Tensor:
        score = _score(log_prob, theta, points)
        return torch.cat([score[:, None], score[:, :, None] * score[:, None, :]], 1)

    mean, matrix = expectation_at(moments, _member(family, theta, shapes)).tensor_split([1])
    _check_mean(mean[0], matrix)
    return DenseFisher(matrix, shapes, num_examples=1)


def sampled_parametric_fisher(
    family: Family, parameters: Parameters, num_samples: int, seed: int = 0
) -> tuple[DenseFisher, Tensor]:
    r"""The mean of :math:`s s^\top` over draws, and the standard error of every entry.

    The distribution may have any shape, but must be one that can be sampled.

    Args:
        family: from parameters to a distribution, without a batch.
        parameters: :math:`\theta`.
        num_samples: the number of draws, 2 or more.
        seed: the seed of the draws; the global random state is not changed.

    Returns:
        The matrix, and the standard errors ``[p, p]``.

    Raises:
        ValueError: ``num_samples`` is below 2.
        TypeError: the family is a :class:`~ewc.statistics.families.expectation.Density`.
    """
    check_count(num_samples, "num_samples", least=2)
    theta, shapes = _flat(parameters)
    distribution = _member(family, theta, shapes)
    if isinstance(distribution, Density):
        raise TypeError("A Density cannot be sampled: take parametric_fisher instead.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = distribution.sample((num_samples,))
    score = _score(_log_prob(family, shapes), theta, Points.of(x))
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

        It holds for the maximum likelihood estimate, whether the family is right or not (White
        1982, doi:10.2307/1912526).  It is :math:`F^{-1}` where the family is right.

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
        truth: the distribution of ``x``; ``None`` for :math:`p_\theta` itself.

    Raises:
        ValueError: as for :func:`parametric_fisher`.
        ArithmeticError: as for :func:`parametric_fisher`.  It is also raised if the two differ
            without a ``truth``: the log-density has a corner, or its second derivatives lose
            digits.
    """
    theta, shapes = _flat(parameters)
    log_prob = _log_prob(family, shapes)

    def hessian(points: Points) -> Tensor:
        slope = torch.func.jacrev(lambda at: log_prob(at, points))
        derivatives: Tensor = torch.func.jacfwd(slope)(theta)
        return derivatives

    def moments(points: Points) -> Tensor:
        score = _score(log_prob, theta, points)
        # A reverse pass holds a vector of all draws for each: few at once.
        chunks = [points[start : start + 256] for start in range(0, len(points.x), 256)]
        curvature = -torch.cat([hessian(chunk) for chunk in chunks])
        return torch.cat([score[:, None], score[:, :, None] * score[:, None, :], curvature], 1)

    under = _member(family, theta, shapes) if truth is None else truth
    mean, score, curvature = expectation_at(moments, under).tensor_split([1, 1 + len(theta)])
    if truth is None:
        _check_mean(mean[0], score)
        _check_gap(score, curvature)
    return Formulations(score, curvature)


def _check_mean(mean: Tensor, squares: Tensor) -> None:
    """Check that the expected score is 0, as for every density with a fixed support.

    Raises:
        ArithmeticError: the expected score is not 0.
    """
    unit = squares.diagonal().sqrt()
    if bool((mean.abs() > MEAN * unit).any()):
        index = int((mean.abs() / unit).nan_to_num(0.0).argmax())
        raise ArithmeticError(
            f"The expected score of parameter {index} is {float(mean[index]):.3g}, but must be 0: "
            "the support must not depend on the parameters, nor may the log-density lose digits."
        )


def _flat(parameters: Parameters) -> tuple[Tensor, Shapes]:
    return flatten(parameters).detach().double(), shapes_of(parameters)


def _member(family: Family, theta: Tensor, shapes: Shapes) -> Distribution | Density:
    """The member of a family, which torch checks."""
    with validation(True):
        return family(unflatten(theta, shapes))


def _check_gap(score: Tensor, curvature: Tensor) -> None:
    """Check that the formulations agree, as for every smooth density under itself.

    Raises:
        ArithmeticError: the formulations differ.
    """
    root = score.diagonal().sqrt()
    gaps = (score - curvature).abs() / root / root[:, None]
    if bool((gaps > MEAN).any()):
        raise ArithmeticError(
            f"Under the family itself the formulations differ by {float(gaps.max()):.2g} of the "
            "information: the log-density has a corner or loses digits in its second derivatives; "
            "take parametric_fisher, which needs only the first."
        )


LogProb = Callable[[Tensor, Points], Tensor]


def _log_prob(family: Family, shapes: Shapes) -> LogProb:
    """The log-density of points as a function of the flat parameters."""

    def log_prob(theta: Tensor, points: Points) -> Tensor:
        return log_density(family(unflatten(theta, shapes)), points)

    return log_prob


def _score(log_prob: LogProb, theta: Tensor, points: Points) -> Tensor:
    """The scores of some draws, ``[n, p]``."""
    # Forward, as there are few parameters and many draws.
    score: Tensor = torch.func.jacfwd(lambda at: log_prob(at, points))(theta)
    return score
