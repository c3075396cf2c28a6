"""The overlap of Fisher matrices against its definition, in closed forms and in symmetry."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from ewc import DenseFisher, DiagonalFisher, fisher_information
from ewc.statistics import fisher_overlap, fisher_overlap_by_layer


def frechet_overlap(a, b):
    """One minus the distance of the two matrices at unit trace, as the paper writes it."""
    a, b = a / a.trace(), b / b.trace()
    return 1 - 0.5 * (a + b - 2 * sqrtm(a @ b).real).trace()


def random_matrix(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, rank, generator=generator, dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("ranks", [(6, 6), (6, 2)])
def test_dense_overlap_is_that_of_the_definition(ranks):
    a, b = random_matrix(0, ranks[0]), random_matrix(1, ranks[1])
    shapes = {"w": torch.Size([6])}
    first, second = DenseFisher(a, shapes, 5), DenseFisher(3 * b, shapes, 9)
    expected = frechet_overlap(a.numpy(), b.numpy())
    # The root of a singular product is ill-conditioned in the oracle.
    assert fisher_overlap(first, second) == pytest.approx(expected, abs=1e-7)
    assert fisher_overlap(second, first) == pytest.approx(expected, abs=1e-7)


def test_overlap_of_two_directions_is_their_cosine():
    u, v = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 3.0, -4.0])
    shapes = {"w": torch.Size([3])}
    first, second = (DenseFisher(torch.outer(d, d), shapes, 1) for d in (u, v))
    assert fisher_overlap(first, second) == pytest.approx(2 / 15, abs=1e-6)


def test_diagonal_overlap_in_closed_form():
    first = DiagonalFisher({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.0])}, 4)
    second = DiagonalFisher({"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([6.0])}, 7)
    assert fisher_overlap(first, second) == pytest.approx(math.sqrt(1 / 4 * 2 / 8))
    assert fisher_overlap(first, first) == pytest.approx(1.0)


def test_overlap_by_layer_scales_every_layer_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    y = torch.zeros(20, dtype=torch.long)
    first = fisher_information(model, [(x, y)])
    second = fisher_information(model, [(x.flip(1) * 2, y)])
    found = fisher_overlap_by_layer(first, second)
    assert list(found) == ["0", "2"]
    for layer, overlap in found.items():
        one, two = (
            torch.cat([m.diagonal()[f"{layer}.{n}"].flatten() for n in ("weight", "bias")])
            for m in (first, second)
        )
        expected = frechet_overlap(torch.diag(one).numpy(), torch.diag(two).numpy())
        assert 0 < expected < 1
        assert overlap == pytest.approx(expected, abs=1e-9)


def test_a_layer_of_no_information_is_left_out():
    some = DiagonalFisher({"a.w": torch.ones(2), "b.w": torch.ones(2)}, 1)
    none = DiagonalFisher({"a.w": torch.ones(2), "b.w": torch.zeros(2)}, 1)
    assert list(fisher_overlap_by_layer(some, none)) == ["a"]


def test_overlap_refuses_other_parameters_and_nothing():
    one = DiagonalFisher({"a": torch.ones(2)}, 1)
    with pytest.raises(ValueError, match="lacks parameter 'a'"):
        fisher_overlap(one, DiagonalFisher({"b": torch.ones(2)}, 1))
    with pytest.raises(ValueError, match="is zero"):
        fisher_overlap(one, DiagonalFisher({"a": torch.zeros(2)}, 1))
