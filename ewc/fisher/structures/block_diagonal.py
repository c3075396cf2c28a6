"""The request for one dense block per layer, and its sum over the data."""

from dataclasses import dataclass

from torch import Tensor

from ewc.fisher.structures.blocks import OuterProductSums
from ewc.fisher.structures.structure import Accumulator, Structure
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.parameters import Parameters, Shapes, shapes_of
from ewc.pullback.pullback import Chunk


def layer_of(name: str) -> str:
    """The layer of a parameter: the parameter's name up to the last dot."""
    return name.rpartition(".")[0]


def by_layer(shapes: Shapes) -> dict[str, Shapes]:
    """The parameters of every layer, by the layer's name."""
    layers: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        layers.setdefault(layer_of(name), {})[name] = shape
    return layers


@dataclass(frozen=True)
class BlockDiagonal(Structure[BlockDiagonalFisher]):
    """One dense block per layer, for layers of up to some thousand parameters."""

    def accumulator(self, parameters: Parameters) -> "BlockDiagonalAccumulator":
        return BlockDiagonalAccumulator(parameters)


class BlockDiagonalAccumulator(Accumulator[BlockDiagonalFisher]):
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top` within every layer."""

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = shapes_of(parameters)
        self.blocks = OuterProductSums(by_layer(self.shapes), next(iter(parameters.values())))

    def add(self, chunk: Chunk) -> None:
        for pullbacks in chunk.pullbacks():
            self.blocks.add(pullbacks)

    def sums(self) -> dict[str, Tensor]:
        return self.blocks.totals

    def mean(self, num_examples: int) -> BlockDiagonalFisher:
        blocks = [self.blocks.mean(key, num_examples) for key in self.blocks.blocks]
        return BlockDiagonalFisher(blocks, self.shapes, num_examples)
