"""Disks that are full, read-only or gone: real ones, of some kB in memory."""

import json
import os
import subprocess

import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import nn

from ewc import DiagonalFisher, EWCPenalty
from experiments.recording.files import append_whole, write_whole
from experiments.recording.kept import keep, read_kept
from experiments.recording.results import read_results, write_results
from experiments.recording.tracking import Recorder
from experiments.reporting.picture_file import write_picture
from experiments.reporting.report.page import write_report
from experiments.reporting.sweep_report import report_sweep

SMALL = ["model.hidden=[50]", "training.iterations=20", "training.batch_size=16"]
SMALL += ["benchmark.num_tasks=2", "strategy=ewc"]
RESULTS = {
    "average_accuracy": 0.75,
    "forgetting": 0.0,
    "backward_transfer": 0.0,
    "accuracy_matrix": [[1.0, 0.0], [0.5, 1.0]],
    "seconds": {"total": 1.0},
    "config": {"_target_": "experiments.experiment.Experiment", "seed": 0},
    "overrides": ["strategy=ewc", "seed=0"],
    "seed": 0,
    "versions": {"ewc": "1"},
}
PAGE = 4096
"""Bytes by which the disk is filled."""


class Disk:
    """A small disk in memory."""

    def __init__(self, folder):
        self.folder = folder

    def mount(self, options):
        """Mount it, or change its options with ``remount``."""
        arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk in memory can be mounted: {done.stderr.strip()}")

    def unmount(self):
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path):
    """A disk that is not mounted yet."""
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.unmount()


# --- every writer -------------------------------------------------------------------------


def fisher(seed):
    entries = torch.rand(6000, generator=torch.Generator().manual_seed(seed))
    return DiagonalFisher({"weight": entries}, 10)


def penalty(seed):
    model = nn.Linear(1500, 1, bias=False)
    penalty = EWCPenalty()
    entries = torch.rand(1, 1500, generator=torch.Generator().manual_seed(seed))
    penalty.consolidate(DiagonalFisher({"weight": entries}, 10), model)
    return penalty


def picture(seed):
    figure = Figure(figsize=(2, 2))
    figure.add_subplot().plot([0, seed, 1])
    return figure


def long(seed):
    config = RESULTS["config"] | {"seed": seed, "name": str(seed) * 20_000}
    return RESULTS | {"config": config, "seed": seed}


