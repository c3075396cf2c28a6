"""Wrapped models: every name is that of the bare model, and every value its value."""

import warnings
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from ewc import (
    Dense,
    EWCPenalty,
    FisherMatrix,
    Implicit,
    Kronecker,
    fisher_information,
)
from ewc.natural_gradient import NaturalGradient
from ewc.parameters import selected_parameters
from ewc.statistics.influence import loss_gradient
from ewc.wrappers import ParameterNames, bare, named_parameters, unwrapped


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def data_parallel(model):
    """On the CPU, also on a machine with accelerators, which it would move the model to."""
    kind = "torch.nn.parallel.data_parallel._get_available_device_type"
    with mock.patch(kind, return_value=None):
        return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed_(model):
    return nn.parallel.DistributedDataParallel(model)


def with_compiled_inside(model):
    """Parts of a network are compiled, too."""
    inside = nn.Sequential(*model)
    inside[0] = compiled(model[0])
    return inside


WRAPPINGS = {
    "data_parallel": data_parallel,
    "compiled": compiled,
    "distributed": distributed_,
    "distributed_compiled": lambda model: distributed_(compiled(model)),
    "compiled_data_parallel": lambda model: compiled(data_parallel(model)),
    "compiled_inside": with_compiled_inside,
    "distributed_with_compiled_inside": lambda model: distributed_(with_compiled_inside(model)),
}


@pytest.fixture(params=WRAPPINGS)
def wrapping(request, _process_group):
    return WRAPPINGS[request.param]


def model_and_data():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return model, [(torch.randn(9, 4), torch.randint(3, (9,)))]


def looked_up(model, name):
    """The parameter with this name, looked up beside others."""
    names = ["0.weight", name, "absent", f"{name}.below"]
    return ParameterNames(names).parameters_of(model)[name]


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


@pytest.mark.parametrize("structure", [Kronecker(), Dense(), Implicit()])
def test_fisher_and_penalty_are_those_of_the_bare_model(wrapping, structure):
    model, data = model_and_data()
    wrapped = wrapping(model)
    fisher = fisher_information(model, data, structure=structure)
    of_wrapped = fisher_information(wrapped, data, structure=structure)
    assert list(of_wrapped.shapes) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(of_wrapped.to_dense(), fisher.to_dense())
    penalties = EWCPenalty(), EWCPenalty()
    penalties[0].consolidate(fisher, model)
    penalties[1].consolidate(of_wrapped, wrapped)
    move(model)
    expected = penalties[0](model).detach()
    assert float(expected) > 0
    for penalty in penalties:
        for network in (model, wrapped):
            torch.testing.assert_close(penalty(network).detach(), expected)


def test_the_network_is_whole_again_after_the_pass(wrapping):
    model, data = model_and_data()
    wrapped = wrapping(model)
    names = [name for name, _ in wrapped.named_modules()]
    fisher_information(wrapped, data)
    with pytest.raises(ValueError, match="outside"), unwrapped(wrapped):
        raise ValueError("outside")
    assert [name for name, _ in wrapped.named_modules()] == names


def test_matrix_free_fishers_are_attached_to_wrapped_networks(wrapping, tmp_path):
    model, data = model_and_data()
    fisher = fisher_information(model, data, structure=Implicit())
    fisher.save(tmp_path / "fisher")
    loaded = FisherMatrix.load(tmp_path / "fisher", wrapping(model))
    torch.testing.assert_close(loaded.trace(), fisher.trace())


def test_natural_gradient_steps_as_with_the_bare_model(wrapping):
    model, data = model_and_data()
    twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    twin.load_state_dict(model.state_dict())
    for network in (wrapping(model), twin):
        optimizer = NaturalGradient(network, lr=0.5)
        optimizer.update_fisher(data)
        nn.functional.cross_entropy(network(data[0][0]), data[0][1]).backward()
        optimizer.step(batch=data[0])
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_go_by_bare_names(wrapping):
    model, data = model_and_data()
    fisher = fisher_information(model, data, structure=Kronecker())
    expected = loss_gradient(model, data, fisher)
    torch.testing.assert_close(loss_gradient(wrapping(model), data, fisher), expected)


def test_selections_go_by_bare_names(wrapping):
    model, _ = model_and_data()
    wrapped = wrapping(model)
    for selection in (["2.*"], [model[2]], [model[2].weight, "2.bias"]):
        assert list(selected_parameters(wrapped, selection)) == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"\(0.weight, 0.bias, 2.weight, 2.bias\)"):
        selected_parameters(wrapped, ["module.*"])


class Outer(nn.Module):
    """Its submodules have the names that wrappers give, but are no wrappers."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 3)
        self._orig_mod = nn.Linear(3, 3)
        self.tied = self.module

    def forward(self, x):
        return self._orig_mod(self.module(x).tanh())


@pytest.mark.usefixtures("_process_group")
def test_submodules_that_are_called_as_in_wrappers_keep_their_names():
    model, data = Outer(), [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    names = ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]
    for wrapped in (model, data_parallel(model), distributed_(model), compiled(model)):
        assert [name for name, _ in named_parameters(wrapped)] == names
        assert bare(wrapped) is model
        assert list(fisher_information(wrapped, data).shapes) == names
        every = dict(named_parameters(wrapped, remove_duplicate=False))
        assert list(every) == [n for n, _ in model.named_parameters(remove_duplicate=False)]
        for name, parameter in every.items():
            assert looked_up(wrapped, name) is parameter
        for name in ("weight", "module", "tied.weights", "module.module.weight"):
            assert looked_up(wrapped, name) is None


def test_parameters_of_scripted_modules_are_found():
    plain = nn.Sequential(nn.Linear(4, 3))
    # Compiling by torch.jit is deprecated, and still what some networks come with.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.jit.script(plain), nn.Linear(3, 3))
    for name, parameter in model.named_parameters():
        assert looked_up(model, name) is parameter
    assert looked_up(model, "0.0.other") is None
