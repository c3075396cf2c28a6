"""Adam in an eigenbasis: plain Adam of the network with its weights written in that basis."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ewc import (
    DenseFisher,
    DiagonalFisher,
    EigenvalueCorrectedFisher,
    KroneckerFisher,
    fisher_information,
)
from ewc.eigenbasis_adam import EigenbasisAdam

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.02}


@pytest.fixture
def data():
    torch.manual_seed(0)
    return [(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))]


@pytest.fixture
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def train(model, optimizer, data, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()


class Turned(nn.Module):
    """A linear layer ``G B A'`` whose parameter is ``B``; the bias is the last column."""

    def __init__(self, layer, left, right):
        super().__init__()
        weight = layer.weight.detach()
        self.bias = layer.bias is not None
        if self.bias:
            weight = torch.cat([weight, layer.bias.detach()[:, None]], 1)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.coordinates = nn.Parameter(left.T @ weight @ right)

    def matrix(self):
        return self.left @ self.coordinates @ self.right.T

    def forward(self, x):
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        return x @ self.matrix().T


@pytest.mark.parametrize("structure", [KroneckerFisher, EigenvalueCorrectedFisher])
def test_it_is_adam_in_turned_coordinates(network, data, structure):
    fisher = fisher_information(network, data, structure=structure)
    bases = [b.eigen if structure is KroneckerFisher else b for b in fisher.blocks]
    turned = nn.Sequential(
        Turned(network[0], bases[0].outputs[0], bases[0].inputs[0]),
        nn.Tanh(),
        Turned(network[2], bases[1].outputs[0], bases[1].inputs[0]),
    )
    plain = copy.deepcopy(network)
    optimizer = EigenbasisAdam(network.parameters(), **OPTIONS)
    optimizer.rotate(fisher.precision, network)
    train(network, optimizer, data, 6)
    train(turned, torch.optim.Adam(turned.parameters(), **OPTIONS), data, 6)
    train(plain, torch.optim.Adam(plain.parameters(), **OPTIONS), data, 6)
    first = torch.cat([network[0].weight, network[0].bias[:, None]], 1)
    torch.testing.assert_close(first, turned[0].matrix(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(network[2].weight, turned[2].matrix(), rtol=1e-9, atol=1e-11)
    assert float((network[2].weight - plain[2].weight).detach().abs().max()) > 1e-3


def test_without_a_basis_it_is_adam(network, data):
    twin, third = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = EigenbasisAdam(network.parameters(), **OPTIONS)
    train(network, optimizer, data, 5)
    train(twin, torch.optim.Adam(twin.parameters(), **OPTIONS), data, 5)
    # A diagonal matrix has the coordinates for its axes, and of a dense one no use is made.
    for structure in (DiagonalFisher, DenseFisher):
        again = copy.deepcopy(third)
        other = EigenbasisAdam(again.parameters(), **OPTIONS)
        other.rotate(fisher_information(again, data, structure=structure), again)
        train(again, other, data, 5)
        torch.testing.assert_close(again[0].weight, twin[0].weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network[0].weight, twin[0].weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network[2].weight, twin[2].weight, rtol=1e-12, atol=1e-12)


def test_it_ends_where_loss_and_stiff_penalty_balance_when_adam_does_not():
    """A quadratic of Kronecker form with a condition of 1e8, in 1,000 annealed steps."""
    torch.manual_seed(2)
    layer = nn.Linear(20, 10, bias=False).double()
    x = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(0, -4, 20).double()
    x = x @ torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    y = torch.randint(10, (200,))
    fisher = fisher_information(layer, [(x, y)], structure=KroneckerFisher)
    goal = {"weight": torch.randn(10, 20, dtype=torch.float64)}
    gap = {}
    for turned in (False, True):
        model = copy.deepcopy(layer)
        optimizer = EigenbasisAdam(model.parameters(), lr=0.03)
        if turned:
            optimizer.rotate(fisher, model)
        for step in range(1000):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * step / 1000)) / 2
            optimizer.zero_grad()
            away = {"weight": model.weight - goal["weight"]}
            (0.5 * fisher.quadratic_form(away)).backward()
            optimizer.step()
        away = {"weight": model.weight.detach() - goal["weight"]}
        gap[turned] = float(fisher.quadratic_form(away))
    assert gap[True] < 1e-3 * gap[False]


