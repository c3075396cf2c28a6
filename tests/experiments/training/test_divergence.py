"""What a run says of numbers that are finite and worthless, on real digits."""

import logging
import warnings

import hydra
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits

from ewc import EWCPenalty, Exact, MonteCarlo, fisher_information
from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.training.divergence import accuracy_of_guessing, warn_of_unlearnt

SMALL = [
    "benchmark.num_tasks=2",
    "model.hidden=[32]",
    "training.epochs=6",
    "training.batch_size=16",
]
SMALL += ["wandb.mode=disabled", "training.checkpoint_minutes=null"]
SHORT = ["benchmark.num_tasks=5", "training.epochs=4"]
SGD = ["optimizer=sgd", "optimizer.lr=0.1"]
ADAM = ["optimizer=adam"]


class Silent:
    def info(self, *args):
        pass


def run(directory, *overrides):
    """A run in this process: what it said, and what ended it."""
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        config = plain(hydra.compose("config", overrides=[*SMALL, *overrides]))
    prepared = build(config, Experiment).prepare()
    ended = None
    with (
        Recorder(directory, WandB(mode="disabled"), {}, Label("test")) as recorder,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="No loggers specified")
        try:
            prepared.run(recorder, Console(quiet=True), Silent())
        except FloatingPointError as error:
            ended = str(error)
    return [str(warning.message) for warning in caught if warning.category is UserWarning], ended


def logged(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


STIFF = {
    "ewc": ["strategy=ewc"],
    "kfac, paced": ["strategy=kfac_ewc"],
    "l2": ["strategy=l2"],
    "momentum": ["strategy=online_ewc", "optimizer.momentum=0.9", "optimizer.lr=0.02"],
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=pytest.mark.slow if n != "l2" else ()) for n, o in STIFF.items()],
    ids=STIFF,
)
def test_a_strength_beyond_the_limit_is_said_before_the_run_diverges(tmp_path, caplog, options):
    (tmp_path / "far").mkdir()
    said, ended = run(tmp_path / "far", *SGD, *options, "strategy.strength=1e5")
    (message,) = said
    assert "From task 2 on training diverges along the penalty's stiffest direction" in message
    assert "in task 2, step " in ended
    limit = float(message.partition("use a strength below ")[2].partition(",")[0])
    for share, diverges in ((0.5, False), (1.5, True)):
        directory = tmp_path / str(share)
        directory.mkdir()
        strength = f"strategy.strength={share * limit}"
        said, ended = run(directory, *SGD, *options, strength)
        assert (bool(said), ended is not None) == (diverges, diverges)


@pytest.mark.parametrize(
    "options",
    [[*SGD, "strategy=ewc", "strategy/update=implicit"], [*ADAM, "strategy=ewc"]],
    ids=["implicit", "adam"],
)
def test_where_no_limit_holds_none_is_claimed(tmp_path, options):
    said, ended = run(tmp_path, *options, "strategy.strength=1e5")
    assert (said, ended) == ([], None)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_penalty_that_does_not_matter_is_said_once(tmp_path, caplog, optimizer):
    said, _ = run(tmp_path, *optimizer, *SHORT, "strategy=ewc", "strategy.strength=1e-6")
    (message,) = said
    assert "The penalty did not matter in task 2, as at its end" in message
    assert message.endswith("use a larger strength than 1e-06.")


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_tasks_that_are_not_learnt_are_said_once(tmp_path, caplog, optimizer):
    firm = ["strategy=l2", "strategy.strength=18", "benchmark.scenario=class"]
    run(tmp_path, *optimizer, *SHORT, *firm)
    (message,) = [m for m in logged(caplog) if "not learnt" in m]
    assert message.startswith("Task 2 is not learnt: after its training the accuracy on it is ")


@pytest.mark.parametrize("strategy", ["naive", "ewc", "l2"])
def test_an_absurd_learning_rate_is_said_early_with_its_layer(tmp_path, caplog, strategy):
    options = [f"strategy={strategy}", "optimizer.lr=1e9", "training.iterations=150"]
    said, _ = run(tmp_path, *options)
    (message,) = [m for m in said if "times as large" in m]
    assert message.startswith("In task 1 the parameters ")
    assert "after step 99 as before training: the learning rate is probably too large." in message
    assert not [
        m for m in [*said, *logged(caplog)] if "did not matter" in m or "the loss went" in m
    ]


def test_a_run_that_learns_nothing_is_said_once(tmp_path, caplog):
    """All predictions are the same: the units are dead, at sizes that are not absurd."""
    options = ["strategy=naive", "optimizer=sgd", "training.iterations=30", "model.hidden=[5]"]
    run(tmp_path, *options, "optimizer.lr=1e6")
    (message,) = logged(caplog)
    assert message.startswith("Task 1 is not learnt: after its training the accuracy on it is ")
    assert message.endswith("so optimizer.lr is too small or too large, or training too short.")


def test_a_short_run_above_chance_is_not_said(tmp_path, caplog):
    run(tmp_path, "strategy=naive", *SGD, "training.iterations=15")
    assert logged(caplog) == []


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ([[0.98], [0.9, 0.55]], True),
        ([[0.98], [0.9, 0.70]], False),  # four standard errors above chance
        ([[0.55], [0.5, 0.55]], False),  # said after the first one
        ([[0.55]], True),
        ([[0.70]], False),
        ([[0.98], [0.9, 0.64]], True),  # 14 points above chance, where the first was 48
        ([[0.70], [0.6, 0.64]], True),  # at chance, by its standard error of 5 points
        ([[0.98], [0.9, 0.55], [0.9, 0.5, 0.5]], False),  # said before
    ],
)
def test_an_accuracy_no_better_than_chance_is_not_learnt(caplog, matrix, said):
    halves = torch.arange(100) % 2
    guessing = [accuracy_of_guessing(halves)] * 3
    warn_of_unlearnt([row + [0.0] * (3 - len(row)) for row in matrix], guessing)
    assert bool(caplog.records) == said


@pytest.mark.filterwarnings("ignore:The Fisher pass differentiates")
@pytest.mark.parametrize("estimator", [Exact(), MonteCarlo(1)], ids=["exact", "monte carlo"])
def test_a_zero_fisher_is_said(estimator):
    """Weights so large that all predictions are certain."""
    x = torch.from_numpy(load_digits().data[:50]).float()
    model = torch.nn.Linear(64, 10)
    with torch.no_grad():
        model.weight.mul_(1e6)
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    fisher = fisher_information(model, data, estimator=estimator)
    with pytest.warns(UserWarning, match=r"zero everywhere, so the penalty does not hold this"):
        EWCPenalty().consolidate(fisher, model)