WRITERS = {
    "results.json": lambda folder, seed: write_results(folder, long(seed)),
    "recipe.jsonl": lambda folder, seed: keep(folder / "recipe.jsonl", long(seed)),
    "config.yaml": lambda folder, seed: write_whole(folder / "config.yaml", str(seed) * 20_000),
    "picture.png": lambda folder, seed: write_picture(picture(seed), folder / "picture.png", 400),
    "fisher.safetensors": lambda folder, seed: fisher(seed).save(folder / "fisher.safetensors"),
    "penalty.safetensors": lambda folder, seed: penalty(seed).save(folder / "penalty.safetensors"),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_on_a_full_disk_leaves_what_was_there(disk, name):
    """Every free size from none to enough: all written, or nothing changed."""
    disk.mount("size=2m")
    write = WRITERS[name]
    write(disk.folder, 1)
    before = contents(disk.folder)
    used = len(before[name])
    pages = range(-(-used // PAGE) + 4)
    outcomes = []
    for free in pages:
        disk.mount("remount,size=2m")
        ballast = disk.folder / "ballast"
        statistics = os.statvfs(disk.folder)
        ballast.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize - free * PAGE))
        full = contents(disk.folder)
        try:
            write(disk.folder, 2)
        except OSError:
            outcomes.append(False)
            assert contents(disk.folder) == full
        else:
            outcomes.append(True)
            break
        ballast.unlink()
    assert outcomes[0] is False
    assert outcomes[-1] is True
    (disk.folder / "ballast").unlink()
    assert contents(disk.folder).keys() == {name}


def test_an_append_that_does_not_fit_leaves_the_file_as_it_was(disk):
    disk.mount("size=16k")
    with (disk.folder / "lines").open("wb", buffering=0) as file:
        append_whole(file, b"first\n")
        with pytest.raises(OSError, match="No space left"):
            append_whole(file, bytes(20_000))
        assert (disk.folder / "lines").read_bytes() == b"first\n"
        append_whole(file, bytearray(b"second\n"))
    assert (disk.folder / "lines").read_bytes() == b"first\nsecond\n"


def test_a_report_that_does_not_fit_leaves_the_earlier_one(disk):
    disk.mount("size=64k")
    (disk.folder / "0").mkdir()
    write_results(disk.folder / "0", RESULTS)
    report_sweep(disk.folder)
    before = (disk.folder / "report.md").read_bytes()
    statistics = os.statvfs(disk.folder)
    (disk.folder / "ballast").write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
    with pytest.raises(OSError, match=r"report\.md"):
        report_sweep(disk.folder)
    assert (disk.folder / "report.md").read_bytes() == before
    assert not list(disk.folder.glob("*.part"))


def test_a_page_that_does_not_fit_leaves_the_earlier_one(disk):
    disk.mount("size=2m")
    (disk.folder / "0").mkdir()
    write_results(disk.folder / "0", RESULTS)
    write_report([disk.folder], disk.folder)
    files = [path for path in disk.folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    statistics = os.statvfs(disk.folder)
    (disk.folder / "ballast").write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
    with pytest.raises(OSError, match=r"pictures/.*\.png"):
        write_report([disk.folder], disk.folder)
    (disk.folder / "ballast").unlink()
    assert {path for path in disk.folder.rglob("*") if path.is_file()} == before.keys()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_line_that_did_not_fit_is_kept_later(disk):
    disk.mount("size=20k")
    keep(disk.folder / "recipe.jsonl", RESULTS)
    with pytest.raises(OSError, match="No space left"):
        keep(disk.folder / "recipe.jsonl", long(1))
    disk.mount("remount,size=1m")
    keep(disk.folder / "recipe.jsonl", long(1))
    jobs, damaged = read_kept(disk.folder / "recipe.jsonl")
    assert [job["seed"] for job in jobs] == [0, 1]
    assert not damaged


# --- the command line ---------------------------------------------------------------------


def check_end(folder, code, out, err):
    """A run has ended with success or one sentence, and has left whole files only."""
    assert "Traceback" not in out + err
    run = folder / "run"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".part", ".tmp")]
    for path in run.glob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    if (run / "config.yaml").exists():
        assert OmegaConf.load(run / "config.yaml").training.iterations == 20
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
            assert json.loads(line)
            assert line.endswith("\n")
    if code == 0:
        assert err == ""
        assert len(read_results(run)["accuracy_matrix"]) == 2
        return
    (sentence,) = err.splitlines()
    assert sentence.startswith("error: ")
    if "task 2/2" in out:
        (printed,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert len(printed["accuracy_matrix"]) == 2
        assert "results.json" in sentence


def test_a_folder_without_room_holds_nothing(disk, command_line):
    disk.mount("size=4k")
    (disk.folder / "ballast").write_bytes(bytes(4096))
    code, _, err = command_line(*SMALL, f"hydra.run.dir={disk.folder}/run")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "No space left on device" in err
    assert [path.name for path in disk.folder.iterdir()] == ["ballast"]


DEFAULT = {8, 24}
"""Sizes at which the records, and the pictures, do not fit."""


@pytest.mark.parametrize(
    "size",
    [
        size if size in DEFAULT else pytest.param(size, marks=pytest.mark.slow)
        for size in (1, 8, 12, 16, 20, 24, 28, 36, 60, 120, 130, 160, 200, 260, 300, 340)
    ],
)
def test_a_run_on_a_full_disk(disk, command_line, size):
    """Then, with room, the same command finishes it with every record once."""
    disk.mount(f"size={size}k")
    options = [*SMALL, "wandb.mode=disabled", f"hydra.run.dir={disk.folder}/run"]
    code, out, err = command_line(*options)
    check_end(disk.folder, code, out, err)
    disk.mount("remount,size=64m")
    if code == 0 and size not in DEFAULT:
        return
    code, _, err = command_line(*options)
    assert (code, err) == (0, "")
    assert len(read_results(disk.folder / "run")["accuracy_matrix"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 20, 150, 300, 400, 500])
def test_a_run_with_wandb_on_a_full_disk(disk, command_line, monkeypatch, size):
    monkeypatch.delenv("WANDB_DATA_DIR")
    disk.mount(f"size={size}k")
    options = [*SMALL, "wandb.mode=offline", f"hydra.run.dir={disk.folder}/run"]
    check_end(disk.folder, *command_line(*options))


def test_records_wait_for_a_full_disk(disk, command_line, monkeypatch):
    """The disk is full for 90 steps; their records are written afterwards, in order."""
    disk.mount("size=1m")
    ballast = disk.folder / "ballast"
    log, count = Recorder.log, []

    def filled(recorder, record, hidden=None, **others):
        count.append({**record, **(hidden or {})})
        if len(count) == 5:
            statistics = os.statvfs(disk.folder)
            ballast.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
        if len(count) == 95:
            ballast.unlink()
        log(recorder, record, hidden=hidden, **others)

    monkeypatch.setattr(Recorder, "log", filled)
    options = [*SMALL, "wandb.mode=disabled", f"hydra.run.dir={disk.folder}/run"]
    code, out, err = command_line(*options, "training.iterations=100")
    assert (code, err) == (0, "")
    assert out.count("records wait until it can be written") == 1
    lines = (disk.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == count


@pytest.mark.parametrize("folder", ["", "/run"])
def test_a_read_only_disk_is_one_sentence(disk, command_line, folder):
    disk.mount("size=1m")
    disk.mount("remount,ro")
    code, _, err = command_line(*SMALL, f"hydra.run.dir={disk.folder}{folder}")
    assert (code, len(err.splitlines())) == (1, 1)
    assert str(disk.folder) in err
    assert "Read-only file system" in err
    assert "hydra.run.dir" in err


def test_a_disk_that_disappears_costs_no_results(disk, command_line, monkeypatch):
    disk.mount("size=1m")
    enter = Recorder.__enter__

    def entered(recorder):
        disk.unmount()
        return enter(recorder)

    monkeypatch.setattr(Recorder, "__enter__", entered)
    options = [*SMALL, "wandb.mode=disabled", f"hydra.run.dir={disk.folder}/run"]
    code, out, err = command_line(*options)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "run/results.json: " in err
    (printed,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(printed["accuracy_matrix"]) == 2
