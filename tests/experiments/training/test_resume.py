"""A run that is interrupted ends as one that is not, bit by bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from safetensors.torch import load_file

from ewc.tensor_file import joined, separated
from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.configuration.targets import ConfigurationError
from experiments.experiment import Experiment
from experiments.recording.checkpoints import FORMAT, Checkpoints
from experiments.recording.folder import checkpoint_files
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.strategies.strategy import Naive
from experiments.training.resume import Continuation, random_states, restore_random_states
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

    def log(self, record, **others):
        super().log(record, **others)
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
    with Stopping(directory, disabled, {}, Label("test"), state=recorded) as recorder:
        recorder.stop, recorder.after = continuation.stop, after
        if after:
            with pytest.raises(SystemExit) as end:
                prepared.run(recorder, Console(quiet=True), Silent(), continuation)
            assert end.value.code == 143
            return None
        results = prepared.run(recorder, Console(quiet=True), Silent(), continuation)
    return results, prepared.model.state_dict(), recorder.curve


def outcome(directory, *overrides, stops=()):
    """What is left of a run that is stopped some times: all but the time."""
    for after in stops:
        assert run(directory, *overrides, after=after) is None
    results, weights, curve = run(directory, *overrides)
    return without_measurements(results), weights, curve, (directory / "metrics.jsonl").read_text()


def without_measurements(results):
    """The results without what the machine decides: times and memory."""
    for information in results["fisher"]:
        del information["seconds"]
    return {key: results[key] for key in results.keys() - {"seconds", "memory"}}


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
    "pseudo-rehearsal": ["strategy=pseudo_rehearsal"],
    "avalanche": ["strategy=avalanche_ewc"],
    "sgd": ["strategy=naive", "optimizer=sgd", "optimizer.momentum=0.9"],
    "annealed": ["strategy=ewc", "training.anneal=true", "training.reset_optimizer=false"],
    "averaged": ["strategy=ewc", "training.tail_average=0.8"],
    "heads": ["strategy=kfac_ewc", "benchmark.scenario=task"],
    "heads, lwf": ["strategy=lwf", "benchmark.scenario=task"],
    "heads, pseudo-rehearsal": ["strategy=pseudo_rehearsal", "benchmark.scenario=task"],
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_an_interrupted_run_ends_as_any_other(tmp_path, overrides):
    whole = outcome(tmp_path / "whole", *overrides)
    # In the first task, after it, in and at the last step of the second, and in the third.
    pieces = outcome(tmp_path / "pieces", *overrides, stops=[4, 6, 5, 4, 4])
    assert_same(pieces, whole)
    assert len(checkpoint_files(tmp_path / "pieces")) == 2
    assert_same(outcome(tmp_path / "pieces", *overrides), whole)  # from the last checkpoint


# --- checkpoints that cannot be used ------------------------------------------------------

FEW = ["strategy=ewc", "training.iterations=4", "benchmark.num_tasks=2"]
EACH = [*FEW, "training.checkpoint_minutes=0"]


def stopped(directory, *overrides, after=7):
    """A folder with the checkpoints of a run that was stopped in its second task."""
    assert run(directory, *overrides, after=after) is None
    return checkpoint_files(directory)


def test_the_newest_two_checkpoints_stay(tmp_path):
    names = [path.name for path in stopped(tmp_path, *EACH)]
    assert names == [f"task0001-step0000000{step}.safetensors" for step in (1, 2)]
    names = [path.name for path in stopped(tmp_path / "other", *FEW)]
    assert names == [f"task0001-step0000000{step}.safetensors" for step in (0, 2)]
    none = [*FEW, "training.checkpoint_minutes=null"]
    assert [path.name for path in stopped(tmp_path / "none", *none, after=2)] == [
        "task0000-step00000002.safetensors"  # of the signal
    ]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: os.truncate(path, 1000), lambda path: path.write_bytes(b"")],
    ids=["flipped", "cut", "empty"],
)
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path, caplog, damage, damaged
):
    whole = outcome(tmp_path / "whole", *EACH)
    files = stopped(tmp_path / "pieces", *EACH)
    for path in files[-damaged:]:
        damage(path)
    pieces = outcome(tmp_path / "pieces", *EACH)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    named = [message for message in messages if "goes on from the checkpoint before" in message]
    assert [path.name in message for path, message in zip(files[::-1], named, strict=False)] == [
        True
    ] * damaged
    assert_same(pieces, whole)


def test_a_checkpoint_whose_records_are_lost_is_not_taken(tmp_path, caplog):
    whole = outcome(tmp_path / "whole", *EACH)
    stopped(tmp_path / "pieces", *EACH)
    path = tmp_path / "pieces" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(outcome(tmp_path / "pieces", *EACH), whole)
    assert "bytes of records" in caplog.text


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    whole = outcome(tmp_path / "whole", *FEW)
    stopped(tmp_path / "pieces", *FEW)
    with (tmp_path / "pieces" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "task": 1, "train/loss": 0.1}\n{"step": 8, "ta')
    assert_same(outcome(tmp_path / "pieces", *FEW), whole)


def test_a_damaged_record_costs_no_training(tmp_path, caplog):
    whole = outcome(tmp_path / "whole", *FEW)
    stopped(tmp_path / "pieces", *FEW)
    path = tmp_path / "pieces" / "metrics.jsonl"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    results, weights, curve, _ = outcome(tmp_path / "pieces", *FEW)
    assert "metrics.jsonl has 1 damaged lines, the first of them line 1" in caplog.text
    assert results == whole[0]
    torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)
    assert len(curve.points) == len(whole[2].points) - 1


def test_another_configuration_is_refused(tmp_path):
    stopped(tmp_path, *FEW)
    with pytest.raises(ConfigurationError, match="is of another configuration: choose another"):
        run(tmp_path, *FEW, "seed=1")
    assert run(tmp_path, *EACH)  # which decides nothing


@pytest.mark.parametrize("name", ["ewc", "torch", "device"])
def test_another_version_or_device_is_refused(tmp_path, name):
    files = stopped(tmp_path, *FEW)
    versions = build(compose(*FEW), Experiment).prepare().deciding_versions
    with pytest.raises(ConfigurationError, match=f"was written with {name} .* {name} other, so"):
        run(tmp_path, *FEW, versions=versions | {name: "other"})
    assert checkpoint_files(tmp_path) == files


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.recording.checkpoints.FORMAT", FORMAT + 1)
    stopped(tmp_path, *FEW)
    monkeypatch.undo()
    with pytest.raises(
        ConfigurationError, match=f"has format {FORMAT + 1}, and .* reads format {FORMAT}"
    ):
        run(tmp_path, *FEW)


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    whole = outcome(tmp_path / "whole", *EACH)
    directory = tmp_path / "pieces"
    files = stopped(directory, *EACH, after=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ewc.tensor_file.os.fsync", full)
        assert run(directory, *EACH, after=5) is None
    assert checkpoint_files(directory) == files
    assert sorted((directory / "checkpoints").iterdir()) == files
    assert "checkpoints: [Errno 28] No space left on device: '" in caplog.text
    assert "; the run goes on without" in caplog.text
    assert_same(outcome(directory, *EACH), whole)


@pytest.mark.parametrize("lost", ["parameters", "state"])
def test_lost_numbers_are_not_kept(tmp_path, lost):
    files = stopped(tmp_path, *EACH, after=2)

    class Lost(Stopping):
        def log(self, record, **others):
            super().log(record, **others)
            weight = prepared.model[0].weight
            state = prepared.optimizer.state[weight]
            with torch.no_grad():
                (weight if lost == "parameters" else state["exp_avg_sq"]).fill_(torch.inf)

    config = compose(*EACH)
    prepared = build(config, Experiment).prepare()
    checkpoints = Checkpoints(tmp_path, config, prepared.deciding_versions)
    state = checkpoints.newest()
    disabled = WandB(mode="disabled")
    with (
        Lost(tmp_path, disabled, {}, Label("test"), state=state["recorder"]) as recorder,
        pytest.raises(FloatingPointError),
    ):
        prepared.run(recorder, Console(quiet=True), Silent(), Continuation(checkpoints, state))
    assert checkpoint_files(tmp_path) == files


class Foreign(SupervisedPlugin):
    """Has no state() and restore()."""


def test_a_plugin_without_a_state_means_no_checkpoints(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Naive, "plugins", lambda *_: [Foreign()])
    assert run(tmp_path, *FEW, "strategy=naive")
    assert checkpoint_files(tmp_path) == []
    assert "Foreign has no state() and restore(), so no checkpoints are written." in caplog.text


# --- the random states --------------------------------------------------------------------


def test_random_states_come_back():
    def draws():
        numpy = np.random.normal(size=3).tolist()
        return torch.randn(3).tolist(), numpy, random.gauss(0, 1), random.random()

    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    np.random.normal()
    random.gauss(0, 1)  # both keep a second number
    tensors, outline = separated(random_states(torch.device("cpu")))
    expected = draws()
    draws()
    states = joined(tensors, json.loads(json.dumps(outline)))
    restore_random_states(states, torch.device("cpu"))
    assert draws() == expected


# --- processes ----------------------------------------------------------------------------


def command(directory, *overrides):
    """``python -m experiments.run`` as a process of its own."""
    arguments = [*overrides, *(o for o in SMALL if o.partition("=")[0] not in str(overrides))]
    arguments += [f"hydra.run.dir={directory}"]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(directory, *overrides):
    """The results without the time, the newest tensors, and the records, of a run to its end."""
    process = command(directory, *overrides)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    results = json.loads((directory / "results.json").read_text())
    results = without_measurements(results)
    del results["config"], results["overrides"]
    tensors = load_file(checkpoint_files(directory)[-1])
    return results, tensors, (directory / "metrics.jsonl").read_text(), out


def when(directory, process, records):
    """Wait until a run has written some records."""
    path = directory / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= records:
            return
        time.sleep(0.001)


PROCESSES = {
    "ewc": ["strategy=ewc"],
    "kfac": ["strategy=kfac_ewc", "training.tail_average=0.5", "training.reset_optimizer=false"],
}
LONG = ["training.iterations=60", "training.checkpoint_minutes=0"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", PROCESSES.values(), ids=PROCESSES)
def test_a_killed_run_ends_as_any_other(tmp_path, overrides):
    whole = finish(tmp_path / "whole", *LONG, *overrides)
    killed = 0
    for records in (7, 60, 61, 122):  # the second and the third around a Fisher pass
        process = command(tmp_path / "pieces", *LONG, *overrides)
        when(tmp_path / "pieces", process, records)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed == 4
    pieces = finish(tmp_path / "pieces", *LONG, *overrides)
    assert "continued in task" in pieces[3]
    assert pieces[0] == whole[0]
    torch.testing.assert_close(pieces[1], whole[1], rtol=0, atol=0)
    assert pieces[2] == whole[2]


SIGNALLED = ["strategy=ewc", "training.iterations=60", "wandb.mode=offline"]


@pytest.fixture(scope="module")
def unsignalled(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("run"), *SIGNALLED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_a_signal_ends_a_run_after_its_step(tmp_path, unsignalled, number, code):
    directory = tmp_path / "run"
    process = command(directory, *SIGNALLED)
    when(directory, process, 70)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    (line,) = [line for line in out.splitlines() if "the run stops" in line]
    assert f"{number.name}: the run stops in task 2 after step " in line
    assert "Traceback" not in out
    assert not (directory / "results.json").exists()
    pieces = finish(directory, *SIGNALLED)
    assert pieces[0] == unsignalled[0]
    torch.testing.assert_close(pieces[1], unsignalled[1], rtol=0, atol=0)
    assert pieces[2] == unsignalled[2]
    runs = {path.name.rpartition("-")[2] for path in directory.glob("wandb/offline-run-*")}
    assert len(runs) == 1
    assert len(list(directory.glob("wandb/offline-run-*"))) == 2
    last = pieces[3].strip().splitlines()[-1]
    assert last.count(f"-{runs.pop()}") == 2


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path):
    slow = ["strategy=joint", "training.iterations=20", "training.batch_size=2000000"]
    process = command(tmp_path, *slow, "model.hidden=[4000,4000]")
    when(tmp_path, process, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert checkpoint_files(tmp_path) == []


@pytest.mark.slow
def test_a_sweep_ends_with_its_job_and_goes_on(tmp_path):
    overrides = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "training.iterations=60"]
    process = command(tmp_path / "none", *overrides)
    when(tmp_path / "0", process, 70)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not (tmp_path / "1").exists()
    process = command(tmp_path / "none", *overrides)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.count("continued in task 2") == 1
    assert [(tmp_path / job / "results.json").exists() for job in "01"] == [True, True]
