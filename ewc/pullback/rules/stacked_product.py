"""Stacks of matrix products: einsum, and maps for every head or expert."""

from typing import Any, Self

import torch
from torch import Tensor

from ewc.linalg.weight_layout import WeightLayout
from ewc.pullback.derived import Reshaped
from ewc.pullback.graph import Graph, Uses
from ewc.pullback.outer import OuterProducts, TensorFactors
from ewc.pullback.pullback import Pullback
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation


class StackedProduct(Operation):
    """``a[b] @ W[b]`` or ``W[b] @ a[b]`` for all ``b``; the examples are in the other dimension.

    Attributes:
        input: ``[b, r, i]``, with the examples in ``r``.
        first: whether the weight is the first factor.
    """

    kinds = ("BmmBackward0",)
    label = "stack of matrix products"
    input: Tensor
    first: bool

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        views = uses[node]
        if len(views) != 1:
            return None
        ((place, view),) = views.items()
        if not view.whole:
            return None
        product = cls()
        product.output, product.weight = node, view
        product.first = place == 0
        product.input = node._saved_mat2.mT if product.first else node._saved_self
        return product

    def rows_of(self, gradient: Tensor) -> Tensor:
        # [k, b, r, o] as [k, r, b, o]
        return (gradient.mT if self.first else gradient).transpose(1, 2)

    def positions(self, num_examples: int) -> int:
        return self.input.shape[1] // num_examples

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        assert self.weight is not None
        stack, first, second = self.weight.shape
        g = rows.by_example(gradient, num_examples, 1).transpose(2, 3)
        a = rows.by_example(self.input.to(g.dtype).transpose(0, 1), num_examples).transpose(1, 2)
        flat = torch.Size([stack * first, second])
        layout = WeightLayout(flat, stack, transposed=not self.first)
        name = self.weight.name
        product = OuterProducts(name, None, layout, [TensorFactors(a, g)], memory)
        return [Reshaped(product, {name: self.weight.shape})]
