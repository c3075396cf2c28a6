"""A picture that is written completely or not at all."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from experiments.recording.files import write_whole


def write_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG file completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi)
    write_whole(path, picture.getvalue())
