r"""The whole Fisher information matrix, for networks of some thousand parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ewc.fisher.layers import Pullback, slices
from ewc.fisher.matrix import FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    flatten,
    shapes_of,
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
                f"The matrix has shape {list(matrix.shape)}: {size} parameters need {[size, size]}."
            )
        self._matrix = matrix
        self.shapes = dict(shapes)
        self.num_examples = num_examples

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "DenseSum":
        """An empty matrix over these parameters."""
        return DenseSum(parameters)

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The product with the flat vector.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        ordered = torch.cat([v[name].reshape(-1) for name in self.shapes])
        return unflatten(self._matrix @ ordered, self.shapes)

    def to_dense(self) -> Tensor:
        """A copy of the matrix, shape ``[p, p]``."""
        return self._matrix.clone()

    def scaled(self, factor: float) -> "DenseFisher":
        """Every entry times ``factor``."""
        return DenseFisher(factor * self._matrix, self.shapes, self.num_examples)

    def __add__(self, other: FisherMatrix) -> FisherMatrix:
        """The sum; with another dense matrix of the same parameters it is dense."""
        if not (isinstance(other, DenseFisher) and list(other.shapes) == list(self.shapes)):
            return super().__add__(other)
        examples = self.num_examples + other.num_examples
        return DenseFisher(self._matrix + other._matrix, self.shapes, examples)

    def embedded(self, shapes: Shapes) -> "DenseFisher":
        """Zero rows and columns for new names and new last rows of a parameter."""
        # New rows of a parameter stand behind its old entries, so the old entries keep
        # their order and only move by what was put between them.
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

    def state(self) -> State:
        """The matrix; the shapes in the flat order."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"matrix": self._matrix}, {"shapes": shapes, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of these entries."""
        shapes = {name: torch.Size(shape) for name, shape in about["shapes"].items()}
        return cls(tensors["matrix"], shapes, about["num_examples"])


class DenseSum:
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top`, in single precision at least.

    Raises:
        ValueError: the matrix does not fit into memory.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = shapes_of(parameters)
        flat = flatten(parameters).detach()
        size = flat.numel()
        dtype = accumulation_dtype(flat.dtype)
        try:
            self.total = torch.zeros(size, size, dtype=dtype, device=flat.device)
        except RuntimeError as error:
            raise ValueError(
                f"A dense Fisher matrix over {size} parameters takes "
                f"{size**2 * dtype.itemsize / 1e9:.0f} GB, more than there is: take another "
                "structure or a smaller network."
            ) from error

    def add(self, pullbacks: Sequence[Pullback]) -> None:
        """Add the outer products of one chunk of pulled-back vectors."""
        if not pullbacks:
            return
        vectors, examples = pullbacks[0].num_vectors, pullbacks[0].num_examples
        row_bytes = vectors * self.total.shape[0] * self.total.element_size()
        for part in slices(examples, row_bytes):
            # A parameter that did not take part has a zero gradient.
            rows = self.total.new_zeros(vectors * (part.stop - part.start), self.total.shape[0])
            columns = unflatten_columns(rows, self.shapes)
            for pullback in pullbacks:
                for name, gradient in pullback.per_example(part).items():
                    columns[name].copy_(gradient.reshape(columns[name].shape))
            self.total.addmm_(rows.T, rows)

    def mean(self, num_examples: int) -> DenseFisher:
        """The mean matrix."""
        return DenseFisher(self.total / num_examples, self.shapes, num_examples)


def unflatten_columns(rows: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Views of the columns of ``rows`` (``[r, p]``) that belong to each parameter."""
    pieces = torch.split(rows, [shape.numel() for shape in shapes.values()], dim=1)
    return dict(zip(shapes, pieces, strict=True))
