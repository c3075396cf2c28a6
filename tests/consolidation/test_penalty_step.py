"""A training step of the penalty: exact after every change of the model, and few operations."""

from dataclasses import replace

import pytest
import torch
from counting import Operations
from torch import nn

from ewc import DiagonalFisher, EWCPenalty, Kronecker, Separate, fisher_information
from ewc.linalg import devices
from ewc.wrappers import named_parameters


@pytest.fixture(params=["host", "accelerator"])
def machine(request, monkeypatch):
    """The way of each machine, on the host."""
    if request.param == "accelerator":
        monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    return request.param


@pytest.fixture
def _accelerator(monkeypatch):
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.inside = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))


def network():
    return nn.Sequential(Tied(), nn.Conv2d(2, 3, 3, bias=False), nn.Linear(3, 2))


def random_diagonal(model, num_examples):
    entries = {n: torch.rand_like(p).detach().float() for n, p in named_parameters(model)}
    return DiagonalFisher(entries, num_examples)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def by_definition(model, tasks, strength, size):
    """Value and gradient entry by entry in double precision; new rows are free."""
    value, gradient = 0.0, {}
    for name, parameter in named_parameters(model):
        theta = parameter.detach().double()
        pull = torch.zeros_like(theta)
        for fisher, anchor in tasks:
            if name not in anchor:
                continue
            rows = anchor[name].shape[:1]
            gap = (theta[: rows[0]] if rows else theta) - anchor[name].double()
            weight = strength * fisher.num_examples / size * fisher.diagonal()[name].double()
            value += 0.5 * float((weight * gap**2).sum())
            (pull[: rows[0]] if rows else pull).add_(weight * gap)
        gradient[name] = pull
    return value, gradient


def remembered(model, tasks=2):
    """A penalty after some tasks that was used once, and the tasks."""
    penalty, history = EWCPenalty(2.5, Separate()), []
    for size in range(10, 10 + tasks):
        move(model)
        fisher = random_diagonal(model, size)
        penalty.consolidate(fisher, model)
        anchor = {n: p.detach().clone() for n, p in named_parameters(model)}
        history.append((fisher, anchor))
    penalty(model).backward()
    model.zero_grad()
    move(model)
    return penalty, history


def assert_exact(penalty, model, history, tolerance):
    value, gradient = by_definition(model, history, 2.5, history[-1][0].num_examples)
    found = penalty(model)
    assert found.item() == pytest.approx(value, rel=tolerance)
    model.zero_grad()
    found.backward()
    for name, parameter in named_parameters(model):
        if parameter.grad is None:
            assert not parameter.requires_grad or not gradient[name].any()
            continue
        assert parameter.grad.dtype == parameter.dtype
        # Autograd wants the gradient in the parameter's type.
        rounding = max(tolerance, torch.finfo(parameter.dtype).eps)
        largest = max(1.0, float(gradient[name].abs().max()))
        torch.testing.assert_close(
            parameter.grad.double(), gradient[name], rtol=rounding, atol=tolerance * largest
        )


def replace_a_layer(model):
    model[2] = nn.Linear(3, 2)


def replace_a_layer_deep_inside(model):
    model[0].inside[0] = nn.Linear(3, 3)


def replace_a_parameter(model):
    model[0].scale = nn.Parameter(torch.randn(()))


def assign_another_state(model):
    model.load_state_dict(
        {n: torch.randn_like(t) for n, t in model.state_dict().items()}, assign=True
    )


def cast_to_double(model):
    model.double()


def cast_to_half(model):
    model.bfloat16()


def cast_one_layer(model):
    model[2].double()


def change_the_memory_format(model):
    model.to(memory_format=torch.channels_last)


def grow_in_place(model):
    model[2].weight.data = torch.randn(4, 3)
    model[2].bias.data = torch.randn(4)


def freeze(model):
    model[0].requires_grad_(False)


def compile_inside(model):
    model[0] = torch.compile(model[0], backend="eager")


CHANGES = [
    replace_a_layer,
    replace_a_layer_deep_inside,
    replace_a_parameter,
    assign_another_state,
    cast_to_double,
    cast_to_half,
    cast_one_layer,
    change_the_memory_format,
    grow_in_place,
    freeze,
    compile_inside,
]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_penalty_follows_every_change_of_the_model(change):
    model = network()
    penalty, history = remembered(model)
    change(model)
    assert_exact(penalty, model, history, 1e-5)


@pytest.mark.usefixtures("machine")
def test_in_double_precision_the_step_is_exact_to_rounding():
    model = network().double()
    penalty, history = remembered(model, tasks=1)
    assert_exact(penalty, model, history, 1e-13)


def test_tiles_change_nothing(monkeypatch):
    model = network().double()
    narrow = replace(devices.PROCESSOR, swept=5)
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", narrow)
    penalty, history = remembered(model, tasks=1)
    assert_exact(penalty, model, history, 1e-13)


def test_the_value_of_a_large_layer_is_exact_in_single_precision():
    model = nn.Linear(2000, 2000, bias=False)
    penalty, history = remembered(model, tasks=1)
    value, _ = by_definition(model, history, 2.5, 10)
    assert penalty(model).item() == pytest.approx(value, rel=1e-6)


def step_operations(model, penalty):
    parameters = [p for p in model.parameters() if p.requires_grad]
    penalty(model)
    with Operations() as operations:
        torch.autograd.grad(penalty(model), parameters)
    return operations


def deep(depth):
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))


@pytest.mark.usefixtures("_accelerator")
def test_on_an_accelerator_operations_do_not_grow_with_the_layers():
    counts = []
    for depth in (4, 40):
        model = deep(depth)
        penalty, _ = remembered(model)
        operations = step_operations(model, penalty)
        assert operations.host_reads == 0
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 12


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_on_an_accelerator_a_kronecker_step_reads_nothing_and_is_whole(share):
    """Few eigenvectors take more time there than all, so the share has no effect."""
    model = nn.Linear(100, 3)
    data = [(torch.randn(200, 100), torch.randint(3, (200,)))]
    penalty = EWCPenalty(1.0, eigenvector_share=share)
    fisher = fisher_information(model, data, structure=Kronecker())
    penalty.consolidate(fisher, model)
    move(model)
    assert step_operations(model, penalty).host_reads == 0
    with torch.no_grad():
        whole = penalty(model)
    torch.testing.assert_close(penalty(model).detach(), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_second_derivative_is_the_precision_in_other_types_too(dtype):
    model = nn.Linear(3, 2)
    penalty = EWCPenalty(2.0)
    fisher = fisher_information(model, [(torch.randn(9, 3), torch.randint(2, (9,)))])
    penalty.consolidate(fisher, model)
    model.to(dtype)
    (gradient,) = torch.autograd.grad(penalty(model), [model.weight], create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), [model.weight])
    expected = 2.0 * fisher.diagonal()["weight"]
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(second.float(), expected, rtol=rtol, atol=0)
