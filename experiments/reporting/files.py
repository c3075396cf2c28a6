"""Files that are there whole or not at all, and files that a run can do without."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, also when the machine stops.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
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
    # The file is there; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def part_of(path: Path) -> Path:
    """Where a file is written before it takes the place of an earlier one of its name."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Make a warning of any error of something that a run can do without.

    Args:
        what: what could not be done, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.warning("%s: %s; the run goes on without.", what, reason)
