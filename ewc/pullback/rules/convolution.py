"""The rule for convolutions, transposed ones too, in any number of dimensions."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from ewc.linalg.gram import RowBatch, StoredColumns, StoredRows
from ewc.linalg.patches import Grid, add_patch_gram, add_patch_squares
from ewc.linalg.squares import by_pairs
from ewc.linalg.weight_layout import WeightLayout
from ewc.pullback.graph import Graph, Uses
from ewc.pullback.outer import Factors, OuterProducts
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation

LAG_CHANNELS = 8
"""Channels from which products of lags are large enough to be fast."""

SHIFTED_VECTORS = 2
"""Score vectors up to which shifted products are faster than unfolding the inputs once."""

LAG_SHARE = 0.7
"""The share of the multiplications of unfolded rows up to which they pay."""


class Convolution(Operation):
    """Convolutions, transposed ones too, in any number of dimensions."""

    kinds = ("ConvolutionBackward0",)
    input: Tensor
    geometry: "Geometry"

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The convolution, if it uses its parameters as they are."""
        views = uses[node]
        if 0 in views or not all(view.whole for view in views.values()):
            return None
        convolution = cls()
        convolution.output, convolution.weight, convolution.bias = node, views.get(1), views.get(2)
        if convolution.weight is not None:
            kernel = convolution.weight.shape[2:]
            convolution.input = node._saved_input
            convolution.geometry = Geometry(
                kernel=kernel,
                stride=_for_every_axis(node._saved_stride, kernel),
                padding=_for_every_axis(node._saved_padding, kernel),
                dilation=_for_every_axis(node._saved_dilation, kernel),
                groups=node._saved_groups,
                transposed=node._saved_transposed,
            )
        return convolution

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        """Outer products of output gradients and inputs under the kernel."""
        if self.weight is None:
            assert self.bias is not None
            summed = rows.by_example(gradient.flatten(3).sum(3), num_examples, 1).sum(2)
            return [Stored({self.bias.name: summed}, memory)]
        g = rows.by_example(gradient, num_examples, 1)
        a = rows.by_example(self.input.to(g.dtype), num_examples)
        shape = self.geometry
        layout = WeightLayout(self.weight.shape, shape.groups, shape.transposed)
        bias = self.bias.name if self.bias is not None else None
        factors = ConvolutionFactors(a, g, shape)
        return [OuterProducts(self.weight.name, bias, layout, [factors], memory)]


def _for_every_axis(numbers: Sequence[int], kernel: torch.Size) -> tuple[int, ...]:
    """One number an axis: torch saves a single one as it was given, as for "valid"."""
    return tuple(numbers) * (len(kernel) if len(numbers) == 1 else 1)


