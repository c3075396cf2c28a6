r"""Rules for operations that give every example's vectors at once, and small.

The scales and shifts of normalisations, parameters that are added to or multiplied with
activations (position embeddings, layer scales, biases on their own), and embeddings.
"""

from typing import Any, Self

from torch import Tensor

from ewc.pullback.graph import Graph, Uses
from ewc.pullback.lookups import Lookups
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.matrix_product import Operation


class Normalisation(Operation):
    r"""The scale and shift behind a normalisation: :math:`\sum g \hat x` and :math:`\sum g`."""

    kinds = ("NativeLayerNormBackward0", "NativeGroupNormBackward0", "NativeBatchNormBackward0")
    features_last: bool
    normalised: Tensor

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The normalisation, by statistics that are the example's own or fixed."""
        views = uses[node]
        if 0 in views or not all(view.whole for view in views.values()):
            return None
        norm = cls()
        norm.output, norm.weight, norm.bias = node, views.get(1), views.get(2)
        norm.features_last = type(node).__name__ == "NativeLayerNormBackward0"
        if norm.features_last:
            sizes = node._saved_normalized_shape
            norm.row_dims = node._saved_input.dim() - len(sizes)
        elif getattr(node, "_saved_training", False):
            return None
        if norm.weight is not None:
            norm.normalised = _normalised(node)
        return norm if norm.row_dims else None

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        """The gradients, times the normalised inputs for the scale, summed over positions."""
        found = {}
        if self.weight is not None:
            normalised = self.normalised.to(gradient.dtype)
            if self.features_last:
                normalised = normalised.flatten(0, self.row_dims - 1)
            found[self.weight.name] = gradient * normalised
        if self.bias is not None:
            found[self.bias.name] = gradient
        for name, entries in found.items():
            if not self.features_last and entries.dim() > 3:
                entries = entries.flatten(3).sum(3)  # noqa: PLW2901
            found[name] = rows.by_example(entries, num_examples, 1).sum(2)
        return [Stored(found, memory)]


def _normalised(node: Any) -> Tensor:
    """What a normalisation scales, of the shape of its input."""
    x: Tensor = node._saved_input
    kind = type(node).__name__
    mean: Tensor
    scale: Tensor
    if kind == "NativeBatchNormBackward0":
        shape = (-1,) + (1,) * (x.dim() - 2)
        mean = node._saved_running_mean.reshape(shape)
        scale = (node._saved_running_var + node._saved_eps).rsqrt().reshape(shape)
        return (x - mean) * scale
    mean, scale = node._saved_result1, node._saved_result2
    if kind == "NativeGroupNormBackward0":
        grouped = x.reshape(x.shape[0], node._saved_group, -1)
        return ((grouped - mean[..., None]) * scale[..., None]).reshape(x.shape)
    return (x - mean) * scale


class Broadcast(Operation):
    """A parameter that is added, subtracted or multiplied, broadcast over the rows."""

    kinds = ("AddBackward0", "SubBackward0", "MulBackward0")
    factor: Tensor | None = None
    sign: float = 1.0

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The operation, if one of its two inputs is a parameter as it is."""
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
        """The leading dimensions along which the parameter does not change are rows."""
        assert self.weight is not None
        self.sizes = gradient.shape[1:]
        new = len(self.sizes) - len(self.weight.shape)
        shape = [1] * new + list(self.weight.shape)
        self.row_dims = next((d for d, size in enumerate(shape) if size != 1), len(shape))
        return gradient.flatten(1, self.row_dims) if self.row_dims else gradient[:, None]

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        """The gradients times the other input, summed over what the parameter does not see."""
        assert self.weight is not None
        entries = self.sign * gradient
        if self.factor is not None:
            factor = self.factor.to(gradient).expand(self.sizes)
            entries = entries * (factor.flatten(0, self.row_dims - 1) if self.row_dims else factor)
        summed = rows.by_example(entries, num_examples, 1).sum(2)
        shape = self.weight.shape
        rest = shape[len(shape) - (summed.dim() - 2) :]
        for dim, size in enumerate(rest, start=2):
            if size == 1:
                summed = summed.sum(dim, keepdim=True)
        return [Stored({self.weight.name: summed.reshape(*summed.shape[:2], *shape)}, memory)]


class Lookup(Operation):
    """An embedding: rows of the weight, by index."""

    kinds = ("EmbeddingBackward0",)
    indices: Tensor
    padding: int

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The embedding, if its gradient is not scaled by how often a row is used."""
        weight = uses[node][0]
        if node._saved_scale_grad_by_freq or not weight.whole:
            return None
        lookup = cls()
        lookup.output, lookup.weight = node, weight
        lookup.indices = node._saved_indices
        # "None" is -1, saved as 2^64 - 1.
        lookup.padding = node._saved_padding_idx
        lookup.row_dims = lookup.indices.dim()
        return lookup if lookup.row_dims else None

    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        """The gradients and where they belong; the padding has none."""
        assert self.weight is not None
        indices = self.indices.flatten().long()
        lookups = Lookups(
            self.weight.name,
            self.weight.shape,
            rows.by_example(indices, num_examples),
            rows.by_example(gradient, num_examples, 1),
            memory=memory,
            padding=self.padding if self.padding < self.weight.shape[0] else None,
        )
        return [lookups]
