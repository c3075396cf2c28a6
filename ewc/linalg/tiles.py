"""Slices of work that fit into memory."""

from collections.abc import Iterator

DEFAULT_MEMORY = 2**29
"""Bytes that the intermediate results of a chunk may take: 512 MiB."""


def slices(length: int, bytes_each: int, memory: int) -> Iterator[slice]:
    """Slices of ``range(length)`` whose items fit into ``memory`` bytes each."""
    step = max(1, memory // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
