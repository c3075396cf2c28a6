"""The learning rate over a task, against the formula."""

import logging
import math
from functools import partial

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console

from ewc import EWCPenalty, Online
from ewc.consolidation.update import ImplicitSteps
from ewc.parameters import flatten
from experiments.experiment import Experiment
from experiments.recording.checkpoints import Checkpoints
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.strategies.ewc import EWC, OnlineEWC
from experiments.strategies.strategy import Naive, Strategy
from experiments.tasks.benchmarks import Split
from experiments.tasks.images import Digits
from experiments.training.models import MLP
from experiments.training.protocol import Training
from experiments.training.resume import Continuation


class Watch(SupervisedPlugin):
    """Keeps the learning rate of every step, by task."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def before_training_exp(self, strategy, **_):
        self.rates.append([])

    def before_update(self, strategy, **_):
        self.rates[-1].append(strategy.optimizer.param_groups[0]["lr"])


def run(folder, training, strategy):
    """Two tasks by gradient descent at a rate of 0.2; the network and the last checkpoint."""
    optimizer = partial(torch.optim.SGD, lr=0.2)
    experiment = Experiment(Split(Digits(), 2), MLP([8]), optimizer, training, strategy)
    prepared = experiment.prepare()
    checkpoints = Checkpoints(folder, {}, {})
    with Recorder(folder, WandB("disabled"), {}, Label("x")) as recorder:
        prepared.run(recorder, Console(quiet=True), logging.getLogger(), Continuation(checkpoints))
    return prepared.model, checkpoints.newest()


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("sizes", [{"iterations": 7}, {"epochs": 2}])
@pytest.mark.parametrize("strategy", [Naive(), EWC(1.0), EWC(1.0, update=ImplicitSteps(3))])
def test_the_learning_rate_falls_to_nothing_over_every_task(
    tmp_path, monkeypatch, strategy, sizes, reset
):
    watch = Watch()
    plugins = type(strategy).plugins
    monkeypatch.setattr(type(strategy), "plugins", lambda *a: [*plugins(*a), watch])
    training = Training(100, reset_optimizer=reset, anneal=True, **sizes)
    run(tmp_path, training, strategy)
    assert len(watch.rates) == 2
    for rates in watch.rates:
        steps = len(rates)
        assert steps == 7 or ("epochs" in sizes and steps == 16)
        expected = [0.1 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]
        assert rates == pytest.approx(expected, rel=1e-6)


def test_without_annealing_the_learning_rate_stays(tmp_path, monkeypatch):
    watch = Watch()
    monkeypatch.setattr(Strategy, "plugins", lambda *_: [watch])
    training = Training(100, iterations=4)
    run(tmp_path, training, Naive())
    assert watch.rates == [[0.2] * 4] * 2


class Iterates(SupervisedPlugin):
    """Keeps the parameters after every step, by task, and those that a task leaves behind."""

    def __init__(self):
        super().__init__()
        self.steps, self.left = [], []

    def before_training_exp(self, strategy, **_):
        self.steps.append([])

    def after_training_iteration(self, strategy, **_):
        self.steps[-1].append(flatten(dict(strategy.model.named_parameters())).detach().clone())

    def after_training_exp(self, strategy, **_):
        self.left.append(flatten(dict(strategy.model.named_parameters())).detach().clone())


@pytest.mark.parametrize(("share", "last"), [(0.25, 2), (0.01, 1), (1.0, 8)])
@pytest.mark.parametrize("sizes", [{"iterations": 8}, {"epochs": 1}])
@pytest.mark.parametrize("strategy", [Naive(), EWC(1.0), EWC(1.0, update=ImplicitSteps(2))])
def test_the_network_takes_the_mean_of_its_last_parameters(
    tmp_path, monkeypatch, strategy, sizes, share, last
):
    watch = Iterates()
    plugins = type(strategy).plugins
    monkeypatch.setattr(type(strategy), "plugins", lambda *a: [watch, *plugins(*a)])
    training = Training(100, tail_average=share, **sizes)
    run(tmp_path, training, strategy)
    assert len(watch.left) == 2
    for steps, left in zip(watch.steps, watch.left, strict=True):
        assert len(steps) == 8
        torch.testing.assert_close(left, torch.stack(steps[-last:]).mean(0))


def test_the_penalty_is_anchored_at_the_mean(tmp_path):
    training = Training(100, iterations=8, tail_average=0.5)
    model, state = run(tmp_path, training, OnlineEWC(1.0))
    (plugin,) = [inner for inner in state["training"]["plugins"] if "penalty" in inner]
    penalty = EWCPenalty(1.0, Online())
    penalty.set_extra_state(plugin["penalty"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(penalty.terms[-1].anchor[name], parameter.detach())
