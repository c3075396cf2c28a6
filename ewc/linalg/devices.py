"""How much work one operation gets, by device: the one place that knows devices.

On a CPU the cache decides: work is cut into tiles that stay in it.  On an accelerator every
operation has a cost of its own, so few large ones are faster, and the host runs ahead until it
reads a value.
"""

from dataclasses import dataclass

import torch

from ewc.linalg.tiles import CACHED_ENTRIES, DEFAULT_MEMORY

FREE_SHARE = 4
"""One part in so many of an accelerator's free memory is for intermediate results."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the pieces of work on a kind of device.

    Attributes:
        waits: whether reading a value back waits for all work of the device.
        whole: whether a few large operations are faster than many small ones.  Their number
            then depends on neither the examples nor the kernel, at the price of more
            arithmetic and memory.
        entries: the entries of a product that is squared or summed; ``None`` for as many as
            fit into memory.
        examples: the largest number of examples in a chunk; ``None`` for a whole batch.
        gradients: the largest size in bytes of one operation's gradients; ``None`` for no limit.
        swept: the entries per thread that one sweep over parameters takes at once; ``None`` for
            all parameters in one list.
        gram_width: the least number of columns for which a Gram matrix is computed in quarters.
    """

    waits: bool
    whole: bool
    entries: int | None
    examples: int | None
    gradients: int | None
    swept: int | None
    gram_width: int

    def entries_in(self, memory: int, dtype: torch.dtype) -> int:
        """The entries of a product, with the results computed from it, in ``memory`` bytes."""
        return memory // (2 * dtype.itemsize) if self.entries is None else self.entries


PROCESSOR = Sizes(
    waits=False,
    whole=False,
    entries=CACHED_ENTRIES,
    # Larger chunks are no faster, and their results leave the cache that the cores share.
    examples=512,
    gradients=2**24,
    swept=2**17,
    gram_width=128,
)

ACCELERATOR = Sizes(
    waits=True, whole=True, entries=None, examples=None, gradients=None, swept=None, gram_width=2048
)

BY_DEVICE = {"cpu": PROCESSOR}
"""The sizes by type of device; those of an accelerator for all others."""


def sizes_for(device: torch.device) -> Sizes:
    """The sizes for a device."""
    return BY_DEVICE.get(device.type, ACCELERATOR)


_EXHAUSTED = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA, HIP, MPS, XPU
    "bad_alloc",  # libraries in C++
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "could not create a memory object",  # oneDNN
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)


def default_memory(device: torch.device) -> int:
    """Bytes for intermediate results on a device: 512 MiB, or a quarter of what is free on CUDA."""
    if device.type != "cuda":
        return DEFAULT_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and not allocated is free too.
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, (free + reserved) // FREE_SHARE)
