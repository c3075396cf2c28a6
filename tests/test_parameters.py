"""Vectors over parameters, and what importing the library brings along."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ewc.parameters import (
    check_same_shapes,
    dot,
    flatten,
    grown_shapes,
    padded,
    shapes_of,
    trainable_parameters,
    unflatten,
)


def test_flat_vectors_come_back():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    parameters = trainable_parameters(model)
    flat = flatten(parameters)
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(unflatten(flat, shapes_of(parameters)), parameters, rtol=0, atol=0)
    torch.testing.assert_close(dot(parameters, parameters), flat @ flat)


def test_frozen_parameters_do_not_take_part():
    model = nn.Linear(2, 3)
    model.weight.requires_grad_(False)
    assert list(trainable_parameters(model)) == ["bias"]


def test_growth_is_new_rows_and_nothing_else():
    old = {"a": torch.Size([2, 3]), "b": torch.Size([2])}
    new = {"a": torch.Size([4, 3]), "c": torch.Size([1])}
    assert grown_shapes(old, new) == {
        "a": torch.Size([4, 3]),
        "b": torch.Size([2]),
        "c": torch.Size([1]),
    }
    for shape in ([1, 3], [2, 4], [2, 3, 1]):
        with pytest.raises(ValueError, match=r"'a' has shape .* only rows added at the end"):
            grown_shapes(old, {"a": torch.Size(shape)})
    grown = padded({"a": torch.ones(2, 3)}, new)
    assert torch.equal(grown["a"], torch.tensor([[1.0] * 3] * 2 + [[0.0] * 3] * 2))
    assert torch.equal(grown["c"], torch.zeros(1))


def test_foreign_vectors_are_named():
    shapes = {"a": torch.Size([2])}
    with pytest.raises(ValueError, match="The step has the unknown parameter 'z'"):
        check_same_shapes(shapes | {"z": torch.Size([1])}, shapes, "The step")
    with pytest.raises(ValueError, match=r"The step has shape \[3\] for parameter 'a'"):
        check_same_shapes({"a": torch.Size([3])}, shapes, "The step")


def test_the_library_stands_alone():
    code = (
        "import sys, ewc; "
        "print([m for m in ('avalanche', 'hydra', 'wandb', 'experiments') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
