"""A run's folder and what goes wrong around a run: nothing is lost, mixed or half done."""

import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import wandb
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import ewc
from experiments import experiment
from experiments.configuration.targets import ConfigurationError
from experiments.experiment import Prepared
from experiments.recording import checkpoints, folder
from experiments.recording import results as result_files
from experiments.recording.curve import Curve
from experiments.recording.folder import OWNER, finished, owned
from experiments.recording.kept import keep, kept_job, read_kept, varied_by
from experiments.recording.label import Label
from experiments.recording.results import read_jobs, read_results, write_results
from experiments.recording.sweep import begin_sweep, failures, note_failure, note_job
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.reporting.report.gathering import gather
from experiments.reporting.sweep_report import report_sweep
from experiments.training.observers import TrainingObserver

ROOT = Path(__file__).parents[3]
SMALL = ["model.hidden=[8]", "training.iterations=20", "training.batch_size=16"]
SMALL += ["benchmark.num_tasks=2", "wandb.mode=disabled", "strategy=naive"]
TRAINING = {"_target_": "experiments.training.protocol.Training", "epochs": 2}
CONFIG = {"_target_": "experiments.experiment.Experiment", "seed": 0, "threads": 1}
CONFIG |= {"training": TRAINING}
RESULTS = {
    "average_accuracy": 0.75,
    "forgetting": 0.0,
    "backward_transfer": 0.0,
    "accuracy_matrix": [[1.0, 0.0], [0.5, 1.0]],
    "seconds": {"total": 1.0},
    "config": CONFIG,
    "overrides": ["strategy=ewc", "seed=0"],
    "seed": 0,
    "versions": {"ewc": "1"},
}
DIVERGED = {key: RESULTS[key] for key in ("config", "overrides", "seed")} | {"diverged": "task 1"}


def contents(directory):
    """Every file of a folder and what is in it."""
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def command(tmp_path, command_line):
    """The command line on a small run in a folder of the test."""

    def call(*arguments, into="run"):
        given = {argument.partition("=")[0] for argument in arguments}
        missing = [option for option in SMALL if option.partition("=")[0] not in given]
        places = [f"hydra.run.dir={tmp_path / into}", f"hydra.sweep.dir={tmp_path / into}"]
        return command_line(*arguments, *places, *missing)

    return call


# --- results are whole --------------------------------------------------------------------


def test_results_reach_the_disk_before_their_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(*paths):
        calls.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_results(tmp_path, RESULTS)
    assert calls == ["file", "name", "folder"]
    assert read_results(tmp_path) == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_results_that_cannot_be_written_leave_the_earlier_ones(tmp_path, monkeypatch, name):
    write_results(tmp_path, RESULTS)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_results(tmp_path, RESULTS | {"seed": 1})
    assert contents(tmp_path) == before


WHOLE = json.dumps(RESULTS)
DAMAGED = {
    "empty": "",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "not JSON": "average accuracy: 75 %",
    "not text": b"\xff\xfe\x00",
    "nested": "[" * 100_000,
    "null": "null",
    "a number": "0.75",
    "a list": f"[{WHOLE}]",
    "nothing": "{}",
    "a word for a number": json.dumps(RESULTS | {"average_accuracy": "high"}),
    "no seconds": json.dumps(RESULTS | {"seconds": {}}),
    "no configuration": json.dumps(RESULTS | {"config": None}),
    "a ragged matrix": json.dumps(RESULTS | {"accuracy_matrix": [[1.0], [0.5, 1.0]]}),
    "no matrix": json.dumps(RESULTS | {"accuracy_matrix": []}),
    "diverged and no more": '{"diverged": "task 1"}',
    "a folder": None,
}


def damage(directory, content):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


NOT_KEPT = {
    "guesses of no task": json.dumps(RESULTS | {"guessing": [{"accuracy": 0.5, "error": 0.1}] * 9}),
    "a guess without error": json.dumps(RESULTS | {"guessing": [{"accuracy": 0.5}] * 2}),
}
"""Damage where kept lines have nothing."""


