"""The studies: their command line, their pages, and what they share."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from ewc import Bernoulli, Empirical, Poisson
from ewc.statistics import robust_covariance
from experiments.tasks.mnist_files import DamagedFileError
from studies import regressions
from studies.__main__ import main
from studies.digits import digits, principal_components
from studies.findings import Claim, Findings, Setting
from studies.natural_gradient import study as natural_gradient
from studies.outcomes import Outcome, outcome_of
from studies.page import with_table
from studies.parametric import study as parametric
from studies.topics import STUDIES, TOPICS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "studies", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_study_prints_its_claims_and_writes_its_page(tmp_path):
    source = (STUDIES / "parametric/README.md").read_text()
    done = run("parametric", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "9 of 9 claims hold; 0 figures have no requirement" in done.stdout
    assert "Bernoulli: relative error" in done.stdout
    page = (tmp_path / "parametric/README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 9
    assert all(row.endswith(" yes |") for row in rows[1:])
    assert page.startswith(source[: source.index("<!-- table -->")])
    assert page.endswith(source[source.index("<!-- end -->") :])
    assert (tmp_path / "parametric/picture.png").stat().st_size > 10_000
    assert (STUDIES / "parametric/README.md").read_text() == source


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_topics_are_listed_with_their_questions(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    for topic, question in TOPICS.items():
        assert re.search(rf"{topic} +{re.escape(question)}", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown topic 'nothing': allowed are all and asymptotics, "),
        (["parametric", "nothing"], "unknown topic 'nothing': allowed are all and asymptotics, "),
        (["all", "--processes", "0"], "--processes: must be a whole number of at least 1, got '0'"),
        (["all", "--rows=1"], "unknown option '--rows=1': allowed are --data-root, --output, "),
    ],
)
def test_wrong_options_end_in_one_line_and_leave_nothing(tmp_path, arguments, message):
    done = run(*arguments, "--output", str(tmp_path / "pages"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "pages").exists()


@pytest.mark.slow
def test_a_study_that_cannot_run_ends_with_status_1(tmp_path):
    done = run("forgetting", "--data-root", str(tmp_path), "--output", str(tmp_path / "pages"))
    assert done.returncode == 1
    assert "could not run: forgetting." in done.stderr
    assert "not run" in done.stdout
    assert not (tmp_path / "pages").exists()


def test_every_topic_has_its_study_its_page_and_its_picture():
    assert {path.parent.name for path in STUDIES.glob("*/study.py")} == set(TOPICS)
    for topic in TOPICS:
        page = (STUDIES / topic / "README.md").read_text()
        assert "(picture.png)" in page
        assert f"`python -m studies {topic}`" in page
        assert re.search(
            r"<!-- table -->\n\n(\|.*\|\n){3,}\nSeed 0, torch .*\n\n<!-- end -->", page
        )
        assert "**no**" not in page
        assert (STUDIES / topic / "picture.png").is_file()


def test_the_index_has_every_topic_with_its_question():
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)/README\.md\) \| (.*?) \|",
                      (STUDIES / "README.md").read_text(), re.MULTILINE)  # fmt: skip
    assert rows == [(topic, topic, question) for topic, question in TOPICS.items()]


def test_a_page_keeps_its_prose_and_gets_the_new_table():
    text = "before\n<!-- table -->\nold\n<!-- end -->\nafter\n"
    claims = [Claim.at_most(r"\alpha", 0.5, 1.0), Claim.at_least("b", 0.0, 1.0)]
    page = with_table(text, [*claims, Claim.shown("c", 2.0)], Setting(ROOT, seed=3))
    assert page.splitlines() == [
        "before",
        "<!-- table -->",
        "",
        "| what | measured | required | holds |",
        "|---|---|---|---|",
        r"| \alpha | 0.5 | <= 1 | yes |",
        "| b | 0 | >= 1 | **no** |",
        "| c | 2 | none |  |",
        "",
        f"Seed 3, torch {torch.__version__.split('+')[0]}.",
        "",
        "<!-- end -->",
        "after",
    ]
    assert with_table(page, [*claims, Claim.shown("c", 2.0)], Setting(ROOT, seed=3)) == page


@pytest.mark.parametrize("text", ["no region", "<!-- table -->\n", "<!-- end -->\n"])
def test_a_page_without_a_region_is_refused(text):
    with pytest.raises(ValueError, match="must have one region"):
        with_table(text, [], Setting(ROOT))


def test_claims_hold_if_the_value_is_allowed():
    for claim, holds in [
        (Claim.at_most("x", 1.0, 1.0), True),
        (Claim.at_most("x", 1.1, 1.0), False),
        (Claim.at_most("x", float("nan"), 1.0), False),
        (Claim.at_least("x", 0.9, 1.0), False),
        (Claim.at_least("x", float("nan"), 1.0), False),
        (Claim.between("x", 0.5, 0.5, 1.0), True),
        (Claim.between("x", 1.5, 0.5, 1.0), False),
        (Claim.between("x", float("nan"), 0.5, 1.0), False),
        (Claim.shown("x", 3.0), None),
        (Claim.shown("x", float("nan")), False),
    ]:
        assert claim.holds is holds
    good, bad = Claim.at_most("x", 0.0, 1.0), Claim.at_most("x", 2.0, 1.0)
    assert Outcome("parametric", [good], 0.0).holds
    assert Outcome("parametric", [good, Claim.shown("x", 3.0)], 0.0).holds
    assert not Outcome("parametric", [good, bad], 0.0).holds
    assert not Outcome("parametric", [], 0.0, missing="no data").holds


@pytest.fixture
def restored_torch():
    """A study sets the threads and the rounding of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("There is no MNIST."), "There is no MNIST."),
        (DamagedFileError("A file is damaged."), "A file is damaged."),
        (
            ModuleNotFoundError("No module named 'statsmodels'", name="statsmodels"),
            "statsmodels is not installed: pip install -e '.[dev]' installs it.",
        ),
    ],
)
@pytest.mark.usefixtures("restored_torch")
def test_a_study_without_what_it_needs_has_not_run(tmp_path, monkeypatch, error, message):
    def without(_):
        raise error

    monkeypatch.setattr(parametric, "measure", without)
    outcome = outcome_of("parametric", Setting(tmp_path), tmp_path / "pages")
    assert (outcome.missing, outcome.claims, outcome.holds) == (message, [], False)
    assert not (tmp_path / "pages").exists()


@pytest.mark.usefixtures("restored_torch")
def test_a_failing_claim_ends_with_status_1_and_stands_in_the_page(tmp_path, monkeypatch, capsys):
    failing = Findings([Claim.at_most("x", 2.0, 1.0)], Figure())
    monkeypatch.setattr(parametric, "measure", lambda _: failing)
    outcome = outcome_of("parametric", Setting(tmp_path), tmp_path)
    assert not outcome.holds
    assert "| x | 2 | <= 1 | **no** |" in (tmp_path / "parametric/README.md").read_text()
    monkeypatch.setattr("studies.outcomes.outcomes", lambda *_: iter([outcome]))
    assert main(["parametric", "--output", str(tmp_path)]) == 1
    assert "Claims fail, or the study could not run: parametric." in capsys.readouterr().err


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
    small, large = natural_gradient.IN_SMALL_BATCHES, natural_gradient.IN_LARGE_BATCHES
    names = {runner.name for runner in small + large}
    assert names >= natural_gradient.HELD_TO_STEPS
    for runners in (small, large):
        assert len({runner.every * runner.batch_size for runner in runners}) == 1
