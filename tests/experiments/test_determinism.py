"""The same command gives the same bits, and options that are not to matter do not."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.recording import folder
from experiments.recording.folder import checkpoint_files
from experiments.recording.results import read_results

BASE = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[40]"]
BASE += ["model.dropout=0.3", "training.iterations=12", "wandb.mode=disabled"]
STRATEGIES = {
    "ewc": ["strategy=ewc"],
    "kfac": ["strategy=kfac_ewc"],
    "sampled": ["strategy=ewc", "fisher/estimator=monte_carlo", "fisher/structure=low_rank"],
    "mas": ["strategy=mas"],
}
SAME = {
    "again": [],
    "wandb": ["wandb.mode=offline"],
    "log_every": ["training.log_every=5"],
    "eval_batch_size": ["training.eval_batch_size=37"],
    "checkpoint_minutes": ["training.checkpoint_minutes=0"],
}


@pytest.fixture
def outcome(tmp_path, command_line, monkeypatch):
    """The weights, results and records of a run, with other global random states before each."""
    runs = iter(range(100))
    monkeypatch.setattr(folder, "PICTURES", ())  # they take longer than the training

    def run(*arguments, into=None):
        number = next(runs)
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        directory = into or tmp_path / str(number)
        place = [f"hydra.run.dir={directory}", f"hydra.sweep.dir={directory.parent}"]
        code, out, err = command_line(*arguments, *place)
        assert (code, err) == (0, ""), out
        return left_in(directory)

    return run


def left_in(directory):
    results = read_results(directory)
    for information in results["fisher"]:
        del information["seconds"]
    apart = {"seconds", "memory", "config", "overrides"}
    results = {k: results[k] for k in results.keys() - apart}
    weights = load_file(checkpoint_files(directory)[-1])
    return weights, results, (directory / "metrics.jsonl").read_text().splitlines()


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1:] == other[1:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_to_matter_does_not(outcome, strategy):
    weights, results, records = outcome(*BASE, *STRATEGIES[strategy])
    # Every option with the strategy that computes most.
    for name in SAME if strategy == "kfac" else ["eval_batch_size"]:
        other = outcome(*BASE, *STRATEGIES[strategy], *SAME[name])
        kept = [line for line in records if name != "log_every" or is_kept(line)]
        assert_same(other, (weights, results, kept))


def is_kept(line):
    """With a record of every fifth step."""
    record = json.loads(line)
    return record.get("step", 0) % 5 == 0


def test_the_seed_decides_and_zero_is_one(outcome):
    zero, again, one = (outcome(*BASE, "strategy=naive", f"seed={seed}") for seed in (0, 0, 1))
    assert_same(again, zero)
    assert zero[1]["accuracy_matrix"] != one[1]["accuracy_matrix"]
    assert not torch.equal(zero[0]["training/model/0.weight"], one[0]["training/model/0.weight"])


def test_a_job_of_a_sweep_is_the_run_alone(tmp_path, outcome):
    alone = outcome(*BASE, "strategy=kfac_ewc", "seed=1")
    sweep = ["-m", *BASE, "strategy=kfac_ewc", "seed=0,1"]
    assert_same(outcome(*sweep, into=tmp_path / "sweep" / "1"), alone)


@pytest.mark.slow
def test_launchers_do_not_matter(tmp_path, outcome):
    sweep = ["-m", *BASE, "seed=0", "strategy=ewc,kfac_ewc"]
    outcome(*sweep, into=tmp_path / "basic" / "0")
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    place = f"hydra.sweep.dir={tmp_path / 'joblib'}"
    command = [sys.executable, "-m", "experiments.run", *sweep, *joblib, place]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    for job in "01":
        assert_same(left_in(tmp_path / "joblib" / job), left_in(tmp_path / "basic" / job))
