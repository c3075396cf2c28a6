"""The scales and shifts of normalisations."""

from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from ewc.pullback.graph import Graph, Uses
from ewc.pullback.pullback import Pullback, Stored
from ewc.pullback.rows import Rows
from ewc.pullback.rules.operation import Operation

OVER_FEATURES = ("NativeLayerNormBackward0", "FusedRmsNormBackward0")
"""Normalisations over the last dimensions."""

BY_STATISTICS = (
    "NativeBatchNormBackward0",
    "NativeBatchNormLegitNoTrainingBackward0",
    "BatchNormNoUpdateBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
)
"""Normalisations by running statistics; accelerators have their own."""


class Normalisation(Operation):
    r"""The scale and shift after a normalisation: :math:`\sum g \hat x` and :math:`\sum g`."""

    kinds = (*OVER_FEATURES, "NativeGroupNormBackward0", *BY_STATISTICS)
    label = "normalisation"
    features_last: bool
    normalised: Tensor

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        views = uses[node]
        if 0 in views or not all(view.whole for view in views.values()):
            return None
        norm = cls()
        norm.output, norm.weight, norm.bias = node, views.get(1), views.get(2)
        norm.features_last = type(node).__name__ in OVER_FEATURES
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
        vectors = {}
        if self.weight is not None:
            normalised = self.normalised.to(gradient.dtype)
            if self.features_last:
                normalised = normalised.flatten(0, self.row_dims - 1)
            vectors[self.weight.name] = gradient * normalised
        if self.bias is not None:
            vectors[self.bias.name] = gradient
        for name, entries in vectors.items():
            if not self.features_last and entries.dim() > 3:
                entries = entries.sum(tuple(range(3, entries.dim())))  # noqa: PLW2901
            vectors[name] = rows.summed(entries, num_examples, 1)
        return [Stored(vectors, memory)]


def _normalised(node: Any) -> Tensor:
    """The normalised input, before the scale and the shift."""
    x: Tensor = node._saved_input
    kind = type(node).__name__
    mean: Tensor
    scale: Tensor
    if kind in BY_STATISTICS:
        statistics = node._saved_running_mean, node._saved_running_var
        eps: float = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
        return functional.batch_norm(x, *statistics, eps=eps)
    if kind == "FusedRmsNormBackward0":
        scale = node._saved_result1
        return x * scale
    mean, scale = node._saved_result1, node._saved_result2
    if kind == "NativeGroupNormBackward0":
        grouped = x.reshape(x.shape[0], node._saved_group, -1)
        return ((grouped - mean[..., None]) * scale[..., None]).reshape(x.shape)
    return (x - mean) * scale
