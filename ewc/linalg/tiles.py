"""Slices of work that fit into a cache or into memory."""

from collections.abc import Iterator

from torch import Tensor

DEFAULT_MEMORY = 2**29
"""Bytes that the intermediate results of a chunk may take on a CPU: 512 MiB."""

CACHED_ENTRIES = 2**18
"""Entries of a product that stay in a core's cache until they are squared or summed."""


def part(tensor: Tensor, items: slice, dim: int = 0) -> Tensor:
    """A slice of one dimension; the tensor itself, without an operation, if it is all."""
    if items.start == 0 and items.stop >= tensor.shape[dim]:
        return tensor
    return tensor.narrow(dim, items.start, min(items.stop, tensor.shape[dim]) - items.start)


def slices(length: int, bytes_each: int, memory: int) -> Iterator[slice]:
    """Slices of ``range(length)`` whose items fit into ``memory`` bytes each."""
    step = max(1, memory // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
