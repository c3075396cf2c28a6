"""States as tensors and JSON, and back."""

import errno
import json
import os
import stat

import pytest
import torch

from ewc.tensor_file import joined, separated, write


def test_a_state_comes_back_from_tensors_and_json():
    turned = torch.randn(3, 4, 2).permute(2, 0, 1)
    state = {
        "a/b": torch.arange(3),
        "a": {"b": torch.zeros(()), "of": [1, 2.5, None, True, "text", [turned]]},
        "none": {},
        "number": 0.1 + 0.2,
    }
    tensors, outline = separated(state)
    assert sorted(tensors) == ["a/b", "a/b'", "a/of/5/0"]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = joined(tensors, json.loads(json.dumps(outline)))
    assert list(back) == list(state)
    assert back["number"] == state["number"]
    torch.testing.assert_close(back["a"]["b"], state["a"]["b"])
    again = back["a"]["of"][5][0]
    torch.testing.assert_close(again, turned, rtol=0, atol=0)
    assert again.stride() == turned.stride()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: 2}, "must be text"),
        ({"$tensor": "a"}, "without \\$ ahead"),
        ({"a": [{1, 2}]}, "holds no set, got one at 'a/0'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        separated(state)


@pytest.mark.parametrize(
    "outline", [{"$tensor": "b"}, {"$tensor": "a", "order": [0]}, {"$tensor": []}]
)
def test_an_outline_of_other_tensors_is_refused(outline):
    with pytest.raises(ValueError, match="not those of the outline"):
        joined({"a": torch.zeros(2, 2)}, {"inside": [outline]})


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))  # /dev/full
    except PermissionError:
        pytest.skip("only root can make a device")


MAKERS = {"folder": os.mkdir, "fifo": os.mkfifo, "device": make_device}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_regular_file_is_not_replaced(kind, linked, tmp_path):
    path = special = tmp_path / kind
    MAKERS[kind](special)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(special)
    before = special.stat()
    with pytest.raises(OSError, match=f"^'{path}' is no regular file: the path must be .* file.$"):
        write(path, {"a": torch.ones(2)}, {})
    assert os.path.samestat(before, special.stat())
    assert special.stat().st_mode == before.st_mode
    assert sorted(tmp_path.iterdir()) == sorted({path, special})


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("no/such", errno.ENOENT),
        ("file/inside", errno.ENOTDIR),
        ("long" * 99, errno.ENAMETOOLONG),
    ],
)
def test_errors_name_the_path_that_was_given(place, number, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write(tmp_path / place, {"a": torch.ones(2)}, {})
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
