"""States as tensors and JSON, and back."""

import json

import pytest
import torch

from ewc.tensor_file import joined, separated


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