@pytest.mark.parametrize(
    "content", [*DAMAGED.values(), *NOT_KEPT.values()], ids=[*DAMAGED, *NOT_KEPT]
)
def test_damaged_results_are_named_and_left_out(tmp_path, caplog, content):
    for name, results in (("a", RESULTS), ("c", DIVERGED)):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, results)
    damage(tmp_path / "b", content)
    assert read_jobs(tmp_path) == [RESULTS, DIVERGED]
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{os.path.relpath(tmp_path / 'b' / 'results.json')} is damaged" in message
    assert "\n" not in message
    assert report_sweep(tmp_path) == 2
    assert "| ewc | 0 | 75.00 (1 diverged) |" in (tmp_path / "report.md").read_text()


def test_the_kept_results_are_whole(caplog):
    kept = [read_kept(path) for path in (ROOT / "results").glob("*.jsonl")]
    assert all(jobs and not damaged for jobs, damaged in kept)
    assert kept


# --- kept lines ---------------------------------------------------------------------------


def test_a_line_has_what_decides_the_outcome_and_what_the_page_shows(tmp_path):
    path = tmp_path / "results" / "recipe.jsonl"
    apart = {"wandb": {"mode": "offline"}, "data_root": "somewhere", "trusted": []}
    where = ["experiment=recipe", "wandb.mode=offline", "+data_root=somewhere"]
    where += ["training.checkpoint_minutes=null"]
    apart["training"] = TRAINING | {"checkpoint_minutes": None}
    overlap = [{"2": 1.0, "10": 1.0}, {"2": 0.5, "10": 0.25}]
    information = {"trace": 1.0, "seconds": 1.0, "layers": {}}
    apart_results = {"device": "cpu", "fisher": [information], "memory": {"peak": 1}}
    keep(
        path,
        RESULTS
        | apart_results
        | {"config": CONFIG | apart, "overrides": ["strategy=ewc", *where, "seed=0"]}
        | {"seconds": {"total": 1.0, "train": 0.5}, "fisher_overlap": overlap},
    )
    keep(path, DIVERGED | {"config": CONFIG | {"seed": 1}, "seed": 1})
    (finished_job, diverged_job), damaged = read_kept(path)
    assert finished_job == {
        key: RESULTS[key]
        for key in ("average_accuracy", "forgetting", "accuracy_matrix", "seed", "versions")
    } | {
        "config": CONFIG,
        "overrides": ["strategy=ewc", "seed=0"],
        "seconds": {"total": 1.0},
        "fisher_overlap": [overlap[-1]],
    }
    assert list(finished_job["fisher_overlap"][0]) == ["2", "10"]  # as the layers come
    assert diverged_job["diverged"] == "task 1"
    assert not damaged
    for line in path.read_text().splitlines():
        assert list(json.loads(line)) == sorted(json.loads(line))


def test_a_configuration_has_one_line(tmp_path):
    path = tmp_path / "recipe.jsonl"
    assert kept_job(path, CONFIG) is None
    for seed in (0, 1, 0):
        keep(path, RESULTS | {"config": CONFIG | {"seed": seed, "data_root": f"folder {seed}"}})
    assert len(path.read_text().splitlines()) == 2
    assert kept_job(path, CONFIG | {"seed": 1, "data_root": "another"})["config"]["seed"] == 1
    assert kept_job(path, CONFIG | {"seed": 2}) is None
    assert kept_job(path, CONFIG | {"threads": 2}) is None  # sums are cut in other pieces
    earlier = {key: value for key, value in CONFIG.items() if key != "threads"}
    assert kept_job(path, earlier)["config"]["threads"] == 1


LINES = {name: content for name, content in DAMAGED.items() if content}


@pytest.mark.parametrize("content", LINES.values(), ids=LINES)
def test_damaged_lines_are_named_and_left_out(tmp_path, caplog, content):
    path = tmp_path / "recipe.jsonl"
    keep(path, RESULTS)
    line = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(line + b"\n" + path.read_bytes())
    jobs, damaged = read_kept(path)
    assert [job["seed"] for job in jobs] == [0]
    assert len(damaged) == 1
    assert f"Line 1 of {os.path.relpath(path)} is damaged (" in damaged[0]
    assert damaged[0] in caplog.text


