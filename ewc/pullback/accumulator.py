"""What a structure keeps while the data go by, and how it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from ewc.parameters import Parameters
from ewc.pullback.pullback import Chunk

if TYPE_CHECKING:
    from ewc.matrices.matrix import FisherMatrix


class Accumulator(ABC):
    """What a structure keeps while the data go by.

    Attributes:
        passes: how often the data must go by.
    """

    passes: int = 1

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        r"""Add :math:`\sum_{n,k} v_{kn} v_{kn}^\top` of one chunk."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """What was summed so far, by a name that is the same in every process."""

    @abstractmethod
    def mean(self, num_examples: int) -> "FisherMatrix | Accumulator":
        """The sums divided by ``num_examples``, as a matrix, or what to sum in another pass."""

    def join(self, group: ProcessGroup) -> None:  # noqa: B027 - most have nothing to do
        """Learn that the data are spread over the processes of a group."""


Matrix = TypeVar("Matrix", bound="FisherMatrix")


@dataclass(frozen=True)
class Configured(Generic[Matrix]):
    """A structure with options; see :meth:`FisherMatrix.configured`.

    Attributes:
        structure: the class.
        options: arguments of its ``accumulator`` besides the parameters.
    """

    structure: type[Matrix]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        """The call that made it, for messages."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.structure.__name__}.configured({options})"

    def accumulator(self, parameters: Parameters) -> Accumulator:
        """An empty sum over these parameters, for the pass over the data."""
        return self.structure.accumulator(parameters, **self.options)
