"""Errors that only the numbers show."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for

NO_BATCH = 2**31 - 1
"""A number above that of every batch."""


class Faults:
    """The first batch with each kind of fault.

    Reading one value back waits for all work of an accelerator.  There the faults are therefore
    read at the end of a pass; elsewhere at once.
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}
        self._kinds: dict[str, type[Exception]] = {}

    def add(self, wrong: Tensor, index: int, error: Exception) -> None:
        """Note a fault of a batch, if there is one.

        Args:
            wrong: whether there is, a scalar.
            index: the number of the batch.
            error: the error, with a message that follows "Batch i: ".
        """
        message = str(error)
        first = torch.where(wrong, index, NO_BATCH)
        if message in self._first:
            first = first.minimum(self._first[message])
        self._first[message], self._kinds[message] = first, type(error)
        if not sizes_for(wrong.device).waits:
            self.check()

    def check(self) -> None:
        """Raise the error of the first batch that has one.

        Raises:
            Exception: the error.
        """
        found = [(int(first), message) for message, first in self._first.items()]
        index, message = min(found, default=(NO_BATCH, ""))
        if index < NO_BATCH:
            raise self._kinds[message](f"Batch {index}: {message}")


def check_finite(sums: Mapping[str, Tensor]) -> None:
    """Check that every sum is finite.

    Raises:
        FloatingPointError: a sum is not finite, because a derivative does not exist.
    """
    for name, total in sums.items():
        # The extremes are NaN if an entry is, and need no memory of the size of the sum.
        if total.numel() and not bool(torch.stack(torch.aminmax(total)).isfinite().all()):
            raise FloatingPointError(
                f"The Fisher information of {name} is not finite: a derivative of the network "
                "is infinite, undefined or too large for its type at one of the examples."
            )
