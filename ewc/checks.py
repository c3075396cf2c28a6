"""Checks of what users give, with a message that says what is allowed."""

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


def check_positive_share(value: float, name: str) -> None:
    """Check that a number is a share above 0.

    Raises:
        ValueError: it is outside (0, 1].
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name} is {value!r}: it must be above 0 and at most 1.")


def check_not_negative(value: float, name: str) -> None:
    """Check for a finite number that is not negative.

    Raises:
        ValueError: it is something else; ``name`` names it in the message.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}: it must be a finite number, 0 or above.")


def check_positive(value: float | None, name: str, *, optional: bool = False) -> None:
    """Check for a finite number above 0.

    Args:
        value: the number.
        name: what it is, for the message.
        optional: whether ``None`` is allowed too.

    Raises:
        ValueError: it is something else.
    """
    if value is None and optional:
        return
    if not (is_number(value) and value > 0):  # type: ignore[operator]
        none = ", or None" if optional else ""
        raise ValueError(f"{name} is {value!r}: it must be a finite number above 0{none}.")


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


def check_whole(value: int, name: str) -> None:
    """Check for a whole number.

    Raises:
        ValueError: it is something else.
    """
    if not is_whole(value):
        raise ValueError(f"{name} is {value!r}: it must be a whole number.")


def check_instance(value: object, kind: Any, name: str, allowed: str) -> None:
    """Check that a choice is a value of its kind, not a class or a string.

    Args:
        value: the choice.
        kind: what it must be an instance of, as ``isinstance`` takes it.
        name: what the choice is called, for the message.
        allowed: what it may be, for the message.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}.")


def shown(value: object) -> str:
    """A value for a message: short ones as they are, of others their class."""
    short = isinstance(value, str | Real | type) or value is None
    return repr(value) if short else f"a {type(value).__name__}"
