"""Checks of numbers that users give, with a message that says what is allowed."""

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether a value is one real, finite number: a truth value is not."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype.is_floating_point and bool(value.isfinite())
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: a truth value is not, nor is 2.0."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_share(value: float, name: str) -> None:
    """Check that a number is a share.

    Raises:
        ValueError: it is outside [0, 1].
    """
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}: it must lie in [0, 1].")


def check_not_negative(value: float, name: str) -> None:
    """Check for a finite number that is not negative.

    Raises:
        ValueError: it is something else; ``name`` names it in the message.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}: it must be a finite number, 0 or above.")


def check_count(value: int | None, name: str, least: int = 1, *, optional: bool = False) -> None:
    """Check that a number is whole and large enough to count something.

    Args:
        value: the number.
        name: what it is, for the message.
        least: the smallest that is allowed.
        optional: whether ``None`` is allowed too.

    Raises:
        ValueError: it is something else.
    """
    if value is None and optional:
        return
    if not (is_whole(value) and value >= least):  # type: ignore[operator]
        kind = "" if is_whole(value) else "a whole number, "
        none = ", or None" if optional else ""
        raise ValueError(f"{name} is {value!r}: it must be {kind}{least} or more{none}.")
