r"""Sums of second moments, :math:`X^\top X`."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ewc.linalg.squares import TILE

GRAM_WIDTH = 128
"""Columns from which it pays to make a Gram matrix in quarters."""


class RowBatch(ABC):
    """Some rows whose second moments are wanted.

    Attributes:
        count: how many there are.
        kind: blocks of the same kind can be put together.
    """

    count: int
    kind: Hashable

    @classmethod
    @abstractmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        """Blocks of one kind as one."""

    @abstractmethod
    def add_gram(self, total: Tensor, alpha: float) -> None:
        """Add the second moments times ``alpha`` to ``total``, ``[g, d, d]``."""

    @abstractmethod
    def sum(self) -> Tensor:
        """The sum of the rows, ``[g, d]``."""


@dataclass(frozen=True)
class StoredRows(RowBatch):
    """Rows as they are.

    Attributes:
        rows: ``[g, r, d]``.
    """

    rows: Tensor

    @property
    def count(self) -> int:  # type: ignore[override]
        """``r``."""
        return self.rows.shape[1]

    @property
    def kind(self) -> Hashable:  # type: ignore[override]
        """Rows of one width go together, and a sum has only such."""
        return StoredRows

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        """All rows, one block after the other."""
        return cls(torch.cat([block.rows for block in blocks], 1))

    def add_gram(self, total: Tensor, alpha: float) -> None:
        """Add their products."""
        add_gram(total, self.rows, alpha)

    def sum(self) -> Tensor:
        """The sum of the rows."""
        return self.rows.sum(1)


@dataclass(frozen=True)
class StoredColumns(RowBatch):
    """Rows that lie in memory as columns, many short matrices of them; not copied.

    Attributes:
        columns: ``[b, g, d, t]``, the ``b t`` rows of every group.
    """

    columns: Tensor

    @property
    def count(self) -> int:  # type: ignore[override]
        """``b t``."""
        return self.columns.shape[0] * self.columns.shape[3]

    @property
    def kind(self) -> Hashable:  # type: ignore[override]
        """Columns of one length go together."""
        return StoredColumns, self.columns.shape[3]

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        """All matrices."""
        return cls(torch.cat([block.columns for block in blocks]))

    def add_gram(self, total: Tensor, alpha: float) -> None:
        """Add the products of every matrix with itself."""
        for group, target in enumerate(total):
            columns = self.columns[:, group]
            for part in torch.split(columns, max(1, TILE // target.numel())):
                target.add_((part @ part.transpose(1, 2)).sum(0), alpha=alpha)

    def sum(self) -> Tensor:
        """The sum of the columns."""
        return self.columns.sum((0, 3))


class RunningGram:
    r"""A running :math:`\sum \alpha X^\top X` over blocks of rows.

    A few rows at a time would read and write the whole matrix for little arithmetic, so
    rows are collected until there are as many as columns.

    Args:
        groups: matrices side by side, ``g``.
        width: ``d``.
        like: a tensor whose device and type the sum has.
        memory: bytes that collected rows may take.
    """

    def __init__(self, groups: int, width: int, like: Tensor, memory: int) -> None:
        self.matrix = like.new_zeros(groups, width, width)
        self._most = min(width, memory // (4 * max(1, width * groups) * like.element_size()))
        self._blocks: list[RowBatch] = []
        self._of: tuple[Hashable, float] | None = None

    def add(self, block: RowBatch, alpha: float = 1.0) -> None:
        """Add the products of some rows."""
        if self._of != (block.kind, alpha):
            self.flush()
            self._of = block.kind, alpha
        self._blocks.append(block)
        if sum(some.count for some in self._blocks) >= self._most:
            self.flush()

    def flush(self) -> Tensor:
        """Add what was collected; the sum, ``[g, d, d]``."""
        if self._of is not None and self._blocks:
            one, *more = self._blocks
            block = one.concatenated(self._blocks) if more else one
            block.add_gram(self.matrix, self._of[1])
            self._blocks = []
        return self.matrix


def add_gram(total: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    r"""Add :math:`\alpha X^\top X` to a symmetric ``total``, in place.

    The products of the halves of the columns with each other are made once and put down
    twice, and so on within the halves: about half the operations of the full product.

    Args:
        total: ``[d, d]``, or a batch of them.
        rows: ``[r, d]``, or a batch of them.
        alpha: the factor.
    """
    if rows.dim() == 3 and rows.shape[0] == 1:
        add_gram(total[0], rows[0], alpha)
        return
    width = rows.shape[-1]
    if rows.dim() == 3:
        total.baddbmm_(rows.transpose(1, 2), rows, alpha=alpha)
    elif width < GRAM_WIDTH:
        total.addmm_(rows.T, rows, alpha=alpha)
    else:
        half = width // 2
        left, right = rows[:, :half], rows[:, half:]
        across = left.T @ right
        total[:half, half:].add_(across, alpha=alpha)
        total[half:, :half].add_(across.T, alpha=alpha)
        add_gram(total[:half, :half], left, alpha)
        add_gram(total[half:, half:], right, alpha)
