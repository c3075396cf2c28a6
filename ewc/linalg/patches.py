r"""Second moments and squared gradients of convolutions of stride 1, without unfolding.

The row of a position :math:`p` has the inputs :math:`x_{p + d}` at all kernel offsets
:math:`d`.  With stride 1 the block :math:`\sum_p x_{p+d} x_{p+d'}^\top` of two offsets
depends only on their lag :math:`\delta = d' - d`, except at the border.  It is the
autocorrelation :math:`R_\delta = \sum_q x_q x_{q+\delta}^\top` minus the terms of the few
:math:`q` that the offset :math:`d` never reaches.  A 3 x 3 kernel has 13 lags up to sign.
Unfolded rows take 45 products.

The gradient of a kernel's entry, :math:`\sum_p g_p x_{p + d}^\top`, is a product with the
inputs shifted by :math:`d`.  With zeros after every row of the image a shift is a slice, so
the inputs are not copied once per entry.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from ewc.linalg.gram import add_gram
from ewc.linalg.tiles import CACHED_ENTRIES, slices

Index = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """The positions of a kernel of stride 1 over an input.

    Attributes:
        kernel: the sizes of the kernel.
        padding: the number of zeros at both ends.
        dilation: the distance between entries of the kernel.
        sizes: the sizes of the input.
    """

    kernel: Index
    padding: Index
    dilation: Index
    sizes: Index

    @property
    def reach(self) -> Index:
        """The largest distance between two entries of the kernel, per axis."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def outputs(self) -> Index:
        """The sizes of the result."""
        sizes = zip(self.sizes, self.padding, self.reach, strict=True)
        return tuple(size + 2 * padding - reach for size, padding, reach in sizes)

    @property
    def stored(self) -> Index:
        """The sizes with enough zeros after every row that no lag reaches the next row."""
        inner = zip(self.sizes[1:], self.reach[1:], strict=True)
        return self.sizes[0], *(size + reach for size, reach in inner)

    def offsets(self) -> list[Index]:
        """The offsets of the kernel's entries, in order."""
        steps = (range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True))
        return list(product(*steps))

    def lags(self) -> dict[Index, list[tuple[int, int]]]:
        """Pairs of entries, by number, for every lag up to sign."""
        pairs: dict[Index, list[tuple[int, int]]] = {}
        offsets = self.offsets()
        for (i, first), (j, second) in product(enumerate(offsets), repeat=2):
            lag = tuple(b - a for a, b in zip(first, second, strict=True))
            if lag >= (0,) * len(lag):
                pairs.setdefault(lag, []).append((i, j))
        return pairs

    def valid(self, axis: int, lag: Index) -> tuple[int, int]:
        """The range where both ``q`` and ``q + lag`` are inside the input."""
        return _range(-lag[axis], self.sizes[axis] - max(0, lag[axis]))

    def reached(self, axis: int, lag: Index, offset: int) -> tuple[int, int]:
        """The range of :meth:`valid` that the kernel's entry at ``offset`` reaches."""
        start, stop = self.valid(axis, lag)
        first = offset - self.padding[axis]
        return _range(max(start, first), min(stop, first + self.outputs[axis]))

    def outside(self, axis: int, lag: Index, offset: int) -> Iterator[tuple[int, int]]:
        """The ranges of :meth:`valid` that the kernel's entry at ``offset`` does not reach."""
        start, stop = self.valid(axis, lag)
        first = offset - self.padding[axis]
        last = first + self.outputs[axis]
        for left, right in ((start, min(first, stop)), (max(last, start), stop)):
            if left < right:
                yield left, right

    @lru_cache  # noqa: B019 - few, small, and used in every batch
    def share(self) -> float:
        """The multiplications, as a fraction of those of unfolded rows."""
        total = 0.0
        stored, offsets = prod(self.stored), self.offsets()
        for lag, pairs in self.lags().items():
            total += max(0, self.sizes[0] - lag[0]) * prod(self.stored[1:])
            prefixes = {offsets[i][:axis] for i, _ in pairs for axis in range(1, len(lag) + 1)}
            for prefix in prefixes:
                axis = len(prefix) - 1
                slabs = self.outside(axis, lag, prefix[axis])
                total += sum(b - a for a, b in slabs) * stored / self.stored[axis]
        entries = prod(self.kernel)
        return total / (prod(self.outputs) * entries * (entries + 1) / 2)


def _range(start: int, stop: int) -> tuple[int, int]:
    """A range of indices, empty if it would end before its start or before 0.

    A kernel may be outside its input, or larger than it.
    """
    return max(0, start), max(0, start, stop)