@dataclass(frozen=True)
class Geometry:
    """Where a kernel lies at every position of a convolution's result.

    Attributes:
        kernel: its sizes.
        stride: of the positions.
        padding: zeros at both ends.
        dilation: between the kernel's entries.
        groups: convolutions side by side.
        transposed: whether it is a transposed convolution.
    """

    kernel: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def plain(self) -> bool:
        """Whether the kernel moves by single steps over the input as it is."""
        return not self.transposed and set(self.stride) == {1}

    def grid(self, sizes: torch.Size) -> Grid:
        """Where a plain kernel lies over an input of these sizes."""
        return Grid(self.kernel, self.padding, self.dilation, sizes)

    def patches(self, x: Tensor, sizes: torch.Size) -> Tensor:
        """What the kernel sees: ``[n, c, *x]`` as ``[n, c, *kernel, *sizes]``, a view or copy.

        Args:
            x: the input.
            sizes: of the result.
        """
        pads: list[int] = []
        stride = self.stride
        if self.transposed:
            # A transposed convolution is a plain one, of stride 1 and with the kernel
            # turned round, over the input with zeros put between its entries.
            spread = [(length - 1) * s + 1 for length, s in zip(x.shape[2:], stride, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *spread)
            strided: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
            wide[strided] = x
            x, stride = wide, (1,) * len(stride)
            for axis in reversed(range(len(sizes))):
                reach = self.dilation[axis] * (self.kernel[axis] - 1)
                left = reach - self.padding[axis]
                pads += [left, sizes[axis] + reach - left - x.shape[2 + axis]]
        else:
            for axis in reversed(range(len(sizes))):
                pads += [self.padding[axis]] * 2
        x = functional.pad(x, pads) if any(pads) else x.contiguous()
        steps = x.stride()[2:]
        patches = x.as_strided(
            (*x.shape[:2], *self.kernel, *sizes),
            (
                *x.stride()[:2],
                *(s * d for s, d in zip(steps, self.dilation, strict=True)),
                *(s * d for s, d in zip(steps, stride, strict=True)),
            ),
            x.storage_offset(),
        )
        return patches.flip(tuple(range(2, 2 + len(sizes)))) if self.transposed else patches


@dataclass(frozen=True)
class ConvolutionFactors(Factors):
    """The factors of a convolution.

    Attributes:
        input: ``[n, t, c, *sizes]``, with ``t`` convolutions an example.
        gradient: ``[k, n, t, o, *sizes]``.
        geometry: where the kernel lies.
    """

    input: Tensor
    gradient: Tensor
    geometry: Geometry

    @property
    def positions(self) -> int:  # type: ignore[override]
        """The entries of a result's channel, times the convolutions an example."""
        return self.gradient.shape[2] * self.gradient.shape[4:].numel()

    @property
    def size(self) -> tuple[int, int, torch.dtype]:  # type: ignore[override]
        """``k``, ``n`` and the floating-point type."""
        return *self.gradient.shape[:2], self.gradient.dtype

    def inputs(self, examples: slice) -> Tensor:
        """The inputs under the kernel at every position, ``[n, g, t, i]``."""
        x = self.input[examples]
        n, t, channels = x.shape[:3]
        patches = self.geometry.patches(x.flatten(0, 1), self.gradient.shape[4:])
        size = channels // self.geometry.groups * self.geometry.kernel.numel()
        flat = patches.reshape(n, t, self.geometry.groups, size, -1)
        if t == 1:
            return flat[:, 0].transpose(-1, -2)
        return flat.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def add_squares(self, examples: slice, total: Tensor) -> None:
        """Add the squares: of few vectors by shifts, for which nothing needs to be unfolded."""
        x, g = self.input[examples].flatten(0, 1), self.gradient[:, examples]
        shape = self.geometry
        wide = x.shape[1] // shape.groups >= LAG_CHANNELS
        few = len(g) <= SHIFTED_VECTORS and not by_pairs(len(g), self.positions)
        if not (shape.plain and wide and few and g.shape[2] == 1 and shape.kernel.numel() > 1):
            super().add_squares(examples, total)
            return
        grid = shape.grid(x.shape[2:])
        parts = x.chunk(shape.groups, 1), g[:, :, 0].chunk(shape.groups, 2)
        for target, inputs, gradients in zip(total, *parts, strict=True):
            add_patch_squares(target, inputs, gradients, grid)

    def input_rows(self, examples: slice) -> RowBatch:
        """What the kernel sees of all examples at all positions."""
        x = self.input[examples].detach().flatten(0, 1)
        patches = PatchBlock(x, self.geometry, self.gradient.shape[4:])
        return patches if patches.by_lags else StoredRows(patches.rows())

    def gradient_rows(self, examples: slice) -> RowBatch:
        """The output gradients of all vectors, examples and positions, rows of ``o``."""
        g = self.gradient[:, examples]
        groups = self.geometry.groups
        positions, width = g.shape[4:].numel(), g.shape[3] // groups
        if positions >= width:
            # In the order that they have in memory.
            whole = (g.transpose(0, 1) if g.stride(0) < g.stride(1) else g).flatten(0, 2)
            return StoredColumns(whole.reshape(-1, groups, width, positions))
        # Columns one after the other: copied once, in the order of the product.
        g = g.transpose(0, 1).movedim(3, 0)
        return StoredRows(g.reshape(groups, g.shape[0] // groups, -1).transpose(1, 2))

    def gradients(self, examples: slice) -> Tensor:
        """The output gradients, ``[k, n, g, t, o]``."""
        g = self.gradient[:, examples]
        k, n, t, channels = g.shape[:4]
        split = g.reshape(k, n, t, self.geometry.groups, channels // self.geometry.groups, -1)
        if t == 1:
            return split[:, :, 0].transpose(-1, -2)
        return split.permute(0, 1, 3, 2, 5, 4).flatten(3, 4)


@dataclass(frozen=True)
class PatchBlock(RowBatch):
    """What the kernel sees at all positions, not unfolded.

    Attributes:
        input: ``[n, c, *x]``.
        geometry: where the kernel lies.
        sizes: of the result.
    """

    input: Tensor
    geometry: Geometry
    sizes: torch.Size

    @property
    def count(self) -> int:  # type: ignore[override]
        """Examples times positions."""
        return self.input.shape[0] * self.sizes.numel()

    @property
    def kind(self) -> Hashable:  # type: ignore[override]
        """Inputs of one size go together."""
        return self.input.shape[1:], self.geometry

    @property
    def by_lags(self) -> bool:
        """Whether products of lags are possible, and fewer than those of unfolded rows."""
        shape = self.geometry
        wide = self.input.shape[1] // shape.groups >= LAG_CHANNELS
        return shape.plain and wide and shape.grid(self.input.shape[2:]).share() < LAG_SHARE

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        """The inputs of all."""
        return replace(blocks[0], input=torch.cat([block.input for block in blocks]))

    def rows(self) -> Tensor:
        """The unfolded rows, ``[g, r, i]``."""
        # Columns one after the other: copied once, in the order of the product.
        patches = self.geometry.patches(self.input, self.sizes).transpose(0, 1)
        size = self.input.shape[1] // self.geometry.groups * self.geometry.kernel.numel()
        last = patches.movedim(1, 1 + len(self.geometry.kernel))
        return last.reshape(self.geometry.groups, size, -1).transpose(1, 2)

    def add_gram(self, total: Tensor, alpha: float) -> None:
        """Add their second moments, lag by lag."""
        grid = self.geometry.grid(self.input.shape[2:])
        for target, x in zip(total, self.input.chunk(self.geometry.groups, 1), strict=True):
            add_patch_gram(target, x, grid, alpha)

    def sum(self) -> Tensor:
        """The sum over positions, of the sum over examples."""
        return replace(self, input=self.input.sum(0, keepdim=True)).rows().sum(1)
