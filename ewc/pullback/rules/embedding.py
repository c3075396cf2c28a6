"""Embeddings: rows of a weight, by index."""

from typing import Any, Self

from torch import Tensor

from ewc.pullback.graph import Graph, Uses
from ewc.pullback.lookups import Lookups, padding_of
from ewc.pullback.pullback import Pullback
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation


class Embedding(Operation):
    """An embedding: rows of the weight, by index."""

    kinds = ("EmbeddingBackward0",)
    label = "embedding"
    indices: Tensor
    padding: int | None

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        weight = uses[node][0]
        if node._saved_scale_grad_by_freq or not weight.whole:
            return None
        lookup = cls()
        lookup.output, lookup.weight = node, weight
        lookup.indices = node._saved_indices
        lookup.padding = padding_of(node, weight.shape[0])
        lookup.row_dims = lookup.indices.dim()
        return lookup if lookup.row_dims else None

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        assert self.weight is not None
        indices = self.indices.flatten().long()
        lookups = Lookups(
            self.weight.name,
            self.weight.shape,
            rows.by_example(indices, num_examples),
            rows.by_example(gradient, num_examples, 1),
            memory=memory,
            padding=self.padding,
        )
        return [lookups]
