"""Solutions, traces and log-determinants from matrix-vector products only."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_count
from ewc.parameters import Parameters, dot


@dataclass(frozen=True)
class Estimate:
    """An estimate of a number from samples.

    Attributes:
        value: the mean over the samples.
        standard_error: the standard error of the mean.
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, samples: list[float]) -> "Estimate":
        """The mean of samples and its standard error, which is infinite for one sample."""
        values = torch.tensor(samples, dtype=torch.float64)
        error = float(values.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
        return cls(float(values.mean()), error)


MOST_PRODUCTS, CONVERGED = 50, 0.001
"""The products of a power iteration, and the relative change at which it stops earlier."""


def largest_eigenvalue(
    product: Callable[[Parameters], Parameters], like: Mapping[str, Tensor]
) -> float:
    r"""The largest eigenvalue of a positive semi-definite matrix, by power iteration.

    It is the Rayleigh quotient of the last vector: never above the largest eigenvalue, and close to
    it after few products where it stands out.

    Args:
        product: maps ``v`` to :math:`F v`.
        like: tensors with the shapes, the type and the device of ``v``.
    """
    generator = torch.Generator().manual_seed(0)
    image = {name: random_signs(t, generator).view(t.shape) for name, t in like.items()}
    value = 0.0
    for _ in range(MOST_PRODUCTS):
        norm = float(dot(image, image).sqrt())
        if not 0 < norm < math.inf:
            break
        vector = {name: tensor / norm for name, tensor in image.items()}
        image = product(vector)
        before, value = value, float(dot(vector, image))
        if abs(value - before) <= CONVERGED * abs(value):
            break
    return value


def scaled_largest_eigenvalue(
    product: Callable[[Parameters], Parameters],
    sizes: Mapping[str, float],
    like: Mapping[str, Tensor],
) -> float:
    r"""The largest eigenvalue of :math:`H^{1/2} F H^{1/2}`, by :func:`largest_eigenvalue`.

    Args:
        product: maps ``v`` to :math:`F v`.
        sizes: the diagonal of :math:`H`, one number per tensor.
        like: tensors with the shapes, the type and the device of ``v``.
    """
    roots = {name: math.sqrt(size) for name, size in sizes.items()}

    def scaled(v: Parameters) -> Parameters:
        image = product({name: roots[name] * tensor for name, tensor in v.items()})
        return {name: roots[name] * image[name] for name in v}

    return largest_eigenvalue(scaled, like)


def largest_eigenvalues(matrices: Tensor) -> Tensor:
    """The largest eigenvalue of each of some matrices ``[..., d, d]``, as above, ``[...]``."""
    signs = random_signs(matrices[..., :1], torch.Generator().manual_seed(0))
    vectors = signs.view(matrices[..., :1].shape)
    values = matrices.new_zeros(())
    for _ in range(MOST_PRODUCTS):
        norms = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
        images = matrices @ (vectors / torch.where(norms > 0, norms, 1.0))
        values = (vectors * images).sum((-2, -1)) / torch.where(norms > 0, norms, 1.0)[..., 0, 0]
        vectors = images
    return values


def conjugate_gradients(
    product: Callable[[Parameters], Parameters],
    diagonal: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    damping: float,
) -> Parameters:
    r"""The solution of :math:`(F + \delta I) u = v`, by products with ``F``.

    Preconditioned by the diagonal.  It stops when the residual is as small as rounding
    errors of ``v``.

    Args:
        product: maps ``u`` to :math:`F u`.
        diagonal: the diagonal of ``F``.
        v: the right-hand side.
        damping: :math:`\delta`.

    Raises:
        torch.linalg.LinAlgError: it does not converge; the damped matrix may be singular.
    """
    like = next(iter(v.values()))
    tiny = torch.finfo(like.dtype).tiny
    scale = {name: (entries + damping).clamp_min(tiny) for name, entries in diagonal.items()}
    if damping == 0:
        scale = {name: torch.ones_like(entries) for name, entries in diagonal.items()}
    solution = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
    residual = {name: tensor.clone() for name, tensor in v.items()}
    goal = 8 * torch.finfo(like.dtype).eps * float(dot(v, v).sqrt())
    size = sum(tensor.numel() for tensor in v.values())
    step = {name: residual[name] / scale[name] for name in v}
    fall = dot(residual, step)
    for _ in range(10 * size + 100):
        if float(dot(residual, residual).sqrt()) <= goal:
            return solution
        image = product(step)
        image = {name: image[name] + damping * step[name] for name in v}
        curvature = dot(step, image)
        if not float(curvature) > 0:
            break
        length = fall / curvature
        for name in v:
            solution[name] += length * step[name]
            residual[name] -= length * image[name]
        scaled = {name: residual[name] / scale[name] for name in v}
        before, fall = fall, dot(residual, scaled)
        step = {name: scaled[name] + (fall / before) * step[name] for name in v}
    if float(dot(residual, residual).sqrt()) <= 1e3 * goal:
        return solution
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"Conjugate gradients did not converge with damping {damping}, because the damped "
        "matrix is singular or nearly singular: the damping must be larger."
    )


