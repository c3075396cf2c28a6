"""The kept results of a recipe's jobs: ``results/RECIPE.jsonl``, one line per job.

A line holds what RESULTS.md shows of the job, and its configuration.  A sweep does not run a job
again if a line has its configuration.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.configuration.schema import deciding, option_of, same_outcome, sets_no_outcome
from experiments.recording.files import append_whole
from experiments.recording.results import Finished, parsed

_log = logging.getLogger(__name__)

KEYS = (*Finished.model_fields, "diverged")
"""The entries of a job's results in its line."""


def line_of(results: Mapping[str, Any]) -> str:
    """The line of a job: the entries of ``results.json`` that are read again.

    It lacks the recipe's name and the options that do not change the results.
    """
    job = {key: results[key] for key in KEYS if key in results}
    config = deciding(results["config"])
    job["config"] = {key: value for key, value in config.items() if key != "experiment"}
    job["overrides"] = [
        override
        for override in results["overrides"]
        if not sets_no_outcome(override) and option_of(override) != "experiment"
    ]
    if "fisher_overlap" in job:
        job["fisher_overlap"] = job["fisher_overlap"][-1:]
    if "seconds" in job:
        job["seconds"] = {"total": job["seconds"]["total"]}
    # Only the top level is sorted, as the order of the layers has a meaning.
    return json.dumps(dict(sorted(job.items())), separators=(",", ":")) + "\n"


def read_kept(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The jobs of a file, and messages on its damaged lines.

    Damaged lines are named in a warning and left out.

    Raises:
        OSError: the file exists but cannot be read.
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
        OSError: the file exists but cannot be read.
    """
    jobs, _ = read_kept(path)
    return next((job for job in jobs if same_outcome(job["config"], config)), None)


def varied_by(hydra_config: Any) -> list[str]:
    """The options that make the jobs of a recipe others than its own; a sweep over them is not.

    Args:
        hydra_config: Hydra's configuration of a sweep or of a job of it.
    """
    if not hydra_config.runtime.choices.get("experiment"):
        return []
    swept = hydra_config.sweeper.get("params") or {}
    return [
        override
        for override in hydra_config.overrides.task
        if not sets_no_outcome(override) and option_of(override) not in ("experiment", *swept)
    ]


def keep(path: Path, results: Mapping[str, Any]) -> None:
    """Add the line of a job, unless the file has one of the same configuration.

    Processes that add lines wait for each other.

    Raises:
        OSError: the line cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        # On a file system without locks a line is still written at once, at the end.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if kept_job(path, results["config"]):
            return
        file.seek(0)
        written = file.read()
        is_cut = bool(written) and not written.endswith(b"\n")  # a process died while writing
        append_whole(file, b"\n" * is_cut + line_of(results).encode())
        os.fsync(file.fileno())
