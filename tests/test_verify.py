"""The command line that measures the claims about the statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.verify.check import Check
from experiments.verify.verification import TOPICS, Outcome, Verification

ROOT = Path(__file__).parents[1]


def verify(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.verify", *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_row_prints_its_figures_and_keeps_them(tmp_path):
    done = verify("row=parametric", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "verify.json").read_text())
    assert row["topic"] == "parametric"
    assert len(row["checks"]) == 9
    assert all(check["holds"] for check in row["checks"])
    assert "9 of 9 figures meet their bars" in done.stdout
    assert "Bernoulli: relative error" in done.stdout
    assert (tmp_path / "parametric.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["row=nothing"], "row is 'nothing': it must be all, or one of parametric"),
        (["processes=0"], "processes is 0: it must be 1 or more"),
        (["rows=all"], "Unknown option 'rows': allowed are row, data_root, pictures"),
    ],
)
def test_wrong_options_end_in_one_line_and_leave_nothing(tmp_path, options, message):
    done = verify(*options, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_topic_has_its_module_and_its_page_with_a_picture():
    modules = {p.stem for p in (ROOT / "experiments/verify/topics").glob("*.py")} - {"__init__"}
    assert modules == set(TOPICS)
    for topic in TOPICS:
        page = (ROOT / f"docs/topics/{topic}.md").read_text()
        assert f"({topic}.png)" in page
        assert f"row={topic}`" in page
        assert (ROOT / f"docs/topics/{topic}.png").is_file()


def test_checks_are_held_to_their_bars():
    for check, holds in [
        (Check.at_most("x", 1.0, 1.0), True),
        (Check.at_most("x", 1.1, 1.0), False),
        (Check.at_most("x", float("nan"), 1.0), False),
        (Check.at_least("x", 0.9, 1.0), False),
        (Check.at_least("x", float("nan"), 1.0), False),
        (Check.between("x", 0.5, 0.5, 1.0), True),
        (Check.between("x", 1.5, 0.5, 1.0), False),
        (Check.between("x", float("nan"), 0.5, 1.0), False),
    ]:
        assert check.holds is holds
    good, bad = Check.at_most("x", 0.0, 1.0), Check.at_most("x", 2.0, 1.0)
    assert Outcome("parametric", [good], 0.0).holds
    assert not Outcome("parametric", [good, bad], 0.0).holds
    assert not Outcome("parametric", [], 0.0, missing="no data").holds


def test_a_row_without_its_data_is_said_not_to_have_run(tmp_path, monkeypatch):
    from experiments.verify import verification
    from experiments.verify.topics import parametric

    def without(_):
        raise FileNotFoundError("There is no MNIST.")

    monkeypatch.setattr(parametric, "verify", without)
    threads = torch.get_num_threads()
    try:
        found = verification.outcome_of("parametric", verification.Surroundings(tmp_path, tmp_path))
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    assert (found.missing, found.checks, found.holds) == ("There is no MNIST.", [], False)


def test_the_rows_are_those_asked_for():
    assert Verification(row="parametric").row in TOPICS
    with pytest.raises(ValueError, match="row is 'x'"):
        Verification(row="x")
