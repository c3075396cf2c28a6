"""What a plugin says of its penalty, on real digits and plain Avalanche loops."""

import re
import warnings

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from ewc.penalty_checks import shortened
from ewc.plugin import EWCPlugin

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


class WarmUp(SupervisedPlugin):
    """The learning rate rises linearly over ten steps of every task, to its value in the task."""

    def __init__(self, first, *last):
        super().__init__()
        self.first, self.last = first, last

    def before_training_iteration(self, strategy, **_):
        done = min(strategy.clock.train_exp_iterations / 10, 1)
        last = self.last[strategy.experience.current_experience]
        for group in strategy.optimizer.param_groups:
            group["lr"] = self.first + done * (last - self.first)


def tasks(number):
    """Pairs of digits, 0 and 1, 2 and 3, ..., each with the labels 0 and 1."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    streams = []
    for task in range(number):
        of_task = labels // 2 == task
        x, y = images[of_task].float() / 16, labels[of_task] % 2
        targets = [DataAttribute(y.tolist(), "targets")]
        streams.append(AvalancheDataset([TensorDataset(x, y)], data_attributes=targets))
    return benchmark_from_datasets(train=streams, test=streams).train_stream


def said(plugin, optimizer=SGD, lr=0.1, epochs=4, number=2, more=()):
    """The warnings of a run, and what ended it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    strategy = Naive(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=epochs,
        plugins=[*more, plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    ended = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for experience in tasks(number):
                strategy.train(experience)
        except FloatingPointError as error:
            ended = str(error)
    return [str(warning.message) for warning in caught if warning.category is UserWarning], ended


@pytest.mark.parametrize("first", [0.0, 0.01])
def test_a_learning_rate_that_rises_beyond_the_limit_is_said(first):
    (message,), ended = said(EWCPlugin(4000.0), more=[WarmUp(first, 0.1, 0.1)])
    assert message.startswith("From task 2 on training diverges along the penalty's stiffest")
    assert ended
    limit = float(re.search(r"learning rate below ([\d.]+)", message)[1])
    messages, ended = said(EWCPlugin(4000.0), more=[WarmUp(first, 0.1, 0.9 * limit)])
    assert (messages, ended) == ([], None)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (99.6, "99"),
        (0.0996, "0.099"),
        (123456.0, "120000"),
        (0.000123, "0.00012"),
        (1.29e-5, "1.2e-05"),
        (3.45e7, "3.4e+07"),
        (100.0, "100"),
    ],
)
def test_advice_is_rounded_to_the_safe_side(number, text):
    assert shortened(number) == text
    assert float(shortened(number)) <= number <= float(shortened(number, up=True))


def test_advice_holds_and_can_be_typed():
    (message,), _ = said(EWCPlugin(4000.0))
    assert re.search(
        r"use a strength below [\d.]+, a learning rate below [\d.]+, or implicit steps "
        r"\(update=ImplicitSteps\(\) in Python, strategy/update=implicit on the command line\)",
        message,
    )
    assert "as their penalties add up" in message
    strength = float(re.search(r"strength below ([\d.]+)", message)[1])
    messages, ended = said(EWCPlugin(strength))
    assert (messages, ended) == ([], None)


@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 1e-5), (ADAM, 1e-6), (ADAM, 1.0)])
def test_a_learning_rate_is_not_taken_for_a_weak_penalty(optimizer, lr):
    """The parameters hardly move, or are ten times too large after the first task."""
    assert said(EWCPlugin(1.0), optimizer, lr) == ([], None)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_weak_penalty_is_said(optimizer):
    (message,), _ = said(EWCPlugin(1e-7), optimizer, 0.01)
    assert message.endswith("use a larger strength than 1e-07.")


def test_parameters_beyond_any_use_are_said_once_and_first():
    messages, _ = said(EWCPlugin(1.0), ADAM, 1e6, number=3)
    assert re.match(r"In task 1 the parameters \S+ are \S+ times as large after step ", messages[0])
    assert messages[0].endswith("before training: the learning rate is probably too large.")
    assert not [m for m in messages[1:] if "times as large" in m or "did not matter" in m]


def test_the_strength_is_blamed_only_where_there_is_a_penalty():
    _, ended = said(EWCPlugin(1.0), lr=1e30)
    assert "in task 1, step " in ended
    assert ended.endswith(": use a smaller learning rate.")
    _, ended = said(EWCPlugin(4000.0))
    assert "in task 2, step " in ended
    assert ended.endswith(": use a smaller learning rate or a smaller strength.")
