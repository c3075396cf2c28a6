"""The records of a run in ``metrics.jsonl``, and what a picture needs of them."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from experiments.recording.curve import Curve
from experiments.recording.files import append_whole, only_warned
from experiments.recording.folder import METRICS

_log = logging.getLogger(__name__)

RETRY = 1.0
"""Seconds until records that could not be written are tried again."""


class MetricsFile:
    """Appends records to ``metrics.jsonl``.

    Once it is open, an error does not end the run but becomes a warning.  Records wait until the
    file can be written again.

    Args:
        directory: the run's directory.
        state: an earlier process's :meth:`state`, whose records are continued.  Later records of
            that process are dropped.  ``None`` to start.

    Attributes:
        curve: what a picture needs of the training steps so far.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, directory: Path, state: Mapping[str, Any] | None) -> None:
        self.curve = Curve()
        self._path = directory / METRICS
        self._writes = True
        self._again_at = 0.0
        self._waiting = bytearray()
        self._position = 0 if state is None else int(state["position"])
        # Without a buffer: what cannot be written is not tried again unasked.
        self._file = self._path.open("wb" if state is None else "r+b", buffering=0)
        if state is not None:
            self._waiting += state["waiting"].encode()
            try:
                self._read_steps()
            except BaseException:
                self._file.close()
                raise

    def add(self, record: Mapping[str, float | int]) -> None:
        """Write one record."""
        if "step" in record:
            self.curve.add(record)
        self._waiting += (json.dumps(record) + "\n").encode()
        # Record by record: an interrupted run keeps its records.
        if self._writes or time.monotonic() >= self._again_at:
            self._write()

    def close(self) -> None:
        """Write what waits and close the file; a warning says what is lost."""
        self._write()
        if lost := self._waiting.count(b"\n"):
            _log.warning("%s lacks the last %d records.", METRICS, lost)
        with only_warned(METRICS):
            self._file.close()

    def state(self) -> dict[str, Any]:
        """What is needed to go on from here, after the records have reached the disk."""
        with contextlib.suppress(OSError):  # a warning has said so
            os.fsync(self._file.fileno())
        return {"position": self._position, "waiting": self._waiting.decode()}

    def _write(self) -> None:
        """Write the waiting records; a warning says once that they wait."""
        try:
            append_whole(self._file, self._waiting)
        except OSError as error:
            if self._writes:
                _log.warning("%s: %s; records wait until it can be written.", METRICS, error)
            self._writes, self._again_at = False, time.monotonic() + RETRY
        else:
            self._position += len(self._waiting)
            self._waiting.clear()
            self._writes = True

    def _read_steps(self) -> None:
        """Read the records before the position, and drop the others."""
        self._file.truncate(self._position)
        damaged = []
        with self._path.open("rb") as file:
            for number, line in enumerate(chain(file, bytes(self._waiting).splitlines()), 1):
                try:
                    record = json.loads(line)
                    if "step" in record:
                        self.curve.add(record)
                except (ValueError, LookupError, TypeError):
                    damaged.append(number)
        if damaged:
            _log.warning(
                "%s has %d damaged lines, the first of them line %d: the curves leave them out.",
                METRICS,
                len(damaged),
                damaged[0],
            )
