"""Checks of arguments; every message says what is allowed and what was given."""

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether a value is one real, finite number, and not a bool."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype.is_floating_point and bool(value.isfinite())
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, and not a bool; 2.0 is not an integer."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_share(value: float, name: str) -> None:
    """Check that a number lies in [0, 1].

    Raises:
        ValueError: the number lies outside.
    """
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}.")


def check_positive_share(value: float, name: str) -> None:
    """Check that a number is a share above 0.

    Raises:
        ValueError: it is outside (0, 1].
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}.")


def check_not_negative(value: float, name: str) -> None:
    """Check that a number is finite and not negative.

    Raises:
        ValueError: the number is negative, infinite or NaN.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or above, got {value!r}.")


def check_positive(value: float | None, name: str, *, optional: bool = False) -> None:
    """Check that a number is finite and above 0.

    Args:
        value: the number.
        name: the argument's name, for the message.
        optional: whether ``None`` is allowed too.

    Raises:
        ValueError: the number is 0, negative, infinite or NaN.
    """
    if value is None and optional:
        return
    if not (is_number(value) and value > 0):  # type: ignore[operator]
        none = ", or None" if optional else ""
        raise ValueError(f"{name} must be a finite number above 0{none}, got {value!r}.")


def check_count(value: int | None, name: str, least: int = 1, *, optional: bool = False) -> None:
    """Check that a number is whole and not too small.

    Args:
        value: the number.
        name: the argument's name, for the message.
        least: the smallest number allowed.
        optional: whether ``None`` is allowed too.

    Raises:
        ValueError: the number is not whole, or below ``least``.
    """
    if value is None and optional:
        return
    if not (is_whole(value) and value >= least):  # type: ignore[operator]
        none = ", or None" if optional else ""
        raise ValueError(f"{name} must be a whole number, {least} or more{none}, got {value!r}.")


def check_whole(value: int, name: str) -> None:
    """Check that a number is whole.

    Raises:
        ValueError: the number is not whole.
    """
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")


def check_instance(value: object, kind: Any, name: str, allowed: str) -> None:
    """Check that an argument is an instance of its type.

    Args:
        value: the argument.
        kind: the type, as ``isinstance`` takes it.
        name: the argument's name, for the message.
        allowed: what is allowed, for the message.

    Raises:
        TypeError: the argument is of another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}.")


def shown(value: object) -> str:
    """A value as a message shows it: a short one by its ``repr``, another by its class."""
    short = isinstance(value, str | Real | type) or value is None
    if short:
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
