"""Counts the operations that reach a device, and those whose result the host reads."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = tuple(
    f"aten.{name}"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal"),
        # Their results have sizes that depend on values.
        *("nonzero", "_unique2", "unique_dim", "bincount", "masked_select"),
    )
)


class Operations(TorchDispatchMode):
    """Counts operations by name while it is active."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def host_reads(self):
        return sum(n for name, n in self.counts.items() if name.startswith(HOST_READS))
