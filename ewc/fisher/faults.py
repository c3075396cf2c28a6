"""Errors that only the numbers show."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ewc.linalg.devices import sizes_for
from ewc.pullback.call import Call

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


@contextmanager
def explained(model: nn.Module, arguments: Call | None) -> Iterator[None]:
    """Add to an error about numbers that are not finite, where these come from.

    Args:
        model: the network.
        arguments: the call that has the fault; ``None`` if it is not known any more.

    Raises:
        FloatingPointError: the error, with the cause.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}{_cause(model, arguments)}") from None


def _cause(model: nn.Module, arguments: Call | None) -> str:
    """Why outputs are not finite, as the end of a message."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f": the parameter {name!r} is not finite, as after training that diverged."
    for name, buffer in model.named_buffers():
        if bool(buffer.isnan().any()):  # a mask may be infinite
            return f": the buffer {name!r} is NaN, as running statistics are after NaN in the data."
    if arguments is None:
        return ", although the parameters are finite: check the inputs."
    for name, tensor in arguments.labelled().items():
        if not bool(tensor.isfinite().all()):
            return f": {name} is not finite in the data."
    return (
        ", although the parameters and the inputs are finite: an intermediate result is infinite "
        "or undefined; with a CTC loss, check the lengths."
    )


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
