"""The limit of gradient descent on the penalty, against steps of torch's own optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    EWCPenalty,
    Implicit,
    Kronecker,
    LowRank,
    Online,
    Separate,
    fisher_information,
)

STRUCTURES = [
    Diagonal(),
    BlockDiagonal(),
    Kronecker(),
    EigenvalueCorrected(),
    LowRank(rank=5),
    Dense(),
    Implicit(),
]
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5, "dampening": 0.3},
    {"dampening": 0.3},  # counts only beside momentum
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.5},
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(3, (30,), generator=generator))]


def consolidated(model, structure, consolidation, tasks=2):
    penalty = EWCPenalty(3.0, consolidation)
    for seed in range(tasks):
        penalty.consolidate(fisher_information(model, data(seed), structure=structure), model)
    return penalty


def hessian(penalty, model):
    """Column by column from the penalty's gradient, which is linear."""
    parameters = list(model.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    columns = []
    for unit in torch.eye(len(flat), dtype=flat.dtype):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(flat + unit, moved.parameters())
        gradient = torch.autograd.grad(penalty(moved), list(moved.parameters()))
        columns.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(columns)


@pytest.mark.parametrize("consolidation", [Separate(), Online()])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: type(s).__name__)
def test_the_product_is_that_of_the_largest_eigenvalue(structure, consolidation):
    model = network()
    penalty = consolidated(model, structure, consolidation)
    largest = float(torch.linalg.eigvalsh(hessian(penalty, model)).max())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.1 * 2 / largest)
    product = penalty.stiffness(model, optimizer).product
    assert 0.95 * 2.2 < product < 2.2 * (1 + 1e-9)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
@pytest.mark.parametrize("consolidation", [Separate(), Online()])
def test_each_layer_has_its_learning_rate(structure, consolidation):
    model = network()
    penalty = consolidated(model, structure, consolidation)
    groups = [
        {"params": model[0].parameters(), "lr": 100.0},
        {"params": model[2].weight, "lr": 3.0},  # the last bias is frozen
    ]
    rates = torch.cat(
        [
            torch.full((p.numel(),), r)
            for p, r in zip(model.parameters(), (100, 100, 3, 0), strict=True)
        ]
    ).double()
    roots = rates.sqrt()
    matrix = roots[:, None] * hessian(penalty, model) * roots
    largest = float(torch.linalg.eigvalsh(matrix).max())
    product = penalty.stiffness(model, torch.optim.SGD(groups)).product
    assert 0.95 * largest < product < largest * (1 + 1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beyond_the_limit_the_optimizer_diverges_and_below_it_does_not(options):
    model = network()
    penalty = consolidated(model, Diagonal(), Online())
    first = torch.optim.SGD(model.parameters(), lr=1e-3, **options)
    least, most = 1e-3, 1e6  # the learning rate at the limit, by bisection
    for _ in range(50):
        first.param_groups[0]["lr"] = rate = (least * most) ** 0.5
        stiffness = penalty.stiffness(model, first)
        beyond = stiffness is None or stiffness.ratio > 1
        least, most = (least, rate) if beyond else (rate, most)
    ends = {}
    for share in (0.95, 1.05):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1)
        optimizer = torch.optim.SGD(moved.parameters(), lr=share * least, **options)
        for _ in range(250):
            optimizer.zero_grad()
            penalty(moved).backward()
            optimizer.step()
        ends[share] = float(nn.utils.parameters_to_vector(moved.parameters()).detach().norm())
    assert ends[0.95] < 10
    assert ends[1.05] > 1e3


def test_a_parameter_without_gradient_does_not_count():
    """The head of another task: its penalty is stiff, but it stays at its anchor."""
    model = network()
    penalty = consolidated(model, Diagonal(), Online())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    whole = penalty.stiffness(model, optimizer).product
    ((x, y),) = data(0)
    functional.cross_entropy(model(x), y).backward()
    assert penalty.stiffness(model, optimizer).product == whole
    entries = {n: float(d.max()) for n, d in penalty.terms[0].precision.diagonal().items()}
    stiffest = max(entries, key=entries.get)
    dict(model.named_parameters())[stiffest].grad.zero_()
    del entries[stiffest]
    expected = 3.0 / 30 * max(entries.values())
    assert penalty.stiffness(model, optimizer).product == pytest.approx(expected)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
@pytest.mark.parametrize("consolidation", [Separate(), Online()])
def test_weight_decay_adds_to_each_layer(structure, consolidation):
    """A group without parameters of the penalty does not matter, whatever its momentum."""
    model = network()
    penalty = consolidated(model, structure, consolidation)
    groups = [
        {"params": model[0].parameters(), "lr": 100.0, "weight_decay": 0.01},
        {"params": model[2].parameters(), "lr": 3.0, "weight_decay": 0.2},
        {"params": nn.Linear(2, 2).parameters(), "lr": 7.0, "momentum": 0.9, "weight_decay": 9.0},
    ]
    sizes = [sum(p.numel() for p in model[k].parameters()) for k in (0, 2)]
    rates, decays = (
        torch.cat([torch.full((n,), v) for n, v in zip(sizes, pair, strict=True)]).double()
        for pair in ((100.0, 3.0), (0.01, 0.2))
    )
    roots = rates.sqrt()
    matrix = roots[:, None] * (hessian(penalty, model) + decays.diag()) * roots
    largest = float(torch.linalg.eigvalsh(matrix).max())
    stiffness = penalty.stiffness(model, torch.optim.SGD(groups))
    assert largest > stiffness.limit == 2
    assert stiffness.decay == pytest.approx(max(100 * 0.01, 3 * 0.2))
    assert 0.95 * largest < stiffness.product < largest * (1 + 1e-9)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("tasks", [1, 3])
def test_far_below_the_limit_it_is_that_of_the_stiffest_task(structure, decay, tasks):
    """The sum of all tasks is below the limit: no power iteration is needed to say so."""
    model = network()
    penalty = consolidated(model, structure, Separate(), tasks)
    largest = float(torch.linalg.eigvalsh(hessian(penalty, model)).max())
    rate = 0.1 / largest
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    scale = 3.0 / 30
    each = [scale * float(term.precision.eigenvalues()[-1]) for term in penalty.terms]
    stiffness = penalty.stiffness(model, optimizer)
    assert stiffness.decay == pytest.approx(rate * decay)
    least = max(*(rate * one for one in each), rate * decay)
    assert 0.95 * least < stiffness.product < (rate * (largest + decay)) * (1 + 1e-9)
    assert stiffness.ratio == stiffness.product / 2 < 1


def test_weight_decay_moves_a_parameter_without_gradient():
    model = network()
    penalty = consolidated(model, Diagonal(), Online())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.5}]
    groups += [{"params": model[2].parameters()}]
    largest = max(
        float(penalty.terms[0].precision.diagonal()[f"0.{n}"].max()) for n in ("weight", "bias")
    )
    product = penalty.stiffness(model, torch.optim.SGD(groups, lr=1.0)).product
    assert product == pytest.approx(3.0 / 30 * largest + 0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_no_limit_is_claimed_for_other_optimizers(optimizer):
    model = network()
    penalty = consolidated(model, Diagonal(), Online())
    assert penalty.stiffness(model, optimizer(model.parameters(), lr=1e6)) is None
    assert EWCPenalty().stiffness(model, torch.optim.SGD(model.parameters(), lr=1.0)) is None
