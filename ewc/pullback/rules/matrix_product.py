"""Matrix products: linear layers, projections of attention, recurrence."""

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ewc.linalg.weight_layout import WeightLayout
from ewc.pullback.graph import Graph, Uses, View
from ewc.pullback.outer import OuterProducts, TensorFactors
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation

BIASES = {
    "AddBackward0": {0: 1, 1: 0},
    # A recurrent layer's step on an accelerator adds each bias to its product itself.
    "ThnnFusedLstmCellBackward0": {0: 3, 1: 4},
    "ThnnFusedGruCellBackward0": {0: 3, 1: 4},
}
"""Nodes that add a bias to a product: the place of the bias, by that of the product."""


class MatrixProduct(Operation):
    """``a @ W.T + b``, ``a @ W`` and ``W @ a``: linear layers, attention, recurrence.

    Attributes:
        input: ``[r, i]``.
        columns: whether the examples are in the columns of the result, as in ``W @ a``.
    """

    kinds = ("AddmmBackward0", "MmBackward0")
    label = "matrix product"
    input: Tensor
    columns: bool = False

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        views = uses[node]
        product = cls()
        product.output = node
        added = type(node).__name__ == "AddmmBackward0"
        if added and (node._saved_alpha != 1 or node._saved_beta != 1):
            return None
        if not added and views.keys() == {0}:
            product.columns = True
            product.weight = replace(views[0], transposed=not views[0].transposed)
            product.input = node._saved_mat2.mT
            return product if len(views[0].shape) == 2 else None
        weight_place = 2 if added else 1
        if not views.keys() <= ({0, 2} if added else {1}):
            return None
        weight = product.weight = views.get(weight_place)
        bias = product.bias = views.get(0) if added else None
        if bias is not None and len(bias.shape) != 1:
            return None
        if weight is not None:
            if len(weight.shape) != 2:
                return None
            product.input = node._saved_mat1 if added else node._saved_self
            if not added:
                product.bias = _bias_added_to(node, weight, uses, graph)
        return product

    def rows_of(self, gradient: Tensor) -> Tensor:
        return gradient.mT if self.columns else gradient

    def positions(self, num_examples: int) -> int:
        shape: torch.Size = self.output._input_metadata[0].shape
        return shape[self.columns] // num_examples

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        g = rows.by_example(gradient, num_examples, 1)
        weight, bias = self.weight, self.bias
        pullbacks: list[Pullback] = []
        together = weight is not None and bias is not None and _side_by_side(weight, bias)
        if bias is not None and not together:
            pullbacks.append(Stored({bias.name: bias.widened(g.sum(2), 2)}, memory))
        if weight is not None:
            if weight.transposed:
                g = weight.widened(g, 3)
            a = rows.by_example(self.input.to(g.dtype), num_examples)
            if not weight.transposed:
                a = weight.widened(a, 2)
            factors = TensorFactors(a[:, None], g[:, :, None])
            # If the view is transposed, the parameter is [o, i], as in a linear layer.
            layout = WeightLayout(weight.shape, transposed=not weight.transposed)
            name = bias.name if together and bias is not None else None
            pullbacks.append(OuterProducts(weight.name, name, layout, [factors], memory))
        return pullbacks


def _side_by_side(weight: View, bias: View) -> bool:
    """Whether the view of a bias has the same rows as the view of its weight.

    They may differ: attention with keys of another width has one weight each for queries,
    keys and values, and one bias for all.
    """
    if not weight.transposed:
        return bias.all_rows
    places = [(view.first, view.count, view.shape[0]) for view in (weight, bias)]
    return places[0] == places[1]


def _bias_added_to(node: Node, weight: View, uses: Uses, graph: Graph) -> View | None:
    """The bias that is added to a product and to nothing else; its use is removed."""
    following, place = graph.only_consumer(node) or (None, 0)
    places = BIASES.get(type(following).__name__, {})
    if following is None or place not in places:
        return None
    bias = uses.get(following, {}).get(places[place])
    outputs = weight.count if weight.transposed else weight.shape[1]
    fits = bias is not None and len(bias.shape) == 1 and bias.count == outputs
    if not fits or getattr(following, "_saved_alpha", 1) != 1:
        return None
    del uses[following][places[place]]
    if not uses[following]:
        del uses[following]
    return bias
