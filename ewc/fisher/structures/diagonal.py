"""The request for the diagonal, and its sum over the data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.fisher.structures.structure import Accumulator, Structure
from ewc.matrices.diagonal import DiagonalFisher
from ewc.parameters import (
    Parameters,
    accumulation_dtype,
)
from ewc.pullback.pullback import Chunk


@dataclass(frozen=True)
class Diagonal(Structure[DiagonalFisher]):
    """The diagonal: ``p`` numbers, one pass over the data."""

    has_units = True

    def accumulator(self, parameters: Parameters) -> "DiagonalAccumulator":
        return DiagonalAccumulator(parameters)


class DiagonalAccumulator(Accumulator[DiagonalFisher]):
    r"""The running :math:`\sum_{n,k} v_{kn}^2`, entry by entry, in single precision at least."""

    def __init__(self, parameters: Parameters) -> None:
        self.total = {
            name: torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
            for name, parameter in parameters.items()
        }

    def add(self, chunk: Chunk) -> None:
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                pullback.add_squares(self.total)

    def sums(self) -> dict[str, Tensor]:
        return self.total

    def mean(self, num_examples: int) -> DiagonalFisher:
        entries = {name: total.div_(num_examples) for name, total in self.total.items()}
        return DiagonalFisher(entries, num_examples)
