"""Files of Fisher matrices: safetensors, with a checksum over every byte.

The metadata of a file hold a description under ``"ewc"`` and, under ``"sha256"``, the SHA-256
of the whole file in which zeros stand for the checksum itself.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ZEROS = "0" * hashlib.sha256().digest_size * 2
"""What stands for the checksum while it is taken."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write a file: whole, or not at all.

    It is written beside its place, brought to the disk, and put there in one step.

    Args:
        path: the file, which is replaced if there is one.
        tensors: by name.
        about: what JSON can hold.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    copies = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        metadata = {"ewc": json.dumps(about), "sha256": ZEROS}
        save_file(copies, os.fspath(temporary), metadata=metadata)
        temporary.chmod(mode)  # safetensors makes a file that nobody else may read
        with temporary.open("r+b") as file:
            place = _place_of(ZEROS, _header(file))
            checksum = _checksum(file, place)
            file.seek(8 + place)
            file.write(checksum.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)!r} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _bring_to_disk(target.parent)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """What :func:`write` wrote, on the CPU.

    Raises:
        ValueError: it wrote no such file, or the file was damaged since.
        OSError: the file cannot be read.
    """
    name = repr(os.fspath(path))
    foreign = (
        f"{name} holds no Fisher matrix: only files written by FisherMatrix.save can be loaded."
    )
    with Path(path).open("rb") as file:
        try:
            header = _header(file)
            metadata = json.loads(header)["__metadata__"]
            about = json.loads(metadata["ewc"])
        # A deep nest of brackets ends in a RecursionError.
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(foreign) from error
        if "sha256" not in metadata:
            raise ValueError(
                f"{name} carries no checksum: it was written by an earlier version of this "
                "library, or is damaged; the matrix must be computed and saved again."
            )
        try:
            whole = _checksum(file, _place_of(metadata["sha256"], header)) == metadata["sha256"]
        except (TypeError, ValueError):
            whole = False
    if not whole:
        raise ValueError(f"{name} is damaged: its contents do not fit its checksum.")
    try:
        with safe_open(os.fspath(path), framework="pt") as content:
            # Copies: the tensors would else change with the file.
            return {key: content.get_tensor(key).clone() for key in content.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(foreign) from error


def _header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, which its first eight bytes give the length of.

    Raises:
        ValueError: the file is shorter.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"The header of {length} bytes does not fit into {size} bytes.")
    return file.read(length)


def _place_of(checksum: str, header: bytes) -> int:
    """Where a checksum begins in the header.

    Raises:
        ValueError: it is of another length, or not there.
    """
    if len(checksum) != len(ZEROS):
        raise ValueError(f"{checksum!r} is no checksum.")
    # Quotes inside of names and descriptions are escaped: this is nowhere else.
    key = b'"sha256":"'
    return header.index(key + checksum.encode() + b'"') + len(key)


def _checksum(file: BinaryIO, place: int) -> str:
    """The checksum of a file whose own one, at this place of the header, counts as zeros."""
    file.seek(0)
    digest = hashlib.sha256(file.read(8 + place))
    digest.update(ZEROS.encode())
    file.seek(len(ZEROS), os.SEEK_CUR)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _bring_to_disk(folder: Path) -> None:
    """Make a new name in a folder survive a loss of power, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # not on every system can a folder be opened
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
