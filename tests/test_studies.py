"""The command line that measures the claims about the statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ewc import Bernoulli, Empirical, Poisson
from ewc.statistics import robust_covariance
from experiments.mnist_files import DamagedFileError
from studies import regressions
from studies.check import Check
from studies.digits import digits, principal_components
from studies.verification import TOPICS, Outcome, Verification

ROOT = Path(__file__).parents[1]


def verify(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "studies", *options],
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
    assert "9 of 9 figures meet their bars, 0 have none" in done.stdout
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
    modules = {p.parent.name for p in (ROOT / "studies").glob("*/study.py")}
    assert modules == set(TOPICS)
    for topic in TOPICS:
        page = (ROOT / f"studies/{topic}/README.md").read_text()
        assert "(picture.png)" in page
        assert f"row={topic}`" in page
        assert (ROOT / f"studies/{topic}/picture.png").is_file()


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
        (Check.shown("x", 3.0), None),
        (Check.shown("x", float("nan")), False),
    ]:
        assert check.holds is holds
    good, bad = Check.at_most("x", 0.0, 1.0), Check.at_most("x", 2.0, 1.0)
    assert Outcome("parametric", [good], 0.0).holds
    assert Outcome("parametric", [good, Check.shown("x", 3.0)], 0.0).holds
    assert not Outcome("parametric", [good, bad], 0.0).holds
    assert not Outcome("parametric", [], 0.0, missing="no data").holds


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("There is no MNIST."), "There is no MNIST."),
        (DamagedFileError("A file is damaged."), "A file is damaged."),
        (
            ModuleNotFoundError("No module named 'statsmodels'", name="statsmodels"),
            "statsmodels is not installed: pip install -e '.[dev]' does it.",
        ),
    ],
)
def test_a_row_without_what_it_needs_is_said_not_to_have_run(tmp_path, monkeypatch, error, message):
    from studies import verification
    from studies.parametric import study as parametric

    def without(_):
        raise error

    monkeypatch.setattr(parametric, "verify", without)
    threads = torch.get_num_threads()
    try:
        found = verification.outcome_of("parametric", verification.Surroundings(tmp_path, tmp_path))
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    assert (found.missing, found.checks, found.holds) == (message, [], False)


def test_the_rows_are_those_asked_for():
    assert Verification(row="parametric").row in TOPICS
    with pytest.raises(ValueError, match="row is 'x'"):
        Verification(row="x")


@pytest.mark.parametrize("likelihood", [Bernoulli(), Poisson()])
def test_regressions_are_fitted_at_once_and_judged_as_one_by_one(likelihood):
    torch.manual_seed(0)
    x, y = torch.randn(60, 3).double(), torch.randint(2, (4, 60)).double()
    theta = regressions.maxima(x, y, likelihood)
    held = regressions.maxima(x, y, likelihood, held=[1])
    assert bool((held[:, 1] == 0).all())
    inverse, sandwich = regressions.covariances(x, y, likelihood, theta)
    for one in range(4):
        full = regressions.Regression(x, y[one], likelihood, theta[one])
        null = regressions.Regression(x, y[one], likelihood, held[one])
        assert float(full.score()["weight"].abs().max()) < 1e-9
        assert float(null.score()["weight"][0, [0, 2]].abs().max()) < 1e-9
        assert full.log_likelihood() > null.log_likelihood()
        fisher = full.fisher()
        torch.testing.assert_close(inverse[one], (60 * fisher.to_dense()).inverse())
        scores = full.fisher(estimator=Empirical())
        torch.testing.assert_close(sandwich[one], robust_covariance(fisher, scores))
    x[:, 0] = 3 * y[0] - 1  # separates the classes
    if isinstance(likelihood, Bernoulli):
        with pytest.raises(ArithmeticError, match="25 steps of Newton's method"):
            regressions.maxima(x, y[:1], likelihood)


def test_the_digits_are_shrunk_by_means_and_their_components_are_standard():
    x, y = digits()
    small, _ = digits(side=4)
    assert (x.shape, small.shape, y.shape) == ((1437, 64), (1437, 16), (1437,))
    torch.testing.assert_close(small[:, 0], x[:, [0, 1, 8, 9]].mean(1))
    components = principal_components(x, 3)
    torch.testing.assert_close(components.T @ components / 1437, torch.eye(3).double())
    torch.testing.assert_close(components.mean(0), torch.zeros(3).double())
    assert bool((components.amax(0) >= -components.amin(0)).all())  # the sign is fixed


def test_the_race_holds_ours_to_runners_that_run_and_look_as_often():
    from studies.natural_gradient import study as topic

    names = {runner.name for runner in topic.IN_SMALL_BATCHES + topic.IN_LARGE_BATCHES}
    assert names >= topic.HELD_TO_STEPS | topic.HELD_TO_SECONDS
    for runners in (topic.IN_SMALL_BATCHES, topic.IN_LARGE_BATCHES):
        assert len({runner.every * runner.batch_size for runner in runners}) == 1
