"""The space of a search, in Hydra's grammar of overrides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep

from experiments.configuration.targets import ConfigurationError


@dataclass(frozen=True)
class Space:
    """What a search is over.

    Attributes:
        fixed: the options that all trials have.
        searched: the overrides that are searched over, by option.
    """

    fixed: dict[str, str]
    searched: dict[str, Override]

    @classmethod
    def parsed(cls, overrides: Sequence[str], loader: ConfigLoader) -> "Space":
        """The space of a command line; a later override of an option replaces an earlier one.

        Raises:
            ConfigurationError: nothing is searched over, or an override cannot be.
        """
        fixed: dict[str, str] = {}
        searched: dict[str, Override] = {}
        parser = OverridesParser.create(config_loader=loader)
        for override in parser.parse_overrides(list(overrides)):
            key = override.get_key_element()
            fixed.pop(key, None)
            searched.pop(key, None)
            if override.is_sweep_override():
                searched[key] = override
                _distribution(override)
            else:
                fixed[key] = f"{key}={override.get_value_element_as_str()}"
        if not searched:
            raise ConfigurationError(
                "hydra/sweeper=optuna has nothing to search over: allowed are interval(1,1000), "
                "tag(log,interval(1,1000)), range(1,10) and choices such as 1,2,3."
            )
        return cls(fixed, searched)

    def distributions(self) -> dict[str, Any]:
        """Optuna's distributions, by option."""
        return {key: _distribution(override) for key, override in self.searched.items()}

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """The overrides of a trial with these values of the options."""
        return [*self.fixed.values(), *(f"{key}={value}" for key, value in values.items())]

    def examples(self) -> list[list[str]]:
        """Overrides in which every choice occurs, to check before the first trial."""
        values = {key: _some(override) for key, override in self.searched.items()}
        start = {key: some[0] for key, some in values.items()}
        return [
            self.overrides(start | {key: value}) for key, some in values.items() for value in some
        ]


def _some(override: Override) -> list[Any]:
    """Every choice of an override, and the ends of an interval."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return list(override.sweep_string_iterator())


def _distribution(override: Override) -> Any:
    """Optuna's distribution for an override of several values."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    assert isinstance(value, Sweep)
    option, is_log = override.get_key_element(), "log" in value.tags
    if value.tags - {"log"} or (is_log and not isinstance(value, IntervalSweep)):
        raise ConfigurationError(
            f"Option {option!r} has the tags {', '.join(sorted(value.tags))}: allowed is log, of "
            "an interval."
        )
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers: list[Any] = sorted(override.sweep_iterator())
        assert value.step is not None
        exact = all(isinstance(number, int) for number in numbers)
        number_kind = IntDistribution if exact else FloatDistribution
        return number_kind(numbers[0], numbers[-1], step=abs(value.step))
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    start, end = value.start, value.end
    assert start is not None
    assert end is not None
    if start >= end or (is_log and start <= 0):
        raise ConfigurationError(
            f"Option {option!r} is searched from {start} to {end}: the first must be smaller, and "
            "positive with the tag log."
        )
    kind = IntDistribution if isinstance(start, int) else FloatDistribution
    return kind(start, end, log=is_log)
