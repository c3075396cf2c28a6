"""Any checkpoint file: the whole state, or the one before it, or one sentence."""

import json
import struct

import pytest
import torch
from hostile import check_clear
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ewc import DiagonalFisher
from ewc.tensor_file import read, write
from experiments.configuration.targets import ConfigurationError
from experiments.recording.checkpoints import _CONTENT, Checkpoints
from experiments.recording.folder import checkpoint_files

STATE = {
    "training": {"model": {"0.weight": torch.arange(6.0).reshape(2, 3)}, "steps": [1, 2.5, None]},
    "recorder": {"position": 0, "run": "a"},
}


def checkpoints(folder, **config):
    return Checkpoints(folder, {"seed": 0, **config}, {"torch": "1", "device": "cpu"})


def two(folder):
    """A folder with two checkpoints, and the newer one."""
    kept = checkpoints(folder)
    kept.write(0, 5, STATE)
    kept.write(1, 0, STATE)
    return kept, checkpoint_files(folder)[-1]


def assert_falls_back(kept, path, content):
    """Check that a damaged newest file gives the state of the one before, and goes."""
    path.write_bytes(content)
    state = kept.newest()
    assert (state["task"], state["step"]) == (0, 5)
    torch.testing.assert_close(state["training"]["model"], STATE["training"]["model"])
    assert not path.exists()


def test_a_flipped_byte_or_a_cut_gives_the_one_before(tmp_path, caplog):
    caplog.set_level("ERROR")
    kept, path = two(tmp_path)
    content = path.read_bytes()
    for place in range(0, len(content), 2):
        wrong = bytearray(content)
        wrong[place] ^= 1 << place % 8
        assert_falls_back(kept, path, bytes(wrong))
        assert_falls_back(kept, path, content[:place])


def test_files_of_other_kinds_give_the_one_before(tmp_path):
    kept, path = two(tmp_path)
    DiagonalFisher({"a": torch.ones(2)}, 3).save(tmp_path / "matrix")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle")
    for name in ("matrix", "plain", "pickle"):
        assert_falls_back(kept, path, (tmp_path / name).read_bytes())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_subnormal=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(JSON, st.binary(max_size=40))
@settings(max_examples=60)
def test_any_header_gives_the_one_before(tmp_path_factory, header, rest):
    kept, path = two(tmp_path_factory.mktemp("run"))
    text = json.dumps(header).encode()
    assert_falls_back(kept, path, struct.pack("<Q", len(text)) + text + rest)
    assert_falls_back(kept, path, rest)


KEYS = ["format", "config", "versions", "task", "step", "state"]


@given(st.sampled_from(KEYS), st.none() | JSON)
@settings(max_examples=60)
def test_any_description_is_refused_or_gives_the_one_before(tmp_path_factory, key, value):
    """With a checksum that fits, as that of another program."""
    kept, path = two(tmp_path_factory.mktemp("run"))
    tensors, about = read(path, _CONTENT)
    if key in ("task", "step") and type(value) is int and value >= 0:
        return
    if about[key] == value:
        return
    write(path, tensors, {**about, key: value})
    try:
        state = kept.newest()
    except ConfigurationError as error:
        check_clear(error, (ConfigurationError,))
        assert path.exists()
    else:
        assert (state["task"], state["step"]) == (0, 5)


@pytest.mark.parametrize("missing", KEYS)
def test_a_description_without_an_entry_is_refused_or_gives_the_one_before(tmp_path, missing):
    kept, path = two(tmp_path)
    tensors, about = read(path, _CONTENT)
    del about[missing]
    write(path, tensors, about)
    state = kept.newest()
    assert (state["task"], state["step"]) == (0, 5)
