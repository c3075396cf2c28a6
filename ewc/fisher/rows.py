"""Which example the rows of a tensor belong to."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def matching_rows(before: Tensor, after: Tensor, factors: Tensor) -> list[Rows]:
    """The layouts by which rows may have been scaled by their example's factor.

    Args:
        before: gradients, ``[rows, ...]``.
        after: the same with the scores of each example scaled.
        factors: by what, ``[n]``.
    """
    n, rows = len(factors), before.shape[0]
    if rows % n:
        return []
    length = rows // n
    layouts = [BATCH_FIRST, TIME_FIRST] if length > 1 else [BATCH_FIRST]
    layouts += [Rows(d, length // d) for d in range(2, length) if length % d == 0]
    factors = factors.to(before.dtype)
    found = []
    for layout in layouts:
        outer = length // (layout.inner or 1) if layout.outer is None else layout.outer
        scale = factors.repeat_interleave(length // outer).repeat(outer)
        # Far from rounding, which is exact here, and from a factor of 2.
        if torch.allclose((before.T * scale).T, after, rtol=0.1, atol=0.0):
            found.append(layout)
    return found
