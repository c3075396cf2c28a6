"""Parameters that are added to or multiplied with activations."""

from typing import Any, Self

from torch import Tensor

from ewc.pullback.graph import Graph, Uses
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation


class Broadcast(Operation):
    """A parameter that is added, subtracted or multiplied, broadcast over the rows."""

    kinds = ("AddBackward0", "SubBackward0", "MulBackward0")
    factor: Tensor | None = None
    sign: float = 1.0

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        views = uses[node]
        if len(views) != 1:
            return None
        ((place, view),) = views.items()
        if not view.whole:
            return None
        broadcast = cls()
        broadcast.output, broadcast.weight = node, view
        kind = type(node).__name__
        if kind == "MulBackward0":
            broadcast.factor = node._saved_self if place == 1 else node._saved_other
        elif place == 1:
            broadcast.sign = float(node._saved_alpha) * (-1 if kind == "SubBackward0" else 1)
        return broadcast

    def rows_of(self, gradient: Tensor) -> Tensor:
        # The leading dimensions along which the parameter is constant are rows.
        assert self.weight is not None
        self.sizes = gradient.shape[1:]
        new = len(self.sizes) - len(self.weight.shape)
        shape = [1] * new + list(self.weight.shape)
        self.row_dims = next((d for d, size in enumerate(shape) if size != 1), len(shape))
        return gradient.flatten(1, self.row_dims) if self.row_dims else gradient[:, None]

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        # The gradients times the other input, summed over the dimensions of the broadcast.
        assert self.weight is not None
        entries = self.sign * gradient
        if self.factor is not None:
            factor = self.factor.to(gradient).expand(self.sizes)
            entries = entries * (factor.flatten(0, self.row_dims - 1) if self.row_dims else factor)
        summed = rows.summed(entries, num_examples, 1)
        shape = self.weight.shape
        rest = shape[len(shape) - (summed.dim() - 2) :]
        for dim, size in enumerate(rest, start=2):
            if size == 1:
                summed = summed.sum(dim, keepdim=True)
        return [Stored({self.weight.name: summed.reshape(*summed.shape[:2], *shape)}, memory)]