def add_patch_squares(total: Tensor, x: Tensor, g: Tensor, grid: Grid) -> None:
    r"""Add :math:`\sum_{k,n} (\sum_p g_{knp} r_{np}^\top)^2` with the rows of the positions.

    Args:
        total: ``[o, c k]`` with the ``k`` entries of the kernel, changed in place.
        x: the inputs, ``[n, c, *sizes]``.
        g: the output gradients, ``[v, n, o, *outputs]``.
        grid: the positions of the kernel.
    """
    vectors, n, outputs = g.shape[:3]
    channels = x.shape[1]
    dims = len(grid.sizes)
    padded = [size + 2 * padding for size, padding in zip(grid.sizes, grid.padding, strict=True)]
    # One more line at the end, for the last shifts.
    ends = [padding + (axis == 0) for axis, padding in enumerate(grid.padding)]
    around = [pad for axis in reversed(range(dims)) for pad in (grid.padding[axis], ends[axis])]
    cells = functional.pad(x, around).flatten(2)
    behind = [pad for axis in reversed(range(1, dims)) for pad in (0, grid.reach[axis])]
    rows = functional.pad(g.transpose(0, 1), behind).reshape(n, vectors * outputs, -1)
    strides = [prod(padded[axis + 1 :]) for axis in range(dims)]
    entries = prod(grid.kernel)
    squares = total.new_zeros(entries, outputs, channels)
    for examples in slices(n, vectors * outputs * channels, CACHED_ENTRIES):
        for number, offset in enumerate(grid.offsets()):
            shift = sum(step * stride for step, stride in zip(offset, strides, strict=True))
            shifted = cells[examples, :, shift : shift + rows.shape[2]]
            gradients = rows[examples] @ shifted.transpose(1, 2)
            squares[number] += gradients.view(-1, outputs, channels).square_().sum(0)
    total += squares.permute(1, 2, 0).reshape(total.shape)


def add_patch_gram(total: Tensor, x: Tensor, grid: Grid, alpha: float) -> None:
    r"""Add :math:`\alpha \sum_p r_p r_p^\top` over the rows of all positions and examples.

    Args:
        total: ``[c k, c k]`` with the ``k`` entries of the kernel, changed in place.
        x: the inputs, ``[n, c, *sizes]``.
        grid: the positions of the kernel.
        alpha: the factor.
    """
    n, channels = x.shape[:2]
    dims = len(grid.sizes)
    # Positions first, so that a lag is a shift of the rows of a matrix.
    cells = x.new_zeros(*grid.stored, n, channels)
    cells[tuple(slice(0, size) for size in grid.sizes)] = x.permute(*range(2, 2 + dims), 0, 1)
    rows = cells.view(-1, channels)
    strides = [prod(grid.stored[axis + 1 :]) * n for axis in range(dims)]
    entries = prod(grid.kernel)
    blocks: dict[tuple[int, int], Tensor] = {}
    offsets = grid.offsets()
    for lag, pairs in grid.lags().items():
        shift = sum(step * stride for step, stride in zip(lag, strides, strict=True))
        if shift:
            whole = rows[:-shift].T @ rows[shift:]
        else:
            whole = x.new_zeros(channels, channels)
            add_gram(whole, rows)
        restricted: dict[Index, Tensor] = {(): whole}
        for i, j in pairs:
            for axis in range(dims):
                prefix = offsets[i][: axis + 1]
                if prefix not in restricted:
                    wider = restricted[prefix[:-1]]
                    restricted[prefix] = _restricted(wider, cells, grid, lag, prefix)
            blocks[i, j] = restricted[offsets[i]]
            blocks[j, i] = blocks[i, j].T
    # The channels come first, so the entries of a block are not contiguous: added row by row.
    rows_of = total.view(channels, entries, channels * entries)
    for i in range(entries):
        row = torch.stack([blocks[i, j] for j in range(entries)], -1)
        rows_of[:, i].add_(row.flatten(1), alpha=alpha)


def _restricted(
    whole: Tensor, cells: Tensor, grid: Grid, lag: Index, prefix: Sequence[int]
) -> Tensor:
    """The sum over all ``q`` that the entry reaches along the axes of ``prefix``.

    Args:
        whole: the sum restricted along these axes except the last.
        cells: the inputs, ``[*stored, n, c]``.
        grid: the positions of the kernel.
        lag: the lag of the two factors.
        prefix: the entry's offsets along the first axes.
    """
    last = len(prefix) - 1
    ranges = []
    for axis in range(len(lag)):
        inner = axis < last
        ranges.append(grid.reached(axis, lag, prefix[axis]) if inner else grid.valid(axis, lag))
    restricted = whole
    for slab in grid.outside(last, lag, prefix[last]):
        ranges[last] = slab
        left = cells[tuple(slice(a, b) for a, b in ranges)]
        right = cells[tuple(slice(a + d, b + d) for (a, b), d in zip(ranges, lag, strict=True))]
        channels = cells.shape[-1]
        removed = left.reshape(-1, channels).T @ right.reshape(-1, channels)
        restricted = restricted - removed
    return restricted
