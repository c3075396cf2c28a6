r"""Second moments and squared gradients of convolutions of stride 1, without unfolding.

The row of a position :math:`p` holds the inputs :math:`x_{p + d}` at all kernel offsets
:math:`d`.  With stride 1 the block :math:`\sum_p x_{p+d} x_{p+d'}^\top` of two offsets
depends on their lag :math:`\delta = d' - d` but for the border: it is the autocorrelation
:math:`R_\delta = \sum_q x_q x_{q+\delta}^\top`, less the few slabs of :math:`q` that lie
outside of what :math:`d` sees.  A 3 x 3 kernel has 13 lags up to sign, where unfolded rows
take 45 products.

The gradient of a kernel's entry, :math:`\sum_p g_p x_{p + d}^\top`, is a product with the
inputs shifted by :math:`d`.  With zeros behind every row of the image a shift is a slice of
them, so that nothing is copied nine times.
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
from ewc.linalg.squares import TILE
from ewc.linalg.tiles import slices

Index = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Where a kernel of stride 1 lies over an input.

    Attributes:
        kernel: its sizes.
        padding: zeros at both ends.
        dilation: between the kernel's entries.
        sizes: of the input.
    """

    kernel: Index
    padding: Index
    dilation: Index
    sizes: Index

    @property
    def reach(self) -> Index:
        """The largest distance of two entries of the kernel."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def outputs(self) -> Index:
        """The sizes of the result."""
        sizes = zip(self.sizes, self.padding, self.reach, strict=True)
        return tuple(size + 2 * padding - reach for size, padding, reach in sizes)

    @property
    def stored(self) -> Index:
        """The sizes with so many zeros behind the rows that no lag gets into the next one."""
        inner = zip(self.sizes[1:], self.reach[1:], strict=True)
        return self.sizes[0], *(size + reach for size, reach in inner)

    def offsets(self) -> list[Index]:
        """The kernel's entries, in order."""
        steps = (range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True))
        return list(product(*steps))

    def lags(self) -> dict[Index, list[tuple[int, int]]]:
        """Pairs of entries (their numbers) by lag, one of every two lags of either sign."""
        found: dict[Index, list[tuple[int, int]]] = {}
        offsets = self.offsets()
        for (i, first), (j, second) in product(enumerate(offsets), repeat=2):
            lag = tuple(b - a for a, b in zip(first, second, strict=True))
            if lag >= (0,) * len(lag):
                found.setdefault(lag, []).append((i, j))
        return found

    def valid(self, axis: int, lag: Index) -> tuple[int, int]:
        """Where both ``q`` and ``q + lag`` are inside of the input."""
        return _range(-lag[axis], self.sizes[axis] - max(0, lag[axis]))

    def seen(self, axis: int, lag: Index, offset: int) -> tuple[int, int]:
        """Of these, what the kernel's entry at ``offset`` sees."""
        start, stop = self.valid(axis, lag)
        first = offset - self.padding[axis]
        return _range(max(start, first), min(stop, first + self.outputs[axis]))

    def outside(self, axis: int, lag: Index, offset: int) -> Iterator[tuple[int, int]]:
        """Of these, what the kernel's entry at ``offset`` does not see."""
        start, stop = self.valid(axis, lag)
        first = offset - self.padding[axis]
        last = first + self.outputs[axis]
        for left, right in ((start, min(first, stop)), (max(last, start), stop)):
            if left < right:
                yield left, right

    @lru_cache  # noqa: B019 - few, small, and asked for at every batch
    def share(self) -> float:
        """The multiplications, as a share of those of unfolded rows."""
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
    """A range of indices, empty where it would end before it begins or before 0.

    A kernel may lie beside its map, or be larger than it.
    """
    return max(0, start), max(0, start, stop)


