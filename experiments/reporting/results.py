"""What a run leaves in ``results.json``, written whole and checked when it is read."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.reporting.files import write_whole

_log = logging.getLogger(__name__)


class DamagedResultsError(ValueError):
    """A ``results.json`` that is not what :func:`write_results` writes."""


class _Job(BaseModel):
    """What every ``results.json`` holds."""

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    overrides: list[str]
    seed: int


class _Finished(_Job):
    """What it holds of a run that trained every task."""

    average_accuracy: float
    forgetting: float
    backward_transfer: float
    accuracy_matrix: list[list[float]]
    fisher_overlap: list[dict[str, float]] = []
    seconds: dict[str, float]
    versions: dict[str, str]


class _Diverged(_Job):
    """What it holds of one that diverged."""

    diverged: str


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
        results = json.loads(path.read_text(encoding="utf-8"))
        kind = _Diverged if isinstance(results, dict) and "diverged" in results else _Finished
        kind.model_validate(results)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{where}: {first['msg']}" if where else first["msg"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    else:
        matrix = results.get("accuracy_matrix", [[0.0]])
        if not matrix or any(len(row) != len(matrix) for row in matrix):
            raise _damaged(path, "accuracy_matrix: it has not as many columns as rows")
        if "total" not in results.get("seconds", {"total": 0.0}):
            raise _damaged(path, "seconds.total: Field required")
        return dict(results)


def _damaged(path: Path, reason: str) -> DamagedResultsError:
    return DamagedResultsError(f"{os.path.relpath(path)} is damaged ({reason}).")


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
