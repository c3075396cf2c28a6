"""Files of tensors and plain values: safetensors and JSON, with a checksum over every byte.

Reading one runs no code, unlike pickle.  The metadata of a file hold a description under ``"ewc"``
and a checksum under ``"sha256"``.  The checksum is the SHA-256 of the whole file with zeros in the
place of the checksum.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ewc.checks import check_has_numbers, reason_of


@dataclass(frozen=True)
class Content:
    """What a kind of file holds, for messages.

    Attributes:
        noun: what it holds, such as "Fisher matrix".
        writer: what writes it.
        remedy: a sentence on what to do where a file is too old.
    """

    noun: str
    writer: str
    remedy: str


ZEROS = "0" * hashlib.sha256().digest_size * 2
"""What is in the place of the checksum while it is computed."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write a file completely or not at all.

    A temporary file in the same folder is written, synced to the disk and renamed.

    Args:
        path: the file; an existing regular file is replaced.
        tensors: the tensors by name.
        about: a description that JSON can hold.

    Raises:
        OSError: the file cannot be written, with its name, or ``path`` is a folder, a device or
            something else that is no regular file.  What is at ``path`` is then unchanged.
        ValueError: a tensor is on the device ``meta``.
    """
    for key, value in tensors.items():
        check_has_numbers(value, f"The tensor {key!r}")
    name = os.fspath(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        _check_replaceable(target, name)
        copies = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
        try:
            _write_whole(temporary, copies, about)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except SafetensorError as error:
        raise OSError(f"{name!r} could not be written: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, name) from error
    _bring_to_disk(target.parent)


def _check_replaceable(target: Path, name: str) -> None:
    """Check that a path is new or a regular file; a file renamed to a device would replace it.

    Raises:
        OSError: it is something else.
    """
    if target.exists() and not target.is_file():
        raise OSError(f"{name!r} is no regular file: the path must be that of a file.")


def _write_whole(path: Path, tensors: dict[str, Tensor], about: Any) -> None:
    """Write a new file and sync it to the disk."""
    with path.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file(tensors, os.fspath(path), metadata={"ewc": json.dumps(about), "sha256": ZEROS})
    path.chmod(mode)  # safetensors makes a file that only its owner can read
    with path.open("r+b") as file:
        place = _place_of(ZEROS, _header(file))
        checksum = _checksum(file, place)
        file.seek(8 + place)
        file.write(checksum.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str], content: Content) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the description that :func:`write` wrote, on the CPU.

    Args:
        path: the file.
        content: what the file should hold, for the messages.

    Raises:
        ValueError: :func:`write` did not write this file, or it is damaged.
        OSError: the file cannot be read.
    """
    name = repr(os.fspath(path))
    foreign = (
        f"{name} holds no {content.noun}: only files written by {content.writer} can be loaded."
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
                f"{content.remedy}"
            )
        try:
            whole = _checksum(file, _place_of(metadata["sha256"], header)) == metadata["sha256"]
        except (TypeError, ValueError):
            whole = False
    if not whole:
        raise ValueError(f"{name} is damaged: its contents do not match its checksum.")
    try:
        with safe_open(os.fspath(path), framework="pt") as stored:
            # Copies: otherwise the tensors would change with the file.
            return {key: stored.get_tensor(key).clone() for key in stored.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(foreign) from error


def separated(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A state as tensors for :func:`write`, and an outline of the rest that JSON can hold.

    In the outline ``{"$tensor": name}`` is in the place of a tensor.  A tensor has the name of its
    place, such as ``model/0.weight``.  The order of its dimensions in memory is kept, as the
    rounding of products depends on it.

    Args:
        state: dictionaries with text as keys, lists, tuples (which become lists), text, numbers,
            booleans, ``None`` and tensors, nested as one likes.

    Raises:
        TypeError: something else is in the state.
    """
    tensors: dict[str, Tensor] = {}

    def outline(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            name = place
            while name in tensors:  # a name may hold a slash itself
                name += "'"
            strides = value.stride()
            order = sorted(range(value.dim()), key=lambda k: (-strides[k], k))
            tensors[name] = value.detach().permute(order)
            moved = {} if order == sorted(order) else {"order": order}
            return {"$tensor": name, **moved}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or key.startswith("$"):
                    raise TypeError(f"A key of a state must be text without $ ahead, got {key!r}.")
            ahead = f"{place}/" if place else ""
            return {key: outline(inner, f"{ahead}{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [outline(inner, f"{place}/{index}") for index, inner in enumerate(value)]
        if value is None or isinstance(value, str | int | float):
            return value
        raise TypeError(f"A state holds no {type(value).__name__}, got one at {place!r}.")

    if not isinstance(state, Mapping):
        raise TypeError(f"A state must be a dictionary, got {type(state).__name__}.")
    return tensors, outline(state, "")


def joined(tensors: Mapping[str, Tensor], outline: Any) -> Any:
    """The inverse of :func:`separated`.

    Raises:
        ValueError: the tensors are not those of the outline.
    """
    try:
        return _joined(tensors, outline)
    except (LookupError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The tensors are not those of the outline ({reason_of(error)})."
        ) from error


def _joined(tensors: Mapping[str, Tensor], outline: Any) -> Any:
    if isinstance(outline, list):
        return [_joined(tensors, inner) for inner in outline]
    if not isinstance(outline, dict):
        return outline
    if "$tensor" not in outline:
        return {key: _joined(tensors, inner) for key, inner in outline.items()}
    tensor = tensors[outline["$tensor"]]
    order = outline.get("order")
    return tensor if order is None else tensor.permute([order.index(k) for k in range(len(order))])


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
