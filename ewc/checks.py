"""Checks of numbers that users give, with a message that says what is allowed."""

import math


def check_share(value: float, name: str) -> None:
    """Check that a number is a share.

    Raises:
        ValueError: it is outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must lie in [0, 1].")


def check_not_negative(value: float, name: str) -> None:
    """Check for a finite number that is not negative.

    Raises:
        ValueError: it is something else; ``name`` names it in the message.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}: it must be a finite number, 0 or above.")


def check_count(value: int, name: str, least: int = 1) -> None:
    """Check that a number is large enough to count something.

    Raises:
        ValueError: it is below ``least``.
    """
    if not value >= least:
        raise ValueError(f"{name} is {value}: it must be {least} or more.")
