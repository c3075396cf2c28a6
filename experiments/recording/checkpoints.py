"""Checkpoints of a run: one file each, of which the newest two stay.

A file holds tensors and JSON with a checksum (:mod:`ewc.tensor_file`), so reading it runs no code.
It says which configuration wrote it, and with which versions and on which device.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewc.checks import check_count, reason_of
from ewc.tensor_file import Content, joined, read, separated, write
from experiments.configuration.schema import same_outcome
from experiments.configuration.targets import ConfigurationError
from experiments.recording.folder import CHECKPOINTS, METRICS, checkpoint_files

_log = logging.getLogger(__name__)

FORMAT = 4
"""The format of the files; one of another format is refused."""

KEEP = 2
"""Checkpoints that stay: if the newest is damaged, there is one before it."""

_CONTENT = Content("checkpoint", "experiments.run", "Remove it.")

_ADVICE = (
    "choose another folder with hydra.run.dir=DIR (of a sweep hydra.sweep.dir=DIR), or remove "
    f"{CHECKPOINTS}/ to start again"
)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a run's folder.

    Attributes:
        directory: the run's folder.
        config: the configuration.
        versions: what else decides the numbers, by name: versions of packages and the device.
    """

    directory: Path
    config: Mapping[str, Any]
    versions: Mapping[str, str]

    def write(self, task: int, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, and remove all but the newest two.

        Args:
            task: the number of the task that comes next or goes on, from 0.
            step: the steps of it that are done.
            state: tensors and plain values.

        Raises:
            OSError: the checkpoint cannot be written; the earlier ones then stay.
        """
        path = self.directory / CHECKPOINTS / f"task{task:04d}-step{step:08d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors, outline = separated(state)
        about = {
            "format": FORMAT,
            "config": self.config,
            "versions": self.versions,
            "task": task,
            "step": step,
            "state": outline,
        }
        write(path, tensors, about)
        for old in checkpoint_files(self.directory)[:-KEEP]:
            old.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest whole state with its ``task`` and ``step``, ``None`` if there is none.

        A damaged checkpoint is named in a warning and removed, and the one before it is taken.

        Raises:
            ConfigurationError: a checkpoint is of another configuration, version, device or format.
            OSError: a checkpoint cannot be read.
        """
        for path in reversed(checkpoint_files(self.directory)):
            try:
                state = self._read(path)
            except ConfigurationError:
                raise
            except ValueError as error:
                _log.warning(
                    "%s The run goes on from the checkpoint before it, or else from the start.",
                    error,
                )
                path.unlink()
            else:
                return state
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        """The state in a file, with its ``task`` and ``step``.

        Raises:
            ConfigurationError: the file is of another configuration, version, device or format.
            ValueError: the file is damaged, or holds no state.
        """
        name = os.path.relpath(path)
        tensors, about = read(path, _CONTENT)
        try:
            self._check(name, about)
            place = {key: about[key] for key in ("task", "step")}
            for key, number in place.items():
                check_count(number, key, least=0)
            state = joined(tensors, about["state"])
            self._check_records(name, state["recorder"]["position"])
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{name} holds no state of a run ({reason_of(error)}).") from error
        return {**state, **place}

    def _check(self, name: str, about: Mapping[str, Any]) -> None:
        """Refuse what another program or configuration has written."""
        if about["format"] != FORMAT:
            raise ConfigurationError(
                f"{name} has format {about['format']!r}, and this version reads format {FORMAT}: "
                f"{_ADVICE}."
            )
        for what, here in self.versions.items():
            if (there := about["versions"].get(what)) != here:
                raise ConfigurationError(
                    f"{name} was written with {what} {there}, and this is {what} {here}, so the "
                    f"run would not go on exactly: {_ADVICE}."
                )
        if not same_outcome(about["config"], self.config):
            raise ConfigurationError(f"{name} is of another configuration: {_ADVICE}.")

    def _check_records(self, name: str, position: int) -> None:
        """Refuse a checkpoint whose records are lost.

        Raises:
            ValueError: ``metrics.jsonl`` ends before the checkpoint.
        """
        path = self.directory / METRICS
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            raise ValueError(
                f"{name} follows {position} bytes of records, and {METRICS} has {size}."
            )
