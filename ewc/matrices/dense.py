r"""The whole Fisher information matrix, for networks of some thousand parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.linalg.gram import add_gram
from ewc.matrices.damped_inverse import DampedInverse, Factorised
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.matrix import FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    shapes_of,
    size_of,
    unflatten,
)
from ewc.pullback.accumulator import Accumulator
from ewc.pullback.pullback import Chunk, Pullback, slices


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

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        r"""The scalars :math:`v_n^\top (F + \delta I)^{-1} v_n`, by one Cholesky factor.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        rows = torch.cat([t.flatten(1) for t in self._checked_rows(v).values()], 1)
        factor = torch.linalg.cholesky(self._damped(damping))
        # With F + delta I = L L' the form is |L^-1 v|^2.
        solved: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False)
        return solved.square().sum(0)

    def to_dense(self) -> Tensor:
        """A copy of the matrix, shape ``[p, p]``."""
        return self._matrix.clone()

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, by one Cholesky factor.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        check_not_negative(tolerance, "tolerance")
        return Factorised(torch.linalg.cholesky(self._damped(damping)), self.shapes)

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

    def check_entries(self) -> None:
        """Check the diagonal, that all entries are finite, and the eigenvalues."""
        super().check_entries()
        self._check_semidefinite(self._matrix)

    def diagonal(self) -> Parameters:
        """A copy of the diagonal, by parameter."""
        return unflatten(self._matrix.diagonal().clone(), self.shapes)

    def state(self) -> State:
        """The matrix; the shapes in the flat order."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"matrix": self._matrix}, {"shapes": shapes, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of these entries."""
        shapes = {name: size_of(shape) for name, shape in about["shapes"].items()}
        return cls(tensors["matrix"], shapes, about["num_examples"])


class BlockSums:
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top` in blocks of parameters.

    Args:
        blocks: the parameters of every block, by a name of the block.
        like: a tensor whose device and type the sums have, in single precision at least.

    Attributes:
        blocks: the parameters of every block.
        totals: the sums: ``[p, p]``, or ``[p]`` where only the diagonal is summed.

    Raises:
        ValueError: a block does not fit into memory.
    """

    def __init__(self, blocks: Mapping[str, Shapes], like: Tensor) -> None:
        self.blocks: dict[str, Shapes] = {}
        self.totals: dict[str, Tensor] = {}
        self.dtype = accumulation_dtype(like.dtype)
        self.device = like.device
        for key, shapes in blocks.items():
            self.include(key, shapes)

    def bytes_of(self, shapes: Shapes) -> int:
        """What a dense block over these parameters takes."""
        return sum(shape.numel() for shape in shapes.values()) ** 2 * self.dtype.itemsize

    def include(self, key: str, shapes: Shapes, *, diagonal: bool = False) -> None:
        """Begin a block, if it is new.

        Raises:
            ValueError: it does not fit into memory.
        """
        if key in self.blocks:
            return
        size = sum(shape.numel() for shape in shapes.values())
        sizes = (size,) if diagonal else (size, size)
        try:
            total = torch.zeros(sizes, dtype=self.dtype, device=self.device)
        except RuntimeError as error:
            where = f" ({', '.join(shapes)})" if key else ""
            raise ValueError(
                f"A dense Fisher matrix over {size} parameters{where} takes "
                f"{self.bytes_of(shapes) / 1e9:.0f} GB, more than there is: take another "
                "structure such as KroneckerFisher or DiagonalFisher, a smaller network or some "
                "of its parameters."
            ) from error
        self.blocks[key], self.totals[key] = dict(shapes), total

    def add(self, pullbacks: Sequence[Pullback], keys: Iterable[str] | None = None) -> None:
        """Add the outer products of pulled-back vectors.

        Args:
            pullbacks: together they hold every parameter of the blocks that takes part.
            keys: the blocks, which share no parameter; all if ``None``.
        """
        owner = {name: key for key in keys or self.blocks for name in self.blocks[key]}
        for members, touched in _connected(pullbacks, owner):
            largest = max(sum(s.numel() for s in self.blocks[key].values()) for key in touched)
            row_bytes = 2 * members[0].num_vectors * largest * self.dtype.itemsize
            row_bytes += sum(pullback.bytes_per_example() for pullback in members)
            for part in slices(members[0].num_examples, row_bytes, members[0].memory):
                vectors: Parameters = {}
                for pullback in members:
                    vectors |= pullback.per_example(part)
                for key in touched:
                    self._add_rows(key, vectors)

    def _add_rows(self, key: str, vectors: Parameters) -> None:
        """Add vectors ``[k, n, *parameter.shape]`` to one block."""
        shapes, total = self.blocks[key], self.totals[key]
        present = [name for name in shapes if name in vectors]
        # A parameter that did not take part has a zero gradient.
        count = vectors[present[0]].shape[:2].numel()
        rows = total.new_zeros(count, total.shape[0])
        pieces = torch.split(rows, [shape.numel() for shape in shapes.values()], dim=1)
        columns = dict(zip(shapes, pieces, strict=True))
        for name in present:
            columns[name].copy_(vectors[name].reshape(columns[name].shape))
        if total.dim() == 1:
            total += rows.square_().sum(0)
        else:
            add_gram(total, rows)

    def mean(self, key: str, num_examples: int) -> FisherMatrix:
        """The mean matrix of one block, which takes the place of its sum."""
        shapes, total = self.blocks[key], self.totals[key].div_(num_examples)
        if total.dim() == 1:
            return DiagonalFisher(unflatten(total, shapes), num_examples)
        return DenseFisher(total, shapes, num_examples)


def _connected(
    pullbacks: Sequence[Pullback], owner: Mapping[str, str]
) -> list[tuple[list[Pullback], list[str]]]:
    """Pullbacks and blocks that have to do with each other, apart from all others."""
    groups: list[tuple[list[Pullback], list[str]]] = []
    for pullback in pullbacks:
        keys = list(dict.fromkeys(owner[name] for name in pullback.shapes if name in owner))
        if not keys:
            continue
        touching = [group for group in groups if set(group[1]) & set(keys)]
        groups = [group for group in groups if group not in touching]
        members = [other for group in touching for other in group[0]]
        joined = dict.fromkeys([key for group in touching for key in group[1]] + keys)
        groups.append(([*members, pullback], list(joined)))
    return groups


class DenseSum(Accumulator):
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top` over all parameters.

    Raises:
        ValueError: the matrix does not fit into memory.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = shapes_of(parameters)
        self.blocks = BlockSums({"": self.shapes}, next(iter(parameters.values())))

    def add(self, chunk: Chunk) -> None:
        """Add the outer products of one chunk of pulled-back vectors."""
        for pullbacks in chunk.pullbacks():
            self.blocks.add(pullbacks)

    def sums(self) -> dict[str, Tensor]:
        """The matrix."""
        return self.blocks.totals

    def mean(self, num_examples: int) -> DenseFisher:
        """The mean matrix."""
        matrix = self.blocks.mean("", num_examples)
        assert isinstance(matrix, DenseFisher)
        return matrix
