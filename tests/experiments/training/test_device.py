"""The GPU of a job, with GPUs that are not there."""

import pytest
import torch

from experiments import job
from experiments.training.device import take_device

SMALL = ["-m", "benchmark.num_tasks=2", "model.hidden=[10]", "training.iterations=1"]
SMALL += ["strategy=naive", "wandb.mode=disabled", "seed=0"]


@pytest.fixture
def taken(monkeypatch):
    """The GPUs that become the current ones, of three."""
    devices = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


def test_jobs_side_by_side_take_one_gpu_after_the_other(tmp_path, command_line, monkeypatch, taken):
    assert command_line(*SMALL, f"hydra.sweep.dir={tmp_path}")[0] == 0
    assert taken == [], "one by one they take the first"
    monkeypatch.setattr(job, "_runs_beside_others", lambda: True)  # in this process
    sweep = [*SMALL[:-1], "seed=3,4"]
    assert command_line(*sweep, f"hydra.sweep.dir={tmp_path}/side")[0] == 0
    assert taken == [0, 1]
    assert "device: auto" in (tmp_path / "side" / "1" / "config.yaml").read_text()


def test_the_gpus_are_taken_in_turns(taken):
    for number in range(5):
        take_device(number)
    assert taken == [0, 1, 2, 0, 1]
