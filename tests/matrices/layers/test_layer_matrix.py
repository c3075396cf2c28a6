"""The matrices of one layer against their definition, entry by entry, and as the layer grows."""

import itertools

import pytest
import torch

from ewc import DenseFisher
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.parameters import flatten, unflatten

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LAYOUTS = {
    "linear": WeightLayout(torch.Size([3, 4])),
    "convolution": WeightLayout(torch.Size([3, 2, 2])),
    "transposed": WeightLayout(torch.Size([4, 3]), transposed=True),
    "transposed_convolution": WeightLayout(torch.Size([2, 3, 2]), transposed=True),
    "groups": WeightLayout(torch.Size([4, 3]), groups=2),
    "transposed_groups": WeightLayout(torch.Size([4, 3]), groups=2, transposed=True),
}
KINDS = ["kronecker", "kronecker_diagonal", "corrected", "corrected_diagonal"]


def positive(groups, size):
    root = torch.randn(groups, size, size, dtype=torch.float64)
    return root @ root.mT / size


def orthogonal(groups, size):
    return torch.linalg.qr(torch.randn(groups, size, size, dtype=torch.float64)).Q


def product(kind, layout, bias):
    weights = LayerWeights("weight", "bias" if bias else None, layout)
    g, o, i = weights.matrix_shape
    if kind.startswith("kronecker"):
        inputs = torch.rand(g, i).double() if kind.endswith("diagonal") else positive(g, i)
        return KroneckerProduct(weights, positive(g, o), inputs, 7)
    inputs = None if kind.endswith("diagonal") else orthogonal(g, i)
    spectrum = torch.rand(g, o, i, dtype=torch.float64)
    return EigenvalueCorrectedProduct(weights, orthogonal(g, o), inputs, spectrum, 7)


def of_group(block, group):
    """The entries ``[o, i, p, j]`` of a group, from the definition."""
    if isinstance(block, KroneckerProduct):
        inputs = block.inputs[group]
        inputs = inputs.diag() if inputs.dim() == 1 else inputs
        return torch.einsum("op,ij->oipj", block.outputs[group], inputs)
    rows, spectrum = block.outputs[group], block.spectrum[group]
    eye = torch.eye(spectrum.shape[1], dtype=torch.float64)
    columns = eye if block.inputs is None else block.inputs[group]
    return torch.einsum("ok,il,kl,pk,jl->oipj", rows, columns, spectrum, rows, columns)


def places(weights):
    """The flat position of the parameter at (group, output, input), by loops over the weight."""
    layout, found = weights.layout, {}
    g, o, i = layout.matrix_shape
    first, second, kernel = layout.shape[0] // g, layout.shape[1], layout.shape[2:].numel()
    for position, (row, column, k) in enumerate(
        itertools.product(range(g * first), range(second), range(kernel))
    ):
        group, inside = divmod(row, first)
        inputs, outputs = (inside, column) if layout.transposed else (column, inside)
        found[group, outputs, inputs * kernel + k] = position
    if weights.bias is not None:
        size = len(found)
        for group, output in itertools.product(range(g), range(o)):
            found[group, output, i] = size + group * o + output
    return found


def by_definition(block):
    at = places(block.weights)
    dense = torch.zeros(len(at), len(at), dtype=torch.float64)
    groups = [of_group(block, group) for group in range(block.weights.layout.groups)]
    for (group, o, i), row in at.items():
        mine = [(p, j, column) for (other, p, j), column in at.items() if other == group]
        outputs, inputs, columns = torch.tensor(mine).T
        dense[row, columns] = groups[group][o, i, outputs, inputs]
    return dense


every_layer = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_layer
@every_layout
@every_kind
def test_the_dense_matrix_is_the_definition(kind, layout, bias):
    block = product(kind, layout, bias)
    dense = by_definition(block)
    torch.testing.assert_close(block.to_dense(), dense, **CLOSE)
    torch.testing.assert_close(flatten(block.diagonal()), dense.diagonal(), **CLOSE)
    v = torch.randn(len(dense), dtype=torch.float64)
    found = flatten(block.matvec(unflatten(v, block.shapes)))
    torch.testing.assert_close(found, dense @ v, **CLOSE)
    values = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(block.eigenvalues(), values, **CLOSE)
    assert block.largest_eigenvalue() == pytest.approx(float(values[-1]))
    nothing = unflatten(v, block.shapes)
    torch.testing.assert_close(block.resolvent(nothing, {}), nothing, rtol=0, atol=0)


