"""The weights of embeddings: vectors with few nonzero rows."""

from typing import Any

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for
from ewc.linalg.squares import sum_of_squares
from ewc.linalg.tiles import slices
from ewc.parameters import Parameters
from ewc.pullback.pullback import Pullback


def padding_of(node: Any, rows: int) -> int | None:
    """The padding row of an embedding's node in the graph."""
    # "None" is -1, saved as 2^64 - 1.
    padding: int = node._saved_padding_idx
    return padding if padding < rows else None


class Lookups(Pullback):
    r"""The vectors of an embedding: row ``r`` is :math:`\sum_{t: index_t = r} g_t`.

    Args:
        name: the name of the embedding's weight.
        shape: its shape, ``[rows, d]``.
        indices: the rows that were looked up, ``[n, t]``.
        gradient: gradients with respect to the results, ``[k, n, t, d]``.
        memory: bytes that intermediate results may take.
        padding: the row that has no gradient, if there is one.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        indices: Tensor,
        gradient: Tensor,
        *,
        memory: int,
        padding: int | None = None,
    ) -> None:
        self.name = name
        self.shapes = {name: shape}
        self.indices = indices
        if padding is not None:
            gradient = gradient * (indices != padding)[..., None]
        self.padding = padding
        self.gradient = gradient
        self.num_vectors, self.num_examples = gradient.shape[:2]
        self.dtype = gradient.dtype
        self.memory = memory

    def per_example(self, examples: slice) -> Parameters:
        indices, gradient = self.indices[examples], self.gradient[:, examples]
        k, n, _, width = gradient.shape
        rows = self.shapes[self.name][0]
        vectors = gradient.new_zeros(k, n * rows, width)
        places = indices + rows * torch.arange(n, device=indices.device)[:, None]
        vectors.index_add_(1, places.flatten(), gradient.flatten(1, 2))
        return {self.name: vectors.reshape(k, n, rows, width)}

    def add_squares(self, total: Parameters) -> None:
        if sizes_for(self.indices.device).waits:
            self._add_squares_by_pairs(total[self.name])
            return
        rows = self.shapes[self.name][0]
        examples = torch.arange(self.num_examples, device=self.indices.device)[:, None]
        # Only the rows that an example looks up are not zero.
        used, place = torch.unique(self.indices + rows * examples, return_inverse=True)
        k, width = self.num_vectors, self.gradient.shape[3]
        summed = self.gradient.new_zeros(k, len(used), width)
        summed.index_add_(1, place.flatten(), self.gradient.flatten(1, 2))
        total[self.name].index_add_(0, used % rows, summed.square().sum(0).to(total[self.name]))

    def _add_squares_by_pairs(self, total: Tensor) -> None:
        """The same without finding the distinct rows, whose number would be read back."""
        positions = self.indices.shape[1]
        width = self.num_vectors * self.gradient.shape[3]
        each = positions * (positions + 3 * width) * self.dtype.itemsize
        for examples in slices(len(self.indices), each, self.memory):
            indices = self.indices[examples]
            same = (indices[:, :, None] == indices[:, None]).to(self.dtype)
            squares = sum_of_squares(same @ self.gradient[:, examples])
            # Every position of a row has the whole sum of the row, so it counts in part.
            squares /= same.sum(2)[:, :, None]
            total.index_add_(0, indices.flatten(), squares.flatten(0, 1).to(total))
