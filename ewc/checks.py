"""Checks of arguments; every message says what is allowed and what was given."""

import math
from dataclasses import is_dataclass
from numbers import Integral, Number, Real
from typing import Any

from torch import Tensor, nn


def is_number(value: Any) -> bool:
    """Whether a value is one real, finite number, and not a bool."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype.is_floating_point and bool(value.isfinite())
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def is_whole(value: Any) -> bool:
    """Whether a value is an integer of 64 bits, and not a bool; 2.0 is not an integer."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return is_integer and -(2**63) <= value < 2**63


def check_share(value: float, name: str) -> None:
    """Check that a number lies in [0, 1].

    Raises:
        ValueError: the number lies outside.
    """
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got {shown(value)}.")


def check_positive_share(value: float, name: str) -> None:
    """Check that a number is a share above 0.

    Raises:
        ValueError: it is outside (0, 1].
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name} must be above 0 and at most 1, got {shown(value)}.")


def check_not_negative(value: float, name: str) -> None:
    """Check that a number is finite and not negative.

    Raises:
        ValueError: the number is negative, infinite or NaN.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or above, got {shown(value)}.")


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
        raise ValueError(f"{name} must be a finite number above 0{none}, got {shown(value)}.")


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
        raise ValueError(
            f"{name} must be a whole number, {least} or more{none}, got {shown(value)}."
        )


def check_whole(value: int, name: str) -> None:
    """Check that a number is whole, and has at most 64 bits.

    Raises:
        ValueError: the number is not whole, or too large.
    """
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number of at most 64 bits, got {shown(value)}.")


def check_instance(value: object, kind: Any, name: str, allowed: str) -> None:
    """Check that an argument is an instance of its type.

    The message says so where the class of a choice is given, without brackets.

    Args:
        value: the argument.
        kind: the type, as ``isinstance`` takes it.
        name: the argument's name, for the message.
        allowed: what is allowed, for the message.

    Raises:
        TypeError: the argument is of another type.
    """
    if isinstance(value, kind):
        return
    given = shown(value)
    if isinstance(value, type) and is_dataclass(value) and issubclass(value, kind):
        given = f"the class {value.__name__}: write {value.__name__}()"
    raise TypeError(f"{name} must be {allowed}, got {given}.")


def check_model(model: object) -> None:
    """Check that a network is a module, not its parameters.

    Raises:
        TypeError: it is something else.
    """
    check_instance(model, nn.Module, "model", "a torch.nn.Module")


def check_has_numbers(tensor: Tensor, what: str) -> None:
    """Check that a tensor has numbers; those on the device ``meta`` have shapes only.

    Raises:
        ValueError: the tensor is on ``meta``; ``what`` names it in the message.
    """
    if tensor.is_meta:
        raise ValueError(
            f"{what} must have numbers, got a tensor on the device meta, which has none."
        )


LONGEST = 80
"""Characters of a value in a message."""


def shown(value: object) -> str:
    """A value as a message shows it: a short one by its ``repr``, another by its class."""
    if isinstance(value, Tensor):
        is_short = value.dim() == 0 and not value.is_meta
    else:
        is_short = value is None or isinstance(value, str | Number | type | list | tuple | dict)
    if is_short:
        try:
            text = repr(value)
        except Exception:  # an integer with too many digits, or any object in a list
            text = ""
        if isinstance(value, str) and len(text) > LONGEST:
            text = f"{text[: LONGEST - 4]}...{text[-1]}"
        if 0 < len(text) <= LONGEST and text.isprintable():
            return text
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def reason_of(error: Exception) -> str:
    """The class and the message of an error of some other code, in one line for a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}"
