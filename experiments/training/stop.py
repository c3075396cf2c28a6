"""The signals that end a run: it finishes its step first."""

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""The exit codes by signal: Ctrl-C, the usual end of a job, and Slurm's warning before one."""


class Stop:
    """Notes the first signal that asks the process to end (a context manager).

    A second one ends the process at once.  A signal that the process ignores stays ignored.

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
        self.signal = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """End the process if a signal has come.

        Raises:
            SystemExit: with 130 after Ctrl-C, and 143 after the others.
        """
        if self.signal is not None:
            raise SystemExit(CODES[self.signal])