def test_a_line_that_was_cut_costs_no_other(tmp_path):
    path = tmp_path / "recipe.jsonl"
    keep(path, RESULTS)
    path.write_bytes(path.read_bytes()[:-100])  # a process died while writing
    keep(path, RESULTS | {"config": CONFIG | {"seed": 1}, "seed": 1})
    jobs, damaged = read_kept(path)
    assert [job["seed"] for job in jobs] == [1]
    assert len(damaged) == 1


@pytest.mark.slow
def test_processes_keep_lines_side_by_side(tmp_path):
    path = tmp_path / "recipe.jsonl"
    keeper = (
        "import json, sys; from pathlib import Path; from experiments.recording.kept import keep;"
        "path, results, first = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]);"
        "[keep(path, results | {'seed': s, 'config': results['config'] | {'seed': s}})"
        " for s in range(first, 20)]"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", keeper, path, json.dumps(RESULTS), str(first)], cwd=ROOT
        )
        for first in (0, 5, 10)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    jobs, damaged = read_kept(path)
    assert sorted(job["seed"] for job in jobs) == list(range(20))
    assert not damaged


# --- one configuration --------------------------------------------------------------------


def leave(directory, *kinds, config=CONFIG):
    """What a run of a configuration leaves behind at different points."""
    directory.mkdir(exist_ok=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    for kind in kinds:
        if kind == OWNER:
            (directory / kind).write_text(json.dumps({"config": config}))
        elif kind == "results.json":
            write_results(directory, RESULTS | {"config": config})
        elif kind.endswith(".yaml"):
            (directory / kind).parent.mkdir(exist_ok=True)
            (directory / kind).write_text(json.dumps(config))  # JSON is YAML
        else:
            (directory / kind).write_text("something")


EARLIER = "checkpoints/model.safetensors", "checkpoints/penalty.pt"
CHECKPOINT = "checkpoints/task0001-step00000003.safetensors"
UNFINISHED = (OWNER, "metrics.jsonl", *EARLIER)
LEFT = [
    UNFINISHED,
    (OWNER,),
    (*UNFINISHED, "results.json"),
    ("results.json",),
    (".hydra/config.yaml", "metrics.jsonl"),
    ("config.yaml", "metrics.jsonl", "accuracy_matrix.png"),
]


@pytest.mark.parametrize("kinds", LEFT, ids=", ".join)
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"threads": 2}, {"training": TRAINING | {"epochs": 3}}], ids=list
)
def test_a_folder_of_another_configuration_is_refused(tmp_path, kinds, other):
    leave(tmp_path, *kinds)
    before = contents(tmp_path)
    (key,) = other
    names = {"seed": "seed is 0 there and 1 here", "training": "training.epochs is 2 there and 3"}
    names["threads"] = "threads is 1 there and 2 here"
    state = "a finished" if "results.json" in kinds else "an unfinished"
    with pytest.raises(ConfigurationError, match=f"{state} run of another .*{names[key]}"):
        finished(tmp_path, CONFIG | other)
    with (
        pytest.raises(ConfigurationError, match="another configuration"),
        owned(tmp_path, CONFIG | other),
    ):
        pytest.fail("the folder is another's")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_results_and_an_unfinished_run_of_two_configurations_are_refused(tmp_path):
    leave(tmp_path, "results.json")
    leave(tmp_path, *UNFINISHED, config=CONFIG | {"seed": 1})
    for seed in (0, 1):
        with pytest.raises(ConfigurationError, match="of another configuration"):
            finished(tmp_path, CONFIG | {"seed": seed})


@pytest.mark.parametrize("record", ["metrics.jsonl", CHECKPOINT, EARLIER[1]])
def test_a_run_of_an_unknown_configuration_is_refused(tmp_path, record):
    leave(tmp_path, record)
    with pytest.raises(ConfigurationError, match="does not say of which configuration"):
        finished(tmp_path, CONFIG)
    assert (tmp_path / record).exists()


