"""Leading eigenvectors with a proved remainder, and the damped inverses made of them."""

import pytest
import torch
from torch import Tensor, nn

from ewc import (
    EigenvalueCorrected,
    Kronecker,
    MonteCarlo,
    fisher_information,
)
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices.layers.eigenvalue_corrected import (
    EigenbasisInverse,
    EigenvalueCorrectedProduct,
)
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.matrices.layers.leading import (
    FIRST_VECTORS,
    WIDTH,
    LeadingInverse,
    leading_columns,
    leading_inverse,
    leading_vectors,
)
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import flatten, unflatten


def positive(spectrum: Tensor) -> Tensor:
    """A matrix with this spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(noise).Q.to(spectrum)
    return vectors * spectrum @ vectors.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("power", [1.5, 2.5])
@pytest.mark.parametrize("count", [5, FIRST_VECTORS - 3, FIRST_VECTORS + 20])
def test_the_remainder_is_what_it_may_be(dtype: torch.dtype, power: float, count: int) -> None:
    """The dense eigenvalues of what is left lie between 0 and the bound."""
    spectrum = torch.arange(1, 241, dtype=dtype) ** -power
    matrix = positive(spectrum)
    bound = float(spectrum[count - 1 : count + 1].mean())
    vectors, values = leading_vectors(matrix, bound)
    left = torch.linalg.eigvalsh((matrix - vectors * values @ vectors.T).double())
    rounding = 10 * torch.finfo(dtype).eps
    assert -rounding <= float(left.min())
    assert float(left.max()) <= bound + rounding
    # Not by taking nearly all of them: at least as many as there must be, not many more.
    assert count <= len(values) <= 1.6 * count + 5
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=dtype))


def test_where_no_few_vectors_do_all_are_taken() -> None:
    """A flat spectrum, and a small matrix: by its eigenvectors, those above the bound."""
    for size in (WIDTH - 1, 2 * WIDTH):
        spectrum = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
        matrix = positive(spectrum)
        vectors, values = leading_vectors(matrix, 1.25)
        torch.testing.assert_close(values, spectrum[spectrum > 1.25])
        torch.testing.assert_close(matrix @ vectors, vectors * values)


def test_nothing_is_kept_of_what_is_below_the_bound() -> None:
    """A matrix that is smaller than the remainder, or 0, has no part."""
    for matrix in (torch.zeros(200, 200), 1e-3 * torch.eye(200)):
        vectors, values = leading_vectors(matrix, 0.01)
        assert vectors.shape == (200, 0)
        assert values.shape == (0,)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def seen(request: pytest.FixtureRequest) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A layer of 150 inputs, most of which vary little, before ReLU and one more layer."""
    torch.manual_seed(0)
    scale = torch.arange(1, 151, dtype=torch.float64) ** -1.0
    x, y = 3 * torch.randn(200, 150, dtype=torch.float64) * scale, torch.randint(3, (200,))
    layers = nn.Linear(150, 5, bias=request.param), nn.ReLU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double(), [(x, y)]


def dense_inverse(block: FisherMatrix, damping: float, tolerance: float) -> Tensor:
    """A damped inverse as a matrix, column by column."""
    inverse = block.damped_inverse(damping, tolerance)
    eye = torch.eye(block.num_parameters, dtype=torch.float64)
    return torch.stack([flatten(inverse(unflatten(row, block.shapes))) for row in eye], 1)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
def test_the_tolerance_bounds_every_quadratic_form(
    seen: tuple[nn.Module, list[tuple[Tensor, Tensor]]], structure: type, tolerance: float
) -> None:
    """Beside the dense damped matrix the inverse has eigenvalues from 1 to 1 + tolerance."""
    network, data = seen
    fisher = fisher_information(network, data, structure=structure)
    block = fisher.blocks[0]
    damping = 0.1 * float(block.trace())
    assert isinstance(block.damped_inverse(damping, tolerance), LeadingInverse)
    found = dense_inverse(block, damping, tolerance)
    torch.testing.assert_close(found, found.T)
    damped = block.to_dense() + damping * torch.eye(len(found), dtype=torch.float64)
    root = torch.linalg.cholesky(damped)
    ratios = torch.linalg.eigvalsh(root.T @ found @ root)
    assert float(ratios.min()) >= 1 - 1e-9
    assert 1 + 1e-3 * tolerance < float(ratios.max()) <= 1 + tolerance + 1e-9


def of_factors(block: KroneckerProduct, damping: float, tolerance: float) -> LeadingInverse | None:
    return leading_inverse(
        block.weights, block.outputs, block.inputs, damping=damping, tolerance=tolerance
    )


def test_without_tolerance_or_where_it_saves_nothing_it_is_exact(
    seen: tuple[nn.Module, list[tuple[Tensor, Tensor]]],
) -> None:
    """A damping far below all eigenvalues, or one that rounding would swallow."""
    network, data = seen
    fisher = fisher_information(network, data, estimator=MonteCarlo(1), structure=Kronecker())
    block = fisher.blocks[0]
    assert isinstance(block, KroneckerProduct)
    for damping, tolerance in ((0.1, 0.0), (1e-9, 0.1), (1e-18, 1.0)):
        assert of_factors(block, damping, tolerance) is None
        assert isinstance(block.damped_inverse(damping, tolerance), EigenbasisInverse)
    exact = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(block.num_parameters).double())
    torch.testing.assert_close(dense_inverse(block, 0.1, 0.0), exact)
    idle = KroneckerProduct(block.weights, 0 * block.outputs, block.inputs, 1)
    torch.testing.assert_close(dense_inverse(idle, 0.1, 0.1), 10 * torch.eye(len(exact)).double())
    for wrong in ((-0.1, 0.1), (0.1, -0.1), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match=r"damping must|tolerance must"):
            block.damped_inverse(*wrong)
        with pytest.raises(ValueError, match=r"damping must|tolerance must"):
            block.eigen.damped_inverse(*wrong)


