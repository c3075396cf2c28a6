r"""The inverse of a damped matrix, made once for many vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ewc.parameters import Parameters, Shapes, check_same_shapes, flatten, shapes_of, unflatten

if TYPE_CHECKING:
    from ewc.fisher.eigenbasis import EigenvalueCorrectedProduct
    from ewc.fisher.matrix import FisherMatrix


class DampedInverse(ABC):
    r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, at one ``F`` and one damping."""

    @abstractmethod
    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution for one right-hand side.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """

    def rows(self, v: Tensor, shapes: Shapes) -> Tensor:
        """The solutions for many flat right-hand sides, ``[n, p]``: here one by one.

        Args:
            v: the vectors, ``[n, p]``, in the flat order.
            shapes: the parameters by name, in the flat order.
        """
        return torch.stack([flatten(self(unflatten(row, shapes))) for row in v])


class Solving(DampedInverse):
    """The inverse of a matrix that has nothing to keep from one vector to the next.

    Args:
        fisher: the matrix.
        damping: what is added to its diagonal.
    """

    def __init__(self, fisher: "FisherMatrix", damping: float) -> None:
        self.fisher = fisher
        self.damping = damping

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution."""
        return self.fisher.solve(v, self.damping)


class Factorised(DampedInverse):
    """The inverse by a Cholesky factor, ``2 p^2`` operations a vector.

    Args:
        factor: of the damped matrix, lower triangular, ``[p, p]``.
        shapes: the parameters by name, in the flat order.
    """

    def __init__(self, factor: Tensor, shapes: Shapes) -> None:
        self.factor = factor
        self.shapes = shapes

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution by two triangular systems."""
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        flat = flatten({name: v[name] for name in self.shapes})
        return unflatten(torch.cholesky_solve(flat[:, None], self.factor)[:, 0], self.shapes)

    def rows(self, v: Tensor, shapes: Shapes) -> Tensor:
        """The solutions for all right-hand sides at once, ``[n, p]``."""
        solved: Tensor = torch.cholesky_solve(v.T, self.factor).T
        return solved


class Blocks(DampedInverse):
    """The inverses of blocks along the diagonal.

    Args:
        inverses: of every block, with its parameters.
        shapes: all parameters by name, in the flat order.
    """

    def __init__(self, inverses: Sequence[tuple[DampedInverse, Shapes]], shapes: Shapes) -> None:
        self.inverses = inverses
        self.shapes = shapes

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solutions of the blocks."""
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        found: Parameters = {}
        for inverse, shapes in self.inverses:
            found |= inverse({name: v[name] for name in shapes})
        return {name: found[name] for name in self.shapes}


class InEigenbasis(DampedInverse):
    r"""The inverse of a layer's matrix :math:`(Q_G \otimes Q_A) S (Q_G \otimes Q_A)^\top`.

    Eigenvalues far below the damping change nothing: with the rows and columns of ``S`` that
    hold one above :math:`\epsilon \delta`

    .. math:: U = \tfrac1\delta \big( V - Q_G \big[ \tfrac{S}{S + \delta} \odot
                  (Q_G^\top V Q_A) \big] Q_A^\top \big)

    has every component in the eigenbasis to a relative :math:`\epsilon`, for
    ``4 o k i + 4 o k m`` operations with ``k`` columns and ``m`` rows in place of
    ``4 o i (o + i)``.

    Args:
        matrix: the layer's matrix.
        damping: :math:`\delta`.
        tolerance: :math:`\epsilon`; 0 takes all eigenvalues.

    Raises:
        torch.linalg.LinAlgError: an eigenvalue plus the damping is not above 0.
    """

    def __init__(
        self, matrix: "EigenvalueCorrectedProduct", damping: float, tolerance: float
    ) -> None:
        self.matrix = matrix
        spectrum = matrix.spectrum
        self.inverse = 1 / matrix.damped_spectrum(damping)
        self.damping = damping
        self.outputs: Tensor | None = None
        # Where the largest eigenvalue is far above the damping, rounding would not cancel.
        rounding = torch.finfo(spectrum.dtype).eps * float(spectrum.max())
        if len(spectrum) > 1 or matrix.inputs is None or rounding >= tolerance * damping:
            return
        above = spectrum[0] > tolerance * damping
        rows, columns = above.any(1), above.any(0)
        if int(columns.sum()) <= spectrum.shape[2] // 2:
            self.outputs = matrix.outputs[0][:, rows]
            self.inputs = matrix.inputs[0][:, columns]
            kept = spectrum[0][rows][:, columns].clamp_min(0.0)
            self.shares = kept / (kept + damping)

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution, in the eigenbasis or the part of it that counts."""
        weights = self.matrix.weights
        matrix = weights.to_matrix(self.matrix.checked(v))
        if self.outputs is None:
            rotated = self.matrix.rotated(matrix) * self.inverse
            return weights.to_parameters(self.matrix.rotated_back(rotated))
        along = self.outputs.T @ (matrix[0] @ self.inputs) * self.shares
        less = torch.addmm(matrix[0], self.outputs @ along, self.inputs.T, alpha=-1)
        return weights.to_parameters(less.div_(self.damping)[None])
