r"""The inverse of a damped matrix, made once for many vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ewc.parameters import Parameters, Shapes, check_same_shapes, flatten, shapes_of, unflatten

if TYPE_CHECKING:
    from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
    from ewc.matrices.matrix import FisherMatrix


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

    It takes ``4 o i (o + i)`` operations.

    Args:
        matrix: the layer's matrix.
        damping: :math:`\delta`.

    Raises:
        torch.linalg.LinAlgError: an eigenvalue plus the damping is not above 0.
    """

    def __init__(self, matrix: "EigenvalueCorrectedProduct", damping: float) -> None:
        self.matrix = matrix
        self.inverse = 1 / matrix.damped_spectrum(damping)

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution, in the eigenbasis."""
        weights = self.matrix.weights
        rotated = self.matrix.rotated(weights.to_matrix(self.matrix.checked(v))) * self.inverse
        return weights.to_parameters(self.matrix.rotated_back(rotated))
