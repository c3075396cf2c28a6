"""Convolutions without unfolding, against unfolded inputs."""

from itertools import product

import pytest
import torch
from torch.nn import functional

from ewc.linalg.patches import Grid, add_patch_gram, add_patch_squares

GRIDS = [
    Grid(kernel, padding, dilation, (6, 7, 4)[:dims])
    for dims in (1, 2, 3)
    for kernel in product((1, 3), repeat=dims)
    for padding in product((0, 2), repeat=dims)
    for dilation in ((1, 1, 1)[:dims], (2, 1, 1)[:dims], (1, 2, 1)[:dims])
    if min(Grid(kernel, padding, dilation, (6, 7, 4)[:dims]).outputs) > 0
]
# Some or all entries of the kernel see nothing but the zeros around the map.
GRIDS += [
    grid
    for sizes in ((1,), (2,), (1, 1), (1, 3), (2, 1), (1, 2, 1))
    for kernel in product((2, 5), repeat=len(sizes))
    for padding in product((0, 1, 3), repeat=len(sizes))
    for dilation in {(1,) * len(sizes), (3, 1, 1)[: len(sizes)]}
    if min((grid := Grid(kernel, padding, dilation, sizes)).outputs) > 0
]


def unfolded(x, grid):
    """What the kernel sees: [n, positions, c k]."""
    around = [pad for p in reversed(grid.padding) for pad in (p, p)]
    padded = functional.pad(x, around)
    seen = []
    for entry in product(*map(range, grid.kernel)):
        corner = [e * d for e, d in zip(entry, grid.dilation, strict=True)]
        box = [slice(c, c + t) for c, t in zip(corner, grid.outputs, strict=True)]
        seen.append(padded[(slice(None), slice(None), *box)].flatten(2))
    return torch.stack(seen, 2).flatten(1, 2).transpose(1, 2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_second_moments_are_those_of_unfolded_inputs(grid):
    x = torch.randn(2, 3, *grid.sizes, dtype=torch.float64)
    rows = unfolded(x, grid).flatten(0, 1)
    want = 1.0 + 0.5 * rows.T @ rows
    found = torch.ones_like(want)
    add_patch_gram(found, x, grid, 0.5)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_squared_gradients_are_those_of_unfolded_inputs(grid):
    x = torch.randn(2, 3, *grid.sizes, dtype=torch.float64)
    g = torch.randn(2, 2, 4, *grid.outputs, dtype=torch.float64)
    gradients = torch.einsum("knop,npi->knoi", g.flatten(3), unfolded(x, grid))
    want = 1.0 + gradients.square().sum((0, 1))
    found = torch.ones_like(want)
    add_patch_squares(found, x, g, grid)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_multiplications_of_lags():
    # Of a large image the border is nothing: 13 lags in place of 45 products of offsets.
    assert Grid((3, 3), (1, 1), (1, 1), (400, 400)).share() == pytest.approx(13 / 45, rel=0.02)
    # One entry has one lag, as one product.
    assert Grid((1, 1), (0, 0), (1, 1), (5, 5)).share() == 1.0
    assert all(grid.share() >= 0 for grid in GRIDS)
