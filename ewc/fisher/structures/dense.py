"""The request for the whole matrix, and its sum over the data."""

from dataclasses import dataclass

from torch import Tensor

from ewc.fisher.structures.blocks import OuterProductSums
from ewc.fisher.structures.structure import Accumulator, Structure
from ewc.matrices.dense import DenseFisher
from ewc.parameters import (
    Parameters,
    shapes_of,
)
from ewc.pullback.pullback import Chunk


@dataclass(frozen=True)
class Dense(Structure[DenseFisher]):
    """The whole matrix, for networks of up to some thousand parameters."""

    def accumulator(self, parameters: Parameters) -> "DenseAccumulator":
        return DenseAccumulator(parameters)


class DenseAccumulator(Accumulator[DenseFisher]):
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top` over all parameters.

    Raises:
        ValueError: the matrix does not fit into memory.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = shapes_of(parameters)
        self.blocks = OuterProductSums({"": self.shapes}, next(iter(parameters.values())))

    def add(self, chunk: Chunk) -> None:
        for pullbacks in chunk.pullbacks():
            self.blocks.add(pullbacks)

    def sums(self) -> dict[str, Tensor]:
        return self.blocks.totals

    def mean(self, num_examples: int) -> DenseFisher:
        matrix = self.blocks.mean("", num_examples)
        assert isinstance(matrix, DenseFisher)
        return matrix
