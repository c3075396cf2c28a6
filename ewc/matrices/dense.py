r"""The full Fisher information matrix, for networks of some thousand parameters."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.matrices.matrix import DampedInverse, FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    check_same_shapes,
    flatten,
    shapes_of,
    size_of,
    unflatten,
)


class DenseFisher(FisherMatrix):
    r"""The matrix :math:`F` itself, shape ``[p, p]``.

    Memory :math:`p^2`; ``matvec`` :math:`p^2`, ``solve``, ``logdet`` and ``eigenvalues``
    :math:`p^3` operations.

    Args:
        matrix: shape ``[p, p]``, symmetric, in the flat order.
        shapes: the parameters by name, in the flat order.
        num_examples: the examples behind the mean.

    Raises:
        ValueError: the matrix is not square over these parameters.
    """

    def __init__(self, matrix: Tensor, shapes: Shapes, num_examples: int) -> None:
        size = sum(shape.numel() for shape in shapes.values())
        if matrix.shape != (size, size):
            raise ValueError(
                f"matrix must have shape {[size, size]} for {size} parameters, got "
                f"{list(matrix.shape)}."
            )
        self._matrix = matrix
        self.shapes = dict(shapes)
        self.num_examples = num_examples

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        ordered = torch.cat([v[name].reshape(-1) for name in self.shapes])
        return unflatten(self._matrix @ ordered, self.shapes)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        rows = torch.cat([t.flatten(1) for t in self._checked_rows(v).values()], 1)
        factor = torch.linalg.cholesky(self._damped(damping))
        # With F + delta I = L L' the form is |L^-1 v|^2.
        solved: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False)
        return solved.square().sum(0)

    def to_dense(self) -> Tensor:
        return self._matrix.clone()

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        check_not_negative(tolerance, "tolerance")
        return CholeskyInverse(torch.linalg.cholesky(self._damped(damping)), self.shapes)

    def scaled(self, factor: float) -> "DenseFisher":
        return DenseFisher(factor * self._matrix, self.shapes, self.num_examples)

    def __add__(self, other: FisherMatrix) -> FisherMatrix:
        """The sum; dense if both matrices are, with the same flat order."""
        if not (isinstance(other, DenseFisher) and list(other.shapes) == list(self.shapes)):
            return super().__add__(other)
        examples = self.num_examples + other.num_examples
        return DenseFisher(self._matrix + other._matrix, self.shapes, examples)

    def embedded(self, shapes: Shapes) -> "DenseFisher":
        # New rows of a parameter come after its old entries: the old entries keep their order.
        positions, start = {}, 0
        for name, shape in shapes.items():
            positions[name] = start
            start += shape.numel()
        kept = torch.cat(
            [positions[name] + torch.arange(s.numel()) for name, s in self.shapes.items()]
        ).to(self._matrix.device)
        matrix = self._matrix.new_zeros(start, start)
        matrix[kept[:, None], kept[None, :]] = self._matrix
        return DenseFisher(matrix, shapes, self.num_examples)

    def check_entries(self) -> None:
        super().check_entries()
        self._check_semidefinite(self._matrix)

    def diagonal(self) -> Parameters:
        return unflatten(self._matrix.diagonal().clone(), self.shapes)

    def state(self) -> State:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"matrix": self._matrix}, {"shapes": shapes, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        shapes = {name: size_of(shape) for name, shape in about["shapes"].items()}
        return cls(tensors["matrix"], shapes, about["num_examples"])


class CholeskyInverse(DampedInverse):
    """The inverse by a Cholesky factor, ``2 p^2`` operations per vector.

    Args:
        factor: the Cholesky factor of the damped matrix, lower triangular, ``[p, p]``.
        shapes: the parameters by name, in the flat order.
    """

    def __init__(self, factor: Tensor, shapes: Shapes) -> None:
        self.factor = factor
        self.shapes = shapes

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        flat = flatten({name: v[name] for name in self.shapes})
        return unflatten(torch.cholesky_solve(flat[:, None], self.factor)[:, 0], self.shapes)

    def rows(self, v: Tensor, shapes: Shapes) -> Tensor:
        solved: Tensor = torch.cholesky_solve(v.T, self.factor).T
        return solved
