"""The signals that end a process: during training it finishes its step first."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""The exit codes by signal: Ctrl-C, the usual end of a job, and Slurm's warning before one."""

REQUEUE = signal.SIGUSR2
"""The signal after which a scheduler that handles it in this process starts the job again."""


class Stop:
    """Notes the first signal that asks the process to end (a context manager).

    A second one ends the process at once.  A signal that the process ignores stays ignored.  The
    worker of a sweep whose process has died gets no signal: it counts as hung up, ``SIGHUP``.

    Where a scheduler handles :data:`REQUEUE`, its handler is called at the end.  Such a scheduler
    sends other signals beside it, so there a second signal does not end the process at once.

    Attributes:
        signal: the first signal; ``None`` before one has come.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Catch the signals; only the main thread of a process can."""
        if threading.current_thread() is threading.main_thread():
            for number in CODES:
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    self._before[number] = before
            if callable(scheduler := signal.getsignal(REQUEUE)):
                self._before[REQUEUE] = scheduler
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the signals to whom they were before."""
        for number, before in self._before.items():
            with contextlib.suppress(TypeError):  # a handler that Python does not know
                signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal != REQUEUE:
            self.signal = signal.Signals(number)
        for each in self._before if REQUEUE not in self._before else ():
            signal.signal(each, signal.SIG_DFL)

    def asked(self) -> bool:
        """Whether the process is asked to end."""
        if self.signal is None and is_orphan():
            self.signal = signal.SIGHUP
        return self.signal is not None

    def check(self) -> None:
        """End the process if it is asked to.

        Raises:
            SystemExit: with 130 after Ctrl-C, 129 for a worker without its sweep, 143 otherwise,
                or what the scheduler's handler says.
        """
        if self.asked():
            assert self.signal is not None
            if self.signal == REQUEUE:
                self._before[REQUEUE](REQUEUE, None)
            raise SystemExit(CODES.get(self.signal, 128 + self.signal))


class AtOnce(Stop):
    """Ends the process at the first signal, where no training step can be lost.

    Attributes:
        advice: what the message says besides the signal; a sweep says how it is continued.
    """

    advice = ""

    def __enter__(self) -> Self:
        """Catch the signals, with the message of a process that is no sweep."""
        AtOnce.advice = "stopped outside of training."
        return super().__enter__()

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        logging.disable(logging.INFO)  # what imported libraries say at the end
        print(f"{signal.Signals(number).name}: {AtOnce.advice}", file=sys.stderr)
        self.check()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process also where an import has made another error of the first one."""
        super().__exit__(kind, error, trace)
        if self.signal is not None:
            raise SystemExit(CODES[self.signal]) from None


_WATCH = "end with the sweep"
"""The name of the thread that watches the sweep's process."""


def _end_with_the_sweep() -> None:
    """End this worker process, between two jobs, when the process that made it has died.

    Such a worker may wait for its next job for ever: it holds both ends of the pipe itself.  In a
    job :class:`Stop` asks for the end.
    """
    if multiprocessing.parent_process() is None or any(
        thread.name == _WATCH for thread in threading.enumerate()
    ):
        return
    threading.Thread(target=_watch, name=_WATCH, daemon=True).start()


_in_a_job = threading.Lock()
"""Held while a job runs."""


def _watch() -> None:
    while not is_orphan():
        time.sleep(1)
    with _in_a_job:
        os._exit(128 + signal.SIGHUP)


@contextlib.contextmanager
def in_job() -> Iterator[None]:
    """A job, which a worker process ends before itself."""
    _end_with_the_sweep()
    with _in_a_job:
        yield


def is_orphan() -> bool:
    """Whether this is a worker process, and the process that made it has died."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or parent.pid == os.getppid():
        return False
    try:
        os.kill(parent.pid, 0)  # some workers have a server between them and that process
    except ProcessLookupError:
        return True
    return False
