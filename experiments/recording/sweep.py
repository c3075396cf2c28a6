"""What the jobs of a sweep note in its folder: which they are, and which of them failed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.configuration.schema import sets_no_outcome
from experiments.recording.files import append_whole
from experiments.recording.folder import IN_USE
from experiments.recording.results import JOBS, RESULTS

FAILURES = "failed.txt"
"""The file of failed jobs in a sweep's folder, one per line."""


def begin_sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Forget the failed jobs of an earlier sweep in a folder, and its jobs if it was another.

    Args:
        folder: the folder of the sweep.
        overrides: what the sweep is over, as on the command line.
    """
    (folder / FAILURES).unlink(missing_ok=True)
    first = json.dumps(sorted(o for o in overrides if not sets_no_outcome(o)))
    path = folder / JOBS
    if not path.exists() or path.read_text(encoding="utf-8").partition("\n")[0] != first:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{first}\n", encoding="utf-8")


def note_job(folder: Path, job: Path) -> None:
    """Note that a folder is that of a job of the sweep, unless it is noted already."""
    name = os.path.relpath(job, folder)
    if name in (folder / JOBS).read_text(encoding="utf-8").splitlines()[1:]:
        return
    with (folder / JOBS).open("ab", buffering=0) as file:
        append_whole(file, f"{name}\n".encode())


def note_failure(folder: Path, number: int, overrides: Sequence[str], reason: str) -> None:
    """Note a failed job in a sweep's folder, where other processes can read it."""
    line = f"{_start(number)}({' '.join(overrides)}): {reason}\n"
    with (folder / FAILURES).open("ab", buffering=0) as file:
        append_whole(file, line.encode())


def failures(folder: Path) -> list[str]:
    """The jobs of a sweep that failed the last time it ran, each with the reason.

    A job that another process ran, and has finished meanwhile, is none of them.
    """
    path = folder / FAILURES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if not (IN_USE in line and _is_finished(folder, line))]


def failure_of(folder: Path, number: int) -> str | None:
    """The line of a job in :data:`FAILURES`, ``None`` if it has not failed."""
    return next((line for line in failures(folder) if line.startswith(_start(number))), None)


def _start(number: int) -> str:
    return f"job {number} "


def _is_finished(folder: Path, line: str) -> bool:
    """Whether there are results of the job of a line in :data:`FAILURES`."""
    number = line.removeprefix("job ").partition(" ")[0]
    return (folder / number / RESULTS).exists()
