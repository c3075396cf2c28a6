"""Files of Fisher matrices: safetensors, with a checksum over every byte.

The metadata of a file hold a description under ``"ewc"`` and a checksum under ``"sha256"``.  The
checksum is the SHA-256 of the whole file with zeros in the place of the checksum.
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
"""What is in the place of the checksum while it is computed."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write a file completely or not at all.

    A temporary file in the same folder is written, synced to the disk and renamed.

    Args:
        path: the file; an existing one is replaced.
        tensors: the tensors by name.
        about: a description that JSON can hold.

    Raises:
        OSError: the file cannot be written; an existing file is then unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    copies = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        metadata = {"ewc": json.dumps(about), "sha256": ZEROS}
        save_file(copies, os.fspath(temporary), metadata=metadata)
        temporary.chmod(mode)  # safetensors makes a file that only its owner can read
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
    """The tensors and the description that :func:`write` wrote, on the CPU.

    Raises:
        ValueError: :func:`write` did not write this file, or it is damaged.
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
                f"{name} has no checksum: it is of an earlier version of this library, or damaged. "
                "Compute and save the matrix again."
            )
        try:
            whole = _checksum(file, _place_of(metadata["sha256"], header)) == metadata["sha256"]
        except (TypeError, ValueError):
            whole = False
    if not whole:
        raise ValueError(f"{name} is damaged: its contents do not match its checksum.")
    try:
        with safe_open(os.fspath(path), framework="pt") as content:
            # Copies: otherwise the tensors would change with the file.
            return {key: content.get_tensor(key).clone() for key in content.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(foreign) from error


def _header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, whose length is in the first eight bytes.

    Raises:
        ValueError: the file is shorter than its header.
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
        ValueError: the checksum has another length, or is not in the header.
    """
    if len(checksum) != len(ZEROS):
        raise ValueError(f"A checksum must have {len(ZEROS)} characters, got {checksum!r}.")
    # Quotes inside names and descriptions are escaped, so this text occurs once.
    key = b'"sha256":"'
    return header.index(key + checksum.encode() + b'"') + len(key)


def _checksum(file: BinaryIO, place: int) -> str:
    """The checksum of a file, with zeros in the place of the one that its header holds."""
    file.seek(0)
    digest = hashlib.sha256(file.read(8 + place))
    digest.update(ZEROS.encode())
    file.seek(len(ZEROS), os.SEEK_CUR)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _bring_to_disk(folder: Path) -> None:
    """Sync a folder, so that a new name in it survives a loss of power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open a folder
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
