"""Files of Fisher matrices: whole, or a ValueError that names them."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    FisherMatrix,
    Implicit,
    Kronecker,
    KroneckerFisher,
    LowRank,
    fisher_information,
)

STRUCTURES = {
    "diagonal": Diagonal(),
    "block_diagonal": BlockDiagonal(),
    "kronecker": Kronecker(),
    "eigenvalue_corrected": EigenvalueCorrected(),
    "low_rank": LowRank(rank=1),
    "dense": Dense(),
    "implicit": Implicit(),
}


def of_kind(kind):
    """A matrix of five parameters."""
    model = nn.Linear(2, 2, bias=False)
    data = [(torch.randn(3, 2), torch.randint(2, (3,)))]
    if kind == "sum":
        one = fisher_information(model, data, structure=Kronecker())
        return one.precision + fisher_information(model, data)
    return fisher_information(model, data, structure=STRUCTURES[kind])


@pytest.fixture(params=[*STRUCTURES, "sum"])
def saved(request, tmp_path):
    """A matrix and its file."""
    fisher, path = of_kind(request.param), tmp_path / "fisher"
    fisher.save(path)
    return fisher, path


def refused(path):
    """Whether loading ends in a ValueError, and no subclass of it, that names the file."""
    try:
        FisherMatrix.load(path)
    except ValueError as error:
        return type(error) is ValueError and repr(str(path)) in str(error)
    return False


def test_a_flipped_bit_in_any_byte_is_refused(saved):
    _, path = saved
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert refused(path)


def test_a_file_of_any_other_length_is_refused(saved):
    _, path = saved
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert refused(path)
    path.write_bytes(content + b"\0")
    assert refused(path)


def rewritten(path, change):
    """The file with another description or other tensors, and a checksum that fits."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["ewc"])
    change(about, header)
    metadata = header["__metadata__"]
    metadata["ewc"] = about if isinstance(about, str) else json.dumps(about)
    metadata["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    checksum = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content.replace(b"0" * 64, checksum))


def test_the_checksum_is_the_one_of_the_whole_file_with_zeros_for_it(saved):
    fisher, path = saved
    before = path.read_bytes()
    rewritten(path, lambda *_: None)
    loaded = FisherMatrix.load(path)
    torch.testing.assert_close(loaded.state()[0], fisher.state()[0], rtol=0, atol=0)
    assert loaded.state()[1] == fisher.state()[1]
    digest = json.loads(before[8 : 8 + struct.unpack("<Q", before[:8])[0]])["__metadata__"]
    found = hashlib.sha256(before.replace(digest["sha256"].encode(), b"0" * 64)).hexdigest()
    assert found == digest["sha256"]


def every_place(value, path=()):
    """Where the values of a description are, innermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from every_place(inner, (*path, key))
        yield (*path, key)


WRONG = [None, "x", -1, 1.5, [], {}, [2**31], {"weight": [2**31]}]


def test_descriptions_of_other_types_are_refused_or_mean_the_same(saved):
    """Also by whom the checksum was made to fit."""
    fisher, path = saved
    content = path.read_bytes()
    for place in every_place(fisher.description()[1]):
        for wrong in WRONG:

            def put(about, _header, place=place, wrong=wrong):
                at(about, place[:-1])[place[-1]] = wrong

            path.write_bytes(content)
            rewritten(path, put)
            if not refused(path):  # another factor, names as a dict's keys
                loaded = FisherMatrix.load(path)
                torch.testing.assert_close(loaded.state()[0], fisher.state()[0], rtol=0, atol=0)
                assert loaded.shapes == fisher.shapes


def at(about, place):
    for key in place:
        about = about[key]
    return about


def test_large_shapes_in_small_files_are_refused(saved):
    _, path = saved

    def enlarge(about, _header):
        for place in every_place(about):
            if isinstance(value := at(about, place), list) and value == [2, 2]:
                value[:] = [65536, 32768]

    before = path.read_bytes()
    rewritten(path, enlarge)
    if path.read_bytes() != before:
        assert len(path.read_bytes()) < 5000
        assert refused(path)

    def declare(_about, header):
        entry = next(value for key, value in header.items() if key != "__metadata__")
        entry["shape"] = [2**31]
        entry["data_offsets"] = [0, 2**33]

    path.write_bytes(before)
    rewritten(path, declare)
    assert refused(path)


def test_nests_of_brackets_are_refused(tmp_path):
    path = tmp_path / "fisher"
    of_kind("diagonal").save(path)

    def nest(_about, header):
        header["__metadata__"]["nest"] = "x"

    rewritten(path, nest)
    path.write_bytes(path.read_bytes().replace(b'"x"', b"[" * 100_000))
    assert refused(path)
    text = '{"structure":"SumFisher","num_examples":1,"terms":['
    save_file(
        {"a": torch.zeros(1)}, path, metadata={"ewc": text * 2000 + "]}" * 2000, "sha256": "0" * 64}
    )
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()))
    assert refused(path)


def test_files_without_a_checksum_are_refused(tmp_path):
    tensors, about = of_kind("diagonal").description()
    path = tmp_path / "fisher"
    save_file(tensors, path, metadata={"ewc": json.dumps(about)})
    with pytest.raises(ValueError, match="has no checksum: it is of an earlier"):
        FisherMatrix.load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "fisher"
    old, new = of_kind("diagonal"), of_kind("kronecker")
    old.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("ewc.tensor_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        new.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    new.save(path)
    assert type(FisherMatrix.load(path)) is KroneckerFisher
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        new.save(tmp_path / "missing" / "fisher")


def test_files_are_as_readable_as_others_and_links_stay_links(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "fisher")
    of_kind("diagonal").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "fisher").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    path = tmp_path / "fisher"
    fisher = of_kind("dense")
    fisher.save(path)
    loaded = FisherMatrix.load(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    torch.testing.assert_close(loaded.to_dense(), fisher.to_dense(), rtol=0, atol=0)
