"""Kill runs at random moments, start them again, and compare with an undisturbed run, bit by bit.

    python scripts/crash_test.py [--kills 30] [--seed 0] [OPTION=VALUE ...]
    python scripts/crash_test.py --sweep [--kills 4] [--seed 0] [OPTION=VALUE ...]

A run is killed with SIGKILL, and the same command is given again until it ends.  Weights, results
and records must then be those of an undisturbed run.  A moment is a number of records and a time
after the last of them, drawn from the seed.  With ``--sweep`` a sweep of 12 jobs under joblib is
killed: in turns all its processes, and only the one that starts the others.
"""

import argparse
import collections
import faulthandler
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from experiments.recording.folder import checkpoint_files
from experiments.run import main as command_line

# Imported once for all runs, which are forks of this process.
for slow in ("experiments.experiment", "experiments.reporting.run_pictures", "sklearn.datasets"):
    importlib.import_module(slow)

ROOT = Path(__file__).parents[1]

RUN = ["benchmark=permuted_digits", "benchmark.num_tasks=3", "strategy=ewc", "model.hidden=[100]"]
RUN += ["training.iterations=40", "training.checkpoint_minutes=0.001", "wandb.mode=disabled"]

SWEEP = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SWEEP += [f"seed={','.join(map(str, range(12)))}"]

PHASES = {
    "writing": r"tensor_file\.py|re(cord|port)ing/\w+\.py",
    "Fisher pass": r"in (_information|consolidate|after_training_exp)\b",
    "evaluation": r"in eval\b",
    "training": r"in training_epoch\b",
    "start or end": "",
}
"""What a process is doing, by a pattern in its stack."""


class Moment(NamedTuple):
    """When a run is killed: so many records, and so many seconds later."""

    records: int
    seconds: float


class Outcome(NamedTuple):
    """What must not depend on interruptions."""

    weights: dict[str, Any]
    results: dict[str, Any]
    records: bytes


def outcome(directory: Path) -> Outcome:
    """What a finished run has left, without the time and the memory it took."""
    results = json.loads((directory / "results.json").read_text())
    del results["seconds"], results["memory"]
    for information in results["fisher"]:
        del information["seconds"]
    tensors = load_file(checkpoint_files(directory)[-1])
    weights = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
    return Outcome(weights, results, (directory / "metrics.jsonl").read_bytes())


def differences(one: Outcome, other: Outcome) -> list[str]:
    """The names of what differs."""
    pairs = zip(Outcome._fields, one, other, strict=True)
    return [name for name, first, second in pairs if first != second]


