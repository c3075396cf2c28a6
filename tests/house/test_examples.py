"""The examples run as files, and print what EWC is good for."""

import re
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
