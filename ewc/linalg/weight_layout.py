"""The weight of an affine layer as matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightLayout:
    """The layout of a weight tensor as matrices ``[g, o, i]``, one per group.

    Attributes:
        shape: the parameter's shape, ``[g o, i, ...]``, or ``[g i, o, ...]`` if transposed.
        groups: ``g``.
        transposed: whether the inputs come first, as in a transposed convolution or ``x @ W``.
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
        """The matrices ``[..., g, o, i]`` of a weight ``[..., *shape]``."""
        lead = weight.shape[: weight.dim() - len(self.shape)]
        first, second, kernel = self._sizes()
        if not self.transposed:
            return weight.reshape(*lead, self.groups, first, second * kernel)
        split = weight.reshape(*lead, self.groups, first, second, kernel)
        return split.transpose(-3, -2).reshape(*lead, self.groups, second, first * kernel)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The weight ``[..., *shape]`` of matrices ``[..., g, o, i]``."""
        lead = matrix.shape[:-3]
        if self.transposed:
            first, second, kernel = self._sizes()
            split = matrix.reshape(*lead, self.groups, second, first, kernel)
            matrix = split.transpose(-3, -2)
        return matrix.reshape(*lead, *self.shape)

    def _sizes(self) -> tuple[int, int, int]:
        return self.shape[0] // self.groups, self.shape[1], self.shape[2:].numel()
