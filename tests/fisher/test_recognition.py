"""What the user hears of layers that go the slow way, and the list of what was recognised."""

import warnings

import pytest
import torch
from networks import LAYERS, SlopesPerChannel, SortedRows, Words
from torch import nn

from ewc import Diagonal, EigenvalueCorrected, Kronecker, fisher_information
from ewc.fisher import recognised
from ewc.pullback.recognition import Use


def data(n=6, features=6):
    x = torch.randn(n, features)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(4)]


class Phase(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head((x * (1j * self.phase)).abs())


REASONS = {
    "a use without a rule": (SlopesPerChannel, r"slopes.weight \(no rule for PreluKernel\)"),
    "rows": (SortedRows, r"square.weight, square.bias \(the rows of \w+ are not the examples in"),
    "complex": (Phase, r"for phase \(Mul has complex numbers\)"),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EigenvalueCorrected()], ids=repr)
def test_the_slow_way_is_named_once_a_pass(reason, structure):
    build, message = REASONS[reason]
    model = build()
    with pytest.warns(UserWarning, match=message) as caught:
        fisher_information(model, [*data(), *data()], structure=structure)
    assert len([w for w in caught if "one example at a time" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match=message):
        fisher_information(model, data(), structure=structure)


def test_many_parameters_are_counted():
    model = nn.Sequential(*(nn.PReLU() for _ in range(6)), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r"0.weight, 1.weight, 2.weight, 3.weight and 2 more \("):
        fisher_information(model, data())


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "no_rule"])
def test_layers_with_a_rule_are_quiet(layer):
    model = LAYERS[layer]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fisher_information(model, data(features=12))
    assert [str(w.message) for w in caught] == []


def test_every_use_is_listed():
    model = Words()
    listed = recognised(model, data()[0])
    head = next(use for use in listed if "head.weight" in use.parameters)
    assert head == Use(("head.weight", "head.bias"), "matrix product", 1, "examples first")
    step = next(use for use in listed if "recurrent.weight_hh_l0" in use.parameters)
    assert (step.times, step.positions) == (6, 1)
    names = {name for use in listed for name in use.parameters}
    assert names == dict(model.named_parameters()).keys()
    assert not any(use.reason for use in listed)


def test_the_list_is_a_table():
    slow = SlopesPerChannel()
    lines = str(recognised(slow, data()[0])).splitlines()
    assert lines[0].split() == ["parameters", "kind", "uses", "positions", "rows", "why", "slow"]
    assert lines[-1].split("  ")[0] == "slopes.weight"
    assert lines[-1].endswith("no rule for PreluKernel")
    assert len(lines) == 4
    assert [use.parameters for use in recognised(slow, data()[0], parameters=["head.bias"])] == [
        ("head.bias",)
    ]


def test_listing_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recognised(model, data()[0])
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["Tensor", "list of batches"])
def test_one_batch_is_wanted(kind):
    x = torch.randn(3, 4)
    batch = x if kind == "Tensor" else [(x, torch.zeros(3))]
    with pytest.raises(TypeError, match=f"must be one batch .* got a {kind}"):
        recognised(nn.Linear(4, 3), batch)
