"""Running sums of outer products in blocks of parameters."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ewc.linalg.gram import add_gram
from ewc.linalg.tiles import slices
from ewc.matrices.dense import DenseFisher
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    unflatten,
)
from ewc.pullback.pullback import Pullback


class OuterProductSums:
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top` in blocks of parameters.

    Args:
        blocks: the parameters of every block, by the block's name.
        like: a tensor with the device of the sums; their type is at least single precision.

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
        """The bytes of a dense block over these parameters."""
        return sum(shape.numel() for shape in shapes.values()) ** 2 * self.dtype.itemsize

    def include(self, key: str, shapes: Shapes, *, diagonal: bool = False) -> None:
        """Add an empty block, if it is new.

        Raises:
            ValueError: the block does not fit into memory.
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
                "structure such as Kronecker() or Diagonal(), or fewer parameters."
            ) from error
        self.blocks[key], self.totals[key] = dict(shapes), total

    def add(self, pullbacks: Sequence[Pullback], keys: Iterable[str] | None = None) -> None:
        """Add the outer products of pulled-back vectors.

        Args:
            pullbacks: the vectors, of every parameter of the blocks that affects the outputs.
            keys: the names of the blocks, which share no parameter; all if ``None``.
        """
        owner = {name: key for key in keys or self.blocks for name in self.blocks[key]}
        for members, touched in _connected(pullbacks, owner):
            largest = max(sum(s.numel() for s in self.blocks[key].values()) for key in touched)
            row_bytes = 2 * members[0].num_vectors * largest * self.dtype.itemsize
            row_bytes += sum(pullback.bytes_per_example() for pullback in members)
            for examples in slices(members[0].num_examples, row_bytes, members[0].memory):
                vectors: Parameters = {}
                for pullback in members:
                    vectors |= pullback.per_example(examples)
                for key in touched:
                    self._add_rows(key, vectors)

    def _add_rows(self, key: str, vectors: Parameters) -> None:
        """Add vectors ``[k, n, *parameter.shape]`` to one block."""
        shapes, total = self.blocks[key], self.totals[key]
        count = next(vectors[name] for name in shapes if name in vectors).shape[:2].numel()
        # A parameter that does not affect the outputs has a zero gradient.
        columns = [
            vectors[name].reshape(count, -1)
            if name in vectors
            else total.new_zeros(count, shape.numel())
            for name, shape in shapes.items()
        ]
        rows = torch.cat(columns, 1).to(total.dtype)
        if total.dim() == 1:
            total += rows.square().sum(0)
        else:
            add_gram(total, rows)

    def mean(self, key: str, num_examples: int) -> FisherMatrix:
        """The mean matrix of one block, computed in place of its sum."""
        shapes, total = self.blocks[key], self.totals[key].div_(num_examples)
        if total.dim() == 1:
            return DiagonalFisher(unflatten(total, shapes), num_examples)
        return DenseFisher(total, shapes, num_examples)


def _connected(
    pullbacks: Sequence[Pullback], owner: Mapping[str, str]
) -> list[tuple[list[Pullback], list[str]]]:
    """Groups of pullbacks and blocks; different groups share no parameter."""
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
