"""Whole experiments, in this process and as the command line runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ewc import EWCPenalty
from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.recording.checkpoints import Checkpoints
from experiments.recording.label import Label
from experiments.recording.results import read_jobs
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.reporting.tables import sweep_table
from experiments.training.resume import Continuation

ROOT = Path(CONFIGS).parent
SMALL = ["model.hidden=[32]", "training.epochs=4", "training.batch_size=16"]
SMALL += ["benchmark.num_tasks=2", "wandb.mode=disabled"]
LAST = "checkpoints/task0002-step00000000.safetensors"


def compose(*overrides):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return plain(hydra.compose("config", overrides=[*SMALL, *overrides]))


class Silent:
    def info(self, *args):
        pass


def run(directory, *overrides):
    directory.mkdir()
    config = compose(*overrides)
    prepared = build(config, Experiment).prepare()
    continuation = Continuation(Checkpoints(directory, config, prepared.deciding_versions))
    with Recorder(directory, WandB(mode="disabled"), {}, Label("test")) as recorder:
        return prepared.run(recorder, Console(quiet=True), Silent(), continuation)


STRATEGIES = ["naive", "joint", "ewc", "online_ewc", "kfac_ewc", "si", "mas", "l2", "lwf"]
STRATEGIES += [
    "pseudo_rehearsal",
    "smoothed_ewc",
    "kfac_ewc strategy/update=implicit",
    "avalanche_ewc",
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("benchmark", "scenario"),
    [
        ("split_digits", "task"),
        pytest.param("split_digits", "domain", marks=pytest.mark.slow),
        pytest.param("split_digits", "class", marks=pytest.mark.slow),
        pytest.param("permuted_digits", "task", marks=pytest.mark.slow),
        pytest.param("permuted_digits", "domain", marks=pytest.mark.slow),
        pytest.param("permuted_digits", "class", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_runs_on_every_scenario(tmp_path, strategy, benchmark, scenario):
    results = run(
        tmp_path / "run",
        *f"strategy={strategy}".split(),
        f"benchmark={benchmark}",
        f"benchmark.scenario={scenario}",
    )
    matrix = torch.tensor(results["accuracy_matrix"])
    assert matrix.shape == (2, 2)
    assert bool(((matrix >= 0) & (matrix <= 1)).all())
    # Four epochs are enough to learn a task far beyond chance.
    assert matrix[0, 0] > 0.8
    assert set(results["seconds"]) == {"train", "fisher", "eval", "total"}
    assert (results["seconds"]["fisher"] > 0) == (
        strategy not in {"naive", "joint", "lwf", "pseudo_rehearsal", "avalanche_ewc"}
    )


def test_another_update_changes_nothing_else():
    paced = compose("strategy=kfac_ewc")
    implicit = compose("strategy=kfac_ewc", "strategy/update=implicit")
    share = {"_target_": "ewc.consolidation.InLoss", "eigenvector_share": 0.05}
    assert paced["strategy"].pop("update") == share
    assert implicit["strategy"].pop("update") == {
        "_target_": "ewc.consolidation.ImplicitSteps",
        "every": 10,
    }
    assert implicit == paced


def test_a_seed_decides_everything(tmp_path):
    first = run(tmp_path / "a", "seed=3")
    again = run(tmp_path / "b", "seed=3")
    other = run(tmp_path / "c", "seed=4")
    assert first["accuracy_matrix"] == again["accuracy_matrix"]
    assert first["accuracy_matrix"] != other["accuracy_matrix"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("a", "b")]
    assert lines[0] == lines[1]


def test_the_untrained_network_is_measured_first(tmp_path):
    still = run(tmp_path / "still", "optimizer.lr=1e-30", "strategy=naive")
    initial = still["initial_accuracies"]
    assert still["accuracy_matrix"] == [initial, initial]
    assert run(tmp_path / "moving", "strategy=naive")["initial_accuracies"] == initial
    assert 2**25 < still["memory"]["peak"] < 2**40


def test_what_a_strategy_keeps_is_counted(tmp_path):
    assert run(tmp_path / "naive", "strategy=naive")["memory"]["kept"] == 0
    l2 = run(tmp_path / "l2", "strategy=l2")
    # An anchor and a diagonal, in single precision, and the penalty's last value.
    assert l2["memory"]["kept"] == 4 * (2 * l2["parameters"] + 1)
    rehearsal = run(tmp_path / "rehearsal", "strategy=pseudo_rehearsal", "strategy.rank=3")
    # A network for each of the tasks, and for each of the ten digits a mean and three components.
    networks = len(rehearsal["accuracy_matrix"]) * rehearsal["parameters"]
    expected = 4 * (networks + 10 * 64 * (1 + 3))
    assert rehearsal["memory"]["kept"] == expected


@pytest.mark.slow
def test_ewc_forgets_less_than_fine_tuning(tmp_path):
    """On 3 seeds of split digits: ECOSYSTEM-size margins, far from noise."""
    options = ("benchmark=split_digits", "benchmark.num_tasks=5", "training.epochs=20")
    drops = {
        name: [
            run(tmp_path / f"{name}{seed}", *options, f"strategy={name}", f"seed={seed}")[
                "forgetting"
            ]
            for seed in range(3)
        ]
        for name in ("naive", "ewc")
    }
    assert sum(drops["ewc"]) < 0.7 * sum(drops["naive"])


@pytest.mark.slow
def test_joint_training_sees_all_tasks(tmp_path):
    options = ("benchmark=permuted_digits", "training.epochs=10")
    joint = run(tmp_path / "joint", *options, "strategy=joint")
    naive = run(tmp_path / "naive", *options, "strategy=naive")
    assert joint["average_accuracy"] > naive["average_accuracy"] + 0.05
    assert joint["forgetting"] < 0.05


def test_checkpoints_hold_network_and_penalty(tmp_path):
    options = ("benchmark=permuted_digits", "strategy=online_ewc")
    versions = {"torch": run(tmp_path / "run", *options)["versions"]["torch"]}
    config = compose(*options)
    tensors = load_file(tmp_path / "run" / LAST)
    prefix = "training/model/"
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert state["0.weight"].shape == (32, 64)
    (plugin,) = [
        inner
        for inner in Checkpoints(tmp_path / "run", config, versions).newest()["training"]["plugins"]
        if "penalty" in inner
    ]
    penalty = EWCPenalty()
    penalty.set_extra_state(plugin["penalty"])
    assert penalty.precision_trace > 0
    torch.testing.assert_close(penalty.terms[0].anchor, state, rtol=0, atol=0)


def test_records_are_on_disk_as_they_come(tmp_path):
    """A run that is cut short has them."""
    with Recorder(tmp_path, WandB(mode="disabled"), {}, Label("test")) as recorder:
        record = {"step": 1, "train/loss": 0.5, "train/penalty": 0.0}
        recorder.log(record)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record
        assert recorder.sync_command is None


def test_permuted_mnist_on_real_images(tmp_path, mnist_root):
    options = ("benchmark=permuted_mnist", "training.iterations=100", f"data_root={mnist_root}")
    results = run(tmp_path / "run", *options, "model.hidden=[100]")
    assert results["accuracy_matrix"][0][0] > 0.8
    assert results["accuracy_matrix"][1][1] > 0.8


def test_reports_of_sweeps_average_over_seeds():
    jobs = [
        {
            "overrides": [f"strategy={name}", f"seed={seed}", "model.hidden=[3]"],
            "seed": seed,
            "average_accuracy": accuracy,
            "forgetting": 0.1,
            "seconds": {"total": 2.0},
        }
        for name, seed, accuracy in [
            ("ewc", 0, 0.8),
            ("ewc", 1, 0.9),
            ("naive", 7, 0.5),
            *(("si", seed, 0.6) for seed in (12, 10, 11)),
            *(("l2", seed, 0.6) for seed in (2, 0, 3)),
        ]
    ]
    columns, rows = sweep_table(jobs)
    assert columns == ["strategy", "seeds", "average accuracy", "forgetting", "seconds"]
    assert rows == [
        ["ewc", "0, 1", "85.00 ± 5.00", "10.00 ± 0.00", "2.0"],
        ["naive", "7", "50.00", "10.00", "2.0"],
        ["si", "10 to 12", "60.00 ± 0.00", "10.00 ± 0.00", "2.0"],
        ["l2", "0, 2, 3", "60.00 ± 0.00", "10.00 ± 0.00", "2.0"],
    ]


def test_published_figures_stand_beside_their_rows():
    jobs = [
        {
            "overrides": [f"benchmark.scenario={scenario}", f"strategy={name}", "seed=0"],
            "seed": 0,
            "average_accuracy": 0.5,
            "forgetting": 0.1,
            "seconds": {"total": 2.0},
        }
        for scenario in ("task", "class")
        for name in ("ewc", "naive")
    ]
    published = {"benchmark.scenario=task,strategy=ewc": "98.6", "strategy=naive": "19.9"}
    columns, rows = sweep_table(jobs, published)
    assert columns[-1] == "published"
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("task", "ewc", "98.6"),
        ("task", "naive", "19.9"),
        ("class", "ewc", ""),
        ("class", "naive", "19.9"),
    ]


@pytest.mark.slow
def test_kronecker_ewc_forgets_less_than_the_diagonal(tmp_path):
    options = ("benchmark=split_digits", "benchmark.num_tasks=5", "benchmark.scenario=task")
    accuracy = {
        name: run(tmp_path / name, *options, "training.epochs=20", f"strategy={name}")[
            "average_accuracy"
        ]
        for name in ("naive", "ewc", "kfac_ewc")
    }
    assert accuracy["naive"] < accuracy["ewc"] < accuracy["kfac_ewc"]


# --- the command line ---------------------------------------------------------------------


def into(tmp_path):
    """The options that put a run or a sweep in the test's folder."""
    return [f"hydra.run.dir={tmp_path}/out/now", f"hydra.sweep.dir={tmp_path}/sweep"]


