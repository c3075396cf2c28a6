"""The results of a run in ``results.json``, written completely and checked when read."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from experiments.recording.files import write_whole

_log = logging.getLogger(__name__)


RESULTS = "results.json"

JOBS = "jobs.txt"
"""The file of the jobs of the newest sweep in a folder: what the sweep is, then one per line."""


class DamagedResultsError(ValueError):
    """A ``results.json`` that is not what :func:`write_results` writes."""


class Job(BaseModel):
    """The results of every job that has ended."""

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    overrides: list[str]
    flags: list[str] = []
    seed: int


class Diverged(Job):
    """The results of a job that diverged."""

    diverged: str


class Finished(Job):
    """The results of a finished job that tables and pictures need."""

    average_accuracy: float
    forgetting: float
    accuracy_matrix: list[list[float]]
    fisher_overlap: list[dict[str, float]] = []
    seconds: dict[str, float]
    versions: dict[str, str]

    @field_validator("accuracy_matrix")
    @classmethod
    def _is_square(cls, matrix: list[list[float]]) -> list[list[float]]:
        if not matrix or any(len(row) != len(matrix) for row in matrix):
            raise ValueError("it must have as many columns as rows")
        return matrix

    @field_validator("seconds")
    @classmethod
    def _has_total(cls, seconds: dict[str, float]) -> dict[str, float]:
        if "total" not in seconds:
            raise ValueError("total is missing")
        return seconds


class Layer(BaseModel):
    """What is kept of the Fisher information of one layer.

    ``eigenvalues`` has the eigenvalues at ``ranks``, counted from 1 for the largest.
    """

    model_config = ConfigDict(strict=True)
    trace: float
    ranks: list[int]
    eigenvalues: list[float]


class Information(BaseModel):
    """What is kept of the Fisher information of one task."""

    model_config = ConfigDict(strict=True)
    trace: float
    seconds: float
    layers: dict[str, Layer]


class Guessing(BaseModel):
    """The accuracy of guessing the most frequent class, and its standard error."""

    model_config = ConfigDict(strict=True)
    accuracy: float
    error: float


class Results(Finished):
    """The content of ``results.json`` for a run that trained every task.

    Runs of earlier versions lack the entries with a default.
    """

    backward_transfer: float
    initial_accuracies: list[float] = []
    fisher: list[Information] = []
    memory: dict[str, int] = {}
    choices: dict[str, str] = {}
    guessing: list[Guessing] = []
    penalty_pull: float = 0.0
    remarks: list[str] = []

    @model_validator(mode="after")
    def _is_of_every_task(self) -> Self:
        size = len(self.accuracy_matrix)
        for name in ("initial_accuracies", "guessing"):
            if len(getattr(self, name)) not in (0, size):
                raise ValueError(f"{name} must be of {size} tasks, as accuracy_matrix is")
        return self


def parsed(text: str | bytes, finished: type[Finished]) -> dict[str, Any]:
    """The job that a text in JSON describes.

    Args:
        text: the text.
        finished: the model of a job that did not diverge.

    Raises:
        ValueError: the text describes no job; the message says why, in one line.
    """
    try:
        job = json.loads(text)
        kind = Diverged if isinstance(job, dict) and "diverged" in job else finished
        kind.model_validate(job)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise ValueError(reason) from error
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return dict(job)


def write_results(directory: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json`` completely or not at all.

    Raises:
        OSError: the file cannot be written; an existing file is then unchanged.
    """
    write_whole(directory / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(directory: Path) -> dict[str, Any] | None:
    """The results in a run's folder, ``None`` if there are none.

    Raises:
        DamagedResultsError: the file has other content; the message names it.
    """
    path = directory / RESULTS
    try:
        return parsed(path.read_bytes(), Results)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedResultsError(f"{os.path.relpath(path)} is damaged ({error}).") from error


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The results of every job of a sweep that has ended, in the order of the jobs.

    Damaged results are named in a warning and left out.
    """
    return read_sweep(folder)[0]


def read_sweep(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of a sweep's jobs, and messages on damaged ones."""
    jobs, damaged = [], []
    for job in _job_folders(folder):
        try:
            if results := read_results(job):
                jobs.append(results)
        except DamagedResultsError as error:
            _log.warning("%s It is left out.", error)
            damaged.append(str(error))
    return jobs, damaged


def noted_jobs(folder: Path) -> list[Path] | None:
    """The folders with results of the newest sweep in a folder, in the order of the jobs.

    ``None`` if no jobs are noted there.
    """
    try:
        names = (folder / JOBS).read_text(encoding="utf-8").splitlines()[1:]
    except FileNotFoundError:
        return None
    return _in_order(folder / name for name in names if (folder / name / RESULTS).exists())


def _job_folders(folder: Path) -> list[Path]:
    """The folders with results in a sweep's folder, which may be of before jobs were noted."""
    if (noted := noted_jobs(folder)) is not None:
        return noted
    return _in_order(path.parent for path in folder.glob(f"*/{RESULTS}"))


def _in_order(jobs: Iterable[Path]) -> list[Path]:
    """Job 10 comes after job 9."""
    return sorted(jobs, key=lambda job: (len(job.name), job))