def hutchinson_trace(
    product: Callable[[Tensor], Tensor], like: Tensor, num_samples: int, seed: int
) -> Estimate:
    r"""The trace by :math:`E[z^\top F z]` over random signs ``z`` (Hutchinson 1989).

    Args:
        product: maps a flat vector to its product with the matrix.
        like: a flat vector with the size, the type and the device of the samples.
        num_samples: the number of random vectors.
        seed: the seed of the random vectors.

    Raises:
        ValueError: ``num_samples`` is not a whole number, 1 or more.
    """
    check_count(num_samples, "num_samples")
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(num_samples):
        z = random_signs(like, generator)
        samples.append(float(torch.dot(z, product(z))))
    return Estimate.of(samples)


def lanczos_quadrature(
    product: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    like: Tensor,
    num_samples: int,
    seed: int,
) -> Estimate:
    r"""The trace of a function of the matrix (Ubaru, Chen & Saad 2017, algorithm 1).

    :math:`\mathrm{tr} f(F) = p\, E[\sum_i \tau_i^2 f(\theta_i)]` with the Ritz values
    :math:`\theta` of the Lanczos process from random signs.  :math:`\tau` are the first
    components of the Ritz vectors.  The process stops when the sum has converged.

    Args:
        product: maps a flat vector to its product with the matrix.
        function: the function of the eigenvalues.
        like: a flat vector with the size, the type and the device of the samples.
        num_samples: the number of random vectors.
        seed: the seed of the random vectors.

    Raises:
        ValueError: ``num_samples`` is not a whole number, 1 or more.
    """
    check_count(num_samples, "num_samples")
    generator = torch.Generator().manual_seed(seed)
    size = like.numel()
    samples = []
    for _ in range(num_samples):
        value = math.nan
        for alphas, betas in lanczos(product, random_signs(like, generator) / math.sqrt(size)):
            values, weights = ritz_values(alphas, betas)
            before = value
            value = size * float((weights * function(values.clamp_min(0.0))).sum())
            if abs(value - before) <= 1e-9 * abs(value):
                break
        samples.append(value)
    return Estimate.of(samples)


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor
) -> Iterator[tuple[list[float], list[float]]]:
    """The tridiagonal matrices of the Lanczos process of a symmetric matrix.

    Each step adds a row, until the Krylov space is invariant.

    Args:
        product: maps a flat vector to its product with the matrix.
        start: the first vector, of norm 1.

    Yields:
        The diagonal and the off-diagonal, which has one entry fewer.
    """
    vectors, alphas, betas = [start], list[float](), list[float]()
    while True:
        image = product(vectors[-1])
        alphas.append(float(torch.dot(image, vectors[-1])))
        yield alphas, betas
        basis = torch.stack(vectors)
        for _twice in range(2):  # once is not enough with rounding errors
            image = image - basis.T @ (basis @ image)
        beta = float(image.norm())
        if beta <= 1e-10 * max(map(abs, alphas)) or len(vectors) == start.numel():
            return
        betas.append(beta)
        vectors.append(image / beta)


def ritz_values(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a tridiagonal matrix, ascending, and their quadrature weights.

    The weight is the squared first component of the eigenvector.
    """
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
    return values, vectors[0].square()


def ritz_vectors(alphas: list[float], betas: list[float]) -> Tensor:
    """The eigenvectors of a tridiagonal matrix as columns, in the order of its eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(_tridiagonal(alphas, betas)).eigenvectors
    return vectors


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if len(alphas) > 1:
        off_diagonal = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
        matrix = matrix + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    return matrix


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """A vector of independent random signs with the size, type and device of ``like``."""
    signs = torch.randint(0, 2, (like.numel(),), generator=generator) * 2 - 1
    return signs.to(like)
