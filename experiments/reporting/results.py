"""What a run leaves in ``results.json``, written whole and checked when it is read."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from experiments.reporting.files import write_whole

_log = logging.getLogger(__name__)


class DamagedResultsError(ValueError):
    """A ``results.json`` that is not what :func:`write_results` writes."""


class Job(BaseModel):
    """What is known of every job that has ended."""

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    overrides: list[str]
    seed: int


class Diverged(Job):
    """What is known of a job that diverged."""

    diverged: str


class Finished(Job):
    """What tables and pictures need of a job that trained every task."""

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


class Results(Finished):
    """What ``results.json`` holds of a run that trained every task."""

    backward_transfer: float


def parsed(text: str | bytes, finished: type[Finished]) -> dict[str, Any]:
    """The job that a text in JSON describes.

    Args:
        text: the text.
        finished: what it must hold unless the job diverged.

    Raises:
        ValueError: it is something else; the message says what, in one line.
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
    """Write ``results.json`` whole or not at all.

    Raises:
        OSError: it cannot be written; an earlier one is as it was.
    """
    write_whole(directory / "results.json", json.dumps(results, indent=2) + "\n")


def read_results(directory: Path) -> dict[str, Any] | None:
    """What :func:`write_results` wrote into a run's folder, ``None`` if there is nothing.

    Raises:
        DamagedResultsError: there is something else; the message names the file.
    """
    path = directory / "results.json"
    try:
        return parsed(path.read_bytes(), Results)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedResultsError(f"{os.path.relpath(path)} is damaged ({error}).") from error


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """What every job of a sweep that has ended wrote, in the order of the jobs.

    Damaged results are named in a warning and left out.
    """
    return read_sweep(folder)[0]


def read_sweep(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of a sweep's jobs, and what is wrong with those that are damaged."""
    folders = sorted(
        (path.parent for path in folder.glob("*/results.json")), key=lambda f: (len(f.name), f)
    )
    jobs, damaged = [], []
    for job in folders:
        try:
            if results := read_results(job):
                jobs.append(results)
        except DamagedResultsError as error:
            _log.warning("%s It is left out.", error)
            damaged.append(str(error))
    return jobs, damaged
