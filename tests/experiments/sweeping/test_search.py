"""A search with Optuna: its trials, its end, and how it goes on."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.recording.sweep import failures

ROOT = Path(__file__).parents[3]
SMALL = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[10]"]
SMALL += ["wandb.mode=disabled", "training.iterations=2"]
SEARCH = ["-m", "hydra/sweeper=optuna", "strategy.strength=tag(log,interval(1,1000))", *SMALL]


@pytest.fixture
def search(tmp_path, command_line):
    def run(*arguments, into="search"):
        return command_line(*arguments, f"hydra.sweep.dir={tmp_path / into}")

    return run


def summary(folder):
    return json.loads((folder / "optimization.json").read_text())


def ends(folder):
    """When each job wrote its results."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/results.json")}


@pytest.mark.slow
def test_a_search_goes_on_as_if_it_had_not_stopped(search, tmp_path):
    code, out, _ = search(*SEARCH, "hydra.sweeper.n_trials=4", into="whole")
    assert code == 0
    whole = summary(tmp_path / "whole")
    best = whole["best"]
    assert best["value"] == max(trial["value"] for trial in whole["trials"])
    assert f"best of 4 trials: job {best['trial']}, " in out
    assert best["command"] in out
    assert search(*SEARCH, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1")[0] == 0
    before = ends(tmp_path / "search")
    assert sorted(before) == ["0", "1"]
    assert search(*SEARCH, "hydra.sweeper.n_trials=4")[0] == 0
    after = ends(tmp_path / "search")
    assert sorted(after) == [str(number) for number in range(4)]
    assert before.items() <= after.items()
    assert summary(tmp_path / "search") == whole
    strengths = {trial["options"]["strategy.strength"] for trial in whole["trials"]}
    assert len(strengths) == 4
    again = search(*SEARCH, "hydra.sweeper.n_trials=4")
    assert again[0] == 0
    assert ends(tmp_path / "search") == after


@pytest.mark.slow
def test_the_command_of_the_best_trial_gives_its_accuracy(search, tmp_path, command_line):
    assert search(*SEARCH, "hydra.sweeper.n_trials=2")[0] == 0
    best = summary(tmp_path / "search")["best"]
    words = best["command"].split()
    assert words[:3] == ["python", "-m", "experiments.run"]
    options = [word.strip("'") for word in words[3:]]
    assert command_line(*options, f"hydra.run.dir={tmp_path}/best")[0] == 0
    results = json.loads((tmp_path / "best" / "results.json").read_text())
    assert results["average_accuracy"] == best["value"]


@pytest.mark.slow
def test_a_search_keeps_away_from_what_fails(search, tmp_path):
    failing = ["-m", "hydra/sweeper=optuna", *SMALL, "strategy=ewc", "strategy.strength=1,-1"]
    failing += ["hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2"]
    code, _, err = search(*failing)
    trials = summary(tmp_path / "search")["trials"]
    failed = failures(tmp_path / "search")
    assert code == 1
    assert {trial["options"]["strategy.strength"] for trial in trials} == {"1"}
    assert len(trials) + len(failed) == 8
    assert 1 <= len(failed) <= 4
    assert f"error: {len(failed)} job" in err
    before = ends(tmp_path / "search")
    code, _, again = search(*failing)  # only they run, and are named again
    assert code == 1
    assert again.splitlines()[-1] == err.splitlines()[-1]
    assert ends(tmp_path / "search") == before


@pytest.mark.slow
def test_a_job_that_failed_runs_again(search, tmp_path, command_line):
    """Here its folder belongs to another run at first."""
    other = tmp_path / "search" / "0"
    assert command_line(*SMALL, "seed=5", f"hydra.run.dir={other}")[0] == 0
    code, out, err = search(*SEARCH, "hydra.sweeper.n_trials=1")
    assert code == 1
    assert "error: 1 job of the sweep failed: job 0 (" in err
    assert "best of" not in out
    shutil.rmtree(other)
    code, out, err = search(*SEARCH, "hydra.sweeper.n_trials=1")
    assert code == 0, err
    assert "best of 1 trials: job 0, " in out


@pytest.mark.slow
def test_a_job_that_diverges_is_the_worst(search, tmp_path):
    wild = ["-m", "hydra/sweeper=optuna", *SMALL, "strategy=naive", "training.iterations=40"]
    wild += ["optimizer=sgd", "optimizer.lr=1e30,0.01", "hydra.sweeper.n_trials=4"]
    code, _, err = search(*wild)
    assert code == 0, err
    for trial in summary(tmp_path / "search")["trials"]:
        assert (trial["value"] == 0) == (trial["options"]["optimizer.lr"] == "1e+30")


def test_another_search_in_the_folder_is_refused(search, tmp_path):
    assert search(*SEARCH, "hydra.sweeper.n_trials=1")[0] == 0
    before = ends(tmp_path / "search")
    others = [
        [*SEARCH[:2], "strategy.strength=interval(1,1000)", *SMALL],
        [*SEARCH, "seed=3"],
    ]
    for other in others:
        code, _, err = search(*other)
        assert code == 1
        assert "holds another search" in err
        assert "hydra.sweep.dir=DIR" in err
    assert ends(tmp_path / "search") == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hydra.sweeper.n_trials=0", "n_trials must be at least 1"),
        ("hydra.sweeper.direction=up", "'hydra.sweeper.direction' is 'up'"),
        ("+hydra.sweeper.trials=3", "Unknown option 'hydra.sweeper.trials'"),
        (
            "hydra.sweeper.sampler._target_=experiments.job.accuracy_of_job",
            "'hydra.sweeper.sampler._target_'",
        ),
        ("strategy=ewc,bogus", "Could not find 'strategy/bogus'"),
        ("strategy.strenght=interval(1,2)", "Unknown option 'strategy.strenght'"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_trial(search, tmp_path, option, message):
    code, _, err = search(*SEARCH, "hydra.sweeper.n_trials=2", option)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert ends(tmp_path / "search") == {}


@pytest.mark.slow
def test_a_killed_search_finishes_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "experiments.run", *SEARCH, "training.iterations=20"]
    command += ["hydra.sweeper.n_trials=12", "training.checkpoint_minutes=0"]
    command += [f"hydra.sweep.dir={tmp_path}"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    cut = tmp_path / "6" / "checkpoints"
    until = time.monotonic() + 240
    try:
        while not list(cut.glob("*.safetensors")):
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        first.kill()
        first.communicate()
    before = ends(tmp_path)
    assert sorted(before) == [str(number) for number in range(6)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    after = ends(tmp_path)
    assert sorted(after, key=int) == [str(number) for number in range(12)]
    assert before.items() <= after.items()
    log = (tmp_path / "6" / "run.log").read_text()
    assert "continued in task" in log
    found = summary(tmp_path)["trials"]
    assert [trial["trial"] for trial in found] == list(range(12))
    assert len({trial["options"]["strategy.strength"] for trial in found}) == 12
