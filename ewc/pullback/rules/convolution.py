"""The rule for convolutions and transposed convolutions in any number of dimensions."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from ewc.linalg.devices import sizes_for
from ewc.linalg.gram import RowBatch, StoredColumns, StoredRows
from ewc.linalg.patches import Grid, add_patch_gram, add_patch_squares
from ewc.linalg.squares import by_pairs
from ewc.linalg.tiles import part
from ewc.linalg.weight_layout import WeightLayout
from ewc.pullback.graph import Graph, Uses
from ewc.pullback.outer import Factors, OuterProducts, scaled_rows
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation

LAG_CHANNELS = 8
"""The least number of channels for which products of lags are fast."""

SHIFTED_VECTORS = 2
"""The most score vectors for which shifted products are faster than unfolding the inputs."""

LAG_SHARE = 0.7
"""The largest fraction of the multiplications of unfolded rows at which lags are faster."""


class Convolution(Operation):
    """Convolutions and transposed convolutions in any number of dimensions."""

    kinds = ("ConvolutionBackward0",)
    label = "convolution"
    input: Tensor
    geometry: "Geometry"

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
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

    def positions(self, num_examples: int) -> int:
        shape: torch.Size = self.output._input_metadata[0].shape
        return super().positions(num_examples) * prod(shape[2:])

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        if self.weight is None:
            assert self.bias is not None
            summed = rows.summed(gradient.flatten(3).sum(3), num_examples, 1)
            return [Stored({self.bias.name: summed}, memory)]
        g = rows.by_example(gradient, num_examples, 1)
        a = rows.by_example(self.input.to(g.dtype), num_examples)
        shape = self.geometry
        layout = WeightLayout(self.weight.shape, shape.groups, shape.transposed)
        bias = self.bias.name if self.bias is not None else None
        factors = ConvolutionFactors(a, g, shape)
        return [OuterProducts(self.weight.name, bias, layout, [factors], memory)]


def _for_every_axis(numbers: Sequence[int], kernel: torch.Size) -> tuple[int, ...]:
    """One number per axis; torch saves a single number as given, such as for "valid"."""
    return tuple(numbers) * (len(kernel) if len(numbers) == 1 else 1)


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution.

    Attributes:
        kernel: the sizes of the kernel.
        stride: the distance between positions.
        padding: the number of zeros at both ends.
        dilation: the distance between entries of the kernel.
        groups: the number of convolutions side by side.
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
        """Whether the stride is 1 and the convolution is not transposed."""
        return not self.transposed and set(self.stride) == {1}

    def grid(self, sizes: torch.Size) -> Grid:
        """The positions of a plain kernel over an input of these sizes."""
        return Grid(self.kernel, self.padding, self.dilation, sizes)

    def patches(self, x: Tensor, sizes: torch.Size) -> Tensor:
        """The inputs under the kernel, ``[n, c, *kernel, *sizes]``, as a view or a copy.

        Args:
            x: the input, ``[n, c, *x]``.
            sizes: the sizes of the result.
        """
        pads: list[int] = []
        stride = self.stride
        if self.transposed:
            # A transposed convolution is one of stride 1 with the flipped kernel, over the
            # input with zeros between its entries.
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
        input: ``[n, t, c, *sizes]``, with ``t`` convolutions per example.
        gradient: ``[k, n, t, o, *sizes]``.
        geometry: the geometry of the convolution.
    """

    input: Tensor
    gradient: Tensor
    geometry: Geometry

    @property
    def positions(self) -> int:  # type: ignore[override]
        """The entries per channel of the result, times the convolutions per example."""
        return self.gradient.shape[2] * self.gradient.shape[4:].numel()

    @property
    def size(self) -> tuple[int, int, torch.dtype]:  # type: ignore[override]
        """``k``, ``n`` and the floating-point type."""
        return *self.gradient.shape[:2], self.gradient.dtype

    def inputs(self, examples: slice) -> Tensor:
        x = part(self.input, examples)
        n, t, channels = x.shape[:3]
        patches = self.geometry.patches(x.flatten(0, 1), self.gradient.shape[4:])
        groups = self.geometry.groups
        size = channels // groups * self.geometry.kernel.numel()
        if t == 1:
            return patches.reshape(n, groups, size, -1).transpose(-1, -2)
        return patches.reshape(n, t, groups, size, -1).permute(0, 2, 1, 4, 3).flatten(2, 3)

    def add_squares(self, examples: slice, total: Tensor, memory: int) -> None:
        if sizes_for(total.device).whole:
            super().add_squares(examples, total, memory)
            return
        x, g = part(self.input, examples).flatten(0, 1), part(self.gradient, examples, 1)
        shape = self.geometry
        wide = x.shape[1] // shape.groups >= LAG_CHANNELS
        few = len(g) <= SHIFTED_VECTORS and not by_pairs(len(g), self.positions)
        if not (shape.plain and wide and few and g.shape[2] == 1 and shape.kernel.numel() > 1):
            super().add_squares(examples, total, memory)
            return
        # Few vectors: by shifts of the inputs, without unfolding them.
        grid = shape.grid(x.shape[2:])
        parts = x.chunk(shape.groups, 1), g[:, :, 0].chunk(shape.groups, 2)
        for target, inputs, gradients in zip(total, *parts, strict=True):
            add_patch_squares(target, inputs, gradients, grid)

    def input_rows(self, examples: slice, scale: Tensor | None = None) -> RowBatch:
        x = scaled_rows(part(self.input, examples).detach(), scale).flatten(0, 1)
        patches = PatchBlock(x, self.geometry, self.gradient.shape[4:])
        return patches if patches.by_lags else StoredRows(patches.rows())

    def gradient_rows(self, examples: slice) -> RowBatch:
        g = part(self.gradient, examples, 1)
        groups = self.geometry.groups
        positions, width = g.shape[4:].numel(), g.shape[3] // groups
        if positions >= width:
            # In their order in memory.
            whole = (g.transpose(0, 1) if g.stride(0) < g.stride(1) else g).flatten(0, 2)
            return StoredColumns(whole.reshape(-1, groups, width, positions))
        # Column by column: one copy, in the order of the product.
        g = g.transpose(0, 1).movedim(3, 0)
        return StoredRows(g.reshape(groups, g.shape[0] // groups, -1).transpose(1, 2))

    def gradients(self, examples: slice) -> Tensor:
        g = part(self.gradient, examples, 1)
        k, n, t, channels = g.shape[:4]
        groups = self.geometry.groups
        if t == 1:
            return g.reshape(k, n, groups, channels // groups, -1).transpose(-1, -2)
        split = g.reshape(k, n, t, groups, channels // groups, -1)
        return split.permute(0, 1, 3, 2, 5, 4).flatten(3, 4)


@dataclass(frozen=True)
class PatchBlock(RowBatch):
    """The inputs under the kernel at all positions, without unfolding.

    Attributes:
        input: ``[n, c, *x]``.
        geometry: the geometry of the convolution.
        sizes: the sizes of the result.
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
        """Blocks with the same input size and geometry are of one kind."""
        return self.input.shape[1:], self.geometry

    @property
    def by_lags(self) -> bool:
        """Whether products of lags are possible, and cheaper than those of unfolded rows."""
        shape = self.geometry
        wide = self.input.shape[1] // shape.groups >= LAG_CHANNELS
        if sizes_for(self.input.device).whole:
            return False
        return shape.plain and wide and shape.grid(self.input.shape[2:]).share() < LAG_SHARE

    @classmethod
    def concatenated(cls, blocks: Sequence[Self]) -> Self:
        return replace(blocks[0], input=torch.cat([block.input for block in blocks]))

    def rows(self) -> Tensor:
        """The unfolded rows, ``[g, r, i]``."""
        # Column by column: one copy, in the order of the product.
        patches = self.geometry.patches(self.input, self.sizes).transpose(0, 1)
        size = self.input.shape[1] // self.geometry.groups * self.geometry.kernel.numel()
        last = patches.movedim(1, 1 + len(self.geometry.kernel))
        return last.reshape(self.geometry.groups, size, -1).transpose(1, 2)

    def add_gram(self, total: Tensor, alpha: float) -> None:
        grid = self.geometry.grid(self.input.shape[2:])
        for target, x in zip(total, self.input.chunk(self.geometry.groups, 1), strict=True):
            add_patch_gram(target, x, grid, alpha)

    def sum(self) -> Tensor:
        # Unfolding is linear, so the examples are added up first.
        return replace(self, input=self.input.sum(0, keepdim=True)).rows().sum(1)