def test_an_unfinished_run_without_a_checkpoint_starts_over(tmp_path):
    leave(tmp_path, *UNFINISHED, "learning_curves.png", "checkpoints/.0123.tmp")
    damage(tmp_path, "{")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert finished(tmp_path, CONFIG | {"data_root": "x"}) is None  # which decides nothing
    with owned(tmp_path, CONFIG):
        left = {path.name for path in contents(tmp_path)}
    assert left == {"run.json", "thesis.txt"}


def test_an_unfinished_run_keeps_its_records_and_checkpoints(tmp_path):
    leave(tmp_path, OWNER, "metrics.jsonl", CHECKPOINT, "checkpoints/.0123.tmp")
    with owned(tmp_path, CONFIG | {"training": TRAINING | {"checkpoint_minutes": 1.0}}):
        left = {str(path.relative_to(tmp_path)) for path in contents(tmp_path)}
    assert left == {"run.json", "metrics.jsonl", CHECKPOINT}


def test_finished_results_of_the_same_configuration_are_given(tmp_path):
    leave(tmp_path, *UNFINISHED, "results.json")
    before = contents(tmp_path)
    assert finished(tmp_path, CONFIG) == RESULTS
    with owned(tmp_path, CONFIG) as results:  # finished by another process meanwhile
        assert results == RESULTS
    assert contents(tmp_path) == before


def test_the_owner_is_written_in_one_piece(tmp_path, monkeypatch):
    """A shorter name of the owner leaves no rest of a longer one, at no moment."""
    seen = []
    pwrite = os.pwrite

    def noted(*arguments):
        pwrite(*arguments)
        seen.append(json.loads((tmp_path / OWNER).read_text()))

    monkeypatch.setattr(os, "pwrite", noted)
    with owned(tmp_path, CONFIG | {"data_root": "x" * 9000}, ["seed=0"]) as results:
        assert results is None
    with owned(tmp_path, CONFIG):
        pass
    assert [owner["overrides"] for owner in seen] == [["seed=0"], []]


# --- one owner ----------------------------------------------------------------------------

HOLDER = """
import json, sys, time
from pathlib import Path
from experiments.recording.folder import owned
with owned(Path(sys.argv[1]), json.loads(sys.argv[2])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_owner_until_its_process_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, json.dumps(CONFIG)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "mine\n"
        before = contents(tmp_path)
        named = f"in use by process {holder.pid} on {socket.gethostname()} since 20"
        for config in (CONFIG, CONFIG | {"seed": 1}):
            with pytest.raises(ConfigurationError, match=named):
                finished(tmp_path, config)
            with pytest.raises(ConfigurationError, match=named), owned(tmp_path, config):
                pytest.fail("it is another's")
        assert contents(tmp_path) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert finished(tmp_path, CONFIG) is None
    with owned(tmp_path, CONFIG):
        assert json.loads((tmp_path / "run.json").read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()} on"):
            finished(tmp_path, CONFIG)
    assert finished(tmp_path, CONFIG) is None


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(folder.fcntl, "flock", unsupported)
    with owned(tmp_path, CONFIG):
        assert "cannot be locked (Operation not supported)" in caplog.text


# --- the command line ---------------------------------------------------------------------


def test_a_folder_is_neither_mixed_nor_overwritten(tmp_path, command, monkeypatch):
    assert command("seed=0")[0] == 0
    before = contents(tmp_path)
    code, out, err = command("seed=1")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "a finished run of another configuration (seed is 0 there and 1 here)" in err
    code, out, err = command("seed=0")
    assert (code, err) == (0, "")
    assert "already done" in out
    assert contents(tmp_path) == before

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingObserver, "after_training_exp", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command("seed=1", into="other")
    assert len((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()) == 20
    before = contents(tmp_path)
    code, _, err = command("seed=0", into="other")
    assert code == 1
    assert "an unfinished run of another configuration (seed is 1 there and 0 here)" in err
    assert contents(tmp_path) == before
    assert command("seed=1", into="other")[0] == 0
    records = (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 2 * 20 + 2
    assert read_results(tmp_path / "other")["seed"] == 1


def broken(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


class Gone:
    """What W&B's run is when its process has ended."""

    def __getattr__(self, name):
        broken()


