"""What the Fisher pass recognised of a network, and what it has to do slowly."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

ONE_AT_A_TIME = "one example at a time"
"""The kind of a use that no rule covers."""

NAMED = 4
"""The number of parameters that a warning names for one reason."""


@dataclass(frozen=True)
class Use:
    """A use of parameters in a network.

    Attributes:
        parameters: the names of the parameters.
        kind: the rule that covers the use, such as ``"matrix product"``.
        positions: the positions per example at which the parameters are used; 0 if unknown.
        rows: the order of the rows of the result, such as ``"examples first"``.
        reason: why the parameters are differentiated one example at a time; empty if they are
            not.
        times: the number of such uses, as in the steps of a recurrence.
    """

    parameters: tuple[str, ...]
    kind: str
    positions: int = 0
    rows: str = ""
    reason: str = ""
    times: int = 1


class Recognised(tuple[Use, ...]):
    """The uses of a network's parameters, printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("parameters", "kind", "uses", "positions", "rows", "why slow")]
        for use in self:
            numbers = str(use.times), str(use.positions or "")
            lines.append((", ".join(use.parameters), use.kind, *numbers, use.rows, use.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def counted(uses: Iterable[Use]) -> list[Use]:
    """Every different use once, with the number of times."""
    return [replace(use, times=times) for use, times in Counter(uses).items()]


def one_at_a_time(reasons: Mapping[str, str]) -> list[Use]:
    """The parameters that are differentiated one example at a time, by reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return [Use(tuple(names), ONE_AT_A_TIME, reason=why) for why, names in groups.items()]


def warn_of(uses: Iterable[Use]) -> None:
    """Warn that parameters are differentiated one example at a time.

    Warns:
        UserWarning: there is such a use.
    """
    listed = []
    for use in uses:
        more = len(use.parameters) - NAMED
        names = ", ".join(use.parameters[:NAMED]) + (f" and {more} more" if more > 0 else "")
        listed.append(f"{names} ({use.reason})")
    if listed:
        warnings.warn(
            "The Fisher pass differentiates the network one example at a time, which is slow, for "
            f"{'; '.join(listed)}. ewc.fisher.recognised lists every use of the parameters.",
            stacklevel=2,
        )
