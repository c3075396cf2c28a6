"""Blocks along the diagonal: their sums, what is zero in one of two matrices, and overlaps."""

import pytest
import torch

from ewc import DenseFisher, DiagonalFisher, KroneckerFisher
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices import BlockDiagonalFisher
from ewc.matrices.block_diagonal import disjoint
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.matrices.matrix import SumFisher
from ewc.parameters import flatten, unflatten

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = {
    "a.weight": torch.Size([2, 3]),
    "a.bias": torch.Size([2]),
    "norm": torch.Size([4]),
    "head": torch.Size([2, 2]),
}


def positive(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T / size


def layer(weight, bias):
    weights = LayerWeights(weight, bias, WeightLayout(SHAPES[weight]))
    _, o, i = weights.matrix_shape
    return KroneckerProduct(weights, positive(o)[None], positive(i)[None], 5)


def dense(*names):
    shapes = {name: SHAPES[name] for name in names}
    return DenseFisher(positive(sum(s.numel() for s in shapes.values())), shapes, 5)


def entries(name):
    return DiagonalFisher({name: torch.rand(SHAPES[name], dtype=torch.float64)}, 5)


def zeros(*names):
    return DiagonalFisher({n: torch.zeros(SHAPES[n], dtype=torch.float64) for n in names}, 5)


def matrix(*blocks, kind=KroneckerFisher):
    return kind(list(blocks), SHAPES, 5)


def test_a_sum_has_the_blocks_of_both_and_of_the_one_that_is_not_zero():
    """A frozen layer, or a head that is new, has zeros in one of two tasks."""
    first = matrix(layer("a.weight", "a.bias"), entries("norm"), zeros("head"))
    second = matrix(zeros("a.weight", "a.bias"), entries("norm"), layer("head", None))
    total = first + second
    assert type(total) is KroneckerFisher
    assert total.num_examples == 10
    torch.testing.assert_close(total.to_dense(), first.to_dense() + second.to_dense(), **CLOSE)
    kinds = {name: type(block) for block in total.blocks for name in block.shapes}
    assert kinds == {
        "a.weight": KroneckerProduct,
        "a.bias": KroneckerProduct,
        "norm": DiagonalFisher,
        "head": KroneckerProduct,
    }


def test_what_is_zero_in_both_stays_zero():
    first = matrix(layer("a.weight", "a.bias"), zeros("norm", "head"))
    second = matrix(zeros("a.weight", "a.bias", "norm", "head"))
    for total in (first + second, second + first):
        assert type(total) is KroneckerFisher
        assert sorted(name for block in total.blocks for name in block.shapes) == sorted(SHAPES)
        torch.testing.assert_close(total.to_dense(), first.to_dense(), **CLOSE)


def test_a_sum_of_unlike_blocks_is_exact():
    """Blocks of other parameters make it lazy; of other kinds they are added in their place."""
    first = matrix(layer("a.weight", "a.bias"), entries("norm"), layer("head", None))
    for second, kind in (
        (matrix(dense("a.weight"), dense("a.bias"), entries("norm"), dense("head")), SumFisher),
        (matrix(dense("a.weight", "a.bias", "norm"), zeros("head")), SumFisher),
        (
            matrix(
                dense("a.weight", "a.bias"), dense("norm"), dense("head"), kind=BlockDiagonalFisher
            ),
            BlockDiagonalFisher,
        ),
    ):
        for total in (first + second, second + first):
            assert type(total) is kind
            assert total.num_examples == 10
            expected = first.to_dense() + second.to_dense()
            torch.testing.assert_close(total.to_dense(), expected, **CLOSE)


def test_blocks_that_share_a_parameter_become_one_block_their_sum():
    """A weight of two layers: whatever links them is in one block, the others stay."""
    terms = [
        layer("a.weight", "a.bias"),
        dense("norm"),
        dense("a.bias", "head"),
        entries("norm"),
        dense("a.weight"),
    ]
    found = disjoint(terms, 5)
    names = [list(block.shapes) for block in found]
    assert sorted(sorted(n) for n in names) == [["a.bias", "a.weight", "head"], ["norm"]]
    assert [block.num_examples for block in found] == [5, 5]
    every = [tensor for block in found for tensor in block.state()[0].values()]
    assert {tensor.dtype for tensor in every} == {torch.float64}
    twins = [DenseFisher(t.to_dense(), t.shapes, 5).embedded(SHAPES) for t in terms]
    expected = sum(twin.to_dense() for twin in twins)
    torch.testing.assert_close(matrix(*found).to_dense(), expected, **CLOSE)
    v = unflatten(torch.randn(len(expected), dtype=torch.float64), SHAPES)
    torch.testing.assert_close(flatten(matrix(*found).matvec(v)), expected @ flatten(v), **CLOSE)
    alone = [dense("norm"), layer("head", None)]
    assert all(one is same for one, same in zip(disjoint(alone, 5), alone, strict=True))


def test_blocks_must_cover_every_parameter_once():
    with pytest.raises(ValueError, match="must be disjoint, got parameter 'norm' in two blocks"):
        matrix(layer("a.weight", "a.bias"), entries("norm"), dense("norm", "head"))
    with pytest.raises(ValueError, match="The set of blocks lacks parameter 'head'"):
        matrix(layer("a.weight", "a.bias"), entries("norm"))


def test_printing_names_the_layers_of_another_structure():
    whole = matrix(layer("a.weight", "a.bias"), dense("norm"), entries("head"))
    assert repr(whole).endswith(", exact blocks: norm, exact diagonals: head)")
    both = whole + matrix(layer("a.weight", "a.bias"), dense("norm"), entries("head"))
    assert repr(both).endswith(", exact blocks: norm, exact diagonals: head)")
    plain = matrix(layer("a.weight", "a.bias"), dense("norm", "head"))
    assert repr(plain).endswith(", exact blocks: norm, head)")
    every = matrix(layer("a.weight", "a.bias"), dense("norm", "head"), kind=BlockDiagonalFisher)
    assert "exact" not in repr(every)


def test_vectors_that_do_not_fit_are_named_before_any_block_is_used():
    fisher = matrix(layer("a.weight", "a.bias"), dense("norm"), entries("head"))
    v = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    del v["norm"]
    with pytest.raises(ValueError, match="The vector lacks parameter 'norm'"):
        fisher.matvec(v)
    for solve in (lambda v: fisher.solve(v, 0.1), fisher.damped_inverse(0.1)):
        with pytest.raises(ValueError, match="The right-hand side lacks parameter 'norm'"):
            solve(v)
