"""Which example the rows of a tensor belong to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.pullback.agreement import margin


@dataclass(frozen=True)
class Rows:
    """Which example a row belongs to: rows are ``[outer, n, inner]``, in this order.

    Attributes:
        outer: the positions before the example; ``None`` if the other number tells.
        inner: the positions behind it; ``None`` if the other number tells.
    """

    outer: int | None
    inner: int | None

    def by_example(self, tensor: Tensor, num_examples: int, dim: int = 0) -> Tensor:
        """Dimension ``dim``, the rows, as two dimensions ``[n, t]``."""
        length = tensor.shape[dim] // num_examples
        outer = length // self.inner if self.outer is None else self.outer  # type: ignore[operator]
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        split = tensor.reshape(*before, outer, num_examples, length // outer, *after)
        return split.transpose(dim, dim + 1).flatten(dim + 1, dim + 2)


BATCH_FIRST = Rows(outer=1, inner=None)
TIME_FIRST = Rows(outer=None, inner=1)


def possible_rows(rows: int, num_examples: int) -> list[Rows]:
    """The layouts of so many rows, as many for every example."""
    if rows % num_examples:
        return []
    length = rows // num_examples
    layouts = [BATCH_FIRST, TIME_FIRST] if length > 1 else [BATCH_FIRST]
    return layouts + [Rows(d, length // d) for d in range(2, length) if length % d == 0]


def matching_rows(
    layouts: Sequence[Rows], before: Tensor, after: Tensor, factors: Tensor, noise: float
) -> list[Rows]:
    """Those layouts by which rows may have been scaled by their example's factor.

    A row was, if it is within a margin of its scaled self, by norms: no entry of a row needs
    to be reproducible, which on an accelerator none is.

    Args:
        layouts: to choose from.
        before: gradients, ``[rows, ...]``.
        after: the same with the scores of each example scaled.
        factors: by what, ``[n]``, powers of 2: they scale without rounding.
        noise: how much of a row of typical size the arithmetic itself changes from one time
            to the next, as :func:`row_noise` has it; smaller rows tell nothing.
    """
    rows = before.shape[0]
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = (tensor.reshape(rows, -1).to(dtype) for tensor in (before, after))
    factors = factors.to(before)
    length = rows // len(factors)
    floor = 4 * noise * (_typical(after) + float(factors.max()) * _typical(before))
    found = []
    for layout in layouts:
        outer = length // (layout.inner or 1) if layout.outer is None else layout.outer
        scale = factors.repeat_interleave(length // outer).repeat(outer)[:, None]
        gap = torch.linalg.vector_norm(after - scale * before, dim=1)
        size = torch.linalg.vector_norm(scale * before, dim=1)
        if bool((gap <= margin(before.dtype) * size + floor).all()):
            found.append(layout)
    return found


def row_noise(once: Tensor, again: Tensor) -> float:
    """The largest change of a row between two runs, in units of a typical row's norm."""
    dtype = torch.promote_types(once.dtype, torch.float32)
    once, again = (tensor.reshape(len(tensor), -1).to(dtype) for tensor in (once, again))
    change = torch.linalg.vector_norm(again - once, dim=1)
    return float(change.max() / _typical(once)) if bool(change.any()) else 0.0


def _typical(rows: Tensor) -> Tensor:
    """The root mean square of the norms of ``rows``."""
    typical: Tensor = torch.linalg.vector_norm(rows) / max(1, len(rows)) ** 0.5
    return typical
