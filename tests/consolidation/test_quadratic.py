"""One quadratic: its differences, its gradient in a loss, and the states it is loaded from."""

import math

import pytest
import torch
from torch import nn

from ewc import DiagonalFisher, EWCPenalty, Kronecker, fisher_information
from ewc.consolidation import Quadratic

NOWHERE = torch.zeros(2, 3, device="meta")


def penalty_and_model(tasks=1):
    model, penalty = nn.Linear(3, 2).double(), EWCPenalty(2.0)
    for _ in range(tasks):
        data = [(torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,)))]
        penalty.consolidate(fisher_information(model, data, structure=Kronecker()), model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    return penalty, model


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("factor", [-3.0, 0.0, 0.5, 1.0, 2.0])
def test_a_factor_of_the_penalty_is_one_of_its_gradient(factor, tasks):
    """A loss may scale the penalty; the matrix by brute force, column by column."""
    penalty, model = penalty_and_model(tasks)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = torch.zeros_like(theta)
    for term in penalty.terms:
        anchor = nn.utils.parameters_to_vector(term.anchor.values())
        expected += factor * 2.0 / 9 * term.precision.to_dense() @ (theta - anchor)
    (factor * penalty(model)).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_second_derivative_is_the_sum_of_all_terms():
    penalty, model = penalty_and_model(3)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(penalty(model), parameters, create_graph=True)
    v = torch.randn(8, dtype=torch.float64)
    product = torch.autograd.grad(nn.utils.parameters_to_vector(gradient) @ v, parameters)
    expected = 2.0 / 9 * sum(term.precision.to_dense() for term in penalty.terms) @ v
    torch.testing.assert_close(nn.utils.parameters_to_vector(product), expected)


def test_a_move_keeps_the_whole_function():
    """Of three diagonal tasks, whose one quadratic has a constant."""
    model, penalty = nn.Linear(3, 2), EWCPenalty(2.0)
    for size in (4, 5, 6):
        entries = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
        penalty.consolidate(DiagonalFisher(entries, size), model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    before = penalty(model).detach()
    assert penalty.terms[0].constant > 0.1
    for moved in (penalty.double(), penalty.to("cpu"), penalty.float()):
        torch.testing.assert_close(moved(model).detach(), before)
    assert math.isfinite(float(before))


def test_a_step_is_taken_in_the_wider_type_and_is_of_the_type_of_the_matrix():
    matrix = DiagonalFisher({"w": torch.ones(2, dtype=torch.float64)}, 3)
    anchor = {"w": torch.tensor([1.0, 1.0 + 2**-20])}
    here = {"w": torch.tensor([1.0, 1.0]).bfloat16()}
    step = Quadratic(matrix, anchor).step_to(here)["w"]
    torch.testing.assert_close(step, torch.tensor([0.0, -(2.0**-20)]).double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": {}}, "The anchor lacks parameter 'w'"),
        ({"anchor": {"w": torch.zeros(2, 2)}}, r"The anchor has shape \[2, 2\] for parameter 'w'"),
        (
            {"anchor": {"w": torch.zeros(2, 3, dtype=torch.long)}},
            "The anchor of 'w' must have shape",
        ),
        (
            {"anchor": {"w": NOWHERE}},
            "The anchor of 'w' must have numbers",
        ),
        ({"anchor": {"w": torch.full((2, 3), math.nan)}}, "The anchor of 'w' must be finite"),
        (
            {"precision": {"w": NOWHERE}},
            "The tensor 'w' must have numbers",
        ),
        ({"precision": {"w": -torch.ones(2, 3)}}, "of 'w' has a negative entry on its diagonal"),
        ({"constant": -1.0}, "constant must be a finite number, 0 or above, got -1"),
        ({"constant": None}, "constant must be a finite number, 0 or above, got None"),
        ({"about": {"structure": "DiagonalFisher", "names": ["w"], "num_examples": 0}}, "or more"),
    ],
)
def test_a_state_that_is_none_names_what_is_wrong(change, message):
    whole = Quadratic(DiagonalFisher({"w": torch.ones(2, 3)}, 4), {"w": torch.ones(2, 3)}, 0.5)
    same = Quadratic.from_state(whole.state())
    assert (same.constant, same.precision.num_examples) == (0.5, 4)
    torch.testing.assert_close(same.anchor, whole.anchor)
    with pytest.raises(ValueError, match=message):
        Quadratic.from_state(whole.state() | change)
