r"""Damped inverses from the eigenvectors with eigenvalues that matter beside the damping."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.matrices.matrix import DampedInverse
from ewc.parameters import Parameters, check_same_shapes, shapes_of

WIDTH = 128
"""Smallest order of a matrix for which a few eigenvectors are faster than all."""

FIRST_VECTORS = 48
"""Number of vectors with which :func:`leading_vectors` begins."""


class LeadingInverse(DampedInverse):
    r"""The inverse of a layer's :math:`\tilde F + \delta I`, where :math:`\tilde F` has low rank.

    With :math:`\tilde F = (U \otimes W) \mathrm{diag}(S) (U \otimes W)^\top`, ``m`` columns
    of ``U`` and ``k`` of ``W``,

    .. math:: X = \tfrac1\delta \big( V - U \big[ \tfrac{S}{S + \delta} \odot
                  (U^\top V W) \big] W^\top \big)

    in ``4 o k (i + m)`` operations.  If :math:`0 \preceq F - \tilde F \preceq \epsilon \delta
    I`, a quadratic form :math:`v^\top X(v)` is never too small, and too large by at most a
    relative :math:`\epsilon`.

    Args:
        weights: the layer's parameters.
        outputs: :math:`U`, ``[o, m]``, orthonormal.
        inputs: :math:`W`, ``[i, k]``, orthonormal.
        spectrum: :math:`S`, 0 or above, ``[m, k]``.
        damping: :math:`\delta`, above 0.
    """

    def __init__(
        self,
        weights: LayerWeights,
        outputs: Tensor,
        inputs: Tensor,
        spectrum: Tensor,
        damping: float,
    ) -> None:
        self.weights = weights
        self.outputs = outputs
        self.inputs = inputs
        self.damping = damping
        self.shares = spectrum / (spectrum + damping)

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.weights.shapes, "The right-hand side")
        # The bias apart: joining it to the weight would copy the weight.
        layout, bias = self.weights.layout, self.weights.bias
        weight = layout.to_matrix(v[self.weights.weight])[0]
        if bias is None:
            solution, _ = self._solution(weight, None)
            return {self.weights.weight: layout.to_parameter(solution[None])}
        solution, last = self._solution(weight, v[bias])
        assert last is not None
        return {self.weights.weight: layout.to_parameter(solution[None]), bias: last}

    def _solution(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The solution for the weight as a matrix, and for the bias if there is one."""
        inputs = self.inputs[: weight.shape[1]]
        along = weight @ inputs
        if bias is not None:
            along.addr_(bias, self.inputs[-1])
        along = self.outputs @ (self.outputs.T @ along * self.shares)
        factor = 1 / self.damping
        solution = torch.addmm(weight, along, inputs.T, beta=factor, alpha=-factor)
        if bias is None:
            return solution, None
        return solution, torch.addmv(bias, along, self.inputs[-1], beta=factor, alpha=-factor)


def leading_inverse(
    weights: LayerWeights, outputs: Tensor, inputs: Tensor, *, damping: float, tolerance: float
) -> LeadingInverse | None:
    r"""The inverse of a layer's :math:`G \otimes A + \delta I` up to a tolerance.

    It replaces the factors by :math:`\tilde G` and :math:`\tilde A`, with remainders of at most
    :math:`\tau_G` and :math:`\tau_A`, so that

    .. math:: 0 \preceq G \otimes A - \tilde G \otimes \tilde A
              = (G - \tilde G) \otimes A + \tilde G \otimes (A - \tilde A)
              \preceq (\tau_G \|A\| + \|\tilde G\| \tau_A) I = \epsilon \delta I.

    Args:
        weights: the layer's parameters.
        outputs: :math:`G`, ``[g, o, o]``.
        inputs: :math:`A`, ``[g, i, i]``, or ``[g, i]`` if diagonal.
        damping: :math:`\delta`.
        tolerance: :math:`\epsilon`.

    Returns:
        The inverse, or ``None`` where it is not worth it: for layers with groups or a diagonal
        factor, where more than half of the columns count, and where the tolerance is within
        rounding.
    """
    if inputs.dim() == 2 or len(inputs) > 1:
        return None
    # The Frobenius norm is no less than the largest eigenvalue.
    norms = float(outputs.norm()), float(inputs.norm())
    error = tolerance * damping
    if _within_rounding(error, norms[0] * norms[1], inputs.dtype):
        return None
    # Columns cost more than rows, so rows get the smaller share of the error.
    left, rows = leading_vectors(outputs[0], 0.25 * error / norms[1])
    largest = float(rows.max()) if len(rows) else 0.0
    if largest == 0:
        zeros = inputs.new_zeros
        return LeadingInverse(weights, left[:, :0], zeros(inputs.shape[1], 0), zeros(0, 0), damping)
    right, columns = leading_vectors(inputs[0], 0.75 * error / largest)
    if len(columns) > inputs.shape[1] // 2:
        return None
    return LeadingInverse(weights, left, right, torch.outer(rows, columns), damping)


