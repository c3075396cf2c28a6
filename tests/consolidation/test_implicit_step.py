"""The implicit step against its definition, and what it is for."""

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    EWCPenalty,
    Kronecker,
    KroneckerFisher,
    LowRank,
    Online,
    fisher_information,
)
from ewc.consolidation.implicit_step import step_sizes
from ewc.fisher.structures.block_diagonal import layer_of
from ewc.parameters import flatten

STRUCTURES = [
    Diagonal(),
    BlockDiagonal(),
    Kronecker(),
    EigenvalueCorrected(),
    Dense(),
    LowRank(),
]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data():
    return torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))


def remembered(model, structure, strength=2.0):
    """A penalty that has seen a task, and the model moved away from it."""
    penalty = EWCPenalty(strength, Online())
    penalty.consolidate(fisher_information(model, [data()], structure=structure), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return penalty


def hessian(penalty, model):
    """Of the penalty, by double differentiation."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(penalty(model), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("strength", [2.0, 1e6])
def test_the_step_is_the_minimum_of_its_definition(structure, strength):
    model = network()
    penalty = remembered(model, structure, strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.75)
    rate = 5 * 0.1 / (1 - 0.75)
    anchor = flatten(penalty.terms[0].anchor)
    before = flatten(dict(model.named_parameters())).detach()
    matrix = torch.eye(len(anchor), dtype=torch.float64) + rate * hessian(penalty, model)
    expected = anchor + torch.linalg.solve(matrix, before - anchor)
    penalty.implicit_step(model, optimizer, num_steps=5)
    found = flatten(dict(model.named_parameters())).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), weight_decay=0),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, eps=0.7),
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.7),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.01),
    ],
)
def test_step_sizes_are_what_the_optimizer_does(kind):
    """With one and the same gradient at every step: then its mean is the gradient."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = kind([parameter])
    gradient = torch.tensor([0.5, -1.5, 4.0], dtype=torch.float64)
    for _ in range(30):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    moved = before - parameter.detach()
    size = step_sizes(optimizer)[id(parameter)]
    torch.testing.assert_close(moved, size * gradient, rtol=1e-6, atol=0.0)


def test_every_entry_has_its_own_step_size_with_a_diagonal():
    model = network()
    penalty = remembered(model, Diagonal())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    sizes = step_sizes(optimizer)
    (term,) = penalty.terms
    scale = penalty.strength / 12
    expected = {
        name: term.anchor[name]
        + (parameter.detach() - term.anchor[name])
        / (1 + 3 * sizes[id(parameter)] * scale * term.precision.diagonal()[name])
        for name, parameter in model.named_parameters()
    }
    penalty.implicit_step(model, optimizer, num_steps=3)
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=repr)
@pytest.mark.parametrize("every", [1, 4])
def test_it_ends_where_the_explicit_penalty_ends(structure, every):
    """Gradient descent on a loss plus penalty, and on the loss with implicit steps."""
    ends = []
    for implicit in (False, True):
        model = network()
        torch.manual_seed(1)
        penalty = remembered(model, structure)
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(8000):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss if implicit else loss + penalty(model)).backward()
            optimizer.step()
            if implicit and (step + 1) % every == 0:
                penalty.implicit_step(model, optimizer, every)
        ends.append(float((nn.functional.cross_entropy(model(x), y) + penalty(model)).detach()))
    # Splitting the two moves the end by an amount of the order of the step size.
    assert ends[1] == pytest.approx(ends[0], abs=0.02)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_any_strength_is_stable(structure):
    model = network()
    penalty = remembered(model, structure, 1e12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = float(penalty(model).detach())
    penalty.implicit_step(model, optimizer)
    assert abs(float(penalty(model).detach())) < 1e-6 * before


def test_frozen_and_new_parameters_stay_where_they_are():
    model = network()
    penalty = remembered(model, Kronecker())
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = model[0].weight.detach().clone()
    moved = model[2].weight.detach().clone()
    penalty.implicit_step(model, optimizer)
    assert torch.equal(model[0].weight, held)
    assert not torch.equal(model[2].weight, moved)
    with pytest.raises(ValueError, match="num_steps must be a whole number, 1 or more, got 0"):
        penalty.implicit_step(model, optimizer, 0)
    assert layer_of("0.weight") == "0"


def test_sums_of_kronecker_matrices_stay_one_matrix():
    model = network()
    projected, matrices = EWCPenalty(1.0, Online()), []
    for _ in range(3):
        fisher = fisher_information(model, [data()], structure=Kronecker())
        projected.consolidate(fisher, model)
        matrices.append(fisher)
        anchor = flatten(dict(model.named_parameters())).detach()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(projected.terms[0].precision, KroneckerFisher)
    assert len(projected.terms[0].precision.state()[0]) == len(fisher.state()[0])
    step = flatten(dict(model.named_parameters())).detach() - anchor
    exact = sum(0.5 * step @ matrix.to_dense() @ step for matrix in matrices)
    ratio = float(projected(model).detach()) / float(exact)
    assert 0.8 < ratio < 1.25
    other = EWCPenalty()
    other.load_state_dict(projected.state_dict())
    assert other.consolidation == Online()
    torch.testing.assert_close(other(model), projected(model))
