"""Files that are written completely or not at all, and optional files."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a text file completely or not at all, also when the machine stops.

    Raises:
        OSError: the file cannot be written; an existing file is then unchanged.
    """
    unfinished = part_of(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    # The file is complete; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
