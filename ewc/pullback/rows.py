"""The order of the examples in the rows of a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.pullback.agreement import margin


@dataclass(frozen=True)
class Rows:
    """The layout of the rows: ``[outer, n, inner]`` with the examples as ``n``.

    Attributes:
        outer: the size before the examples; ``None`` if ``inner`` determines it.
        inner: the size after the examples; ``None`` if ``outer`` determines it.
    """

    outer: int | None
    inner: int | None

    def __str__(self) -> str:
        if self.outer == 1:
            return "examples first"
        return "positions first" if self.inner == 1 else f"examples between {self.outer} and rest"

    def by_example(self, tensor: Tensor, num_examples: int, dim: int = 0) -> Tensor:
        """A tensor with its rows, dimension ``dim``, split into two dimensions ``[n, t]``."""
        length = tensor.shape[dim] // num_examples
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        if self.outer == 1:
            return tensor.reshape(*before, num_examples, length, *after)
        outer = length // self.inner if self.outer is None else self.outer  # type: ignore[operator]
        split = tensor.reshape(*before, outer, num_examples, length // outer, *after)
        return split.transpose(dim, dim + 1).flatten(dim + 1, dim + 2)

    def summed(self, tensor: Tensor, num_examples: int, dim: int = 0) -> Tensor:
        """A tensor with the rows of every example summed up, ``n`` in dimension ``dim``."""
        if tensor.shape[dim] == num_examples:
            return tensor
        return self.by_example(tensor, num_examples, dim).sum(dim + 1)


BATCH_FIRST = Rows(outer=1, inner=None)
TIME_FIRST = Rows(outer=None, inner=1)


def possible_rows(rows: int, num_examples: int) -> list[Rows]:
    """The possible layouts of a number of rows, with equally many per example."""
    if rows % num_examples:
        return []
    length = rows // num_examples
    layouts = [BATCH_FIRST, TIME_FIRST] if length > 1 else [BATCH_FIRST]
    return layouts + [Rows(d, length // d) for d in range(2, length) if length % d == 0]


def matching_rows(
    layouts: Sequence[Rows], before: Tensor, after: Tensor, factors: Tensor, noise: float
) -> list[Rows]:
    """The layouts in which every row is scaled by the factor of its example.

    Rows are compared by norm, within a margin.  Single entries are not reproducible on an
    accelerator.

    Args:
        layouts: the candidates.
        before: gradients, ``[rows, ...]``.
        after: the gradients after the scores of each example were scaled.
        factors: the factors of the scaling, ``[n]``; powers of 2, which scale without rounding.
        noise: the change of a row between two runs, relative to a row of typical size
            (:func:`row_noise`).  Rows below it are ignored.
    """
    rows = before.shape[0]
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = (tensor.reshape(rows, -1).to(dtype) for tensor in (before, after))
    factors = factors.to(before)
    length = rows // len(factors)
    floor = 4 * noise * (_typical(after) + float(factors.max()) * _typical(before))
    matching = []
    for layout in layouts:
        outer = length // (layout.inner or 1) if layout.outer is None else layout.outer
        scale = factors.repeat_interleave(length // outer).repeat(outer)[:, None]
        gap = torch.linalg.vector_norm(after - scale * before, dim=1)
        size = torch.linalg.vector_norm(scale * before, dim=1)
        if bool((gap <= margin(before.dtype) * size + floor).all()):
            matching.append(layout)
    return matching


def row_noise(once: Tensor, again: Tensor) -> float:
    """The largest change of a row between two runs, relative to a typical row's norm."""
    dtype = torch.promote_types(once.dtype, torch.float32)
    once, again = (tensor.reshape(len(tensor), -1).to(dtype) for tensor in (once, again))
    change = torch.linalg.vector_norm(again - once, dim=1)
    return float(change.max() / _typical(once)) if bool(change.any()) else 0.0


def _typical(rows: Tensor) -> Tensor:
    """The root mean square of the norms of ``rows``."""
    typical: Tensor = torch.linalg.vector_norm(rows) / max(1, len(rows)) ** 0.5
    return typical