def leading_columns(
    weights: LayerWeights,
    outputs: Tensor,
    inputs: Tensor | None,
    spectrum: Tensor,
    *,
    damping: float,
    tolerance: float,
) -> LeadingInverse | None:
    r"""The inverse by the eigenvectors with an eigenvalue above :math:`\epsilon \delta`.

    Args:
        weights: the layer's parameters.
        outputs: the eigenvectors of the outputs, ``[g, o, o]``.
        inputs: the eigenvectors of the inputs, ``[g, i, i]``; ``None`` for the identity.
        spectrum: the eigenvalues, ``[g, o, i]``.
        damping: :math:`\delta`.
        tolerance: :math:`\epsilon`.

    Returns:
        The inverse, or ``None`` as in :func:`leading_inverse`.
    """
    if len(spectrum) > 1 or inputs is None:
        return None
    if _within_rounding(tolerance * damping, float(spectrum.max()), spectrum.dtype):
        return None
    above = spectrum[0] > tolerance * damping
    rows, columns = above.any(1), above.any(0)
    if int(columns.sum()) > spectrum.shape[2] // 2:
        return None
    kept = spectrum[0][rows][:, columns].clamp_min(0.0)
    left, right = outputs[0][:, rows], inputs[0][:, columns]
    return LeadingInverse(weights, left, right, kept, damping)


def _within_rounding(error: float, largest: float, dtype: torch.dtype) -> bool:
    """Whether an error is no larger than the rounding of the largest eigenvalue."""
    return 16 * torch.finfo(dtype).eps * largest >= error


def leading_vectors(matrix: Tensor, remainder: float) -> tuple[Tensor, Tensor]:
    r"""Vectors and values with :math:`0 \preceq M - U \Lambda U^\top \preceq \tau I`.

    They come from the Nystrom approximation :math:`M Q (Q^\top M Q)^{-1} Q^\top M`, which never
    exceeds ``M``.  :math:`Q` spans random vectors multiplied with ``M`` (Tropp et al. 2017,
    arXiv:1706.05736, algorithm 3).  A Cholesky factor of :math:`\tau I - (M - U \Lambda U^\top)`
    proves the bound.  Without one, it tries again with half as many vectors more, and finally
    takes all eigenvectors.

    Args:
        matrix: ``M``, positive semi-definite, ``[d, d]``.
        remainder: :math:`\tau`, far above the rounding of ``M``.

    Returns:
        :math:`U` with orthonormal columns, ``[d, k]``, and :math:`\Lambda`, ``[k]``.
    """
    size = len(matrix)
    generator = torch.Generator().manual_seed(0)
    vectors, width = matrix.new_zeros(size, 0), FIRST_VECTORS
    while size >= WIDTH and width <= size // 3:
        more = torch.randn(size, width - vectors.shape[1], generator=generator)
        basis = torch.linalg.qr(matrix @ torch.cat([vectors, more.to(matrix)], 1)).Q
        eigenvectors, values = _nystrom(matrix, basis)
        # Values well below the remainder are not needed.
        kept = values > 0.7 * remainder
        if not bool(kept.all()):
            leading = eigenvectors[:, kept], values[kept]
            if _leaves_at_most(remainder, matrix, *leading):
                return leading
        vectors, width = basis, width * 3 // 2
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > remainder
    return vectors[:, kept], values[kept]


def _nystrom(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and ascending eigenvalues of the Nystrom approximation from a basis."""
    image = matrix @ basis
    # A shift of the size of the rounding keeps the small matrix positive definite.
    shift = 4 * torch.finfo(matrix.dtype).eps * float(image.norm())
    image = image.add_(basis, alpha=shift)
    inner = basis.T @ image
    factor, failed = torch.linalg.cholesky_ex(0.5 * (inner + inner.T))
    if int(failed):
        return basis[:, :0], image.new_zeros(0)
    root = torch.linalg.solve_triangular(factor, image.T, upper=False)
    orthonormal, triangle = torch.linalg.qr(root.T)
    values, vectors = torch.linalg.eigh(triangle @ triangle.T)
    return orthonormal @ vectors, (values - shift).clamp_min(0.0)


def _leaves_at_most(remainder: float, matrix: Tensor, vectors: Tensor, values: Tensor) -> bool:
    r"""Whether :math:`M - U \Lambda U^\top` has no eigenvalue above the remainder."""
    room = torch.addmm(matrix, vectors * values, vectors.T, beta=-1)
    room.diagonal().add_(remainder)
    return not int(torch.linalg.cholesky_ex(room).info)
