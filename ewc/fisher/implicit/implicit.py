"""The request for the matrix-free Fisher, and the accumulator that stores its data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ewc.fisher.implicit.implicit_fisher import ImplicitFisher
from ewc.fisher.implicit.network_product import NetworkProduct
from ewc.fisher.implicit.pieces import Piece
from ewc.fisher.network_state import copied
from ewc.fisher.structures.structure import Accumulator, Structure
from ewc.parameters import (
    Parameters,
    shapes_of,
)
from ewc.pullback.pullback import Chunk


@dataclass(frozen=True)
class Implicit(Structure[ImplicitFisher]):
    """No matrix: the network and the data are stored, and differentiated for every product."""

    def accumulator(self, parameters: Parameters) -> "ImplicitAccumulator":
        return ImplicitAccumulator(parameters)


class ImplicitAccumulator(Accumulator[ImplicitFisher]):
    """The data of a pass, and its network."""

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = shapes_of(parameters)
        self.pieces: list[Piece] = []
        self.model: nn.Module | None = None
        self.group: ProcessGroup | None = None

    def add(self, chunk: Chunk) -> None:
        self.model = chunk.model
        self.pieces.append(Piece(chunk.arguments.map(torch.clone), chunk.scores.detach()))

    def sums(self) -> dict[str, Tensor]:
        return {}

    def clear(self) -> None:
        self.pieces.clear()

    def join(self, group: ProcessGroup) -> None:
        self.group = group

    def mean(self, num_examples: int) -> ImplicitFisher:
        """The matrix, with a copy of the present network.

        Raises:
            ValueError: this process has no data.
        """
        if self.model is None:
            raise ValueError("The matrix-free Fisher needs an example in every process.")
        model = copied(self.model)
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        return ImplicitFisher(
            NetworkProduct(model, list(self.shapes)),
            weights,
            self.pieces,
            network_shapes=self.shapes,
            shapes=self.shapes,
            num_examples=num_examples,
            group=self.group,
        )
