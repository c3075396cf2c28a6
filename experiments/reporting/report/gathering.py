"""The runs below some folders, and what is known of those without results."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.recording.kept import read_kept
from experiments.recording.results import (
    RESULTS,
    DamagedResultsError,
    noted_jobs,
    read_results,
)
from experiments.recording.sweep import FAILURES, failures


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        results: the content of its ``results.json``.
        folder: its folder; ``None`` for a line of kept results.
    """

    results: dict[str, Any]
    folder: Path | None = None


@dataclass(frozen=True)
class Gathered:
    """What lies below some folders.

    Attributes:
        runs: the runs that have ended, the diverged ones too.
        failed: the jobs that failed, with the reason.
        damaged: sentences on results that cannot be read.
    """

    runs: list[Run] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def gather(places: Iterable[Path]) -> Gathered:
    """The runs in folders, in folders of folders, or in files of kept results, each once."""
    gathered = Gathered()
    seen: set[Path] = set()
    for place in places:
        if place.is_file():
            jobs, damaged = read_kept(place)
            gathered.runs.extend(Run(job) for job in jobs)
            gathered.damaged.extend(damaged)
            continue
        for path in _files(place):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if path.name == FAILURES:
                gathered.failed.extend(f"{_short(path)} {job}" for job in failures(path.parent))
                continue
            try:
                if results := read_results(path.parent):
                    gathered.runs.append(Run(results, path.parent))
            except DamagedResultsError as error:
                gathered.damaged.append(str(error))
    return gathered


def _files(place: Path) -> Iterator[Path]:
    """The results and the lists of failed jobs below a folder; job 10 comes after job 9.

    Jobs of an earlier sweep in a sweep's folder are left out.
    """
    for name, inner, names in os.walk(place):
        folder = Path(name)
        if (noted := noted_jobs(folder)) is not None:
            inner.clear()
        inner.sort(key=lambda name: (len(name), name))
        yield from (folder / name for name in (FAILURES, RESULTS) if name in names)
        yield from (job / RESULTS for job in noted or ())


def _short(path: Path) -> str:
    return f"{path.parent.name}:"