def command(tmp_path, *arguments, **environment):
    """``python -m experiments.run`` with its outputs in ``tmp_path`` and nothing to answer."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments, *into(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def read_wandb(folder):
    """All records of an offline run, by W&B's own reader."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    text = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_line_leaves_everything_behind(tmp_path):
    done = command(tmp_path, *SMALL[:-1], "seed=5")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "now"
    results = json.loads((folder / "results.json").read_text())
    assert results["seed"] == 5
    assert results["config"]["model"]["hidden"] == [32]
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"] == ("cuda" if torch.cuda.is_available() else "cpu")  # not "auto"
    matrix = results["accuracy_matrix"]
    assert results["average_accuracy"] == pytest.approx(sum(matrix[1]) / 2)
    assert results["forgetting"] == pytest.approx(matrix[0][0] - matrix[1][0])
    assert results["backward_transfer"] == pytest.approx(matrix[1][0] - matrix[0][0])
    for name in ("accuracy_matrix.png", "learning_curves.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "config.yaml").is_file()
    assert (folder / LAST).is_file()

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step" in record]
    tasks = [record for record in records if "step" not in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert steps[0]["train/penalty"] == 0.0
    assert steps[-1]["train/loss"] > steps[-1]["train/penalty"] > 0.0
    assert [record["task"] for record in tasks] == [0, 1]
    assert tasks[1]["eval/accuracy/task00"] == matrix[1][0]
    assert tasks[1]["eval/forgetting"] == pytest.approx(results["forgetting"])
    assert tasks[0]["fisher/trace/task00"] > 0

    assert "test accuracy in %" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "wandb sync" in last
    assert (ROOT / last.rpartition(" ")[2]).is_dir()
    assert "warn" not in done.stderr.lower()

    kept = read_wandb(folder)
    text = json.dumps(kept)
    history = [record for record in kept if "history" in json.dumps(record)[:200]]
    assert len(history) >= len(records)
    for name in (
        "train/loss",
        "train/penalty",
        "eval/accuracy/task01",
        "eval/forgetting",
        "fisher/trace/task00",
        "learning_curves",
        "accuracy_matrix",
        "average_accuracy",
        "scenario",
    ):
        assert name in text, name
    assert repr(results["average_accuracy"])[:8] in text
    assert list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert list(folder.glob("wandb/offline-run-*/files/media/table/*.json"))


@pytest.mark.slow
def test_a_sweep_runs_its_jobs_in_parallel_and_reports(tmp_path):
    done = command(
        tmp_path,
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "strategy=naive,ewc",
        "seed=0,1",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    jobs = read_jobs(tmp_path / "sweep")
    assert [job["overrides"][:2] for job in jobs] == [
        [f"strategy={name}", f"seed={seed}"] for name in ("naive", "ewc") for seed in (0, 1)
    ]
    text = (tmp_path / "sweep" / "report.md").read_text()
    assert "| strategy | seeds | average accuracy |" in text
    assert "| ewc | 0, 1 |" in text


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_its_page_is_rebuilt(tmp_path):
    kept = tmp_path / "results" / "split_digits_strategies.jsonl"
    arguments = ["-m", "experiment=split_digits_strategies", "strategy=naive,kfac_ewc"]
    arguments += ["wandb.mode=disabled", f"hydra.callbacks.report.kept={kept}"]
    first = command(tmp_path, *arguments, "seed=0")
    assert first.returncode == 0, first.stderr
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    shutil.rmtree(tmp_path / "sweep")
    again = command(tmp_path, *arguments, "seed=0,1", "hydra/launcher=joblib")
    assert again.returncode == 0, again.stderr
    assert kept.read_text().splitlines()[:2] == lines
    assert len(kept.read_text().splitlines()) == 4
    assert (again.stdout + again.stderr).count("already done") == 2
    # Jobs that are done leave no folder, and the report is over all that is kept.
    assert len(read_jobs(tmp_path / "sweep")) == 2
    assert not (tmp_path / "sweep" / "0").exists()
    assert "| kfac_ewc | 0, 1 |" in (tmp_path / "sweep" / "report.md").read_text()
    page = subprocess.run(
        [sys.executable, "-m", "experiments.results"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 tables" in page.stdout
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## split_digits_strategies" in text
    assert "| kfac_ewc | 0, 1 |" in text
    assert (tmp_path / "results" / "split_digits_strategies_over_tasks.png").exists()


def test_a_job_that_diverges_does_not_end_the_sweep(tmp_path, command_line):
    arguments = ["-m", *SMALL, "strategy=naive", "optimizer=sgd", "optimizer.lr=1e30,1e-1"]
    for _ in range(2):  # the second time both jobs are done
        code, out, errors = command_line(*arguments, *into(tmp_path))
        assert code == 0, errors
        text = (tmp_path / "sweep" / "report.md").read_text()
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 1e+30 |")]
        assert [row[1:3] for row in rows] == [["0", "diverged"]]
        assert "| 0.1 | 0 |" in text
    jobs = read_jobs(tmp_path / "sweep")
    (failed,) = [job["diverged"] for job in jobs if "diverged" in job]
    assert "in task 1, step 2" in failed
    assert "already done" in out + errors


def test_a_wrong_option_removes_nothing_that_was_there(tmp_path, command_line):
    folder = tmp_path / "out" / "now"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    code, _, _ = command_line(*SMALL, "strategy.strength=-1", *into(tmp_path))
    assert code == 1
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("given", ["out", "{}/out", "{}/mine", "{}/mine/out", "{}/mine/a/b"])
def test_a_wrong_option_removes_only_folders_of_the_run(tmp_path, command_line, monkeypatch, given):
    (tmp_path / "here").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, _ = command_line(
        *SMALL, "strategy.strength=-1", f"hydra.run.dir={given.format(tmp_path)}"
    )
    assert code == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "mine"]


def test_the_choice_of_a_sweep_that_lacks_an_option_is_named(tmp_path, command_line):
    sweep = ["strategy=ewc,si", "-m", "strategy.shrinkage=0.1,0.2"]
    code, _, errors = command_line(*sweep, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert code != 0
    assert "'strategy.shrinkage' with strategy=si: allowed are strategy.strength, " in errors


def test_a_strategy_without_a_fisher_pass_makes_no_matrix(tmp_path, command_line):
    dense = ["fisher/structure=dense", "model.hidden=[4000]", "training.iterations=1"]
    code, _, errors = command_line(*SMALL, "strategy=si", *dense, *into(tmp_path))
    assert code == 0, errors


@pytest.mark.filterwarnings("default:In task 1 the parameters")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fisher/structure=dense", "model.hidden=[4000]"], "over 300010 parameters takes 360 GB"),
        (["optimizer=sgd", "optimizer.lr=1e38", "training.iterations=1"], "in task 1"),
        (
            ["strategy.strengh=3"],
            "Unknown option 'strategy.strengh': allowed are strategy.strength, strategy.shri",
        ),
        (["sed=3"], "Unknown option 'sed': allowed are benchmark, model, "),
        (["trainng.iterations=3"], "Unknown option 'trainng.iterations': allowed are benchmark"),
        (["hydra.run.dri=x"], "Unknown option 'hydra.run.dri': allowed are hydra.run.dir."),
        (
            ["strategy=naive", "strategy.strength=3"],
            "Unknown option 'strategy.strength' with strategy=naive: an option of strategy=",
        ),
        (
            ["fisher.estimator.num_samples=3"],
            "'fisher.estimator.num_samples' with fisher/estimator=exact: "
            "an option of fisher/estimator=monte_carlo.",
        ),
        (["hydra.launcher.n_jobs=2"], "=basic: an option of hydra/launcher=joblib"),
        (["hydra.job.env_set.a=1"], "'hydra.job.env_set.a': 'hydra.job.env_set' has no options."),
        (["strategy=joint", "strategy.a=3"], "'strategy.a' with strategy=joint: it has no options"),
        (
            ["strategy=ewcc"],
            "'strategy/ewcc': allowed are avalanche_ewc, ewc, joint, kfac_ewc,",
        ),
        (["+training.steps=3"], "Unknown option 'training.steps': allowed are training.batch_si"),
        (["training.iterations=few"], "Option 'training.iterations' is 'few': Input should be a"),
        (
            ["strategy.strength=-1"],
            "strategy: strength must be a finite number, 0 or above, got -1",
        ),
        (
            ["strategy.strength=nan"],
            "strategy: strength must be a finite number, 0 or above, got na",
        ),
        (["strategy=online_ewc", "strategy.decay=1.5"], "decay must lie in [0, 1], got 1.5"),
        (
            ["benchmark=split_digits", "benchmark.num_tasks=3"],
            "num_tasks must be 1, 2, 5 for 10 classes, got 3",
        ),
        (["optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["wandb.mode=on"], "Option 'wandb.mode' is "),
        (["benchmark=split_mnist", "data_root=/nonexistent/data"], "of MNIST is not in"),
        (
            ["optimizer=sgd", "optimizer.lr=1e30", "strategy=naive"],
            "in task 1, step 2, as the outputs of 'heads.0' (Linear) are not finite: use",
        ),
        (["seed="], "seed"),
        (["seed"], "'seed' has no value: an option is written OPTION=VALUE."),
        (["seed=interval(0,3)"], "-m hydra/sweeper=optuna runs a job for each value"),
        (["-m", "seed=interval(0,3)"], "An interval is searched with hydra/sweeper=optuna;"),
        (
            ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"],
            "Option 'hydra.launcher': n_jobs == 0 in Parallel has no meaning.",
        ),
        (
            ["-m", "hydra/launcher=joblib", "hydra.launcher.prefer=fibres"],
            "Option 'hydra.launcher': prefer=fibres is not a valid backend hint",
        ),
        (
            ["-m", "hydra/launcher=joblib", "hydra.launcher.pre_dispatch='3*os.getpid()'"],
            "Option 'hydra.launcher.pre_dispatch' is '3*os.getpid()': allowed are all, a number,",
        ),
        (
            ["-m", "hydra/launcher=joblib", "hydra.launcher.njobs=2"],
            "'hydra.launcher.njobs' with hydra/launcher=joblib: allowed are hydra.launcher.n_jobs,",
        ),
    ],
)
def test_a_wrong_command_line_ends_in_one_message(tmp_path, command_line, arguments, message):
    code, _, errors = command_line(*SMALL, *arguments, *into(tmp_path))
    assert code != 0
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("results.json"))
    # A run that diverged keeps its records, for they show how.
    assert (tmp_path / "out").exists() == ("in task 1" in message)
