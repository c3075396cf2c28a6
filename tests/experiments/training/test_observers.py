"""What is recorded of a step, against autograd."""

import json

import hydra
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from conftest import EXACT
from counting import Operations
from rich.console import Console
from torch import nn

from ewc import Diagonal, EWCPenalty, Kronecker, fisher_information
from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.strategies.ewc import EWC
from experiments.training.observers import gradient_norms

SMALL = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[10]"]
SMALL += ["training.iterations=24"]
EWC_OF_TEN = ["strategy=ewc", "strategy.strength=10"]


def total(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=repr)
def test_the_parts_of_the_gradient_are_those_of_autograd(structure):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,))
    penalty = EWCPenalty(strength=3.0)
    for _ in range(2):  # two tasks
        penalty.consolidate(fisher_information(model, [(x, y)], structure=structure), model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.add_module("head", nn.Linear(3, 3).double())  # which the penalty does not know
    task = nn.functional.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    expected = [
        total(torch.autograd.grad(task, parameters, retain_graph=True)),
        total(g for g in torch.autograd.grad(penalty(model), parameters, allow_unused=True)
              if g is not None),
    ]  # fmt: skip
    assert penalty.last_gradient is None
    penalty.keeps_gradient = True
    (task + penalty(model)).backward()
    norms = gradient_norms(model, penalty.last_gradient)
    assert list(norms) == ["train/task_gradient_norm", "train/penalty_gradient_norm"]
    torch.testing.assert_close(list(norms.values()), expected, **EXACT)
    with torch.no_grad():
        penalty(model)
    assert penalty.last_gradient is None


def run(folder, *overrides, strategy=EWC_OF_TEN, plugin=None, monkeypatch=None):
    """The records of the steps of a run."""
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        config = plain(hydra.compose("config", overrides=[*SMALL, *strategy, *overrides]))
    prepared = build(config, Experiment).prepare()
    if plugin:
        plugins = EWC.plugins
        added = lambda self, fisher: [*plugins(self, fisher), plugin]  # noqa: E731
        monkeypatch.setattr(EWC, "plugins", added)
    folder.mkdir()
    with Recorder(folder, WandB(mode="disabled"), {}, Label("test")) as recorder:
        prepared.run(recorder, Console(quiet=True), Silent())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


class Silent:
    def info(self, *args):
        pass


class Probe(SupervisedPlugin):
    """Measures each step by itself, as the last plugin."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_backward(self, strategy, **_):
        task = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y)
        parts = {"train/task_loss": task, "train/penalty": strategy.loss.squeeze() - task}
        parameters = list(strategy.model.parameters())
        norms = []
        for part in parts.values():
            gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            norms.append(float(total(g for g in gradients if g is not None)))
        hits = strategy.mb_output.argmax(1) == strategy.mb_y
        self.steps.append(
            {name: float(part.detach()) for name, part in parts.items()}
            | {"train/accuracy": float(hits.float().mean())}
            | {"train/loss": float(strategy.loss.detach())}
            | {"train/learning_rate": strategy.optimizer.param_groups[0]["lr"]}
            | {"train/task_gradient_norm": norms[0], "train/penalty_gradient_norm": norms[1]}
        )

    def state(self):
        return {}

    def restore(self, state, strategy):
        pass


def test_a_record_is_what_autograd_says_of_the_step(tmp_path, monkeypatch):
    probe = Probe()
    records = run(tmp_path / "run", "training.anneal=true", plugin=probe, monkeypatch=monkeypatch)
    assert [record["step"] for record in records] == list(range(1, 49))
    rates = {record["train/learning_rate"] for record in records}
    assert len(rates) == 24
    for record, measured in zip(records, probe.steps, strict=True):
        names = measured.keys() & record.keys()
        assert len(names) >= 5
        for name in names:
            assert record[name] == pytest.approx(measured[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("strategy", ["lwf", "pseudo_rehearsal", "avalanche_ewc"])
def test_what_a_plugin_adds_to_the_loss_is_the_penalty(tmp_path, strategy):
    records = run(tmp_path / "run", strategy=[f"strategy={strategy}"])
    first, second = records[:24], records[26:]
    assert all(record["train/penalty"] == 0 for record in first)
    for record in second:
        parts = record["train/task_loss"] + record["train/penalty"]
        assert record["train/loss"] == pytest.approx(parts, rel=1e-6)
        assert record["train/penalty"] > 0
    # The gradients of the parts are not known.
    with_norm = [r["step"] for r in records if "train/task_gradient_norm" in r]
    assert with_norm == [10, 20]


@pytest.mark.parametrize(("every", "steps"), [(1, [10, 20, 30, 40]), (3, [12, 21, 30, 42]),
                                              (12, [12, 24, 36, 48])])  # fmt: skip
def test_one_record_of_ten_steps_has_the_norms(tmp_path, every, steps):
    records = run(tmp_path / "run", f"training.log_every={every}")
    assert [record["step"] for record in records] == list(range(every, 49, every))
    with_norms = [r["step"] for r in records if "train/task_gradient_norm" in r]
    assert with_norms == steps
    with_penalty = [r["step"] for r in records if "train/penalty_gradient_norm" in r]
    assert with_penalty == [step for step in steps if step > 24]


def test_a_record_reads_no_value_alone(tmp_path):
    """All values of a record are gathered on the device, and read as one list."""
    reads = []
    for number, options in enumerate((["training.log_every=1"], ["training.log_every=100"])):
        with Operations() as operations:
            run(tmp_path / str(number), *options)
        reads.append(operations.host_reads)
    assert reads[0] == reads[1]
