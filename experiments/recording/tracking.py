"""The records of a run, in ``metrics.jsonl`` and in Weights & Biases."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import wandb

from experiments.configuration.command_line import sentence
from experiments.configuration.targets import ConfigurationError
from experiments.recording.curve import Curve
from experiments.recording.files import append_whole, only_warned
from experiments.recording.folder import METRICS

_log = logging.getLogger(__name__)

RETRY = 1.0
"""Seconds until records that could not be written are tried again."""

_OTHER_MODES = {
    "online": "wandb.mode=offline keeps the run on disk for a later `wandb sync`",
    "offline": "wandb.mode=disabled does without W&B",
    "disabled": "W&B is not installed as it should be",
}

PATIENCE = 30.0
"""Seconds that a run waits for W&B's server, when it begins and again when it ends."""


@dataclass(frozen=True)
class WandB:
    """How a run appears in Weights & Biases.

    Attributes:
        mode: ``offline`` keeps the run on disk, ``online`` uploads it, ``disabled`` drops it.
        project: the project.
        entity: the user or team; ``None`` for the default one.
        name: the run's name; ``None`` for one made from benchmark, strategy and seed.
        group: the name of a group of runs; ``None`` for the sweep's folder, if any.
        tags: tags of the run.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "ewc"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


class Recorder:
    """Writes every record of a run to ``metrics.jsonl`` and to W&B (a context manager).

    Once it is open, an error of either does not end the run but becomes a warning.  Records wait
    until ``metrics.jsonl`` can be written again.  W&B gets no more of them.

    Args:
        directory: the run's directory.
        options: how the run appears in W&B.
        config: the resolved configuration, kept with the run.
        name: the run's name, where ``options`` has none.
        group: its group, where ``options`` has none.
        state: an earlier process's :meth:`state`, whose records are continued.  Later records of
            that process are dropped.  ``None`` to start.

    Attributes:
        curve: what a picture needs of the training steps so far.

    Raises:
        ConfigurationError: W&B cannot start.
        OSError: ``metrics.jsonl`` cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        options: WandB,
        config: Mapping[str, Any],
        name: str,
        group: str | None,
        *,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.options = options
        self.curve = Curve()
        self._writes, self._shows = True, True
        self._again_at = 0.0
        self._waiting = bytearray()
        self._is_uploaded = options.mode == "online"
        self._position = 0 if state is None else int(state["position"])
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            path = directory / METRICS
            # Without a buffer: what cannot be written is not tried again unasked.
            opened = path.open("wb" if state is None else "r+b", buffering=0)
            self._file = stack.enter_context(opened)
            if state is not None:
                self._waiting += state["waiting"].encode()
                self._read_steps()
            stack.enter_context(_staged_in(directory / "wandb"))
            begin = partial(
                wandb.init,
                project=options.project,
                entity=options.entity,
                name=options.name or name,
                group=options.group or group,
                tags=options.tags,
                job_type="train",
                id=None if state is None else state["run"],
                resume=None if state is None else "allow",
                dir=directory,
                config=dict(config),
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    save_code=False,
                    init_timeout=PATIENCE,
                    finish_timeout=PATIENCE,
                    finish_timeout_raises=True,
                ),
            )
            try:
                self.run = self._begun(begin)
            except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
                raise ConfigurationError(
                    f"wandb.mode is {options.mode!r} and W&B says: {sentence(error)} "
                    "wandb.mode=offline and wandb.mode=disabled need no account."
                ) from error
            except (wandb.errors.Error, OSError) as error:
                raise ConfigurationError(
                    f"wandb.mode is {options.mode!r} and W&B cannot begin ({sentence(error)}): "
                    f"{_OTHER_MODES[options.mode]}."
                ) from error
            # W&B drops what is logged under a smaller step than before; each kind of record
            # has its own axis instead.
            self.run.define_metric("step")
            self.run.define_metric("task")
            self.run.define_metric("train/*", step_metric="step")
            for kind in ("eval", "fisher", "drift"):
                self.run.define_metric(f"{kind}/*", step_metric="task")
            self._run_id = self.run.id  # W&B's process may end before this one
            self._closing = stack.pop_all()

    def _begun(self, begin: Callable[..., wandb.Run]) -> wandb.Run:
        """The W&B run; it is kept on disk where the server cannot be reached."""
        try:
            return begin(mode=self.options.mode)
        except wandb.errors.AuthenticationError:
            raise
        except wandb.errors.CommError as error:
            if self.options.mode != "online":
                raise
            _log.warning("W&B does not take the run (%s): it is kept on disk.", sentence(error))
            self._is_uploaded = False
            return begin(mode="offline")

    def __enter__(self) -> Self:
        """The recorder, which is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close both; the W&B run counts as failed after an error."""
        ended = False
        with self._in_wandb("the end of the W&B run"):
            self.run.finish(exit_code=0 if error is None else 1)
            ended = True
        if not ended:
            # W&B's process may be lost: the next run of a sweep gets another one.
            with contextlib.suppress(Exception):
                wandb.teardown()
        self._write()
        if lost := self._waiting.count(b"\n"):
            _log.warning("%s lacks the last %d records.", METRICS, lost)
        with only_warned(METRICS):
            self._closing.close()

    def log(self, record: Mapping[str, float | int]) -> None:
        """Write one record of scalars; it names its axis, ``step`` or ``task``."""
        if "step" in record:
            self.curve.add(record)
        self._waiting += (json.dumps(record) + "\n").encode()
        # Record by record: an interrupted run keeps its records.
        if self._writes or time.monotonic() >= self._again_at:
            self._write()
        self._show(dict(record))

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

    def state(self) -> dict[str, Any]:
        """What a recorder needs to go on from here, after the records have reached the disk."""
        with contextlib.suppress(OSError):  # a warning has said so
            os.fsync(self._file.fileno())
        waiting = self._waiting.decode()
        return {"position": self._position, "waiting": waiting, "run": self._run_id}

    def _read_steps(self) -> None:
        """Read the records before the position, and drop the others."""
        self._file.truncate(self._position)
        damaged = []
        with (self.directory / METRICS).open("rb") as file:
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

    def picture(self, name: str, path: Path) -> None:
        """Show a PNG file in the W&B run."""
        with self._in_wandb(f"{name} in W&B"):
            self.run.log({name: wandb.Image(str(path))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the W&B run."""
        with self._in_wandb(f"{name} in W&B"):
            table = wandb.Table(columns=list(columns), data=[list(r) for r in rows])
            self.run.log({name: table})

    def summary(self, values: Mapping[str, float]) -> None:
        """Set the final figures of the W&B run."""
        with self._in_wandb("the summary in W&B"):
            self.run.summary.update(dict(values))

    def _show(self, record: dict[str, Any]) -> None:
        if self._shows:
            self._shows = False
            with self._in_wandb("records in W&B"):
                self.run.log(record)
                self._shows = True

    @contextlib.contextmanager
    def _in_wandb(self, what: str) -> Iterator[None]:
        """Turn an error of W&B into a warning; the run then is not uploaded completely."""
        uploaded, self._is_uploaded = self._is_uploaded, False
        with only_warned(what):
            yield
            self._is_uploaded = uploaded

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the run later; ``None`` if there is nothing to upload."""
        if self.options.mode == "disabled" or self._is_uploaded:
            return None
        here, this = Path.cwd(), Path(self.run.dir).parent
        # A run that went on after an interruption has a folder for each of its processes.
        folders = sorted({this, *this.parent.glob(f"*run-*-{self._run_id}")})
        names = (str(f.relative_to(here) if f.is_relative_to(here) else f) for f in folders)
        return f"wandb sync {' '.join(names)}"


@contextlib.contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Make W&B put files that wait for their upload into a folder, not into the home directory.

    They then move with the run's folder to another machine, and no home directory is needed.
    """
    if "WANDB_DATA_DIR" in os.environ:  # the user's choice
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