def once_open(patch, fault):
    """Have the fault when the run's records have been opened."""
    enter = Recorder.__enter__

    def entered(recorder):
        fault(recorder)
        return enter(recorder)

    patch.setattr(Recorder, "__enter__", entered)


def full_disk(recorder):
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), recorder._file._file.fileno())


FAULTS = {
    "accuracy_matrix.png": lambda patch: patch.setattr(Figure, "savefig", broken),
    "learning_curves in W&B": lambda patch: patch.setattr(wandb, "Image", broken),
    "accuracy in W&B": lambda patch: patch.setattr(wandb, "Table", broken),
    "the summary in W&B": lambda patch: once_open(patch, lambda r: setattr(r._run, "run", Gone())),
    "records in W&B": lambda patch: once_open(patch, lambda r: setattr(r._run, "run", Gone())),
    "the end of the W&B run": lambda patch: once_open(
        patch, lambda r: setattr(r._run, "run", Gone())
    ),
    "config.yaml": lambda patch: patch.setattr(OmegaConf, "to_yaml", broken),
    "metrics.jsonl": lambda patch: once_open(patch, full_disk),
    "checkpoints": lambda patch: patch.setattr(checkpoints, "write", broken),
}


QUICK = {"accuracy_matrix.png", "records in W&B", "metrics.jsonl"}
"""One fault of each kind of file."""


@pytest.mark.parametrize(
    "what",
    [what if what in QUICK else pytest.param(what, marks=pytest.mark.slow) for what in FAULTS],
)
def test_a_fault_of_what_is_not_the_result_is_a_warning(tmp_path, command, monkeypatch, what):
    FAULTS[what](monkeypatch)
    code, out, err = command("strategy=ewc")
    assert (code, err) == (0, "")
    assert f"{what}: [Errno" in out
    assert read_results(tmp_path / "run")["average_accuracy"] > 0
    assert (tmp_path / "run" / "learning_curves.png").exists() == (what != "accuracy_matrix.png")


def test_results_come_before_pictures(tmp_path, command, monkeypatch):
    there = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda *_, **__: there.append(read_results(tmp_path / "run")),
    )
    assert command()[0] == 0
    assert len(there) == 2
    assert all(there)


