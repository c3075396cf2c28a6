r"""The weights of affine layers: vectors that are sums of outer products.

A linear map used at ``t`` positions of an example has :math:`v_{kn} = \sum_t g_{knt}
a_{nt}^\top`, with inputs :math:`a` and gradients :math:`g` with respect to the outputs.
Linear layers, convolutions, recurrent and attention weights are all of this form.  The
groups of a convolution are separate maps side by side.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.linalg.gram import RowBatch, StoredRows
from ewc.linalg.squares import add_outer_squares, sum_of_squares
from ewc.linalg.tiles import part, slices
from ewc.linalg.weight_layout import WeightLayout
from ewc.parameters import Parameters
from ewc.pullback.pullback import Pullback


def scaled_rows(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """A tensor ``[n, ...]`` times one number ``[n]`` an example; unchanged if ``None``."""
    if scale is None:
        return tensor
    return tensor * scale.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))


class Factors(ABC):
    """The two factors of one use of a weight.

    Attributes:
        positions: ``t``.
        size: ``k``, ``n`` and the floating-point type.
    """

    positions: int
    size: tuple[int, int, torch.dtype]

    @abstractmethod
    def inputs(self, examples: slice) -> Tensor:
        """The inputs of the map, ``[n, g, t, i]``."""

    @abstractmethod
    def gradients(self, examples: slice) -> Tensor:
        """Gradients with respect to the outputs of the map, ``[k, n, g, t, o]``."""

    def summed_gradients(self, examples: slice) -> Tensor:
        """The gradients, summed over positions, ``[k, n, g, o]``."""
        g = self.gradients(examples)
        return g.sum(3) if g.shape[3] > 1 else g.squeeze(3)

    def add_squares(self, examples: slice, total: Tensor, memory: int) -> None:
        r"""Add :math:`\sum_{k,n} (\sum_t g_t a_t^\top)^2` to ``total``, ``[g, o, i]``.

        Intermediate results may take ``memory`` bytes.
        """
        add_outer_squares(self.inputs(examples), self.gradients(examples), total, memory)

    def input_rows(self, examples: slice, scale: Tensor | None = None) -> RowBatch:
        """The inputs of all examples and positions, rows of ``i``.

        They are detached, because the rows may outlive the graph that they come from.

        Args:
            examples: the examples.
            scale: a factor of each example, ``[n]``; 1 if ``None``.
        """
        inputs = scaled_rows(self.inputs(examples).detach(), scale)
        return StoredRows(inputs.transpose(0, 1).flatten(1, 2))

    def gradient_rows(self, examples: slice) -> RowBatch:
        """The gradients of all vectors, examples and positions, rows of ``o``."""
        g = self.gradients(examples)
        # The order of the rows does not matter; their order in memory needs no copy.
        first, second = (0, 1) if g.stride(0) >= g.stride(1) else (1, 0)
        return StoredRows(g.permute(2, first, second, 3, 4).flatten(1, 3))


@dataclass(frozen=True)
class TensorFactors(Factors):
    """Factors that are stored as tensors.

    Attributes:
        input: ``[n, g, t, i]``.
        gradient: ``[k, n, g, t, o]``.
    """

    input: Tensor
    gradient: Tensor

    @property
    def positions(self) -> int:  # type: ignore[override]
        """``t``."""
        return self.input.shape[2]

    @property
    def size(self) -> tuple[int, int, torch.dtype]:  # type: ignore[override]
        """``k``, ``n`` and the floating-point type."""
        return *self.gradient.shape[:2], self.gradient.dtype

    def inputs(self, examples: slice) -> Tensor:
        return part(self.input, examples)

    def gradients(self, examples: slice) -> Tensor:
        return part(self.gradient, examples, 1)


class OuterProducts(Pullback):
    r"""The vectors :math:`\sum_t g_t a_t^\top` of a weight, and :math:`\sum_t g_t` of its bias.

    Args:
        weight: the weight's name.
        bias: the bias's name, if one is added at every use of the weight.
        layout: how the weight is read as matrices.
        uses: the factors of every use.
        memory: bytes that intermediate results may take.
    """

    def __init__(
        self,
        weight: str,
        bias: str | None,
        layout: WeightLayout,
        uses: Sequence[Factors],
        memory: int,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.layout = layout
        self.uses = uses
        self.memory = memory
        self.num_vectors, self.num_examples, self.dtype = uses[0].size
        self.positions = sum(use.positions for use in uses)
        self.groups, self.outputs, self.inputs = layout.matrix_shape
        self.shapes = {weight: layout.shape}
        if bias is not None:
            self.shapes[bias] = torch.Size([self.groups * self.outputs])

    def factors(self, examples: slice) -> tuple[Tensor, Tensor]:
        """The factors at all positions of all uses: ``[n, g, t, i]`` and ``[k, n, g, t, o]``."""
        inputs = [use.inputs(examples) for use in self.uses]
        gradients = [use.gradients(examples) for use in self.uses]
        if len(self.uses) == 1:
            return inputs[0], gradients[0]
        return torch.cat(inputs, 2), torch.cat(gradients, 3)

    def slices(self, bytes_per_example: int = 0) -> list[slice]:
        """Slices of the examples whose factors and ``bytes_per_example`` fit into memory."""
        width = self.inputs + self.num_vectors * self.outputs
        factors = 2 * self.groups * self.positions * width * self.dtype.itemsize
        return list(slices(self.num_examples, factors + bytes_per_example, self.memory))

    def bytes_per_example(self) -> int:
        width = self.inputs + self.num_vectors * self.outputs
        factors = 2 * self.groups * self.positions * width * self.dtype.itemsize
        return super().bytes_per_example() + factors

    def per_example(self, examples: slice) -> Parameters:
        a, g = self.factors(examples)
        vectors = {self.weight: self.layout.to_parameter(g.transpose(-1, -2) @ a)}
        if self.bias is not None:
            vectors[self.bias] = g.sum(3).flatten(2)
        return vectors

    # --- the diagonal -----------------------------------------------------------------

    def add_squares(self, total: Parameters) -> None:
        r"""Add :math:`\sum_{k,n} v_{kn}^2`, without storing any :math:`v_{kn}`."""
        weight = total[self.weight]
        squares = self.layout.to_matrix(weight)
        in_place = squares.data_ptr() == weight.data_ptr()
        if not in_place:
            squares = torch.zeros_like(squares)
        for examples in self.slices():
            if self.bias is not None:
                first, *further = (use.summed_gradients(examples) for use in self.uses)
                summed = sum(further, start=first)
                total[self.bias] += sum_of_squares(summed.flatten(2)).sum(0)
            if len(self.uses) == 1:
                self.uses[0].add_squares(examples, squares, self.memory)
            else:
                add_outer_squares(*self.factors(examples), squares, self.memory)
        if not in_place:
            weight += self.layout.to_parameter(squares)

    # --- products with directions -----------------------------------------------------

    def project(self, directions: Parameters) -> Tensor:
        r"""The products :math:`\sum_t g_t^\top U_l a_t`, ``[k, n, l]``."""
        matrices = self.layout.to_matrix(directions[self.weight].to(self.dtype))
        products = []
        extra = self.groups * self.positions * self.outputs * len(matrices) * self.dtype.itemsize
        for examples in self.slices(extra):
            a, g = self.factors(examples)
            mapped = torch.einsum("ngti,lgoi->ngtol", a, matrices)
            if self.bias is not None:
                bias = directions[self.bias].to(self.dtype)
                mapped += bias.reshape(-1, self.groups, self.outputs).permute(1, 2, 0)[:, None]
            products.append(torch.einsum("kngto,ngtol->knl", g, mapped))
        return torch.cat(products, 1)

    def add_combinations(self, coefficients: Tensor, total: Parameters) -> None:
        r"""Add :math:`\sum_{n,t} (\sum_k c_{knl} g_{knt}) a_{nt}^\top`."""
        extra = self.groups * self.positions * self.outputs * coefficients.shape[2]
        for examples in self.slices(extra * self.dtype.itemsize):
            a, g = self.factors(examples)
            weighted = torch.einsum("knl,kngto->lngto", coefficients[:, examples].to(g.dtype), g)
            matrices = torch.einsum("lngto,ngti->lgoi", weighted, a)
            total[self.weight] += self.layout.to_parameter(matrices)
            if self.bias is not None:
                total[self.bias] += weighted.sum((1, 3)).flatten(1)
