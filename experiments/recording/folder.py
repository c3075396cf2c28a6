"""A run's folder: one process at a time and one configuration.

``run.json`` names the process that runs in the folder, or ran there last, and its configuration.
A process holds a lock on the file while it runs.  The operating system releases the lock when the
process ends, for whatever reason.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.configuration.schema import deciding, same_outcome
from experiments.configuration.targets import ConfigurationError
from experiments.recording.files import part_of
from experiments.recording.results import RESULTS, DamagedResultsError, read_results

_log = logging.getLogger(__name__)

OWNER = "run.json"

METRICS = "metrics.jsonl"

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a run's folder."""

PICTURES = ("accuracy_matrix", "learning_curves")
"""Names of the pictures of a run, PNG files."""

_EARLIER = (f"{CHECKPOINTS}/model.safetensors", f"{CHECKPOINTS}/penalty.pt")
"""The files of earlier versions, from which a run cannot go on."""

_RECORDS = (METRICS, *_EARLIER)

IN_USE = "is in use by"
"""What the message of a folder says that another process has locked."""

_LEFT = (*_RECORDS, *(f"{name}.png" for name in PICTURES), "config.yaml", RESULTS)
"""The files of a run in its folder, besides checkpoints, ``run.json``, its log and W&B's files."""

_OPTIONS = "hydra.run.dir=DIR (of a sweep hydra.sweep.dir=DIR)"


def checkpoint_files(directory: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    return sorted((directory / CHECKPOINTS).glob("task*-step*.safetensors"))


def finished(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of a run with this configuration, ``None`` if it has not been run yet.

    Nothing is written.  Damaged results are named in a warning and count as missing.

    Raises:
        ConfigurationError: another process runs in the folder, or it holds a run of another
            configuration, finished or not.
    """
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(directory / OWNER, os.O_RDONLY)
        try:
            _lock(descriptor, fcntl.LOCK_SH, directory)
        finally:
            os.close(descriptor)
    return _results_of_same(directory, config)


@contextlib.contextmanager
def owned(
    directory: Path, config: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Iterator[dict[str, Any] | None]:
    """Lock a run's folder, and remove the files of an earlier run that left no checkpoint.

    Args:
        directory: the folder.
        config: the configuration of the run.
        overrides: the options of the command line that led to it.

    Yields:
        The results of the run if another process has finished it meanwhile, else ``None``.

    Raises:
        ConfigurationError: another process runs in the folder, or it holds a run of another
            configuration.
        OSError: the folder cannot be written.
    """
    descriptor = os.open(directory / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, fcntl.LOCK_EX, directory)
        if results := _results_of_same(directory, config):
            yield results
            return
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "overrides": list(overrides),
            "config": config,
        }
        content = (json.dumps(owner, indent=2) + "\n").encode()
        before = os.fstat(descriptor).st_size
        try:
            # In place, as the lock is the file's, and in one piece: a longer file gets spaces.
            os.pwrite(descriptor, content.ljust(before), 0)
            os.fsync(descriptor)
        except OSError:
            if not before:
                (directory / OWNER).unlink()
            raise
        if not checkpoint_files(directory):
            if before:
                _log.info("there is no checkpoint of an earlier process: the run begins again")
            for name in _LEFT:
                for path in (directory / name, part_of(directory / name)):
                    path.unlink(missing_ok=True)
        for path in (directory / CHECKPOINTS).glob(".*.tmp"):  # of an interrupted write
            path.unlink(missing_ok=True)
        yield None
    finally:
        os.close(descriptor)  # this releases the lock


def _lock(descriptor: int, kind: int, directory: Path) -> None:
    """Lock ``run.json`` without waiting; ``kind`` is ``LOCK_EX``, or ``LOCK_SH`` to read."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = read_owner(directory)
        holder = "another process"
        if owner.keys() >= {"pid", "host", "started"}:
            holder = f"process {owner['pid']} on {owner['host']} since {owner['started']}"
        raise ConfigurationError(
            f"{os.path.relpath(directory)} {IN_USE} {holder}: wait for its end, or choose "
            f"another folder with {_OPTIONS}."
        ) from error
    except OSError as error:
        _log.warning(
            "%s cannot be locked (%s): nothing but care keeps other runs out of it.",
            os.path.relpath(directory),
            error.strerror,
        )


def _results_of_same(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's results; an error if a file in it is of another configuration."""
    results, damaged = None, None
    try:
        results = read_results(directory)
    except DamagedResultsError as error:
        damaged = error
    known = _configurations(directory)
    if results:
        known.append(results["config"])
    run = f"{os.path.relpath(directory)} holds {'a finished' if results else 'an unfinished'} run"
    advice = f"choose another folder with {_OPTIONS}, or remove this one"
    for other in known:
        if not same_outcome(other, config):
            difference = _difference(deciding(other), deciding(config))
            raise ConfigurationError(f"{run} of another configuration{difference}: {advice}.")
    records = [*checkpoint_files(directory), *(directory / name for name in _RECORDS)]
    if not known and any(path.exists() for path in records):
        raise ConfigurationError(f"{run} and does not say of which configuration: {advice}.")
    if damaged:
        _log.warning("%s The run starts again.", damaged)
    return results


def _configurations(directory: Path) -> list[dict[str, Any]]:
    """The configurations in the folder, without that of its results.

    Runs of earlier versions have Hydra's file instead of ``run.json``.
    """
    configs = [read_owner(directory).get("config")]
    for name in ("config.yaml", ".hydra/config.yaml"):
        with contextlib.suppress(Exception):  # a file that cannot be read is not that of a run
            configs.append(OmegaConf.to_container(OmegaConf.load(directory / name), resolve=True))
    return [config for config in configs if isinstance(config, dict) and config]


def read_owner(directory: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty if it is missing or damaged."""
    try:
        owner = json.loads((directory / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _difference(other: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> str:
    """The first option with different values, in brackets; empty if there is none."""
    for name, value in other.items():
        if name not in here or value == here[name]:
            continue
        option = f"{path}.{name}" if path else name
        if not (isinstance(value, Mapping) and isinstance(here[name], Mapping)):
            return f" ({option} is {value!r} there and {here[name]!r} here)"
        if deeper := _difference(value, here[name], option):
            return deeper
    return ""
