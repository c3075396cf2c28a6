"""How the weight of an affine layer is read as matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightLayout:
    """How a weight tensor is read as matrices ``[g, o, i]``, one a group.

    Attributes:
        shape: of the parameter: ``[g o, i, ...]``, or ``[g i, o, ...]`` if transposed.
        groups: ``g``.
        transposed: the inputs come first, as in a transposed convolution and in ``x @ W``.
    """

    shape: torch.Size
    groups: int = 1
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``g``, ``o`` and ``i``."""
        first, second, kernel = self._sizes()
        if self.transposed:
            return self.groups, second, first * kernel
        return self.groups, first, second * kernel

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``[..., *shape]`` as ``[..., g, o, i]``."""
        lead = weight.shape[: weight.dim() - len(self.shape)]
        first, second, kernel = self._sizes()
        if not self.transposed:
            return weight.reshape(*lead, self.groups, first, second * kernel)
        split = weight.reshape(*lead, self.groups, first, second, kernel)
        return split.transpose(-3, -2).reshape(*lead, self.groups, second, first * kernel)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """``[..., g, o, i]`` as ``[..., *shape]``."""
        lead = matrix.shape[:-3]
        if self.transposed:
            first, second, kernel = self._sizes()
            split = matrix.reshape(*lead, self.groups, second, first, kernel)
            matrix = split.transpose(-3, -2)
        return matrix.reshape(*lead, *self.shape)

    def _sizes(self) -> tuple[int, int, int]:
        return self.shape[0] // self.groups, self.shape[1], self.shape[2:].numel()
