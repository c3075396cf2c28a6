r"""Damped inverses from the eigenvectors whose eigenvalues the damping does not drown."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.matrices.matrix import DampedInverse
from ewc.parameters import Parameters, check_same_shapes, shapes_of

WIDTH = 128
"""The order from which a few eigenvectors are found faster than all."""

FIRST_VECTORS = 48
"""How many :func:`leading_part` begins with."""


class LeadingInverse(DampedInverse):
    r"""The inverse of a layer's :math:`\tilde F + \delta I`, where :math:`\tilde F` has low rank.

    With :math:`\tilde F = (U \otimes W) \mathrm{diag}(S) (U \otimes W)^\top`, ``m`` columns
    of ``U`` and ``k`` of ``W``,

    .. math:: X = \tfrac1\delta \big( V - U \big[ \tfrac{S}{S + \delta} \odot
                  (U^\top V W) \big] W^\top \big)

    in ``4 o k (i + m)`` operations.  Where :math:`0 \preceq F - \tilde F \preceq
    \epsilon \delta I` every quadratic form :math:`v^\top X(v)` is too large by at most a
    relative :math:`\epsilon`, and never too small.

    Args:
        weights: the layer's parameters.
        outputs: :math:`U`, ``[o, m]``, orthonormal.
        inputs: :math:`W`, ``[i, k]``, orthonormal.
        spectrum: :math:`S`, not negative, ``[m, k]``.
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
        """The solution; the bias apart, as putting it beside the weight would copy that."""
        check_same_shapes(shapes_of(v), self.weights.shapes, "The right-hand side")
        layout, bias = self.weights.layout, self.weights.bias
        weight = layout.to_matrix(v[self.weights.weight])[0]
        if bias is None:
            return {self.weights.weight: layout.to_parameter(self._less(weight, None)[0][None])}
        less, last = self._less(weight, v[bias])
        assert last is not None
        return {self.weights.weight: layout.to_parameter(less[None]), bias: last}

    def _less(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The solution as a matrix, and its last column apart if there is a bias."""
        inputs = self.inputs[: weight.shape[1]]
        along = weight @ inputs
        if bias is not None:
            along.addr_(bias, self.inputs[-1])
        along = self.outputs @ (self.outputs.T @ along * self.shares)
        factor = 1 / self.damping
        less = torch.addmm(weight, along, inputs.T, beta=factor, alpha=-factor)
        if bias is None:
            return less, None
        return less, torch.addmv(bias, along, self.inputs[-1], beta=factor, alpha=-factor)


def leading_inverse(
    weights: LayerWeights, outputs: Tensor, inputs: Tensor, *, damping: float, tolerance: float
) -> LeadingInverse | None:
    r"""The inverse of a layer's :math:`G \otimes A + \delta I` up to a tolerance.

    The factors are :math:`\tilde G` and :math:`\tilde A` with remainders of at most
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
        The inverse, or ``None`` where it would save little or rounding would not cancel: for
        layers with groups or a diagonal factor, and where more than half of the columns
        count.
    """
    if inputs.dim() == 2 or len(inputs) > 1:
        return None
    # The Frobenius norm is no less than the largest eigenvalue.
    norms = float(outputs.norm()), float(inputs.norm())
    error = tolerance * damping
    if _drowns(norms[0] * norms[1], error, inputs.dtype):
        return None
    # Columns cost more than rows, so rows are held to the smaller part of the error.
    left, rows = leading_part(outputs[0], 0.25 * error / norms[1])
    largest = float(rows.max()) if len(rows) else 0.0
    if largest == 0:
        nothing = inputs.new_zeros
        return LeadingInverse(
            weights, left[:, :0], nothing(inputs.shape[1], 0), nothing(0, 0), damping
        )
    right, columns = leading_part(inputs[0], 0.75 * error / largest)
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
    r"""The inverse with the eigenvectors that have an eigenvalue above :math:`\epsilon \delta`.

    Args:
        weights: the layer's parameters.
        outputs: the eigenvectors of the outputs, ``[g, o, o]``.
        inputs: those of the inputs, ``[g, i, i]``; ``None`` for the identity.
        spectrum: the eigenvalues, ``[g, o, i]``.
        damping: :math:`\delta`.
        tolerance: :math:`\epsilon`.

    Returns:
        The inverse, or ``None`` as of :func:`leading_inverse`.
    """
    if len(spectrum) > 1 or inputs is None:
        return None
    if _drowns(float(spectrum.max()), tolerance * damping, spectrum.dtype):
        return None
    above = spectrum[0] > tolerance * damping
    rows, columns = above.any(1), above.any(0)
    if int(columns.sum()) > spectrum.shape[2] // 2:
        return None
    kept = spectrum[0][rows][:, columns].clamp_min(0.0)
    left, right = outputs[0][:, rows], inputs[0][:, columns]
    return LeadingInverse(weights, left, right, kept, damping)


def _drowns(largest: float, error: float, dtype: torch.dtype) -> bool:
    """Whether an error is one of rounding, beside eigenvalues that should cancel."""
    return 16 * torch.finfo(dtype).eps * largest >= error


def leading_part(matrix: Tensor, remainder: float) -> tuple[Tensor, Tensor]:
    r"""Vectors and values with :math:`0 \preceq M - U \Lambda U^\top \preceq \tau I`.

    By Nystroem's approximation :math:`M Q (Q^\top M Q)^{-1} Q^\top M`, never above ``M``,
    from random vectors once multiplied with ``M`` (Tropp et al. 2017, arXiv:1706.05736,
    algorithm 3).  That it leaves no more than :math:`\tau` is proved by a Cholesky factor of
    :math:`\tau I - (M - U \Lambda U^\top)`; until there is one, it is tried with half as many
    vectors again, and at last by all eigenvectors.

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
        found, values = _nystroem(matrix, basis)
        # What is well below the remainder need not be kept.
        kept = values > 0.7 * remainder
        if not bool(kept.all()):
            part = found[:, kept], values[kept]
            if _leaves_no_more(matrix, *part, remainder):
                return part
        vectors, width = basis, width * 3 // 2
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > remainder
    return vectors[:, kept], values[kept]


def _nystroem(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and -values, ascending, of what an orthonormal basis sees of a matrix."""
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


def _leaves_no_more(matrix: Tensor, vectors: Tensor, values: Tensor, remainder: float) -> bool:
    """Whether what vectors and values leave of a matrix has no eigenvalue above a bound."""
    room = torch.addmm(matrix, vectors * values, vectors.T, beta=-1)
    room.diagonal().add_(remainder)
    return not int(torch.linalg.cholesky_ex(room).info)
