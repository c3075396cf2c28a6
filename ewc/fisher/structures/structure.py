"""What of the Fisher matrix to keep, and what is summed up for it while the data go by."""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from ewc.checks import check_instance
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters
from ewc.pullback.pullback import Chunk

Matrix = TypeVar("Matrix", bound=FisherMatrix)


class Accumulator(ABC, Generic[Matrix]):
    """A running sum over the data, from which a matrix is made at the end.

    Attributes:
        passes: how often the data must go by.
    """

    passes: int = 1

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        r"""Add :math:`\sum_{n,k} v_{kn} v_{kn}^\top` of one chunk."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by a name that is the same in every process."""

    @abstractmethod
    def mean(self, num_examples: int) -> "Matrix | Accumulator[Matrix]":
        """The mean over the examples as a matrix, or the accumulator of another pass."""

    def join(self, group: ProcessGroup) -> None:
        """Prepare for data that are spread over the processes of a group."""


class Structure(ABC, Generic[Matrix]):
    """A request: what of the Fisher matrix to keep, such as ``Diagonal()``.

    A value with its options.  :func:`~ewc.fisher_information` takes it, and returns a
    matrix of the kind that it names.

    Attributes:
        has_units: whether the matrices know the output units of layers, over which
            :meth:`~ewc.FisherMatrix.shrunk` spreads the information.
    """

    has_units: ClassVar[bool] = False

    @abstractmethod
    def accumulator(self, parameters: Parameters) -> Accumulator[Matrix]:
        """An empty sum over these parameters."""


def check_structure(structure: object) -> None:
    """Check that a structure is a value.

    Raises:
        TypeError: it is a class, a string or something else.
    """
    check_instance(structure, Structure, "structure", "a Structure instance such as Diagonal()")
