"""The four files of MNIST: verified byte for byte, and downloaded if missing."""

import gzip
import hashlib
import io
import logging
import math
import os
import urllib.request
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

MAGIC = b"\0\0\x08"
"""The first bytes of a file in the IDX format with unsigned bytes."""


class DamagedFileError(ValueError):
    """A file exists but has other content than it should, or cannot be read."""


@dataclass(frozen=True)
class IdxFile:
    """A file in the IDX format: magic, number of dimensions, sizes, then the values.

    Attributes:
        name: the name of the uncompressed file; that of a compressed one ends in ``.gz``.
        shape: the shape of the array.
        sha256: the checksum of the uncompressed file.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The bytes before the values."""
        sizes = b"".join(size.to_bytes(4, "big") for size in self.shape)
        return MAGIC + bytes([len(self.shape)]) + sizes

    def array(self, content: bytes, is_compressed: bool) -> NDArray[np.uint8]:
        """The array in a file's content.

        Raises:
            DamagedFileError: the content is not what it should be; the message is the reason.
        """
        size = len(self.header) + math.prod(self.shape)
        if is_compressed:
            try:
                with gzip.open(io.BytesIO(content)) as file:
                    content = file.read(size + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise DamagedFileError(f"it cannot be decompressed ({error})") from error
        if len(content) != size:
            number = "more" if len(content) > size else str(len(content))
            raise DamagedFileError(f"it has {number} bytes, not {size}")
        if not content.startswith(self.header):
            begin = content[: len(self.header)].hex()
            raise DamagedFileError(f"its header is {begin}, not {self.header.hex()}")
        if (checksum := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise DamagedFileError(f"its SHA-256 is {checksum}, not {self.sha256}")
        values = np.frombuffer(content, np.uint8, offset=len(self.header))
        return values.reshape(self.shape).copy()


MNIST_FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)


def read_files(
    folder: Path, files: Sequence[IdxFile] = MNIST_FILES, mirrors: Sequence[str] | None = None
) -> list[NDArray[np.uint8]]:
    """The arrays of all files; missing files are downloaded into the folder.

    A file is complete and verified before it gets its name.  Other files are not touched.

    Args:
        folder: the folder of the files, compressed or not.
        files: the files, with their shapes and checksums.
        mirrors: addresses to which a file's name is appended; ``None`` for torchvision's.

    Raises:
        DamagedFileError: a file is damaged or cannot be read.
        FileNotFoundError: a file is missing and cannot be downloaded or written.
    """
    # Existing files are verified before anything is downloaded.
    present = {file: _read(folder, file) for file in files}
    arrays = []
    for file in files:
        array = present[file]
        arrays.append(_download(folder, file, mirrors) if array is None else array)
    return arrays


def _read(folder: Path, file: IdxFile) -> NDArray[np.uint8] | None:
    """The array of a file, ``None`` if it is missing."""
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise DamagedFileError(f"{path} is no regular file: put the original file there.")
        try:
            return file.array(path.read_bytes(), path.suffix == ".gz")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DamagedFileError(
                f"{path} cannot be read ({error.strerror}): make it readable, or name another "
                "folder with data_root=DIR."
            ) from error
        except DamagedFileError as reason:
            raise DamagedFileError(
                f"{path} is damaged, {reason}: put the original file of MNIST there, or remove "
                "this one and it is downloaded again."
            ) from reason
    return None


def _download(folder: Path, file: IdxFile, mirrors: Sequence[str] | None) -> NDArray[np.uint8]:
    """Download a file, and keep it if its content is right."""
    if mirrors is None:
        from torchvision.datasets import MNIST

        mirrors = MNIST.mirrors
    reasons = []
    for mirror in mirrors:
        address = f"{mirror}{file.name}.gz"
        _log.info("downloading %s", address)
        try:
            # The addresses are torchvision's own, never a configuration's.
            with urllib.request.urlopen(address, timeout=20) as response:  # noqa: S310
                array = file.array(response.read(), is_compressed=True)
        except (OSError, HTTPException, DamagedFileError) as error:
            reasons.append(f"{address}: {error}")
            continue
        _keep(folder / file.name, file.header + array.tobytes())
        return array
    raise FileNotFoundError(
        f"{file.name} of MNIST is not in {folder} and could not be downloaded "
        f"({'; '.join(reasons)}): put it there or name another folder with data_root=DIR; "
        "benchmark=split_digits and permuted_digits need no download."
    )


def _keep(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} of MNIST was downloaded but cannot be written ({error.strerror}): make its "
            "folder writable, or name another one with data_root=DIR."
        ) from error
