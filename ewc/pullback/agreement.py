"""When two computations of one thing count as equal."""

from math import isfinite

import torch
from torch import Tensor

MARGIN = 0.02
"""Far above what rounding does (TF32: 1e-3), far below what a wrong rule does."""


def margin(dtype: torch.dtype, noise: float = 0.0) -> float:
    """The largest relative difference, in norm, of two computations of one thing.

    Args:
        dtype: the type they were made in.
        noise: the relative difference of the same computation made twice.
    """
    return max(MARGIN, 16 * torch.finfo(dtype).eps, 4 * noise)


def rounding(dtype: torch.dtype) -> float:
    """What arithmetic of that type may lose, relatively; TF32 calls itself float32."""
    return 1e-8 if dtype == torch.float64 else max(2e-3, 16 * torch.finfo(dtype).eps)


def agree(one: Tensor, other: Tensor, noise: float = 0.0) -> bool:
    """Whether two tensors are one by their norms, never entry by entry.

    Accelerators add in another order every time, and round to 1e-3 in TF32: an entry that
    is small beside the others has no digit in common.
    """
    gap, size = _gap_and_size(one, other)
    return gap <= margin(one.dtype, noise) * size


def same(one: Tensor, other: Tensor, spread: float = 0.0) -> bool:
    """Whether two results of a network differ by rounding only.

    Args:
        one: the outputs of an example.
        other: the outputs of the same example.
        spread: how far outputs of other examples are away: a small share of it does not count.
    """
    gap, size = _gap_and_size(one, other)
    return gap <= max(rounding(one.dtype) * size, MARGIN * spread)


def _gap_and_size(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The norm of the difference, and the larger of the two norms."""
    gap, *sizes = (float(t.norm()) for t in (one - other, one, other))
    if isfinite(gap):
        return gap, max(sizes)
    equal = one == other  # infinities too: outputs may rule a class out
    gap = torch.where(equal, 0, one - other).norm()
    size = max(float(torch.where(t.isfinite(), t, 0).norm()) for t in (one, other))
    return float(gap), size
