r"""The Fisher information of each layer by itself: blocks along the diagonal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ewc.checks import check_count
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.matrix import (
    DampedInverse,
    FisherMatrix,
    State,
    SumFisher,
    combined_states,
    split_states,
)
from ewc.parameters import Parameters, Shapes, check_same_shapes, shapes_of, size_of


class BlockDiagonalFisher(FisherMatrix):
    r"""Matrices over disjoint parameters, side by side: :math:`\mathrm{diag}(F_1, F_2, \dots)`.

    The request ``BlockDiagonal()`` gives one dense block per layer (a module that holds
    parameters itself).  It is exact within a layer and zero between layers.  Memory and cost are
    sums over the blocks: :math:`\sum_l p_l^2` numbers, :math:`\sum_l p_l^3` operations for
    ``solve``, ``logdet`` and ``eigenvalues``.

    Args:
        blocks: matrices of any structure, over disjoint parameters.
        shapes: all parameters by name, in the flat order.
        num_examples: the examples behind the mean.

    Attributes:
        form: the usual structure of a layer's block; printing names the layers with another.

    Raises:
        ValueError: two blocks share a parameter, or a parameter is in no block.
    """

    form: ClassVar[Any] = FisherMatrix

    def __init__(self, blocks: Sequence[FisherMatrix], shapes: Shapes, num_examples: int) -> None:
        self.blocks = list(blocks)
        self.shapes = dict(shapes)
        self.num_examples = num_examples
        names = [name for block in self.blocks for name in block.shapes]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"Blocks must be disjoint, got parameter {twice!r} in two blocks.")
        union = {name: shape for block in self.blocks for name, shape in block.shapes.items()}
        check_same_shapes(union, self.shapes, "The set of blocks")

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        return self._gathered(block.matvec(_over(block, v)) for block in self.blocks)

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return self._gathered(block.solve(_over(block, v), damping) for block in self.blocks)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        rows = self._checked_rows(v)
        return torch.stack(
            [b.inverse_quadratic_forms(_over(b, rows), damping) for b in self.blocks]
        ).sum(0)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        inverses = [(b.damped_inverse(damping, tolerance), b.shapes) for b in self.blocks]
        return BlockwiseInverse(inverses, self.shapes)

    def inverse_diagonal(self, damping: float) -> Parameters:
        return self._gathered(block.inverse_diagonal(damping) for block in self.blocks)

    def diagonal(self) -> Parameters:
        return self._gathered(block.diagonal() for block in self.blocks)

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def logdet(self, damping: float) -> Tensor:
        return torch.stack([block.logdet(damping) for block in self.blocks]).sum()

    def eigenvalues(self) -> Tensor:
        return torch.cat([block.eigenvalues() for block in self.blocks]).sort().values

    def largest_eigenvalue(self, steps: Mapping[str, float] | None = None) -> float:
        return max((block.largest_eigenvalue(steps) for block in self.blocks), default=0.0)

    def to_dense(self) -> Tensor:
        size = self.num_parameters
        dense = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        starts, start = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = start
            start += shape.numel()
        for block in self.blocks:
            ranges = [starts[name] + torch.arange(s.numel()) for name, s in block.shapes.items()]
            places = torch.cat(ranges).to(self.device)
            dense[places[:, None], places[None, :]] = block.to_dense()
        return dense

    def scaled(self, factor: float) -> Self:
        blocks = [block.scaled(factor) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    def with_num_examples(self, num_examples: int) -> Self:
        check_count(num_examples, "num_examples")
        blocks = [block.with_num_examples(num_examples) for block in self.blocks]
        return type(self)(blocks, self.shapes, int(num_examples))

    def __add__(self, other: FisherMatrix) -> FisherMatrix:
        """The sum, block by block where the other matrix has the same blocks.

        A layer that is zero in one of the two matrices has its block of the other.
        """
        if not (isinstance(other, BlockDiagonalFisher) and other.shapes == self.shapes):
            return super().__add__(other)
        (left, left_zeros), (right, right_zeros) = self._nonzero_blocks(), other._nonzero_blocks()
        sums: list[FisherMatrix] = []
        for names in {**left, **right}:
            if names in left and names in right:
                sums.append(left[names] + right[names])
            elif names in left and right_zeros.keys() >= set(names):
                sums.append(left[names])
            elif names in right and left_zeros.keys() >= set(names):
                sums.append(right[names])
            else:
                return super().__add__(other)
        present = {name for block in sums for name in block.shapes}
        sums += [zero for name, zero in left_zeros.items() if name not in present]
        examples = self.num_examples + other.num_examples
        kind = type(self) if type(self) is type(other) else BlockDiagonalFisher
        return kind(sums, self.shapes, examples)

    def _nonzero_blocks(
        self,
    ) -> tuple[dict[tuple[str, ...], FisherMatrix], dict[str, FisherMatrix]]:
        """The blocks by the names of their parameters, and the blocks of zeros by parameter."""
        blocks: dict[tuple[str, ...], FisherMatrix] = {}
        zeros: dict[str, FisherMatrix] = {}
        for block in self.blocks:
            if isinstance(block, DiagonalFisher) and float(block.trace()) == 0.0:
                for name, entries in block.diagonal().items():
                    zeros[name] = DiagonalFisher({name: entries}, block.num_examples)
            else:
                blocks[tuple(block.shapes)] = block
        return blocks, zeros

    def embedded(self, shapes: Shapes) -> Self:
        old = {name for block in self.blocks for name in block.shapes}
        blocks = [
            block.embedded({name: shapes[name] for name in block.shapes}) for block in self.blocks
        ]
        for name, shape in shapes.items():
            if name not in old:
                zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
                blocks.append(DiagonalFisher({name: zeros}, self.num_examples))
        return type(self)(blocks, shapes, self.num_examples)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        # Block by block: matrix-free ones keep their network.
        blocks = [block.mapped(function) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def has_units(self) -> bool:
        return any(block.has_units for block in self.blocks)

    def _shrunk(self, amount: float) -> Self:
        if not self.has_units:
            super()._shrunk(amount)
        blocks = [block.shrunk(amount) if block.has_units else block for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    def resolvent(self, v: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]) -> Parameters:
        return self._gathered(block.resolvent(_over(block, v), steps) for block in self.blocks)

    def matvec_with(
        self,
        v: Mapping[str, Tensor],
        product: Callable[[FisherMatrix, Parameters], Parameters],
    ) -> Parameters:
        return self._gathered(b.matvec_with(_over(b, v), product) for b in self.blocks)

    def check_entries(self) -> None:
        for block in self.blocks:
            block.check_entries()

    def attached(self, model: nn.Module) -> Self:
        blocks = [block.attached(model) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    def __repr__(self) -> str:
        """One line with size and trace, and the layers of another structure than ``form``."""
        exact = [
            block
            for block in self.blocks
            if not all(isinstance(term, self.form) for term in block.terms)
        ]
        line = super().__repr__()[:-1]
        for kind, diagonal in (("exact blocks", False), ("exact diagonals", True)):
            of_kind = [b for b in exact if isinstance(b, DiagonalFisher) == diagonal]
            if names := [name for block in of_kind for name in block.shapes]:
                line += f", {kind}: {', '.join(names)}"
        return f"{line})"

    def state(self) -> State:
        tensors, about = combined_states(self.blocks)
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return tensors, {"blocks": about, "shapes": shapes, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        shapes = {name: size_of(shape) for name, shape in about["shapes"].items()}
        return cls(split_states(tensors, about["blocks"]), shapes, about["num_examples"])

    def _gathered(self, vectors: Iterable[Parameters]) -> Parameters:
        """One vector from those over the blocks, in the flat order."""
        gathered = {name: tensor for vector in vectors for name, tensor in vector.items()}
        return {name: gathered[name] for name in self.shapes}


def _over(block: FisherMatrix, v: Mapping[str, Tensor]) -> Parameters:
    """The entries of a vector that belong to a block."""
    return {name: v[name] for name in block.shapes}


def disjoint(terms: Sequence[FisherMatrix], num_examples: int) -> list[FisherMatrix]:
    """Blocks that share no parameter: matrices that share one become one block, their sum."""
    groups: list[list[FisherMatrix]] = []
    for term in terms:
        touching = [g for g in groups if any(term.shapes.keys() & t.shapes.keys() for t in g)]
        groups = [group for group in groups if group not in touching]
        groups.append([other for group in touching for other in group] + [term])
    return [group[0] if len(group) == 1 else _sum(group, num_examples) for group in groups]


def _sum(terms: Sequence[FisherMatrix], num_examples: int) -> FisherMatrix:
    """The sum of matrices over overlapping parameters."""
    shapes = {name: shape for term in terms for name, shape in term.shapes.items()}
    like = terms[0]
    whole: list[FisherMatrix] = []
    for term in terms:
        zeros = {
            name: torch.zeros(shape, dtype=like.dtype, device=like.device)
            for name, shape in shapes.items()
            if name not in term.shapes
        }
        blocks = [term, DiagonalFisher(zeros, num_examples)]
        whole.append(BlockDiagonalFisher(blocks, shapes, num_examples) if zeros else term)
    return SumFisher(whole, num_examples)


class BlockwiseInverse(DampedInverse):
    """The inverses of blocks along the diagonal.

    Args:
        inverses: the inverse of every block, with the block's parameters.
        shapes: all parameters by name, in the flat order.
    """

    def __init__(self, inverses: Sequence[tuple[DampedInverse, Shapes]], shapes: Shapes) -> None:
        self.inverses = inverses
        self.shapes = shapes

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        solution: Parameters = {}
        for inverse, shapes in self.inverses:
            solution |= inverse({name: v[name] for name in shapes})
        return {name: solution[name] for name in self.shapes}
