"""The jobs of a sweep that failed, in a file that several processes write."""

from pathlib import Path

from experiments.recording.files import append_whole
from experiments.recording.folder import IN_USE
from experiments.recording.results import RESULTS

FAILURES = "failed.txt"
"""The file of failed jobs in a sweep's folder, one per line."""


def note_failure(folder: Path, job: str, reason: str) -> None:
    """Note a failed job in a sweep's folder, where other processes can read it."""
    with (folder / FAILURES).open("ab", buffering=0) as file:
        append_whole(file, f"{job}: {reason}\n".encode())


def failures(folder: Path) -> list[str]:
    """The jobs of a sweep that failed the last time it ran, each with the reason.

    A job that another process ran, and has finished meanwhile, is none of them.
    """
    path = folder / FAILURES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if not (IN_USE in line and _is_finished(folder, line))]


def _is_finished(folder: Path, line: str) -> bool:
    """Whether there are results of the job of a line in :data:`FAILURES`."""
    number = line.removeprefix("job ").partition(" ")[0]
    return (folder / number / RESULTS).exists()