@every_layer
@every_layout
@every_kind
def test_shrinkage_mixes_in_the_average_over_the_outputs_of_a_group(kind, layout, bias):
    block = product(kind, layout, bias)
    at, dense = places(block.weights), by_definition(block)
    _, outputs, _ = block.weights.matrix_shape
    expected = 0.7 * dense
    for (group, o, i), row in at.items():
        for (other, p, j), column in at.items():
            if (group, o) == (other, p):
                terms = [dense[at[group, q, i], at[group, q, j]] for q in range(outputs)]
                expected[row, column] += 0.3 * sum(terms) / outputs
    torch.testing.assert_close(block.shrunk(0.3).to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
@every_layer
@every_layout
@every_kind
def test_a_layer_that_grew_has_zeros_in_its_new_rows(kind, layout, bias, rows):
    """New rows are outputs, or the inputs of a transposed weight; the kind stays where it can."""
    block = product(kind, layout, bias)
    shapes = {"weight": torch.Size([layout.shape[0] + rows * layout.groups, *layout.shape[1:]])}
    if bias:
        more = 0 if layout.transposed else rows * layout.groups
        shapes["bias"] = torch.Size([block.shapes["bias"].numel() + more])
    larger = block.embedded(shapes)
    assert larger.shapes == shapes
    assert larger.num_examples == 7
    assert type(larger) is (type(block) if layout.groups == 1 else DenseFisher)
    # An old entry keeps its index in every parameter.
    ends = torch.cumsum(torch.tensor([0, *[s.numel() for s in shapes.values()]]), 0)
    old = torch.cat(
        [end + torch.arange(s.numel()) for end, s in zip(ends, block.shapes.values(), strict=False)]
    )
    expected = torch.zeros(int(ends[-1]), int(ends[-1]), dtype=torch.float64)
    expected[old[:, None], old] = by_definition(block)
    torch.testing.assert_close(larger.to_dense(), expected, **CLOSE)
    v = torch.randn(len(expected), dtype=torch.float64)
    found = flatten(larger.solve(unflatten(v, shapes), 0.3))
    damped = expected + 0.3 * torch.eye(len(v), dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(damped, v), **CLOSE)


@every_kind
def test_another_parameter_beside_the_layer_has_zeros(kind):
    block = product(kind, LAYOUTS["linear"], bias=True)
    shapes = {"first": torch.Size([2]), **block.shapes}
    larger = block.embedded(shapes)
    expected = torch.block_diag(torch.zeros(2, 2), by_definition(block))
    torch.testing.assert_close(larger.to_dense(), expected, **CLOSE)
    assert larger.num_examples == 7
    assert block.embedded(dict(block.shapes)) is block


@every_layer
@every_layout
def test_a_layer_is_its_description(layout, bias):
    weights = LayerWeights("weight", "bias" if bias else None, layout)
    assert LayerWeights.from_description(weights.description()) == weights


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"weight": 3}, TypeError, "weight must be a name, got 3"),
        ({"weight": None}, TypeError, "weight must be a name, got None"),
        ({"bias": 3}, TypeError, "bias must be a name or None, got 3"),
        ({"transposed": 1}, TypeError, "transposed must be True or False, got 1"),
        ({"groups": 0}, ValueError, "groups must be a whole number, 1 or more, got 0"),
        ({"groups": True}, ValueError, "groups must be a whole number, 1 or more, got True"),
        ({"shape": [3, -4]}, ValueError, "size must be a whole number, 0 or more, got -4"),
        ({"shape": 12}, TypeError, "shape must be a list, got 12"),
    ],
)
def test_an_entry_of_a_description_is_checked(wrong, error, message):
    """A file may hold anything; a wrong entry must not become another layer."""
    about = LayerWeights("weight", "bias", LAYOUTS["linear"]).description()
    with pytest.raises(error, match=message):
        LayerWeights.from_description(about | wrong)


def test_a_layer_is_printed_with_what_tells_it_from_others():
    shape = torch.Size([4, 3])
    names = {
        "w": LayerWeights("w", None, WeightLayout(shape)),
        "w and b": LayerWeights("w", "b", WeightLayout(shape)),
        "w in 2 groups": LayerWeights("w", None, WeightLayout(shape, 2)),
        "w and b in 2 groups transposed": LayerWeights("w", "b", WeightLayout(shape, 2, True)),
    }
    assert {name: str(weights) for name, weights in names.items()} == {n: n for n in names}


@every_kind
def test_factors_of_other_shapes_are_refused(kind):
    block = product(kind, LAYOUTS["linear"], bias=True)
    tensors, about = block.state()
    for name, what in (
        ("outputs", r"first (factor|basis)"),
        ("inputs", r"second (factor|basis)"),
        ("spectrum", "spectrum"),
    ):
        if name in tensors:
            shape = list(tensors[name].shape)
            with pytest.raises(
                ValueError, match=rf"The {what} .*must have shape .*, got shape \[2, "
            ):
                type(block).from_state(tensors | {name: torch.ones(2, *shape[1:])}, about)
