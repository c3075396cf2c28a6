r"""The Fisher information of every layer by itself: a matrix of blocks along the diagonal."""

from collections.abc import Callable, Mapping, Sequence
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

    From the pass over the data there is one dense block a layer (a module with parameters
    of its own), exact within the layer and zero between layers.  Memory and cost are the
    sums over the blocks: :math:`\sum_l p_l^2` numbers, :math:`\sum_l p_l^3` operations for
    ``solve``, ``logdet`` and ``eigenvalues``.

    Args:
        blocks: matrices of any structure, over disjoint parameters.
        shapes: all parameters by name, in the flat order.
        num_examples: the examples behind the mean.

    Attributes:
        form: the structure that layers have where they can; printing names the others.

    Raises:
        ValueError: the blocks share a parameter, or do not hold all of them.
    """

    form: ClassVar[Any] = FisherMatrix

    def __init__(self, blocks: Sequence[FisherMatrix], shapes: Shapes, num_examples: int) -> None:
        self.blocks = list(blocks)
        self.shapes = dict(shapes)
        self.num_examples = num_examples
        names = [name for block in self.blocks for name in block.shapes]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"Parameter {twice!r} is in two blocks: blocks must be disjoint.")
        union = {name: shape for block in self.blocks for name, shape in block.shapes.items()}
        check_same_shapes(union, self.shapes, "The set of blocks")

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The products of the blocks.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        return self._gathered(block.matvec(self._part(v, block)) for block in self.blocks)

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solutions of the blocks' :math:`(F_l + \delta I) u_l = v_l`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: a damped block is not positive definite.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return self._gathered(block.solve(self._part(v, block), damping) for block in self.blocks)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        r"""The sums of the blocks' :math:`v_{nl}^\top (F_l + \delta I)^{-1} v_{nl}`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: a damped block is not positive definite.
        """
        rows = self._checked_rows(v)
        return torch.stack(
            [b.inverse_quadratic_forms(self._part(rows, b), damping) for b in self.blocks]
        ).sum(0)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, block by block.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: a damped block is not positive definite.
        """
        inverses = [(b.damped_inverse(damping, tolerance), b.shapes) for b in self.blocks]
        return BlockwiseInverse(inverses, self.shapes)

    def inverse_diagonal(self, damping: float) -> Parameters:
        r"""The diagonals of the blocks' :math:`(F_l + \delta I)^{-1}`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: a damped block is not positive definite.
        """
        return self._gathered(block.inverse_diagonal(damping) for block in self.blocks)

    def diagonal(self) -> Parameters:
        """The diagonals of the blocks."""
        return self._gathered(block.diagonal() for block in self.blocks)

    def trace(self) -> Tensor:
        """The sum of the blocks' traces."""
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def logdet(self, damping: float) -> Tensor:
        r"""The sum of the blocks' :math:`\log \det (F_l + \delta I)`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        return torch.stack([block.logdet(damping) for block in self.blocks]).sum()

    def eigenvalues(self) -> Tensor:
        """The eigenvalues of all blocks in ascending order, shape ``[p]``."""
        return torch.cat([block.eigenvalues() for block in self.blocks]).sort().values

    def to_dense(self) -> Tensor:
        """The blocks at their places, shape ``[p, p]``."""
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
        """Every block times ``factor``."""
        blocks = [block.scaled(factor) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    def with_num_examples(self, num_examples: int) -> Self:
        """The same blocks, each as the information of another number of examples."""
        check_count(num_examples, "num_examples")
        blocks = [block.with_num_examples(num_examples) for block in self.blocks]
        return type(self)(blocks, self.shapes, int(num_examples))

    def __add__(self, other: FisherMatrix) -> FisherMatrix:
        """The sum; where the other matrix has the same blocks, block by block.

        A layer that took no part in one of the two is zero there, and its block that of
        the other.
        """
        if not (isinstance(other, BlockDiagonalFisher) and other.shapes == self.shapes):
            return super().__add__(other)
        (mine, idle), (theirs, others_idle) = self._parts(), other._parts()
        sums: list[FisherMatrix] = []
        for names in {**mine, **theirs}:
            if names in mine and names in theirs:
                sums.append(mine[names] + theirs[names])
            elif names in mine and others_idle.keys() >= set(names):
                sums.append(mine[names])
            elif names in theirs and idle.keys() >= set(names):
                sums.append(theirs[names])
            else:
                return super().__add__(other)
        present = {name for block in sums for name in block.shapes}
        sums += [zero for name, zero in idle.items() if name not in present]
        examples = self.num_examples + other.num_examples
        kind = type(self) if type(self) is type(other) else BlockDiagonalFisher
        return kind(sums, self.shapes, examples)

    def _parts(self) -> tuple[dict[tuple[str, ...], FisherMatrix], dict[str, FisherMatrix]]:
        """The blocks by their parameters, and apart the zero ones, by parameter."""
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
        """The blocks over more parameters; new parameters are blocks of zeros."""
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
        """The blocks, each with ``function`` applied: matrix-free ones keep their network."""
        blocks = [block.mapped(function) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the first block."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the first block is."""
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
        return self._gathered(block.resolvent(self._part(v, block), steps) for block in self.blocks)

    def matvec_with(
        self,
        v: Mapping[str, Tensor],
        product: Callable[[FisherMatrix, Parameters], Parameters],
    ) -> Parameters:
        return self._gathered(b.matvec_with(self._part(v, b), product) for b in self.blocks)

    def check_entries(self) -> None:
        """Check the entries of every block."""
        for block in self.blocks:
            block.check_entries()

    def attached(self, model: nn.Module) -> Self:
        """The blocks with the network that matrix-free ones among them need."""
        blocks = [block.attached(model) for block in self.blocks]
        return type(self)(blocks, self.shapes, self.num_examples)

    def __repr__(self) -> str:
        """One line with size and trace, and the layers that have another form."""
        others = [
            block
            for block in self.blocks
            if not all(isinstance(term, self.form) for term in block.terms)
        ]
        line = super().__repr__()[:-1]
        for kind, diagonal in (("exact blocks", False), ("exact diagonals", True)):
            of_kind = [b for b in others if isinstance(b, DiagonalFisher) == diagonal]
            if names := [name for block in of_kind for name in block.shapes]:
                line += f", {kind}: {', '.join(names)}"
        return f"{line})"

    def state(self) -> State:
        """The tensors of all blocks, numbered; a description a block."""
        tensors, about = combined_states(self.blocks)
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return tensors, {"blocks": about, "shapes": shapes, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of the blocks described."""
        shapes = {name: size_of(shape) for name, shape in about["shapes"].items()}
        return cls(split_states(tensors, about["blocks"]), shapes, about["num_examples"])

    @staticmethod
    def _part(v: Mapping[str, Tensor], block: FisherMatrix) -> Parameters:
        return {name: v[name] for name in block.shapes}

    def _gathered(self, parts: Any) -> Parameters:
        found = {name: tensor for part in parts for name, tensor in part.items()}
        return {name: found[name] for name in self.shapes}


def disjoint(terms: Sequence[FisherMatrix], num_examples: int) -> list[FisherMatrix]:
    """BlockwiseInverse that share no parameter: matrices that do are put into one, their sum."""
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