def count_records(directory: Path) -> int:
    """The records of a run, or of all jobs of a sweep."""
    paths = [*directory.glob("metrics.jsonl"), *directory.glob("*/metrics.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in paths)


def started(arguments: Sequence[str], log: Path, stack: Path) -> int:
    """The process of a new run; SIGUSR2 makes it write its stack to a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("a") as file, stack.open("w") as stack_file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            faulthandler.register(signal.SIGUSR2, file=stack_file, all_threads=False)
            sys.argv[1:] = arguments
            command_line()
            code = 0
    except SystemExit as end:
        print(end.code or "", file=sys.stderr, flush=True)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)


def ended(process: int, wait: bool = False) -> int | None:
    """The exit code of a process, negative for a signal; ``None`` while it runs."""
    number, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def phase_of(stack: Path) -> str:
    """What a process was doing when it wrote its stack."""
    text = stack.read_text()
    return next(phase for phase, pattern in PHASES.items() if re.search(pattern, text))


def killed(arguments: Sequence[str], directory: Path, moment: Moment) -> str | None:
    """Start a run and kill it; what it was doing, or ``None`` if it ended before."""
    stack = directory.with_suffix(".stack")
    process = started(arguments, directory.with_suffix(".log"), stack)
    deadline = None
    while (code := ended(process)) is None:
        if deadline is None and count_records(directory) >= moment.records:
            deadline = time.monotonic() + moment.seconds
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(process, signal.SIGUSR2)
            # The last call is the fork of this process.
            while (code := ended(process)) is None and "in started" not in stack.read_text():
                time.sleep(0.001)
            if code is None:
                os.kill(process, signal.SIGKILL)
                code = ended(process, wait=True)
            break
        time.sleep(0.001)
    if code == 0:
        return None
    if code not in (-signal.SIGKILL, -signal.SIGUSR2):  # before it could write its stack
        sys.exit(f"the run ended with {code}: {directory.with_suffix('.log').read_text()}")
    return phase_of(stack)


def timeline(arguments: Sequence[str], directory: Path) -> list[float]:
    """The seconds at which a whole run had 0, 1, 2 ... records, and at which it ended."""
    begin = time.monotonic()
    process = started(arguments, directory.with_suffix(".log"), directory.with_suffix(".stack"))
    times = [0.0]
    while (code := ended(process)) is None:
        while len(times) <= count_records(directory):
            times.append(time.monotonic() - begin)
        time.sleep(0.001)
    if code:
        sys.exit(f"the run ended with {code}: {directory.with_suffix('.log').read_text()}")
    return [*times, time.monotonic() - begin]


def drawn(draw: random.Random, times: Sequence[float], task_ends: Sequence[int]) -> Moment:
    """A moment: at the start, between steps, after a task's last step, or at the end."""
    last = len(times) - 2
    steps, after_task = draw.randint(1, last), draw.choice(task_ends) - 1
    records = draw.choice([0, steps, steps, after_task, after_task, last])
    return Moment(records, draw.uniform(0, times[records + 1] - times[records]))


def crash_runs(options: Sequence[str], kills: int, draw: random.Random, folder: Path) -> int:
    """Kill runs and compare them; the number of runs that differ."""

    def command(directory: Path) -> list[str]:
        return [*RUN, *options, f"hydra.run.dir={directory}"]

    whole = folder / "whole"
    times = timeline(command(whole), whole)
    expected = outcome(whole)
    lines = [json.loads(line) for line in expected.records.splitlines()]
    task_ends = [number for number, line in enumerate(lines, start=1) if "step" not in line]
    print(f"an undisturbed run: {times[-1]:.1f} s, {len(lines)} records")
    counts: collections.Counter[str] = collections.Counter()
    runs, different = 0, 0
    while counts.total() < kills:
        directory = folder / f"run{runs}"
        runs += 1
        moments = []
        for _ in range(min(draw.choice([1, 1, 2, 3]), kills - counts.total())):
            moments.append(drawn(draw, times, task_ends))
            if (phase := killed(command(directory), directory, moments[-1])) is None:
                break
            counts[phase] += 1
        timeline(command(directory), directory)
        if differ := differences(outcome(directory), expected):
            different += 1
            print(f"{directory}: other {', '.join(differ)} after kills at {moments}")
        else:
            shutil.rmtree(directory)
    print("\nkilled during    times")
    for phase in PHASES:
        print(f"{phase:<15} {counts[phase]:>6}")
    print(f"\n{counts.total()} kills in {runs} runs: {runs - different} bit-identical")
    return different


def crash_sweeps(options: Sequence[str], kills: int, draw: random.Random, folder: Path) -> int:
    """Kill sweeps and compare their jobs; the number of jobs that differ."""
    begin = [sys.executable, "-m", "experiments.run", *SWEEP, *RUN, *options]

    def sweep(directory: Path) -> subprocess.Popen[bytes]:
        with directory.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [*begin, f"hydra.sweep.dir={directory}"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    whole = folder / "whole"
    if sweep(whole).wait():
        sys.exit(whole.with_suffix(".log").read_text())
    jobs = sorted(path.parent.name for path in whole.glob("*/results.json"))
    total, different = count_records(whole), 0
    print(f"an undisturbed sweep: {len(jobs)} jobs, {total} records")
    print("\nkilled           at record   starts needed   jobs that differ")
    ways: dict[str, Callable[[int], None]] = {
        "all processes": lambda process: os.killpg(process, signal.SIGKILL),
        "only the first": lambda process: os.kill(process, signal.SIGKILL),
    }
    for number in range(kills):
        way = list(ways)[number % 2]
        directory, records = folder / f"sweep{number}", draw.randrange(1, total)
        process = sweep(directory)
        while process.poll() is None and count_records(directory) < records:
            time.sleep(0.001)
        ways[way](process.pid)
        process.wait()
        starts = 1
        while sweep(directory).wait():  # at once, while workers may still run
            starts += 1
        differ = [
            f"{job} ({', '.join(names)})"
            for job in jobs
            if (names := differences(outcome(directory / job), outcome(whole / job)))
        ]
        different += len(differ)
        print(f"{way:<15} {records:>10} {starts:>15}   {', '.join(differ) or 'none'}", flush=True)
    return different


def main() -> None:
    """Run the test; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    arguments = parser.parse_intermixed_args()
    test, kills = (crash_sweeps, 4) if arguments.sweep else (crash_runs, 30)
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    draw = random.Random(arguments.seed)
    if test(arguments.options, arguments.kills or kills, draw, folder):
        sys.exit(f"seed {arguments.seed} repeats this; what was left is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
