"""Errors of approximations against loops over the entries of dense matrices."""

import math

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    Kronecker,
    fisher_information,
)
from ewc.matrices import BlockDiagonalFisher
from ewc.statistics import error_by_layer, relative_error, share_between_layers

LAYERS = {"0": range(24), "2": range(24, 39)}
"""Where the parameters of the network's layers are."""


@pytest.fixture
def matrices():
    """All structures of one network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.randn(20, 5, dtype=torch.float64), torch.zeros(20, dtype=torch.long))]
    structures = (
        BlockDiagonal(),
        Dense(),
        Diagonal(),
        EigenvalueCorrected(),
        Kronecker(),
    )
    return {s: fisher_information(model, data, structure=s) for s in structures}


def squares(matrix, rows, columns):
    return sum(float(matrix[i, j]) ** 2 for i in rows for j in columns)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EigenvalueCorrected()])
@pytest.mark.parametrize("exact", [BlockDiagonal(), Dense()])
def test_error_by_layer_is_that_of_the_entries(matrices, structure, exact):
    found = error_by_layer(matrices[structure], matrices[exact])
    off = matrices[structure].to_dense() - matrices[Dense()].to_dense()
    assert list(found) == list(LAYERS)
    for layer, places in LAYERS.items():
        whole = squares(matrices[Dense()].to_dense(), places, places)
        expected = math.sqrt(squares(off, places, places) / whole)
        assert found[layer] == pytest.approx(expected, rel=1e-10)


def test_relative_error_and_what_lies_between_layers(matrices):
    dense = matrices[Dense()].to_dense()
    off = matrices[Kronecker()].to_dense() - dense
    every = range(39)
    whole = squares(dense, every, every)
    expected = math.sqrt(squares(off, every, every) / whole)
    found = relative_error(matrices[Kronecker()], matrices[Dense()])
    assert found == pytest.approx(expected, rel=1e-10)
    between = 2 * squares(dense, LAYERS["0"], LAYERS["2"]) / whole
    share = share_between_layers(matrices[Dense()])
    assert share == pytest.approx(between, rel=1e-10)
    assert 0.01 < share < 0.99
    least = relative_error(matrices[BlockDiagonal()], matrices[Dense()])
    assert least == pytest.approx(math.sqrt(share), rel=1e-10)
    assert share_between_layers(matrices[BlockDiagonal()]) == pytest.approx(0, abs=1e-12)


def test_the_order_of_the_parameters_does_not_matter(matrices):
    exact = matrices[Dense()]
    backwards = dict(reversed(exact.shapes.items()))
    places = range(36, 39), range(24, 36), range(20, 24), range(20)
    order = [place for part in places for place in part]
    other = DenseFisher(exact.to_dense()[order][:, order], backwards, 20)
    assert error_by_layer(other, exact) == {"2": 0.0, "0": 0.0}
    assert relative_error(other, exact) == 0.0


def test_a_block_over_two_layers_is_cut():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    shapes = {"a.weight": torch.Size([2]), "b.weight": torch.Size([2])}
    dense = DenseFisher(root @ root.T, shapes, 3)
    one_block = BlockDiagonalFisher([dense], shapes, 3)
    assert error_by_layer(one_block, dense) == {"a": 0.0, "b": 0.0}
    assert share_between_layers(one_block) == share_between_layers(dense) > 0


def test_layers_without_information():
    shapes = {"a.weight": torch.Size([2]), "b.weight": torch.Size([2])}
    exact = DenseFisher(torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])), shapes, 3)
    assert error_by_layer(exact * 0.0, exact) == {"a": 1.0, "b": 0.0}
    wrong = DenseFisher(torch.eye(4), shapes, 3)
    assert error_by_layer(wrong, exact)["b"] == math.inf
    with pytest.raises(ValueError, match="must not be 0: a share"):
        share_between_layers(exact * 0.0)


def test_other_parameters_are_refused():
    one = DiagonalFisher({"a": torch.ones(2)}, 1)
    other = DiagonalFisher({"b": torch.ones(2)}, 1)
    for function in (error_by_layer, relative_error):
        with pytest.raises(ValueError, match="The approximation lacks parameter 'a'"):
            function(other, one)
