"""What is kept of a recipe's jobs: ``results/RECIPE.jsonl``, one line a job.

A line holds what RESULTS.md shows of the job, and its configuration: a sweep does not run a
job again whose configuration has a line.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.configuration.schema import NO_OUTCOME, same_outcome
from experiments.reporting.results import Finished, parsed

_log = logging.getLogger(__name__)

KEYS = (*Finished.model_fields, "diverged")
"""What a line has of a job's results."""


def line_of(results: Mapping[str, Any]) -> str:
    """The line of a job: what ``results.json`` says, without what nobody reads again.

    Options that do not decide the outcome are left out, and the recipe's name.
    """
    job = {key: results[key] for key in KEYS if key in results}
    apart = ("experiment", *NO_OUTCOME)
    job["config"] = {k: value for k, value in results["config"].items() if k not in apart}
    job["overrides"] = [
        override
        for override in results["overrides"]
        if override.lstrip("+~").partition("=")[0].partition(".")[0] not in apart
    ]
    if "fisher_overlap" in job:
        job["fisher_overlap"] = job["fisher_overlap"][-1:]
    if "seconds" in job:
        job["seconds"] = {"total": job["seconds"]["total"]}
    # Within, the order stays: that of the layers means something.
    return json.dumps(dict(sorted(job.items())), separators=(",", ":")) + "\n"


def read_kept(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The jobs of a file, and what is wrong with its lines that are damaged.

    Damaged lines are named in a warning and left out.

    Raises:
        OSError: there is a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    jobs, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            jobs.append(parsed(line, Finished))
        except ValueError as error:
            message = f"Line {number} of {os.path.relpath(path)} is damaged ({error})."
            _log.warning("%s It is left out.", message)
            damaged.append(message)
    return jobs, damaged


def kept_job(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The job with this configuration, ``None`` if the file has none.

    Raises:
        OSError: there is a file that cannot be read.
    """
    jobs, _ = read_kept(path)
    return next((job for job in jobs if same_outcome(job["config"], config)), None)


def keep(path: Path, results: Mapping[str, Any]) -> None:
    """Add the line of a job, unless the file has one of the same configuration.

    Processes that add lines wait for each other.

    Raises:
        OSError: the line cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # Where a file system has no locks, a line is still written at once, at the end.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if kept_job(path, results["config"]):
            return
        file.seek(0)
        written = file.read()
        is_cut = bool(written) and not written.endswith(b"\n")  # a process died while writing
        file.write(b"\n" * is_cut + line_of(results).encode())
        file.flush()
        os.fsync(file.fileno())
