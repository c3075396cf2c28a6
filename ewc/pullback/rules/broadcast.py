"""Parameters that are added to or multiplied with activations."""

from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from ewc.pullback.graph import Graph, Uses
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation


class Broadcast(Operation):
    """A parameter that is added, multiplied or only repeated, broadcast over the rows.

    Attributes:
        factor: the factor of the result's gradient, besides the sign.
        sign: a number that multiplies the gradient.
        sizes: the shape of the result.
        aligned: the shape of the parameter, with as many dimensions as the result.
        order: the dimensions of the result, those of the rows first.
    """

    kinds = (
        *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"),
        *("ExpandBackward0", "RepeatBackward0"),
    )
    label = "broadcast"
    factor: Tensor | None = None
    sign: float = 1.0
    sizes: torch.Size
    aligned: list[int]
    order: list[int]

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        views = uses[node]
        if len(views) != 1:
            return None
        ((place, view),) = views.items()
        if view.transposed:
            return None
        broadcast = cls()
        broadcast.output, broadcast.weight = node, view
        sizes = broadcast.sizes = torch.Size(node._input_metadata[0].shape)
        shape = broadcast.aligned = [1] * (len(sizes) - len(view.shape)) + list(view.narrowed)
        pairs = list(zip(shape, sizes, strict=True))
        if any(size not in (1, result) for size, result in pairs):
            return None
        # The leading dimensions along which the parameter is constant are rows; if there are
        # none, all such dimensions.
        dims = range(len(sizes))
        rows = list(dims[: next((d for d in dims if shape[d] != 1), len(dims))])
        rows = rows or [d for d in dims if shape[d] == 1 != sizes[d]]
        broadcast.row_dims = len(rows)
        broadcast.order = rows + [d for d in dims if d not in rows]
        kind = type(node).__name__
        if kind == "MulBackward0":
            broadcast.factor = node._saved_self if place == 1 else node._saved_other
        elif kind == "DivBackward0":
            divisor = node._saved_other
            broadcast.factor = -node._saved_self / divisor**2 if place == 1 else 1 / divisor
        elif place == 1:
            broadcast.sign = float(node._saved_alpha) * (-1 if kind == "SubBackward0" else 1)
        return broadcast

    def rows_of(self, gradient: Tensor) -> Tensor:
        return self._by_row(gradient, 1)

    def positions(self, num_examples: int) -> int:
        return prod(self.sizes[d] for d in self.order[: self.row_dims]) // num_examples

    def _by_row(self, tensor: Tensor, first: int) -> Tensor:
        """A tensor ``[..., *sizes]`` with the dimensions of the rows as dimension ``first``."""
        tensor = tensor.permute(*range(first), *(first + d for d in self.order))
        return (
            tensor.flatten(first, first + self.row_dims - 1)
            if self.row_dims
            else tensor.unsqueeze(first)
        )

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        # The gradients times the other input, summed over the dimensions of the broadcast.
        assert self.weight is not None
        entries = self.sign * gradient
        if self.factor is not None:
            entries = entries * self._by_row(self.factor.to(gradient).expand(self.sizes), 0)
        summed = rows.summed(entries, num_examples, 1)
        for dim, place in enumerate(self.order[self.row_dims :], start=2):
            if self.aligned[place] == 1:
                summed = summed.sum(dim, keepdim=True)
        summed = summed.reshape(*summed.shape[:2], *self.weight.narrowed)
        return [Stored({self.weight.name: self.weight.widened(summed, 2)}, memory)]
