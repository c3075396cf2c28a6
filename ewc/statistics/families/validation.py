"""Torch's checks of a distribution's parameters, switched on or off for a while.

The switch is global, and the first ``torch.compile`` of a process turns it off for good.  So
whoever relies on the checks switches them on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution


@contextmanager
def validation(on: bool) -> Iterator[None]:
    """Check the parameters of distributions made in this block, or do not."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(on)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
