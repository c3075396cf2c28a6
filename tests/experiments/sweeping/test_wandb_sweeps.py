"""The sweeps for W&B: the command that its agent makes of them runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from experiments.configuration.command_line import CONFIGS
from experiments.recording.results import read_results

ROOT = Path(CONFIGS).parent

SWEEPS = sorted((Path(CONFIGS) / "wandb_sweep").glob("*.yaml"))


def agents_command(sweep, values):
    """What ``Agent._command_run`` in ``wandb/wandb_agent.py`` starts for a run of a sweep."""
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    args |= {"interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    command = []
    for word in map(str, create_sweep_command(sweep["command"])):
        is_macro = word.startswith("${") and word.endswith("}")
        command += (args.get(word[2:-1]) or []) if is_macro else [word]
    return command


def some_values(sweep):
    """Values of the parameters, as W&B's server draws them."""
    for name, parameter in sweep["parameters"].items():
        if "values" in parameter:
            yield name, parameter["values"][-1]
        elif "value" in parameter:
            yield name, parameter["value"]
        else:
            assert parameter["distribution"] == "log_uniform_values"
            assert 0 < parameter["min"] < parameter["max"]
            yield name, parameter["min"] + 0.123456789012345


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_agents_command_runs(tmp_path, path):
    sweep = yaml.safe_load(path.read_text())
    values = dict(some_values(sweep))
    command = agents_command(sweep, values)
    assert command[:4] == ["/usr/bin/env", "python", "-m", "experiments.run"]
    assert (ROOT / sweep["program"]).exists()
    small = ["model.hidden=[10]", "training.iterations=2", "benchmark.num_tasks=2"]
    done = subprocess.run(
        [sys.executable, *command[2:], *small, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT,
        env=os.environ | {"WANDB_RUN_ID": "given", "WANDB_SWEEP_ID": "sweep"},  # as the agent
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "run")
    assert sweep["metric"]["name"] in results
    for name, value in values.items():
        found = results["config"]
        for key in name.split("."):
            found = found[key]
        if name != "strategy":
            assert found == value
    assert [p.name.rpartition("-")[2] for p in tmp_path.glob("run/wandb/offline-run-*")] == [
        "given"
    ]


def test_both_kinds_of_sweep_are_there():
    assert {yaml.safe_load(path.read_text())["method"] for path in SWEEPS} == {"bayes", "grid"}