def test_copies_and_reloads_go_on_in_the_same_basis(network, data):
    fisher = fisher_information(network, data, structure=KroneckerFisher)
    optimizer = EigenbasisAdam(network.parameters(), **OPTIONS)
    optimizer.rotate(fisher, network)
    train(network, optimizer, data, 3)
    copied, pickled = copy.deepcopy((network, optimizer)), pickle.dumps((network, optimizer))
    twin = copy.deepcopy(network)
    reloaded = EigenbasisAdam(twin.parameters())
    reloaded.rotate(fisher, twin)
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, data, 3)
    for model, other in (copied, pickle.loads(pickled), (twin, reloaded)):
        train(model, other, data, 3)
        assert torch.equal(model[0].weight, network[0].weight)
        assert torch.equal(model[2].weight, network[2].weight)


def test_frozen_and_foreign_parameters_are_left_alone(network, data):
    fisher = fisher_information(network, data, structure=KroneckerFisher)
    before = copy.deepcopy(network)
    optimizer = EigenbasisAdam([network[0].weight])
    optimizer.rotate(fisher, network)
    train(network, optimizer, data, 2)
    assert torch.equal(network[2].weight, before[2].weight)
    assert torch.equal(network[0].bias, before[0].bias)
    assert not torch.equal(network[0].weight, before[0].weight)
    # Without a gradient there is no step.
    optimizer.zero_grad()
    weight = network[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(network[0].weight, weight)


@pytest.mark.parametrize("structure", [KroneckerFisher, EigenvalueCorrectedFisher])
def test_what_is_frozen_later_stays(network, data, structure):
    optimizer = EigenbasisAdam(network.parameters(), **OPTIONS)
    optimizer.rotate(fisher_information(network, data, structure=structure), network)
    train(network, optimizer, data, 2)  # leaves gradients and moments
    network[0].weight.requires_grad_(False)
    frozen, bias = network[0].weight.clone(), network[0].bias.detach().clone()
    for parameter in (network[0].bias, *network[2].parameters()):
        parameter.grad = None
    x, y = data[0]
    cross_entropy(network(x), y).backward()
    optimizer.step()
    assert torch.equal(network[0].weight, frozen)
    assert not torch.equal(network[0].bias, bias)


def test_a_layer_in_two_groups_is_moved_once(network, data):
    """Its weight and bias have options of their own, and so their own coordinates."""
    twin = copy.deepcopy(network)
    groups = [
        {"params": [p for n, p in network.named_parameters() if n.endswith(kind)]}
        for kind in ("weight", "bias")
    ]
    split = EigenbasisAdam(groups, lr=0.1)
    split.rotate(fisher_information(network, data, structure=KroneckerFisher), network)
    plain = EigenbasisAdam(twin.parameters(), lr=0.1)
    for model, optimizer in ((network, split), (twin, plain)):
        x, y = data[0]
        cross_entropy(model[2](model[0](x)), y).backward()
        optimizer.step()
    for name in ("weight", "bias"):
        assert torch.equal(getattr(network[0], name), getattr(twin[0], name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_state_holds_the_basis(network, data, dtype):
    network.to(dtype)
    data = [(x.to(dtype), y) for x, y in data]
    optimizer = EigenbasisAdam(network.parameters(), **OPTIONS)
    optimizer.rotate(fisher_information(network, data, structure=KroneckerFisher), network)
    train(network, optimizer, data, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(network)
    other = EigenbasisAdam(twin.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    for model, each in ((network, optimizer), (twin, other)):
        train(model, each, data, 3)
    for one, same in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, same)


def test_a_basis_of_other_parameters_is_refused(network, data):
    optimizer = EigenbasisAdam(network.parameters())
    optimizer.rotate(fisher_information(network, data, structure=KroneckerFisher), network)
    train(network, optimizer, data, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["bases"][0]["parameters"].reverse()
    bases, moments = dict(optimizer._bases), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"saved basis of .* does not fit the optimizer's"):
        optimizer.load_state_dict(state)
    assert optimizer._bases == bases
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)


def test_a_head_that_grew_keeps_its_coordinates(network, data):
    fisher = fisher_information(network, data, structure=KroneckerFisher)
    grown = nn.Sequential(network[0], nn.Tanh(), nn.Linear(5, 4, bias=False).double())
    optimizer = EigenbasisAdam(grown.parameters(), lr=0.1)
    optimizer.rotate(fisher, grown)
    before = grown[2].weight.detach().clone()
    train(grown, optimizer, data, 1)
    # Adam's first step has the size of the learning rate in each coordinate.
    moved = (grown[2].weight.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-5, atol=0)


def test_closure(network, data):
    optimizer = EigenbasisAdam(network.parameters())

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(network(data[0][0]), data[0][1])
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


def test_what_is_refused(network):
    for options, message in [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": math.inf}, "eps is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\): both must lie in \[0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            EigenbasisAdam(network.parameters(), **options)
