"""The examples run as files, and print what EWC is good for."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def printed_accuracies(stdout):
    """The test accuracies in each printed row, by the row's name."""
    rows = re.findall(r"^(with\w* EWC)((?: +[\d.]+)+)$", stdout, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


@pytest.mark.parametrize(
    "name",
    [
        "plain_loop.py",
        pytest.param("ewc_from_scratch.py", marks=pytest.mark.slow),
        pytest.param("avalanche_plugin.py", marks=pytest.mark.slow),
    ],
)
def test_ewc_forgets_less(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    accuracy = printed_accuracies(done.stdout)
    assert set(accuracy) == {"without EWC", "with EWC"}
    naive, ewc = accuracy["without EWC"], accuracy["with EWC"]
    assert naive[0] < 65 < naive[-1]
    assert min(ewc) > 70
    assert sum(ewc) / len(ewc) > sum(naive) / len(naive) + 15
    assert not list(tmp_path.iterdir())


OWN = FOLDER / "own_experiment"

COMMANDS = re.findall(
    r"^python -m experiments\.run (.*)$",
    (FOLDER.parent / "docs" / "own_experiment.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_own_network_data_and_strategy_run_by_the_commands_of_the_page(command, tmp_path):
    shutil.copytree(OWN, tmp_path / "own", ignore=shutil.ignore_patterns("outputs", "multirun"))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *shlex.split(command)],
        cwd=tmp_path / "own",
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "--help" in command:
        assert {"model=convnet", "benchmark=permuted_wine"} <= set(done.stdout.split())
        return
    (folder,) = (tmp_path / "own").glob("*run/*/*" if "-m" in command else "outputs/*/*")
    results = list(folder.glob("**/results.json"))
    assert len(results) == (6 if "-m" in command else 1)
    for path in results:
        options = set(json.loads(path.read_text())["overrides"])
        assert options & {"model=convnet", "benchmark=permuted_wine"}


def test_an_example_refuses_a_package_that_is_not_trusted(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "--config-dir=configs", "model=convnet"],
        cwd=OWN,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: Option 'model._target_' is 'my_package.network.ConvNet'")


@pytest.mark.slow
def test_the_logger_shows_a_row_for_every_evaluation(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "wandb_logger.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stderr
