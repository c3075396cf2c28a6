"""The learning rate over a task, against the formula."""

import logging
import math
from functools import partial

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console

from experiments.benchmarks import Split
from experiments.data import Digits
from experiments.experiment import Experiment, Training
from experiments.models import MLP
from experiments.strategies import EWC, Naive, Strategy
from experiments.tracking import Recorder, WandB


class Watch(SupervisedPlugin):
    """Keeps the learning rate of every step, by task."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def before_training_exp(self, strategy, **_):
        self.rates.append([])

    def before_update(self, strategy, **_):
        self.rates[-1].append(strategy.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("sizes", [{"iterations": 7}, {"epochs": 2}])
@pytest.mark.parametrize("strategy", [Naive(), EWC(1.0), EWC(1.0, implicit_every=3)])
def test_the_learning_rate_falls_to_nothing_over_every_task(
    tmp_path, monkeypatch, strategy, sizes, reset
):
    watch = Watch()
    plugins = type(strategy).plugins
    monkeypatch.setattr(type(strategy), "plugins", lambda *a: [*plugins(*a), watch])
    training = Training(100, reset_optimizer=reset, anneal=True, **sizes)
    optimizer = partial(torch.optim.SGD, lr=0.2)
    experiment = Experiment(Split(Digits(), 2), MLP([8]), optimizer, training, strategy)
    with Recorder(tmp_path, WandB("disabled"), {}, "x", None) as recorder:
        experiment.prepare().run(recorder, Console(quiet=True), logging.getLogger())
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
    optimizer = partial(torch.optim.SGD, lr=0.2)
    experiment = Experiment(Split(Digits(), 2), MLP([8]), optimizer, training, Naive())
    with Recorder(tmp_path, WandB("disabled"), {}, "x", None) as recorder:
        experiment.prepare().run(recorder, Console(quiet=True), logging.getLogger())
    assert watch.rates == [[0.2] * 4] * 2
