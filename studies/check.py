"""One figure that was measured, and the bar it is held to."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Check:
    """A measured figure and whether it meets its bar.

    Attributes:
        claim: what was measured, with its unit.
        measured: the figure.
        bar: what it is held to, as text; ``none`` for a figure that is only shown.
        holds: whether it does; ``None`` without a bar.
    """

    claim: str
    measured: float
    bar: str
    holds: bool | None

    @classmethod
    def at_most(cls, claim: str, measured: float, bound: float) -> Self:
        """A figure that must not exceed a bound (nor be no number)."""
        return cls(claim, float(measured), f"<= {bound:g}", bool(measured <= bound))

    @classmethod
    def at_least(cls, claim: str, measured: float, bound: float) -> Self:
        """A figure that must reach a bound."""
        return cls(claim, float(measured), f">= {bound:g}", bool(measured >= bound))

    @classmethod
    def between(cls, claim: str, measured: float, low: float, high: float) -> Self:
        """A figure that must lie in an interval."""
        return cls(claim, float(measured), f"{low:g} to {high:g}", bool(low <= measured <= high))

    @classmethod
    def shown(cls, claim: str, measured: float) -> Self:
        """A figure without a bar: nothing says beforehand what it should be.

        It must still be a number.
        """
        return cls(claim, float(measured), "none", None if math.isfinite(measured) else False)


@dataclass(frozen=True)
class Surroundings:
    """What a topic may use.

    Attributes:
        data_root: where MNIST is, for topics that want more than the digits of scikit-learn.
        pictures: the folder for the topic's picture, ``<topic>.png``.
        seed: decides whatever is drawn at random.
    """

    data_root: Path
    pictures: Path
    seed: int = 0
