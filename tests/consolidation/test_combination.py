"""Two quadratics as one: the same function, with every term of the completed square."""

import pytest
import torch

from ewc import DiagonalFisher, Online, Separate
from ewc.consolidation import Quadratic
from ewc.consolidation.combination import completed_square

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


def quadratic(constant, examples):
    """Some entries are 0: there the function is flat."""
    entries = {name: torch.rand(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    entries["b"][0] = 0.0
    entries["a"][examples % 3] = 0.0
    anchor = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return Quadratic(DiagonalFisher(entries, examples), anchor, constant)


def value(function, theta):
    """One half of the form, and the constant, entry by entry."""
    total = function.constant
    for name, entries in function.precision.diagonal().items():
        gaps = (theta[name] - function.anchor[name]).flatten().tolist()
        weights = entries.flatten().tolist()
        total += sum(0.5 * p * gap**2 for p, gap in zip(weights, gaps, strict=True))
    return total


def test_the_completed_square_is_the_sum_of_two_functions_everywhere():
    first, second = quadratic(0.75, 3), quadratic(2.5, 7)
    both = completed_square(first, second)
    for _ in range(5):
        theta = {name: 3 * torch.randn(shape).double() for name, shape in SHAPES.items()}
        expected = value(first, theta) + value(second, theta)
        assert value(both, theta) == pytest.approx(expected, rel=1e-12)
    assert both.precision.num_examples == 10
    # At its anchor it is least: no value is lower than the constant.
    assert both.constant == pytest.approx(value(both, both.anchor), rel=1e-12)


def test_where_neither_is_curved_the_first_anchor_stays():
    first, second = quadratic(0.0, 3), quadratic(0.0, 3)
    both = completed_square(first, second)
    assert float(both.precision.diagonal()["b"][0]) == 0.0
    assert float(both.anchor["b"][0]) == float(first.anchor["b"][0])
    assert all(bool(tensor.isfinite().all()) for tensor in both.anchor.values())


def test_separate_sums_diagonals_and_online_keeps_one_around_the_last_anchor():
    terms = [quadratic(0.0, 3), quadratic(1.5, 7), quadratic(0.0, 9)]
    theta = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    together: list[Quadratic] = []
    for term in terms:
        together = Separate().consolidated(together, term)
    assert len(together) == 1
    expected = sum(value(term, theta) for term in terms)
    assert value(together[0], theta) == pytest.approx(expected, rel=1e-12)
    (last,) = Online(0.5).consolidated(terms[:1], terms[1])
    assert last.anchor is terms[1].anchor
    entries = {
        name: 0.5 * entries + terms[1].precision.diagonal()[name]
        for name, entries in terms[0].precision.diagonal().items()
    }
    torch.testing.assert_close(last.precision.diagonal(), entries)
