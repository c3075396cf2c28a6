r"""Sums of second moments, :math:`X^\top X`."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for


class RowBatch(ABC):
    """A block of rows whose second moments are summed.

    Attributes:
        count: the number of rows.
        kind: blocks of the same kind can be concatenated.
    """

    count: int
    kind: Hashable

    @classmethod
    @abstractmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        """One block in place of several of the same kind."""

    @abstractmethod
    def add_gram(self, total: Tensor, alpha: float) -> None:
        """Add the second moments times ``alpha`` to ``total``, ``[g, d, d]``."""

    @abstractmethod
    def sum(self) -> Tensor:
        """The sum of the rows, ``[g, d]``."""


@dataclass(frozen=True)
class StoredRows(RowBatch):
    """Rows that are stored as a matrix.

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
        """All stored rows are of one kind; a sum has rows of one width only."""
        return StoredRows

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        return cls(torch.cat([block.rows for block in blocks], 1))

    def add_gram(self, total: Tensor, alpha: float) -> None:
        add_gram(total, self.rows, alpha)

    def sum(self) -> Tensor:
        return self.rows.sum(1)


@dataclass(frozen=True)
class StoredColumns(RowBatch):
    """Rows that are stored as the columns of many short matrices, without a copy.

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
        """Matrices with the same number of columns are of one kind."""
        return StoredColumns, self.columns.shape[3]

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        return cls(torch.cat([block.columns for block in blocks]))

    def add_gram(self, total: Tensor, alpha: float) -> None:
        tile = sizes_for(total.device).entries
        if tile is None:
            # One product for all matrices, after a copy.
            add_gram(total, self.columns.permute(1, 0, 3, 2).flatten(1, 2), alpha)
            return
        for group, target in enumerate(total):
            columns = self.columns[:, group]
            for matrices in torch.split(columns, max(1, tile // target.numel())):
                target.add_((matrices @ matrices.transpose(1, 2)).sum(0), alpha=alpha)

    def sum(self) -> Tensor:
        return self.columns.sum((0, 3))


class RunningGram:
    r"""A running :math:`\sum \alpha X^\top X` over blocks of rows.

    Rows are collected until there are as many as columns.  Adding a few rows would read and
    write the whole matrix for little arithmetic.

    Args:
        groups: ``g``, the number of matrices side by side.
        width: ``d``.
        like: a tensor with the device and the type of the sum.
        memory: bytes that collected rows may take.
    """

    def __init__(self, groups: int, width: int, like: Tensor, memory: int) -> None:
        self.matrix = like.new_zeros(groups, width, width)
        self._most = min(width, memory // (4 * max(1, width * groups) * like.element_size()))
        self._blocks: list[RowBatch] = []
        self._kind: tuple[Hashable, float] | None = None
        """The kind of the collected blocks, and their factor."""

    def add(self, block: RowBatch, alpha: float = 1.0) -> None:
        """Add the second moments of a block of rows."""
        if self._kind != (block.kind, alpha):
            self.flush()
            self._kind = block.kind, alpha
        self._blocks.append(block)
        if sum(collected.count for collected in self._blocks) >= self._most:
            self.flush()

    def flush(self) -> Tensor:
        """Add the collected rows and return the sum, ``[g, d, d]``."""
        if self._kind is not None and self._blocks:
            first, *further = self._blocks
            block = first.concatenated(self._blocks) if further else first
            block.add_gram(self.matrix, self._kind[1])
            self._blocks = []
        return self.matrix


def add_gram(total: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    r"""Add :math:`\alpha X^\top X` to a symmetric ``total``, in place.

    The product of the left half of the columns with the right half is computed once and
    added twice, and likewise within the halves.  This takes about half the operations of
    the full product.

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
    elif width < sizes_for(total.device).gram_width:
        total.addmm_(rows.T, rows, alpha=alpha)
    else:
        half = width // 2
        left, right = rows[:, :half], rows[:, half:]
        across = left.T @ right
        total[:half, half:].add_(across, alpha=alpha)
        total[half:, :half].add_(across.T, alpha=alpha)
        add_gram(total[:half, :half], left, alpha)
        add_gram(total[half:, half:], right, alpha)
