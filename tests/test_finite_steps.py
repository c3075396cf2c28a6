"""Numbers that are not finite end training on real digits, and the layer is named."""

import re

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from ewc.finite_steps import FiniteSteps, not_finite
from ewc.linalg import devices
from ewc.plugin import EWCPlugin

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adam]


def digits(n=300):
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images[:n]).float() / 16, torch.from_numpy(labels[:n])


def train(model, optimizer, lr=0.01, data=None, criterion=None, plugin=None):
    x, y = data or digits()
    labels = [DataAttribute(y.tolist(), "targets")]
    task = AvalancheDataset([TensorDataset(x, y)], data_attributes=labels)
    strategy = Naive(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=criterion or nn.CrossEntropyLoss(),
        train_mb_size=30,
        plugins=[plugin or EWCPlugin(1.0)],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    strategy.train(benchmark_from_datasets(train=[task], test=[task]).train_stream[0])


class Naked(SupervisedPlugin):
    """The check by itself: EWC would try the Fisher information before training."""

    def __init__(self):
        super().__init__()
        self.finite = FiniteSteps()

    def before_backward(self, strategy, **_):
        self.finite.check_loss(strategy)

    def before_update(self, strategy, **_):
        self.finite.note_gradients(strategy)

    def after_training_exp(self, strategy, **_):
        self.finite.look(strategy)


class Root(nn.Module):
    """A square root of what is above 0, with 0 times an infinite derivative elsewhere."""

    def forward(self, x):
        return (x * (x > 0)).sqrt()


def rooted():
    return nn.Sequential(nn.Linear(64, 16), Root(), nn.Linear(16, 10))


def mlp():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_names_its_layer(optimizer):
    said = (
        r"loss became nan in task 1, step 2, as the parameter '0.weight' \(and .*others?\) stopped"
    )
    with pytest.raises(FloatingPointError, match=said):
        train(rooted(), optimizer, plugin=Naked())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_accelerator_names_layer_and_step_later(monkeypatch, optimizer):
    """The last layer is sound, and the first one's bias comes before its weight on the way back."""
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    said = "task 1, step 2, as the gradient of '0.bias' is not finite in step 1: use a smaller"
    with pytest.raises(FloatingPointError, match=said):
        train(rooted(), optimizer, plugin=Naked())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_outputs_that_overflow_name_their_layer(optimizer):
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[2].weight.mul_(1e30)
    with pytest.raises(
        FloatingPointError, match=r"step 1, as the outputs of '2' \(Linear\) are not finite"
    ):
        train(model, optimizer, plugin=Naked())
    with pytest.raises(FloatingPointError, match=r"Fisher information of task 1 .*: Batch 0: the"):
        train(model, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_data_that_are_not_finite_are_told_from_divergence(optimizer):
    x, y = digits()
    x[7, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="as the mini-batch is not finite: check the data"):
        train(mlp(), optimizer, data=(x, y))


class Large(nn.CrossEntropyLoss):
    """A loss whose squared gradients overflow in single precision."""

    def forward(self, outputs, targets):
        return 1e25 * super().forward(outputs, targets)


def test_a_ruined_optimizer_state_is_found_though_all_else_is_finite():
    model = mlp()
    said = (
        r"the optimizer state 'exp_avg_sq' of '0.weight' \(and 3 others\) stopped being finite in "
        "task 1, between step 1 and step 10"
    )
    with pytest.raises(FloatingPointError, match=said):
        train(model, torch.optim.Adam, criterion=Large())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_large_finite_numbers_are_finite():
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(1e30)  # its squares overflow
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not_finite(model, optimizer) == []
    with torch.no_grad():
        model[2].bias[3] = -torch.inf
    assert not_finite(model, optimizer) == ["parameter '2.bias'"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_messages_are_one_sentence(optimizer):
    with pytest.raises(FloatingPointError) as caught:
        train(rooted(), optimizer, plugin=Naked())
    assert len(re.findall(r"\.(\s|$)", str(caught.value))) == 1
