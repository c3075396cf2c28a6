"""When two computations of the same quantity count as equal."""

from math import isfinite

import torch
from torch import Tensor

MARGIN = 0.02
"""Far above rounding errors (TF32: 1e-3), far below the error of a wrong rule."""


def margin(dtype: torch.dtype, noise: float = 0.0) -> float:
    """The largest relative difference, in norm, at which two computations agree.

    Args:
        dtype: the floating-point type of the computations.
        noise: the relative difference between two runs of the same computation.
    """
    return max(MARGIN, 16 * torch.finfo(dtype).eps, 4 * noise)


def rounding(dtype: torch.dtype) -> float:
    """The relative rounding error that a type allows; TF32 reports itself as float32."""
    return 1e-8 if dtype == torch.float64 else max(2e-3, 16 * torch.finfo(dtype).eps)


def agree(one: Tensor, other: Tensor, noise: float = 0.0) -> bool:
    """Whether two tensors agree, compared by norm and not entry by entry.

    Accelerators add in a different order every time, and round to 1e-3 in TF32.  A
    relatively small entry may then have no correct digit.
    """
    gap, size = _gap_and_size(one, other)
    return gap <= margin(one.dtype, noise) * size


def same(one: Tensor, other: Tensor, spread: float = 0.0) -> bool:
    """Whether two results of a network differ by rounding only.

    Args:
        one: the outputs of an example.
        other: the outputs of the same example.
        spread: the distance to the outputs of other examples; a small fraction of it does
            not count.
    """
    gap, size = _gap_and_size(one, other)
    return gap <= max(rounding(one.dtype) * size, MARGIN * spread)


def _gap_and_size(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The norm of the difference, and the larger of the two norms."""
    gap, *sizes = (float(t.norm()) for t in (one - other, one, other))
    if isfinite(gap):
        return gap, max(sizes)
    equal = one == other  # infinities too: outputs may exclude a class
    gap = torch.where(equal, 0, one - other).norm()
    size = max(float(torch.where(t.isfinite(), t, 0).norm()) for t in (one, other))
    return float(gap), size
