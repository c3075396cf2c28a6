"""Files that are written completely or not at all, and optional files."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, also when the machine stops.

    Raises:
        OSError: the file cannot be written, with its name; an existing file is then unchanged.
    """
    unfinished = part_of(path)
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    # The file is complete; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_whole(file: BinaryIO, content: bytes | bytearray) -> None:
    """Append to a file without a buffer, completely or not at all.

    Raises:
        OSError: the file cannot be written; it then ends where it did.
    """
    end = file.seek(0, os.SEEK_END)
    written = 0
    try:
        while written < len(content):
            with memoryview(content)[written:] as rest:
                written += file.write(rest)
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def part_of(path: Path) -> Path:
    """The path of a file while it is being written."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Turn any error of an optional step into a warning.

    Args:
        what: the step, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.warning("%s: %s; the run goes on without.", what, reason)


class LogFile(logging.FileHandler):
    """A log file that is given up with a warning when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Log elsewhere only, from now on."""
        logging.getLogger().removeHandler(self)
        with only_warned(Path(self.baseFilename).name):
            _, error, _ = sys.exc_info()
            assert error is not None
            raise error

    def close(self) -> None:
        """Close the file, also where the last line cannot be written."""
        with contextlib.suppress(OSError):
            super().close()