def test_results_that_cannot_be_written_are_printed(tmp_path, command, monkeypatch):
    monkeypatch.setattr(result_files, "write_whole", broken)
    code, out, err = command()
    assert (code, len(err.splitlines())) == (1, 1)
    assert "Input/output error" in err
    (printed,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(printed["accuracy_matrix"]) == 2


@pytest.mark.slow
def test_a_run_under_a_limit_of_file_size_has_results(tmp_path):
    """The system refuses every file beyond 12 kB: pictures and checkpoints, not results."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.run", *SMALL, f"hydra.run.dir={tmp_path}/run"),
            *("training.log_every=10", "model.hidden=[100]", "benchmark.num_tasks=5"),
        ],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_results(tmp_path / "run")["accuracy_matrix"]) == 5
    assert "accuracy_matrix.png: [Errno" in done.stdout
    assert "checkpoints: " in done.stdout


@pytest.mark.slow
def test_wandb_needs_no_home(tmp_path, command, monkeypatch):
    (tmp_path / "home").write_text("a file, no folder")
    monkeypatch.delenv("WANDB_DATA_DIR")
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    code, out, err = command("wandb.mode=offline")
    assert (code, err) == (0, "")
    assert "W&B" not in "".join(line for line in out.splitlines() if "WARNING" in line)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/*.json"))
    assert "WANDB_DATA_DIR" not in os.environ


def test_curves_are_drawn_from_memory(tmp_path):
    with Recorder(tmp_path, WandB(mode="disabled"), {}, Label("test")) as recorder:
        recorder.log({"step": 1, "train/loss": 0.5, "train/penalty": 0.0})
        recorder.log({"task": 0, "eval/accuracy/task00": 0.5})
        recorder.log({"step": 2, "train/loss": 0.25, "train/penalty": 0.125})
        points = [(point.step, *point.means.values()) for point in recorder.curve.points]
    assert points == [(1, 0.5, 0.0), (2, 0.25, 0.125)]


@pytest.mark.parametrize("count", [1, 799, 800, 801, 5000])
def test_a_curve_has_the_means_of_windows_and_bounded_memory(count):
    steps = range(10, 10 * count + 1, 10)
    losses = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = Curve()
    for step, loss in zip(steps, losses.tolist(), strict=True):
        curve.add({"step": step, "train/loss": loss, "train/penalty": 2 * loss})
    whole = count // curve.width * curve.width
    windows = losses[:whole].view(-1, curve.width).mean(1)
    assert count / 800 <= curve.width <= 1 + count / 400
    assert len(curve.points) == len(windows) < 800
    assert [point.step for point in curve.points] == list(steps)[curve.width - 1 :: curve.width]
    for name, factor in (("train/loss", 1), ("train/penalty", 2)):
        means = torch.tensor([point.means[name] for point in curve.points], dtype=torch.float64)
        torch.testing.assert_close(means, factor * windows)


def test_a_curve_knows_where_tasks_begin():
    curve = Curve()
    for step, task in [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]:
        curve.add({"step": step, "task": task, "train/loss": 1.0, "train/penalty": 0.0})
    assert curve.starts == [3, 5]


def test_a_curve_knows_the_largest_pull_of_the_penalty():
    curve = Curve()
    for step, task, penalty in [(1, 0.0, 1.0), (2, 4.0, 1.0), (3, 2.0, 0.2)]:
        norms = {"train/task_gradient_norm": task, "train/penalty_gradient_norm": penalty}
        curve.add({"step": step, "train/loss": 1.0, "train/penalty": 0.0, **norms})
    curve.add({"step": 4, "train/loss": 1.0, "train/penalty": 0.0})
    assert curve.pull == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=null"], "Option 'model' is 'null': allowed are mlp."),
        (["benchmark=3"], "Option 'benchmark' is '3': allowed are permuted_digits, "),
        (["threads=100000"], "threads must be at most 1024, got 100000"),
        (["seed=-1"], "seed must lie between 0 and 4294967295, got -1."),
        (["optimizer=newton"], "Could not find 'optimizer/newton': allowed are adam, sgd."),
        (["device=meta"], "device must be one that PyTorch can use, such as cpu, got 'meta' ("),
        (["model.hidden=[100000000000]"], "model: 7500000000010 parameters and their gradients"),
        (["model.hidden=[100000000000,100000000000]"], "model: "),
        ([f"model.hidden=[{10**30}]"], "model: "),
        (
            ["optimizer._target_=torch.optim.LBFGS", "~optimizer.betas", "~optimizer.fused"],
            "such as torch.optim.SGD, got LBFGS",
        ),
        (
            ["optimizer._target_=torch.optim.SparseAdam", "~optimizer.fused"],
            "such as torch.optim.SGD, got SparseAdam",
        ),
    ],
)
def test_what_cannot_run_is_one_sentence(tmp_path, command, arguments, message):
    drop = ["~optimizer.weight_decay"] if "optimizer._target_" in arguments[0] else []
    code, _, err = command(*arguments, *drop)
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.rglob("*.json"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("obstacle", ["run", "run/run.json", "run/config.yaml"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, command, obstacle):
    """A file where a folder is needed, or a folder where a file is: also for the superuser."""
    path = tmp_path / obstacle
    if obstacle == "run":
        path.write_text("a file")
    else:
        path.mkdir(parents=True)
    code, _, err = command()
    assert (code, len(err.splitlines())) == (1, 1)
    assert str(tmp_path / "run") in err
    assert "hydra.run.dir" in err
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.filterwarnings("default:In task 1 the parameters", "default:The Fisher inform")
def test_a_ruined_network_is_said(command):
    _, out, _ = command("optimizer.lr=1e9", into="ruined")
    assert out.count("is probably too large") == 1
    assert "In task 1 the parameters body.0.bias are" in out
    _, out, _ = command(into="sound")
    assert "probably too large" not in out


def test_a_clone_that_is_not_installed_runs(tmp_path, command, monkeypatch):
    def version(name):
        if name == "ewc":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(experiment, "version", version)
    assert command()[0] == 0
    assert read_results(tmp_path / "run")["versions"]["ewc"] == ewc.__version__


@pytest.mark.slow
def test_one_wrong_job_of_a_sweep_is_named_and_the_others_run(tmp_path, command):
    sweep = ["-m", "strategy=ewc", "strategy.strength=1,-1,2"]
    code, _, err = command(*sweep)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "error: 1 job of the sweep failed: job 1 (" in err
    assert " strategy.strength=-1 " in err
    assert "): strategy: strength must be a finite number, 0 or above, got -1.0" in err
    text = (tmp_path / "run" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2
    assert "- job 1 (" in text
    code, _, err = command(*sweep[:-1], "strategy.strength=1")
    assert (code, err) == (0, "")
    assert "failed" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "wrong", "message"),
    [
        (["seed=-1,0"], "seed=-1", "seed must lie between 0 and"),
        (["threads=100000,1"], "threads=100000", "threads must be at most 1024"),
        (["device=meta,cpu"], "device=meta", "device must be one that PyTorch can use"),
        (["model.hidden=[100000000000],[8]"], "model.hidden=[100000000000]", "take 60000 GB"),
    ],
)
def test_each_kind_of_wrong_job_is_named(tmp_path, command, options, wrong, message):
    code, _, err = command("-m", *options)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "error: 1 job of the sweep failed: job 0 (" in err
    assert wrong in err
    assert message in err
    assert len(read_jobs(tmp_path / "run")) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("a bug")])
def test_a_job_that_fails_in_training_does_not_end_the_sweep(tmp_path, command, monkeypatch, error):
    train = Prepared.run

    def fail_once(self, *arguments):
        if self.experiment.seed == 0:
            raise error
        return train(self, *arguments)

    monkeypatch.setattr(Prepared, "run", fail_once)
    code, _, err = command("-m", "seed=0,1")
    assert code == 1
    last = err.splitlines()[-1]
    assert "error: 1 job of the sweep failed: job 0 (" in last
    assert str(error.args[-1]) in last
    assert [job["seed"] for job in read_jobs(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "report.md").exists()


def test_a_report_holds_the_jobs_of_the_newest_sweep_only(tmp_path):
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        write_results(tmp_path / str(seed), RESULTS | {"seed": seed})
    assert len(read_jobs(tmp_path)) == 3, "nothing is noted"
    begin_sweep(tmp_path, ["seed=1,0", "wandb.mode=offline"])
    for job in "10":
        note_job(tmp_path, tmp_path / job)
    begin_sweep(tmp_path, ["seed=1,0", "wandb.mode=disabled"])  # it goes on
    assert [job["seed"] for job in read_jobs(tmp_path)] == [0, 1]
    begin_sweep(tmp_path, ["seed=2"])
    assert read_jobs(tmp_path) == []
    note_job(tmp_path, tmp_path / "2")
    assert [job["seed"] for job in read_jobs(tmp_path)] == [2]
    assert [run.results["seed"] for run in gather([tmp_path]).runs] == [2]


def test_a_refused_job_is_not_in_the_report(tmp_path, command):
    assert command("-m", "strategy=naive", "seed=0,1")[0] == 0
    code, _, err = command("-m", "strategy=naive", "seed=0,2")
    assert code == 1
    assert "job 1 (" in err
    assert "holds a finished run of another configuration" in err
    assert [job["seed"] for job in read_jobs(tmp_path / "run")] == [0]


@pytest.mark.parametrize(
    ("choice", "task", "varied"),
    [
        ("a_recipe", ["experiment=a_recipe", "strategy=ewc", "seed=7"], []),
        ("a_recipe", ["experiment=a_recipe", "data_root=/data", "wandb.mode=disabled"], []),
        ("a_recipe", ["experiment=a_recipe", "training.iterations=3"], ["training.iterations=3"]),
        ("a_recipe", ["strategy=ewc", "+optimizer.eps=1"], ["+optimizer.eps=1"]),
        (None, ["training.iterations=3"], []),
    ],
)
def test_a_try_of_a_recipe_with_other_options_is_not_kept(choice, task, varied):
    hydra = OmegaConf.create(
        {
            "runtime": {"choices": {"experiment": choice}},
            "sweeper": {"params": {"strategy": "naive,ewc", "seed": "0,1"}},
            "overrides": {"task": task},
        }
    )
    assert varied_by(hydra) == varied


def test_a_sweep_runs_a_job_with_damaged_results_again(tmp_path, command):
    assert command("-m", "seed=0,1")[0] == 0
    path, other = (tmp_path / "run" / str(job) / "results.json" for job in (0, 1))
    whole, untouched = json.loads(path.read_text()), other.stat().st_mtime_ns
    path.write_text(path.read_text()[:100])
    code, out, err = command("-m", "seed=0,1")
    assert (code, err) == (0, "")
    assert f"{os.path.relpath(path)} is damaged" in out
    assert json.loads(path.read_text())["accuracy_matrix"] == whole["accuracy_matrix"]
    assert other.stat().st_mtime_ns == untouched


def test_a_finished_sweep_is_known_at_once(tmp_path, command):
    """Without the imports that a run needs, and with each configuration composed once."""
    assert command("-m", "seed=0,1")[0] == 0
    before = contents(tmp_path)
    script = (
        "import sys; from experiments.configuration.command_line import CheckedLoader;"
        "from experiments.run import main; composed = [];"
        "load = CheckedLoader.load_configuration;"
        "CheckedLoader.load_configuration = lambda *a, **k: composed.append(0) or load(*a, **k);"
        "main(); print(sorted({'torch', 'avalanche', 'wandb'} & sys.modules.keys()), len(composed))"
    )
    options = ["-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("already done") == 2
    assert done.stdout.splitlines()[-1] == "[] 4"  # mode, sweep, and one for each job
    assert {k: v for k, v in contents(tmp_path).items() if k.name != "multirun.yaml"} == {
        k: v for k, v in before.items() if k.name != "multirun.yaml"
    }


def test_a_job_that_another_process_ran_and_finished_is_no_failure(tmp_path, command):
    assert command("-m", "seed=0,1")[0] == 0
    note_failure(tmp_path / "run", 0, ["seed=0"], "0 is in use by process 7: wait for its end.")
    note_failure(tmp_path / "run", 1, ["seed=1"], "1 holds a finished run of another one.")
    note_failure(tmp_path / "run", 2, ["seed=2"], "2 is in use by process 7: wait for its end.")
    assert [line.partition(" (")[0] for line in failures(tmp_path / "run")] == ["job 1", "job 2"]


def test_a_job_that_died_before_its_line_was_kept_is_kept(tmp_path, command):
    kept = tmp_path / "kept.jsonl"
    sweep = ["-m", "seed=0", f"+hydra.callbacks.report.kept={kept}"]
    assert command(*sweep)[0] == 0
    line = kept.read_text()
    kept.unlink()  # as after a kill between the two files
    code, out, _ = command(*sweep)
    assert (code, out.count("already done")) == (0, 1)
    assert kept.read_text() == line


def test_a_warning_of_torch_about_cuda_is_no_error():
    """What it says where the first operation of a backward pass is a matrix product."""
    warnings.warn(
        "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the "
        "primary context... (Triggered internally at CublasHandlePool.cpp:330.)",
        stacklevel=1,
    )


def test_a_finished_job_whose_line_is_missing_is_kept(tmp_path, command, monkeypatch):
    """An earlier process wrote its results and then found no room for the line."""
    kept = tmp_path / "kept.jsonl"
    options = ["-m", "seed=0", f"+hydra.callbacks.report.kept={kept}"]
    assert command(*options)[0] == 0
    line = kept.read_text()
    kept.unlink()
    code, out, _ = command(*options)
    assert code == 0
    assert "already done" in out
    assert kept.read_text() == line
