"""The options that jobs ran with: when two are the same, and the jobs of one setting."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")


def options_of(job: Mapping[str, Any]) -> dict[str, str]:
    """The options of a job on the command line, by name."""
    pairs = (override.lstrip("+~").partition("=") for override in job["overrides"])
    return {name: value for name, _, value in pairs}


def by_setting(
    jobs: Iterable[Job], options: Iterable[Mapping[str, str]], but: Sequence[str] = ()
) -> list[tuple[dict[str, str], list[Job]]]:
    """The jobs by setting: those of one setting differ in the seed only.

    Args:
        jobs: the jobs.
        options: the options of each job.
        but: options besides the seed that may differ within a setting.

    Returns:
        The options of each setting, without those that may differ, and its jobs; in the order in
        which they came.
    """
    settings: dict[frozenset[tuple[str, float | str]], tuple[dict[str, str], list[Job]]] = {}
    for job, given in zip(jobs, options, strict=True):
        setting = {name: text for name, text in given.items() if name not in ("seed", *but)}
        key = frozenset((name, value_of(text)) for name, text in setting.items())
        settings.setdefault(key, (setting, []))[1].append(job)
    return list(settings.values())


def varied(options: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of the options that are missing in some, or have several values."""
    names = dict.fromkeys(name for each in options for name in each)
    return [
        name
        for name in names
        if len({value_of(each[name]) if name in each else None for each in options}) > 1
    ]


def has_options(options: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Whether all ``wanted`` are among the options."""
    return all(
        name in options and value_of(options[name]) == value_of(str(value))
        for name, value in wanted.items()
    )


def value_of(text: str) -> float | str:
    """What a text is as an option: ``1e-3`` is ``0.001``, as for Hydra."""
    try:
        return float(text)
    except ValueError:
        return text


def as_written(text: str) -> str:
    """A value as a person writes it: 1e+11, not 100000000000.0."""
    value = value_of(text)
    return f"{value:g}" if isinstance(value, float) else value
