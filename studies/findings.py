"""What a study is given, and what it returns."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Claim:
    """A measured quantity, and what the theory requires of it.

    Attributes:
        quantity: what was measured, with its unit.
        measured: its value.
        required: the values that are allowed, as text; ``none`` if every number is.
        holds: whether the value is allowed; ``None`` if every number is.
    """

    quantity: str
    measured: float
    required: str
    holds: bool | None

    @classmethod
    def at_most(cls, quantity: str, measured: float, bound: float) -> Self:
        """A value that must not exceed a bound, and must be a number."""
        return cls(quantity, float(measured), f"<= {bound:g}", bool(measured <= bound))

    @classmethod
    def at_least(cls, quantity: str, measured: float, bound: float) -> Self:
        """A value that must reach a bound."""
        return cls(quantity, float(measured), f">= {bound:g}", bool(measured >= bound))

    @classmethod
    def between(cls, quantity: str, measured: float, low: float, high: float) -> Self:
        """A value that must lie in an interval."""
        return cls(quantity, float(measured), f"{low:g} to {high:g}", bool(low <= measured <= high))

    @classmethod
    def shown(cls, quantity: str, measured: float) -> Self:
        """A value that no theory predicts: it must only be finite."""
        return cls(quantity, float(measured), "none", None if math.isfinite(measured) else False)


@dataclass(frozen=True)
class Setting:
    """What a study is given.

    Attributes:
        data_root: the folder of MNIST.
        seed: the seed of all random draws.
    """

    data_root: Path
    seed: int = 0


@dataclass(frozen=True)
class Findings:
    """What a study returns.

    Attributes:
        claims: the rows of its table.
        picture: its picture.
    """

    claims: list[Claim]
    picture: Figure
