r"""Sums of second moments, :math:`X^\top X`."""

import torch
from torch import Tensor

GRAM_WIDTH = 128
"""Columns from which it pays to make a Gram matrix in quarters."""


class GramSum:
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
        self._rows: list[Tensor] = []
        self._alpha = 1.0

    def add(self, rows: Tensor, alpha: float = 1.0) -> None:
        """Add the products of rows ``[g, r, d]``."""
        rows = rows.detach()  # or collected rows would keep the graph they come from
        if alpha != self._alpha:
            self.flush()
            self._alpha = alpha
        if rows.shape[1] >= self._most and not self._rows:
            add_gram(self.matrix, rows, alpha)
            return
        self._rows.append(rows)
        if sum(some.shape[1] for some in self._rows) >= self._most:
            self.flush()

    def flush(self) -> Tensor:
        """Add what was collected; the sum, ``[g, d, d]``."""
        if self._rows:
            rows = self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows, 1)
            add_gram(self.matrix, rows, self._alpha)
            self._rows = []
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
