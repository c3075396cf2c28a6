"""A run that is interrupted ends as one that is not, bit by bit."""

import signal
from pathlib import Path

import hydra
import pytest
import torch
from rich.console import Console

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.reporting.checkpoints import Checkpoints
from experiments.reporting.folder import checkpoint_files
from experiments.reporting.tracking import Recorder, WandB
from experiments.training.resume import Continuation
from experiments.training.stop import Stop

ROOT = Path(CONFIGS).parent
SMALL = ["model.hidden=[70]", "training.iterations=9", "training.batch_size=300"]
SMALL += ["benchmark=permuted_digits", "benchmark.num_tasks=3", "model.dropout=0.2"]
SMALL += ["wandb.mode=disabled"]


class Silent:
    def info(self, *args):
        pass


class Stopping(Recorder):
    """Has a signal come while some record is written."""

    stop, after = None, 0

    def log(self, record):
        super().log(record)
        self.after -= 1
        if self.after == 0:
            self.stop.signal = signal.SIGTERM


def compose(*overrides):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return plain(hydra.compose("config", overrides=[*SMALL, *overrides]))


def run(directory, *overrides, after=0, versions=None):
    """A run in this process; ``None`` if it was stopped."""
    directory.mkdir(exist_ok=True)
    config = compose(*overrides)
    prepared = build(config, Experiment).prepare()
    checkpoints = Checkpoints(directory, config, versions or prepared.deciding_versions)
    state = checkpoints.newest()
    recorded = state["recorder"] if state else None
    continuation = Continuation(checkpoints, state, Stop())
    disabled = WandB(mode="disabled")
    with Stopping(directory, disabled, {}, "test", None, state=recorded) as recorder:
        recorder.stop, recorder.after = continuation.stop, after
        if after:
            with pytest.raises(SystemExit) as end:
                prepared.run(recorder, Console(quiet=True), Silent(), continuation)
            assert end.value.code == 143
            return None
        results = prepared.run(recorder, Console(quiet=True), Silent(), continuation)
    return results, prepared.model.state_dict(), recorder.steps


def outcome(directory, *overrides, stops=()):
    """What is left of a run that is stopped some times: all but the time."""
    for after in stops:
        assert run(directory, *overrides, after=after) is None
    results, weights, steps = run(directory, *overrides)
    del results["seconds"]
    return results, weights, steps, (directory / "metrics.jsonl").read_text()


def assert_same(one, other):
    assert one[0] == other[0]
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
    assert one[2:] == other[2:]


CASES = {
    "naive": ["strategy=naive"],
    "joint": ["strategy=joint"],
    "ewc": ["strategy=ewc"],
    "online": ["strategy=online_ewc", "training.reset_optimizer=false"],
    "kfac": ["strategy=kfac_ewc"],
    "implicit": ["strategy=kfac_ewc", "strategy/update=implicit", "strategy.update.every=2"],
    "low rank": ["strategy=ewc", "fisher/structure=low_rank", "fisher.structure.rank=3"],
    "matrix-free": ["strategy=ewc", "fisher/structure=implicit"],
    "si": ["strategy=si"],
    "mas": ["strategy=mas"],
    "l2": ["strategy=l2"],
    "lwf": ["strategy=lwf"],
    "avalanche": ["strategy=avalanche_ewc"],
    "sgd": ["strategy=naive", "optimizer=sgd", "optimizer.momentum=0.9"],
    "annealed": ["strategy=ewc", "training.anneal=true", "training.reset_optimizer=false"],
    "averaged": ["strategy=ewc", "training.tail_average=0.8"],
    "heads": ["strategy=kfac_ewc", "benchmark.scenario=task"],
    "heads, lwf": ["strategy=lwf", "benchmark.scenario=task"],
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_an_interrupted_run_ends_as_any_other(tmp_path, overrides):
    whole = outcome(tmp_path / "whole", *overrides)
    # In the first task, after it, in and at the last step of the second, and in the third.
    pieces = outcome(tmp_path / "pieces", *overrides, stops=[4, 6, 5, 4, 4])
    assert_same(pieces, whole)
    assert len(checkpoint_files(tmp_path / "pieces")) == 2
    assert_same(outcome(tmp_path / "pieces", *overrides), whole)  # from the last checkpoint
