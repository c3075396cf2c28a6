"""Signals that end a process, and workers whose sweep has died."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.recording.results import read_results
from experiments.training.stop import CODES, REQUEUE, AtOnce, Stop

ROOT = Path(__file__).parents[3]
SMALL = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[30]"]
SMALL += ["strategy=naive", "wandb.mode=disabled"]


@pytest.fixture(autouse=True)
def _logging():
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_signal_outside_of_training_ends_the_process_at_once(capsys, number, code):
    before = signal.getsignal(number)

    def signalled():
        with AtOnce():
            os.kill(os.getpid(), number)
            pytest.fail("it goes on")

    with pytest.raises(SystemExit) as end:
        signalled()
    assert end.value.code == code
    assert capsys.readouterr().err == f"{number.name}: stopped outside of training.\n"
    assert signal.getsignal(number) == before


def stopped_by(*numbers):
    """What a scheduler's handler gets when signals come in training, and the exit code."""
    seen = []
    before = signal.signal(REQUEUE, lambda number, _: seen.append(number))
    try:
        with Stop() as stop:
            for number in numbers:
                os.kill(os.getpid(), number)
            assert seen == []
            with pytest.raises(SystemExit) as end:
                stop.check()
    finally:
        signal.signal(REQUEUE, before)
    return seen, end.value.code


@pytest.mark.parametrize(
    ("numbers", "requeued"),
    [
        ([REQUEUE], True),
        ([signal.SIGTERM], False),  # scancel
        ([signal.SIGTERM, REQUEUE], True),  # pre-emption
        ([REQUEUE, signal.SIGTERM], True),
    ],
)
def test_a_scheduler_gets_its_signal_at_the_end(numbers, requeued):
    code = 128 + (REQUEUE if requeued else signal.SIGTERM)
    assert stopped_by(*numbers) == ([REQUEUE] * requeued, code)


def test_without_a_scheduler_its_signal_is_not_caught():
    with Stop():
        assert signal.getsignal(REQUEUE) is signal.SIG_DFL


def test_an_import_may_hide_the_end():
    def importing():
        with AtOnce():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SystemExit as end:
                raise ImportError("a module in C") from end

    with pytest.raises(SystemExit, match="143"):
        importing()


def test_a_signal_in_training_is_noted(capsys):
    with AtOnce() as outer:
        with Stop() as stop:
            assert not stop.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()
            with pytest.raises(SystemExit, match="143"):
                stop.check()
        assert outer.signal is None
    assert capsys.readouterr().err == ""


WORKER = """
import multiprocessing, os, sys, time
from experiments.training.stop import Stop
def work(path):
    stop = Stop()
    with open(path, "a") as file:
        print(stop.asked(), file=file, flush=True)
        for _ in range(3000):
            time.sleep(0.01)
            if stop.asked():
                print(stop.signal.name, file=file, flush=True)
                stop.check()
if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[2]).Process(target=work, args=sys.argv[1:2]).start()
    time.sleep(600)
"""


IDLE = """
import multiprocessing, os, sys, time
from experiments.training.stop import in_job
def work(path):
    with in_job():
        pass
    with open(path, "w") as file:
        print(os.getpid(), file=file, flush=True)
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=sys.argv[1:2]).start()
    time.sleep(600)
"""


def test_a_worker_that_waits_for_a_job_ends_with_its_sweep(tmp_path):
    script, said = tmp_path / "worker.py", tmp_path / "said"
    script.write_text(IDLE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script, said], env=environment)
    wait_for(lambda: said.exists() and said.read_text().endswith("\n"))
    worker = int(said.read_text())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_whose_parent_has_died_is_asked_to_end(tmp_path, method):
    script, said = tmp_path / "worker.py", tmp_path / "said"
    script.write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script, said, method], env=environment)
    wait_for(lambda: said.exists() and said.read_text() == "False\n")
    parent.kill()
    parent.wait()
    wait_for(lambda: said.read_text() == "False\nSIGHUP\n")


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments, *SMALL],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGINT, "started"), (signal.SIGTERM, "imports"), (signal.SIGUSR1, "imports")],
)
def test_a_signal_before_training_is_one_sentence(tmp_path, number, when):
    directory = tmp_path / "all" / "runs" / "run"
    running = process(f"hydra.run.dir={directory}")
    if when == "imports":
        wait_for(directory.exists)  # Hydra makes it, and torch and Avalanche come after
        time.sleep(0.3)
    else:
        wait_for(lambda: caught(running.pid, number))
    running.send_signal(number)
    out, _ = running.communicate(timeout=60)
    assert (running.returncode, out) == (
        CODES[number],
        f"{number.name}: stopped outside of training.\n",
    )
    assert list(tmp_path.iterdir()) == []


def caught(pid, number):
    """Whether a process handles a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    # SIGINT is handled by Python itself from the start; SIGUSR1 is not.
    return all(int(mask, 16) >> (n - 1) & 1 for n in (number, signal.SIGUSR1))


@pytest.mark.slow
def test_a_sweep_whose_first_process_was_killed_goes_on_at_once(tmp_path):
    sweep = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1,2"]
    sweep += ["training.iterations=300", f"hydra.sweep.dir={tmp_path}"]
    first = process(*sweep)
    records = [tmp_path / job / "metrics.jsonl" for job in "01"]
    wait_for(lambda: all(path.exists() and path.stat().st_size for path in records))
    first.kill()
    first.wait()
    first.stdout.close()
    second = process(*sweep)
    out, _ = second.communicate(timeout=280)
    assert second.returncode == 0, out
    assert [read_results(tmp_path / job)["seed"] for job in "012"] == [0, 1, 2]
    assert "SIGHUP: the run stops in task" in (tmp_path / "0" / "run.log").read_text()
    lengths = [len(path.read_text().splitlines()) for path in records]
    assert lengths == [2 * 300 + 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("by", ["Ctrl-C", "a killed job"])
def test_a_sweep_side_by_side_ends_in_one_sentence(tmp_path, by):
    sweep = ["-m", *SMALL, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    sweep += ["training.iterations=600", f"hydra.sweep.dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *sweep],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    job = tmp_path / "1"
    wait_for(lambda: process.poll() or (job / "metrics.jsonl").exists())
    if by == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        os.kill(json.loads((job / "run.json").read_text())["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    start = {"Ctrl-C": "SIGINT: ", "a killed job": "error: the process of a job was killed"}[by]
    (said,) = [line for line in err.splitlines() if line.startswith(start)]
    where = os.path.relpath(tmp_path, ROOT)
    assert said.endswith(f"to continue the sweep: the same command with hydra.sweep.dir={where}")
    assert "Traceback" not in err
    assert process.returncode == (130 if by == "Ctrl-C" else 1)
