"""The progress of a run on a terminal: the step, the rate, and the time left for the whole run."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

REFRESH = 0.1
"""Seconds from one change of the bar to the next; a step must not wait for it."""


class SizedBatches(Protocol):
    """Batches, and how many there are."""

    def __len__(self) -> int:
        """The number of batches."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        ...


class RunProgress(SupervisedPlugin):
    """A bar for training, the Fisher pass and the evaluation of each task.

    Nothing is shown where the console is not a terminal.  It must be the first plugin, as it says
    when training ends and what comes after a task begins.

    Args:
        console: the console of the bar.
        stream: the tasks of the run.

    Attributes:
        loss: the last recorded loss, for the bar; ``None`` before the first.
    """

    def __init__(self, console: Console, stream: Sequence[Any]) -> None:
        super().__init__()
        self.console = console
        self.stream = stream
        self.loss: float | None = None
        self._bar: Progress | None = None
        self._streams: list[tuple[Any, Any]] = []
        self._is_trained = False
        self._number = 0
        self._steps: list[int] = []
        self._steps_here, self._step_seconds = 0, 0.0
        self._tasks_here, self._other_seconds = 0, 0.0
        self._started = self._changed = 0.0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start the bar of a task."""
        if not self.console.is_terminal:
            return
        self._steps = self._steps or [strategy.num_steps(task) for task in self.stream]
        self._number = strategy.experience.current_experience
        self._is_trained = False
        self._open()
        self._show("training", 0, self._steps[self._number])
        self._started = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Move the bar by a step."""
        if self._bar:
            self._steps_here += 1
            now = time.perf_counter()
            self._step_seconds += now - self._started
            self._started = now
            if now - self._changed >= REFRESH:
                done = strategy.clock.train_exp_iterations + 1  # the clock is the last plugin
                rate = self._steps_here / self._step_seconds
                self._show("training", done, self._steps[self._number], rate)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Note the end of training; what comes next is the Fisher pass, if there is one."""
        self._is_trained = True
        self._started = time.perf_counter()

    def after_eval(self, strategy: Any, **_: Any) -> None:
        """Remove the bar, as the task is done."""
        if self._bar:
            self._tasks_here += 1
            self._other_seconds += time.perf_counter() - self._started
        self.close()

    def watched(self, batches: SizedBatches, kind: str) -> SizedBatches:
        """The batches of a pass after training, which move the bar; ``kind`` names the pass."""
        return _Watched(batches, self, kind) if self._bar and self._is_trained else batches

    def passing(self, kind: str, done: int, total: int, seconds: float) -> None:
        """Show how far a pass over a task has come."""
        if self._bar and time.perf_counter() - self._changed >= REFRESH:
            self._show(kind, done, total, done / seconds if seconds else 0.0)

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar:
            for handler, stream in self._streams:
                handler.setStream(stream)
            self._bar.stop()
            self._bar = None

    def _open(self) -> None:
        self.close()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._bar.add_task(f"task {self._number + 1}/{len(self.stream)}", total=None, note="")
        streams = (sys.stdout, sys.stderr)
        self._bar.start()
        # Lines of the log must not run into the bar: the new streams print above it.
        self._streams = [
            (handler, handler.stream)
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams
        ]
        for handler, _ in self._streams:
            handler.setStream(sys.stderr)

    def _show(self, kind: str, done: int, total: int, rate: float = 0.0) -> None:
        assert self._bar
        self._changed = time.perf_counter()
        notes = [f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"] if rate else []
        if kind == "training" and self.loss is not None:
            notes.append(f"loss {self.loss:.4f}")
        if (left := self._left(0 if self._is_trained else total - done)) is not None:
            notes.append(f"{_clock(left)} left")
        self._bar.update(
            self._bar.task_ids[0],
            description=f"task {self._number + 1}/{len(self.stream)} {kind}",
            completed=done,
            total=total,
            note="  ".join(notes),
        )

    def _left(self, steps: int) -> float | None:
        """The seconds left for the whole run; ``None`` before there is anything to go by.

        Steps last as long as those so far, and what follows a task as long as after earlier ones.

        Args:
            steps: the steps left in the present task.
        """
        if not self._steps_here:
            return None
        later = self._number + 1
        left = (steps + sum(self._steps[later:])) * self._step_seconds / self._steps_here
        if self._tasks_here:
            tasks = len(self.stream) - later
            if self._is_trained:
                spent = time.perf_counter() - self._started
                left += max(0.0, self._other_seconds / self._tasks_here - spent)
            else:
                tasks += 1
            left += tasks * self._other_seconds / self._tasks_here
        return left


class _Watched:
    """Batches that move a bar."""

    def __init__(self, batches: SizedBatches, progress: RunProgress, kind: str) -> None:
        self.batches = batches
        self.progress = progress
        self.kind = kind

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        started = time.perf_counter()
        for number, batch in enumerate(self.batches):
            passed = time.perf_counter() - started
            self.progress.passing(self.kind, number, len(self.batches), passed)
            yield batch


def _clock(seconds: float) -> str:
    """A time as ``1:05`` or ``2:03:10``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