def stepped(size: int, large: int) -> Tensor:
    """Some eigenvalues of 1, and the others far below what a tolerance of 1 % leaves."""
    return torch.where(torch.arange(size) < large, 1.0, 1e-9).double()


def layer(groups: int, outputs: int, inputs: int, large: int) -> KroneckerProduct:
    """A layer some of whose inputs matter, in every group."""
    weights = LayerWeights("w", None, WeightLayout(torch.Size([groups * outputs, inputs]), groups))
    left = torch.eye(outputs, dtype=torch.float64).repeat(groups, 1, 1)
    right = positive(stepped(inputs, large)).repeat(groups, 1, 1)
    return KroneckerProduct(weights, left, right, 9)


@pytest.mark.parametrize("inputs", [20, 21, 160])
@pytest.mark.parametrize("kind", ["factors", "eigenvectors"])
def test_up_to_half_of_the_columns_are_faster_than_all(inputs: int, kind: str) -> None:
    """With one more it costs as much as the whole basis, and is left out."""
    for more in (0, 1):
        block: FisherMatrix = layer(1, 2, inputs, inputs // 2 + more)
        if kind == "eigenvectors":
            assert isinstance(block, KroneckerProduct)
            block = block.eigen
        found = block.damped_inverse(0.1, 0.01)
        assert isinstance(found, EigenbasisInverse if more else LeadingInverse)
        if isinstance(found, LeadingInverse):
            assert found.inputs.shape == (inputs, inputs // 2)
        exact = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(2 * inputs).double())
        torch.testing.assert_close(dense_inverse(block, 0.1, 0.01), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["factors", "eigenvectors"])
def test_layers_in_groups_and_with_one_hot_inputs_are_exact(kind: str) -> None:
    """Their inverse is that of every group, not that of the first one for all."""
    groups = layer(2, 2, 12, 3)
    groups.outputs[1] *= 5
    one_hot = KroneckerProduct(
        layer(1, 2, 12, 3).weights, torch.eye(2).double()[None], stepped(12, 3)[None], 9
    )
    for product in (groups, one_hot):
        block = product if kind == "factors" else product.eigen
        assert isinstance(block.damped_inverse(0.1, 0.01), EigenbasisInverse)
        size = block.num_parameters
        exact = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(size).double())
        torch.testing.assert_close(dense_inverse(block, 0.1, 0.01), exact)


def test_rows_and_columns_with_an_eigenvalue_above_the_bound_are_kept() -> None:
    """Whichever row or column has one: the bound is the tolerance times the damping."""
    generator = torch.Generator().manual_seed(2)
    spectrum = 1e-6 * torch.rand(1, 6, 10, generator=generator, dtype=torch.float64)
    spectrum[0, 1, 7], spectrum[0, 4, 2], spectrum[0, 4, 9] = 0.5, 0.0101, 0.0099
    weights = LayerWeights("w", "b", WeightLayout(torch.Size([6, 9])))
    outputs, inputs = (positive_basis(size)[None] for size in (6, 10))
    block = EigenvalueCorrectedProduct(weights, outputs, inputs, spectrum, 9)
    found = leading_columns(weights, outputs, inputs, spectrum, damping=0.1, tolerance=0.1)
    assert found is not None
    torch.testing.assert_close(found.outputs, outputs[0][:, [1, 4]])
    torch.testing.assert_close(found.inputs, inputs[0][:, [2, 7]])
    kept = spectrum[0][[1, 4]][:, [2, 7]]
    torch.testing.assert_close(found.shares, kept / (kept + 0.1))
    ratios = torch.linalg.eigvals(
        (block.to_dense() + 0.1 * torch.eye(60).double()) @ dense_inverse(block, 0.1, 0.1)
    )
    assert float(ratios.real.min()) >= 1 - 1e-9
    assert 1.05 < float(ratios.real.max()) <= 1.1


def positive_basis(size: int) -> Tensor:
    return torch.linalg.eigh(positive(torch.linspace(1, 2, size).double())).eigenvectors


def test_a_right_hand_side_that_does_not_fit_is_named(
    seen: tuple[nn.Module, list[tuple[Tensor, Tensor]]],
) -> None:
    network, data = seen
    block = fisher_information(network, data, structure=Kronecker()).blocks[0]
    for tolerance in (0.5, 0.0):
        inverse = block.damped_inverse(0.1 * float(block.trace()), tolerance)
        kind = LeadingInverse if tolerance else EigenbasisInverse
        assert isinstance(inverse, kind)
        with pytest.raises(ValueError, match=r"has the unknown parameter 'other'"):
            inverse(
                {name: torch.ones(s).double() for name, s in block.shapes.items()}
                | {"other": torch.ones(1)}
            )