def add_patch_squares(total: Tensor, x: Tensor, g: Tensor, grid: Grid) -> None:
    r"""Add :math:`\sum_{k,n} (\sum_p g_{knp} r_{np}^\top)^2` with the rows of the positions.

    Args:
        total: ``[o, c k]`` with the ``k`` entries of the kernel, changed in place.
        x: ``[n, c, *sizes]``.
        g: ``[v, n, o, *outputs]``.
        grid: where the kernel lies.
    """
    vectors, n, outputs = g.shape[:3]
    channels = x.shape[1]
    dims = len(grid.sizes)
    padded = [size + 2 * padding for size, padding in zip(grid.sizes, grid.padding, strict=True)]
    # One line more at the end, for the last shifts.
    ends = [padding + (axis == 0) for axis, padding in enumerate(grid.padding)]
    around = [pad for axis in reversed(range(dims)) for pad in (grid.padding[axis], ends[axis])]
    cells = functional.pad(x, around).flatten(2)
    behind = [pad for axis in reversed(range(1, dims)) for pad in (0, grid.reach[axis])]
    rows = functional.pad(g.transpose(0, 1), behind).reshape(n, vectors * outputs, -1)
    strides = [prod(padded[axis + 1 :]) for axis in range(dims)]
    entries = prod(grid.kernel)
    squares = total.new_zeros(entries, outputs, channels)
    for some in slices(n, vectors * outputs * channels, TILE):
        for number, offset in enumerate(grid.offsets()):
            shift = sum(step * stride for step, stride in zip(offset, strides, strict=True))
            seen = cells[some, :, shift : shift + rows.shape[2]]
            gradients = rows[some] @ seen.transpose(1, 2)
            squares[number] += gradients.view(-1, outputs, channels).square_().sum(0)
    total += squares.permute(1, 2, 0).reshape(total.shape)


def add_patch_gram(total: Tensor, x: Tensor, grid: Grid, alpha: float) -> None:
    r"""Add :math:`\alpha \sum_p r_p r_p^\top` over the rows of all positions and examples.

    Args:
        total: ``[c k, c k]`` with the ``k`` entries of the kernel, changed in place.
        x: ``[n, c, *sizes]``.
        grid: where the kernel lies.
        alpha: the factor.
    """
    n, channels = x.shape[:2]
    dims = len(grid.sizes)
    # Positions first: a lag is then a shift of the rows of a matrix.
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
        found: dict[Index, Tensor] = {(): whole}
        for i, j in pairs:
            for axis in range(dims):
                prefix = offsets[i][: axis + 1]
                if prefix not in found:
                    found[prefix] = _restricted(found[prefix[:-1]], cells, grid, lag, prefix)
            blocks[i, j] = found[offsets[i]]
            blocks[j, i] = blocks[i, j].T
    # The channels come first, so entries lie in between: made for whole rows at a time.
    rows_of = total.view(channels, entries, channels * entries)
    for i in range(entries):
        row = torch.stack([blocks[i, j] for j in range(entries)], -1)
        rows_of[:, i].add_(row.flatten(1), alpha=alpha)


def _restricted(
    whole: Tensor, cells: Tensor, grid: Grid, lag: Index, prefix: Sequence[int]
) -> Tensor:
    """The sum over all ``q`` that the entry sees along the axes of ``prefix``.

    Args:
        whole: the sum that is restricted along all of these axes but the last.
        cells: the inputs, ``[*stored, n, c]``.
        grid: where the kernel lies.
        lag: of the two factors.
        prefix: the entry's offsets along the first axes.
    """
    last = len(prefix) - 1
    ranges = []
    for axis in range(len(lag)):
        seen = axis < last
        ranges.append(grid.seen(axis, lag, prefix[axis]) if seen else grid.valid(axis, lag))
    restricted = whole
    for slab in grid.outside(last, lag, prefix[last]):
        ranges[last] = slab
        left = cells[tuple(slice(a, b) for a, b in ranges)]
        right = cells[tuple(slice(a + d, b + d) for (a, b), d in zip(ranges, lag, strict=True))]
        channels = cells.shape[-1]
        removed = left.reshape(-1, channels).T @ right.reshape(-1, channels)
        restricted = restricted - removed
    return restricted
