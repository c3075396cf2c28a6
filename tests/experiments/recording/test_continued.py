"""``resume=DIR`` continues a run from its folder alone."""

import json
import os
import shlex
import signal

import pytest

from experiments.configuration.targets import ConfigurationError
from experiments.recording import folder
from experiments.recording.continued import with_resume
from experiments.recording.folder import OWNER
from experiments.recording.results import read_results
from experiments.recording.tracking import Recorder

SMALL = ["model.hidden=[8]", "training.iterations=20", "training.batch_size=16"]
SMALL += ["benchmark.num_tasks=2", "wandb.mode=disabled", "strategy=ewc", "seed=3"]


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(folder, "PICTURES", ())  # they take longer than the training


@pytest.fixture
def stopping(monkeypatch):
    """Have a signal come while some record is written."""
    log = Recorder.log

    def after(records):
        seen = iter(range(1, 10**6))

        def logged(self, record, **others):
            log(self, record, **others)
            if next(seen) == records:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Recorder, "log", logged)

    return after


def results_of(directory):
    results = read_results(directory)
    for information in results["fisher"]:
        del information["seconds"]
    return {key: results[key] for key in results.keys() - {"seconds", "memory", "overrides"}}


def test_the_command_in_the_message_continues_the_run(tmp_path, command_line, stopping):
    whole, pieces = tmp_path / "whole", tmp_path / "a 'quoted', folder"
    assert command_line(*SMALL, f"hydra.run.dir={whole}")[0] == 0
    stopping(25)
    quoted = str(pieces).replace("'", "\\'")
    code, out, err = command_line(*SMALL, f"hydra.run.dir='{quoted}'")
    assert (code, err) == (143, "")
    (line,) = [line for line in out.splitlines() if "SIGTERM: " in line]
    command = shlex.split(line.partition("checkpoint: python -m experiments.run ")[2])
    assert command == [f"resume={os.path.relpath(pieces)}"]
    code, out, err = command_line(*command)
    assert (code, err) == (0, "")
    assert "continued in task 2 after step 4" in out
    assert results_of(pieces) == results_of(whole)
    assert (pieces / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert "already done" in command_line(*command)[1]


def test_a_job_of_a_sweep_is_continued_alone(tmp_path, command_line, stopping):
    sweep = ["-m", *SMALL[:-1], "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    stopping(25)
    code, out, _ = command_line(*sweep)
    assert code == 143
    assert f"the same command with hydra.sweep.dir={os.path.relpath(tmp_path)}" in out
    code, out, err = command_line(f"resume={tmp_path}/0", "training.checkpoint_minutes=null")
    assert (code, err) == (0, "")
    assert "continued in task 2" in out
    assert read_results(tmp_path / "0")["seed"] == 1
    assert not (tmp_path / "1").exists()
    assert command_line(*sweep)[0] == 0
    assert read_results(tmp_path / "1")["seed"] == 2


@pytest.mark.parametrize("other", ["seed=3", "-m", "hydra.run.dir=elsewhere", "+model.new=1"])
def test_options_that_decide_are_refused(tmp_path, command_line, other):
    code, _, err = command_line(f"resume={tmp_path}", other)
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"so {other!r} is not taken" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"overrides": "seed=1"}',
        '{"overrides": [1]}',
        '{"overrides": ["seed=1", "-m"]}',
        '{"overrides": ["--config-dir=elsewhere"]}',
        '{"overrides": ["hydra.sweep.dir=elsewhere"]}',
        '{"overrides": ["+hydra.callbacks.x._target_=os.getcwd"]}',
        '{"overrides": ["hydra/launcher=joblib"]}',
    ],
)
def test_a_folder_without_the_options_of_a_run_is_refused(tmp_path, command_line, content):
    (tmp_path / OWNER).write_text(content)
    code, _, err = command_line(f"resume={tmp_path}")
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"{tmp_path / OWNER} does not say how a run was started" in err


def test_only_the_command_line_trusts_modules(tmp_path):
    overrides = ["trusted=[evil]", "seed=1", "wandb.mode=offline"]
    (tmp_path / OWNER).write_text(json.dumps({"overrides": overrides}))
    arguments = with_resume([f"resume={tmp_path}", "wandb.mode=disabled"])
    assert arguments[:-2] == ["seed=1", "wandb.mode=disabled"]
    with pytest.raises(ConfigurationError, match="is not taken"):
        with_resume(["resume=x", "trust=[evil]"])


def test_other_defaults_than_those_of_the_run_are_refused(tmp_path, command_line):
    assert command_line(*SMALL, f"hydra.run.dir={tmp_path}")[0] == 0
    owner = json.loads((tmp_path / OWNER).read_text())
    owner["overrides"].remove("seed=3")
    (tmp_path / OWNER).write_text(json.dumps(owner))
    code, _, err = command_line(f"resume={tmp_path}")
    assert code == 1
    assert "another configuration (seed is 3 there and 0 here)" in err


@pytest.mark.parametrize("given", ["", "{}/nothing", "{}"])
def test_what_is_no_folder_of_a_run_is_named(tmp_path, command_line, given):
    code, _, err = command_line(f"resume={given.format(tmp_path)}")
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"resume={given.format(tmp_path)} names no folder of a run" in err


def test_a_folder_chooses_no_data_elsewhere(tmp_path, command_line, stopping):
    elsewhere, run = tmp_path / "data", tmp_path / "run"
    stopping(5)
    code, out, _ = command_line(*SMALL, f"hydra.run.dir={run}", f"data_root={elsewhere}")
    assert code == 143
    (line,) = [line for line in out.splitlines() if "SIGTERM: " in line]
    command = shlex.split(line.partition("checkpoint: python -m experiments.run ")[2])
    assert command == [f"resume={os.path.relpath(run)}", f"data_root={elsewhere}"]
    code, _, err = command_line(command[0])
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"has data_root={elsewhere}, which a file may not choose" in err
    assert command_line(*command)[0] == 0


def test_a_run_of_a_configuration_of_ones_own_is_continued(tmp_path, command_line, stopping):
    own = tmp_path / "configs" / "model"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: experiments.training.models.MLP\nhidden: [8]\n")
    flag = f"--config-dir={os.path.relpath(tmp_path / 'configs')}"
    given = [flag, *SMALL[1:], "model=mine", "trusted=[counting]"]
    stopping(25)
    code, out, _ = command_line(*given, f"hydra.run.dir={tmp_path}/run")
    assert code == 143
    (line,) = [line for line in out.splitlines() if "SIGTERM: " in line]
    command = shlex.split(line.partition("checkpoint: python -m experiments.run ")[2])
    assert command == [flag, f"resume={os.path.relpath(tmp_path / 'run')}", "trusted=[counting]"]
    code, _, err = command_line(*command)
    assert code == 0, err
    assert read_results(tmp_path / "run")["flags"] == [flag]
