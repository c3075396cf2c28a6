r"""The spectrum of the Fisher information, of networks of any size.

A network with more parameters than its data determine has few large eigenvalues and a bulk
near 0.  Its effective dimension is the number of directions that the data decide.  Results come
from products with the matrix, by Lanczos quadrature (Golub & Welsch 1969; Ghorbani, Krishnan &
Xiao 2019, arXiv:1901.10159), or from all eigenvalues where these are available.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_count, check_not_negative, check_positive
from ewc.linalg.krylov import (
    Estimate,
    lanczos,
    lanczos_quadrature,
    random_signs,
    ritz_values,
    ritz_vectors,
)
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, flatten, unflatten


@dataclass(frozen=True)
class SpectralDensity:
    r"""The distribution of the ``p`` eigenvalues, as weights at points.

    Attributes:
        values: the points, ascending, in nats per squared unit of the parameters.
        weights: the fraction of the eigenvalues at each point; they sum to 1.
    """

    values: Tensor
    weights: Tensor

    def share_above(self, value: float) -> float:
        """The fraction of the eigenvalues above a value."""
        return float(self.weights[self.values > value].sum())

    def moment(self, order: int) -> float:
        r"""The mean of :math:`\lambda^k` over the eigenvalues: :math:`\mathrm{tr} F^k / p`."""
        return float((self.weights * self.values**order).sum())


def spectral_density(
    fisher: FisherMatrix, *, num_steps: int = 60, num_samples: int = 10, seed: int = 0
) -> SpectralDensity:
    r"""The density of the eigenvalues by stochastic Lanczos quadrature.

    Every random vector gives ``num_steps`` points and weights with its first ``2 num_steps``
    moments.  The mean over vectors is unbiased.  The ends of the spectrum converge first.  The
    cost is ``num_samples * num_steps`` products.

    Args:
        fisher: a matrix of any structure; :class:`~ewc.fisher.ImplicitFisher` has exact products.
        num_steps: the steps of the Lanczos process.
        num_samples: the number of random vectors.
        seed: the seed of the vectors.

    Raises:
        ValueError: a number is below 1.
    """
    check_count(num_steps, "num_steps")
    check_count(num_samples, "num_samples")
    like = torch.zeros(fisher.num_parameters, dtype=fisher.dtype, device=fisher.device)
    generator = torch.Generator().manual_seed(seed)
    points, shares = [], []
    for _ in range(num_samples):
        start = random_signs(like, generator) / like.numel() ** 0.5
        for tridiagonal in lanczos(lambda v: _product(fisher, v), start):
            if len(tridiagonal[0]) == num_steps:
                break
        values, weights = ritz_values(*tridiagonal)
        points.append(values)
        shares.append(weights / num_samples)
    values, order = torch.cat(points).sort()
    return SpectralDensity(values, torch.cat(shares)[order])


def largest_eigenvalue(
    fisher: FisherMatrix, *, tolerance: float = 1e-6, max_steps: int = 200, seed: int = 0
) -> float:
    r"""The sharpness: the largest eigenvalue, by the Lanczos process from a random vector.

    Gradient descent diverges with a step above 2 over the Hessian's largest eigenvalue.  The
    process approaches the value from below.

    Args:
        fisher: a matrix of any structure.
        tolerance: the relative change in a step at which the process ends.
        max_steps: the largest number of products.
        seed: the seed of the vector.

    Raises:
        ValueError: ``max_steps`` is below 1, or the tolerance negative.
    """
    value, _ = _leading(fisher, tolerance, max_steps, seed)
    return value


def leading_eigenvector(
    fisher: FisherMatrix, *, tolerance: float = 1e-6, max_steps: int = 200, seed: int = 0
) -> tuple[float, Parameters]:
    r"""The largest eigenvalue and its eigenvector: the direction that the data decide best.

    It uses the Lanczos process, as :func:`largest_eigenvalue` does.  The error of the vector is
    about ``tolerance`` times the largest eigenvalue over its distance to the next one.

    Args:
        fisher: a matrix of any structure.
        tolerance: the tolerance of the vector; its square is that of the eigenvalue.
        max_steps: the largest number of products, and of vectors in memory.
        seed: the seed of the start vector.

    Returns:
        The eigenvalue and the vector, of norm 1.

    Raises:
        ValueError: ``max_steps`` is below 1, or the tolerance negative.
    """
    value, vector = _leading(fisher, tolerance**2, max_steps, seed)
    return value, unflatten(vector, fisher.shapes)


def _leading(
    fisher: FisherMatrix, tolerance: float, max_steps: int, seed: int
) -> tuple[float, Tensor]:
    check_count(max_steps, "max_steps")
    check_not_negative(tolerance, "tolerance")
    like = torch.zeros(fisher.num_parameters, dtype=fisher.dtype, device=fisher.device)
    start = torch.randn(like.numel(), generator=torch.Generator().manual_seed(seed)).to(like)
    basis: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        basis.append(vector)  # the process multiplies each vector of its basis once
        return _product(fisher, vector)

    largest = 0.0
    for alphas, betas in lanczos(product, start / start.norm()):
        before, largest = largest, float(ritz_values(alphas, betas)[0][-1])
        if abs(largest - before) <= tolerance * largest or len(alphas) == max_steps:
            break
    return largest, torch.stack(basis).T @ ritz_vectors(alphas, betas)[:, -1].to(like)


def effective_dimension(fisher: FisherMatrix, prior_precision: float) -> float:
    r"""The number of directions that the data decide.

    .. math:: \sum_i \frac{N \lambda_i}{N \lambda_i + \delta}

    For ridge regression these are the degrees of freedom.  For a Laplace posterior it is
    MacKay's number of well-determined parameters (1992, doi:10.1162/neco.1992.4.3.415).  All
    eigenvalues are computed.

    Args:
        fisher: the mean information of ``N`` examples, with a spectrum in closed form or
            small enough for a dense matrix.
        prior_precision: :math:`\delta`, above 0.

    Raises:
        ValueError: the precision is not a finite number above 0.
    """
    ratio = _ratio(fisher, prior_precision)
    values = fisher.eigenvalues().double().clamp_min(0.0)
    return float((values / (values + ratio)).sum())


def effective_dimension_estimate(
    fisher: FisherMatrix, prior_precision: float, *, num_samples: int = 30, seed: int = 0
) -> Estimate:
    r"""The :func:`effective_dimension` from products alone, with its standard error.

    Args:
        fisher: a matrix of any structure and size.
        prior_precision: :math:`\delta`, above 0.
        num_samples: the number of random vectors.
        seed: the seed of the vectors.

    Raises:
        ValueError: the precision is not a finite number above 0, or ``num_samples`` is below 1.
    """
    check_count(num_samples, "num_samples")
    ratio = _ratio(fisher, prior_precision)
    like = torch.zeros(fisher.num_parameters, dtype=fisher.dtype, device=fisher.device)
    return lanczos_quadrature(
        lambda v: _product(fisher, v), lambda x: x / (x + ratio), like, num_samples, seed
    )


def _ratio(fisher: FisherMatrix, prior_precision: float) -> float:
    check_positive(prior_precision, "prior_precision")
    return prior_precision / fisher.num_examples


def _product(fisher: FisherMatrix, vector: Tensor) -> Tensor:
    product = fisher.matvec(unflatten(vector, fisher.shapes))
    return flatten({name: product[name] for name in fisher.shapes})
