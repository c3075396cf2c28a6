"""Counts the operations that reach a device, and those whose result the host reads."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal")


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
