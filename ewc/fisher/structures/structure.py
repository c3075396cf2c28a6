"""Structures: the part of the Fisher matrix to keep, and its sum over the data."""

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
    """A running sum over the data, whose mean is a matrix.

    Attributes:
        passes: the number of passes over the data.
    """

    passes: int = 1

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        r"""Add :math:`\sum_{n,k} v_{kn} v_{kn}^\top` of one chunk."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, by names that are equal in all processes."""

    @abstractmethod
    def mean(self, num_examples: int) -> "Matrix | Accumulator[Matrix]":
        """The mean over the examples as a matrix, or the accumulator of the next pass."""

    def clear(self) -> None:
        """Forget all data, so that the pass can begin again."""
        for total in self.sums().values():
            total.zero_()

    def join(self, group: ProcessGroup) -> None:
        """Prepare for data that are distributed over the processes of a group."""


class Structure(ABC, Generic[Matrix]):
    """A request for a part of the Fisher matrix, such as ``Diagonal()``.

    It is a value with options.  :func:`~ewc.fisher_information` takes it and returns a matrix
    of the corresponding class.

    Attributes:
        has_units: whether the matrices have the output units of layers, over which
            :meth:`~ewc.FisherMatrix.shrunk` averages.
    """

    has_units: ClassVar[bool] = False

    @abstractmethod
    def accumulator(self, parameters: Parameters) -> Accumulator[Matrix]:
        """An empty sum over these parameters."""


def check_structure(structure: object) -> None:
    """Check that a value is a structure.

    Raises:
        TypeError: it is a class, a string or something else.
    """
    check_instance(structure, Structure, "structure", "a Structure instance such as Diagonal()")
