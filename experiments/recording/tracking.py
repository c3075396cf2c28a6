"""The records of a run, in ``metrics.jsonl`` and in Weights & Biases."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.recording.curve import Curve
from experiments.recording.label import Label
from experiments.recording.metrics_file import MetricsFile
from experiments.recording.wandb_run import WandB, WandBRun


class Recorder:
    """Writes every record of a run to ``metrics.jsonl`` and to W&B (a context manager).

    Once it is open, an error of either does not end the run but becomes a warning.  W&B then gets
    no more records.

    Args:
        directory: the run's directory.
        options: how the run appears in W&B.
        config: the resolved configuration, kept with the run.
        label: what the run is called.
        state: an earlier process's :meth:`state`, whose records are continued.  Later records of
            that process are dropped.  ``None`` to start.

    Raises:
        ConfigurationError: W&B cannot start.
        OSError: ``metrics.jsonl`` cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        options: WandB,
        config: Mapping[str, Any],
        label: Label,
        *,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = MetricsFile(directory, state)
        try:
            run = None if state is None else state["run"]
            self._run = WandBRun(directory, options, config, label, run)
        except BaseException:
            self._file.close()
            raise

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
        self._run.finish(error)
        self._file.close()

    @property
    def curve(self) -> Curve:
        """What a picture needs of the training steps so far."""
        return self._file.curve

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the run later; ``None`` if there is nothing to upload."""
        return self._run.sync_command

    def log(
        self,
        record: Mapping[str, float | int],
        *,
        hidden: Mapping[str, float] | None = None,
        shown: Mapping[str, float] | None = None,
    ) -> None:
        """Write one record of scalars.

        Args:
            record: what both get; it names its axis, ``step`` or ``task``.
            hidden: what has no panel of its own in W&B.
            shown: what W&B has besides, such as times: ``metrics.jsonl`` is the same each time.
        """
        hidden = hidden or {}
        self._file.add({**record, **hidden})
        self._run.log({**record, **hidden, **(shown or {})}, hidden)

    def state(self) -> dict[str, Any]:
        """What a recorder needs to go on from here, after the records have reached the disk."""
        return {**self._file.state(), "run": self._run.id}

    def picture(self, name: str, path: Path) -> None:
        """Show a PNG file in the W&B run."""
        self._run.picture(name, path)

    def page(self, name: str, html: str) -> None:
        """Show a piece of HTML in the W&B run."""
        self._run.page(name, html)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the W&B run."""
        self._run.table(name, columns, rows)

    def artifact(self, kind: str, task: int, write: Callable[[Path], object]) -> None:
        """Keep a file with the W&B run, unless its artifacts take too much (:class:`WandB`).

        Args:
            kind: what it is, such as ``model``: name and type of the artifact.
            task: the number of the task after which it was made, from 0.
            write: writes the file.
        """
        self._run.artifact(kind, task, write)

    def summary(self, values: Mapping[str, float]) -> None:
        """Set the final figures of the W&B run."""
        self._run.summary(values)
