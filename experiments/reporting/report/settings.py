"""Runs put together: by benchmark, and within one by setting, under names that a person reads."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.configuration.schema import completed, deciding
from experiments.reporting.options import as_written, by_setting, options_of, value_of, varied
from experiments.reporting.report.gathering import Run
from experiments.reporting.tables import finished

REFERENCES = ("joint", "naive")
"""The strategies that others are compared with: the upper reference and the lower one."""

_OF_STRATEGY = ("strategy.", "fisher.")
"""Options that say how a strategy works."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed only.

    Attributes:
        name: what tells it from the other settings of its benchmark.
        runs: the runs, the diverged ones too.
        reference: the strategy, if it is one of :data:`REFERENCES`.
    """

    name: str
    runs: list[Run]
    reference: str = ""

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The results of the runs that did not diverge, one for each seed."""
        done = finished([run.results for run in self.runs])
        return [dict(job) for job in {job["seed"]: job for job in done}.values()]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all runs."""
        return sorted({run.results["seed"] for run in self.runs})


@dataclass(frozen=True)
class Benchmark:
    """The runs on one benchmark; accuracies on different ones are not compared."""

    name: str
    settings: list[Setting]


def by_benchmark(runs: Sequence[Run]) -> list[Benchmark]:
    """The runs by benchmark and setting, in the order in which they came."""
    # A run of an earlier version has the defaults of options that came later.
    configs = completed([deciding(run.results["config"]) for run in runs])
    runs = [
        Run(run.results | {"config": config}, run.folder)
        for run, config in zip(runs, configs, strict=True)
    ]
    groups = by_setting(runs, [_under(_flat(_config(run)), "benchmark.") for run in runs])
    names = _told_apart(
        [_benchmark(members[0]) for _, members in groups], [options for options, _ in groups]
    )
    return [
        Benchmark(name, _settings(members))
        for name, (_, members) in zip(names, groups, strict=True)
    ]


def circumstances(results: Mapping[str, Any]) -> str:
    """Everything but the strategy that decides a run's numbers, the seed included."""
    flat = _flat(deciding(results["config"]))
    decisive = {k: value_of(v) for k, v in flat.items() if not k.startswith(_OF_STRATEGY)}
    return json.dumps(decisive | {"seed": str(results["seed"])}, sort_keys=True)


def strategy_of(results: Mapping[str, Any]) -> str:
    """The name of a run's strategy on the command line, else that of its class."""
    chosen = results.get("choices", {}).get("strategy") or options_of(results).get("strategy")
    target = results["config"].get("strategy", {}).get("_target_", "")
    return str(chosen or target.rpartition(".")[2].lower() or "unknown")


def _settings(runs: Sequence[Run]) -> list[Setting]:
    groups = by_setting(runs, [_flat(_config(run)) for run in runs])
    strategies = [strategy_of(members[0].results) for _, members in groups]
    of_strategy = [_under(options, *_OF_STRATEGY) for options, _ in groups]
    beside = [
        {k: v for k, v in options.items() if not k.startswith(_OF_STRATEGY)}
        for options, _ in groups
    ]
    additions = _differences(beside)
    names = _told_apart(strategies, of_strategy)
    return [
        Setting(", ".join([name, *added]), members, strategy if strategy in REFERENCES else "")
        for name, added, (_, members), strategy in zip(
            names, additions, groups, strategies, strict=True
        )
    ]


def _told_apart(names: Sequence[str], options: Sequence[Mapping[str, str]]) -> list[str]:
    """The names, with the options that differ behind those that are the same."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        by_name[name].append(place)
    parts: list[list[str]] = [[name] for name in names]
    for places in by_name.values():
        for place, added in zip(places, _differences([options[p] for p in places]), strict=True):
            parts[place] += added
    return [", ".join(part) for part in parts]


def _differences(options: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Of each set of options those that are not the same in all, as ``strength 100``."""
    keys = varied(options)
    last = [_short(key) for key in keys]
    words = {key: _short(key) if last.count(_short(key)) == 1 else key for key in keys}
    return [
        [f"{words[key]} {_shown(key, each[key])}" for key in keys if key in each]
        for each in options
    ]


def _short(key: str) -> str:
    return key.removesuffix("._target_").rpartition(".")[2]


def _shown(key: str, text: str) -> str:
    """A value on the page, classes by their last name."""
    return text.rpartition(".")[2] if key.endswith("_target_") else as_written(text)


def _benchmark(run: Run) -> str:
    """A benchmark as the command line names it, with its tasks and its scenario."""
    options = _config(run).get("benchmark", {})
    name = run.results.get("choices", {}).get("benchmark")
    if not name:
        targets = (options, options.get("images") or {})
        classes = [node.get("_target_", "").rpartition(".")[2].lower() for node in targets]
        name = "_".join(filter(None, classes)) or "unknown benchmark"
    scenario = options.get("scenario")
    tasks = options.get("num_tasks")
    return ", ".join(
        [name] + [f"{tasks} tasks"] * bool(tasks) + [f"{scenario}-incremental"] * bool(scenario)
    )


def _config(run: Run) -> dict[str, Any]:
    config: dict[str, Any] = run.results["config"]
    return config


def _under(flat: Mapping[str, str], *prefixes: str) -> dict[str, str]:
    return {key: value for key, value in flat.items() if key.startswith(prefixes)}


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The options of a configuration by their dotted names."""
    values: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
        elif key != "_partial_":
            values[f"{prefix}{key}"] = str(value)
    return values
