"""Load: many tasks, many parameters, many jobs, and a long run with flat memory.

``python scripts/load_test.py tasks|fisher|jobs|soak``.  Each prints one line with what it measured
and ends with 1 where it is above its bound.

- ``tasks``: 100 permuted tasks of digits with EWC; time of a step and memory, early and late.
- ``fisher``: the exact diagonal of a network of 50 million parameters, and its peak memory.
- ``jobs``: the report over 1,000 jobs in one sweep's folder.
- ``soak``: training, Fisher passes, evaluations and checkpoints for 30 minutes, and its memory.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The tree that this file is in, not another one that is installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUN = (sys.executable, "-m", "experiments.run", "wandb.mode=offline")
PERMUTED = ("benchmark=permuted_digits", "benchmark.num_tasks=100", "strategy=ewc")
MIB = 2**20


@dataclass(frozen=True)
class Moment:
    """What was seen of a run when it wrote a record.

    Attributes:
        record: the record.
        at: the clock, in seconds.
        resident: the memory of the process, in bytes.
    """

    record: dict[str, float]
    at: float
    resident: int


def watched(arguments: tuple[str, ...], directory: Path, seconds: float) -> Iterator[Moment]:
    """Start a run, and look at it 100 times a second; after ``seconds`` it gets SIGTERM."""
    command = [*RUN, f"hydra.run.dir={directory}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = directory / "metrics.jsonl"
    try:
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.01)
        ends = time.monotonic() + seconds
        with metrics.open(encoding="utf-8") as file:
            while process.poll() is None:
                lines, now = file.readlines(), time.monotonic()
                complete = [line for line in lines if line.endswith("\n")]
                file.seek(file.tell() - len("".join(lines[len(complete) :])))
                if complete:
                    memory = resident(process.pid)
                    yield from (Moment(json.loads(line), now, memory) for line in complete)
                if now > ends:
                    process.send_signal(signal.SIGTERM)
                    ends = now + 60
                time.sleep(0.01)
    finally:
        process.kill()
    if process.returncode not in (0, 143):
        sys.exit(f"The run ended with {process.returncode}.")


def resident(pid: int) -> int:
    """The memory that a process occupies; 0 after its end."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def verdict(ok: bool, text: str) -> None:
    """Print a result, and end with 1 if it is above its bound."""
    print(text if ok else f"ABOVE ITS BOUND: {text}", flush=True)
    if not ok:
        sys.exit(1)


def tasks() -> None:
    """Time of a step and memory over 100 tasks: the last ten beside the second ten."""
    steps: dict[int, list[float]] = {}
    memory: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (*PERMUTED, "training.epochs=20")
        for moment in watched(arguments, Path(folder) / "run", 3600):
            task = int(moment.record["task"])
            if "step" in moment.record:
                steps.setdefault(task, []).append(moment.at)
            memory[task] = max(memory.get(task, 0), moment.resident)
    times = {task: 1000 * (at[-1] - at[0]) / (len(at) - 1) for task, at in steps.items()}
    early, late = (statistics.median(times[t] for t in range(*r)) for r in ((10, 20), (90, 100)))
    before, after = memory[19] / MIB, memory[99] / MIB
    verdict(
        late < 1.1 * early and after < before + 30,
        f"{len(times)} tasks: a step takes {early:.2f} ms in tasks 11 to 20 and {late:.2f} ms in "
        f"tasks 91 to 100; memory {before:.0f} MiB after task 20 and {after:.0f} MiB after 100.",
    )


FISHER = """
import resource, sys, torch
from torch import nn
from ewc import fisher_information

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(784, 6000), nn.ReLU(), nn.Linear(6000, 6000), nn.ReLU(),
                      nn.Linear(6000, 1500), nn.ReLU(), nn.Linear(1500, 10))
data = [(torch.randn(256, 784), torch.randint(10, (256,)))]
before = peak()
fisher = fisher_information(model, data)
print(sum(p.numel() for p in model.parameters()), before, peak(), float(fisher.trace()))
"""


def fisher() -> None:
    """The peak memory of a Fisher pass beyond that of the network."""
    done = subprocess.run(
        [sys.executable, "-c", FISHER], cwd=ROOT, check=True, capture_output=True, text=True
    )
    count, before, after, _ = (float(word) for word in done.stdout.split())
    added, bound = (after - before) / MIB, 2 * 4 * count / MIB + 256
    verdict(
        added <= bound,
        f"{count / 1e6:.1f} million parameters, {4 * count / MIB:.0f} MiB: the exact diagonal adds "
        f"{added:.0f} MiB at its peak; the bound is twice the parameters and 256 MiB.",
    )


def jobs() -> None:
    """The time of the report over 1,000 jobs."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "run"
        subprocess.run([*RUN, f"hydra.run.dir={first}", "training.epochs=1"], cwd=ROOT, check=True)
        results = json.loads((first / "results.json").read_text())
        sweep = Path(folder) / "sweep"
        for number in range(1000):
            job = sweep / str(number)
            job.mkdir(parents=True)
            strength, seed = 10.0 ** (number % 10), number // 10
            results["overrides"] = [f"strategy.strength={strength}", f"seed={seed}"]
            results["seed"] = results["config"]["seed"] = seed
            results["config"]["strategy"]["strength"] = strength
            (job / "results.json").write_text(json.dumps(results))
        start = time.monotonic()
        report = [sys.executable, "-m", "experiments.report", str(sweep)]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        lines = (sweep / "report.md").read_text().count("\n| ")
    verdict(seconds < 10, f"1,000 jobs: the report of {lines} lines takes {seconds:.1f} s.")


def soak(minutes: float) -> None:
    """Memory at the end of a long run beside that after a tenth of it."""
    seen: list[tuple[float, int]] = []
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = (*PERMUTED, "training.iterations=2000", "training.checkpoint_minutes=0.1")
        for moment in watched(arguments, Path(folder) / "run", 60 * minutes):
            seen.append((moment.at, moment.resident))
            count += "step" in moment.record
    start, end = seen[0][0], seen[-1][0]
    early = [memory for at, memory in seen if at < start + 0.2 * (end - start)]
    late = [memory for at, memory in seen if at > start + 0.8 * (end - start)]
    before, after = max(early) / MIB, max(late) / MIB
    verdict(
        after < before + 20,
        f"{(end - start) / 60:.0f} minutes, {count} steps: at most {before:.0f} MiB in the first "
        f"fifth and {after:.0f} MiB in the last.",
    )


def main() -> None:
    """Measure one of the loads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("load", choices=["tasks", "fisher", "jobs", "soak"])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    arguments = parser.parse_args()
    if arguments.load == "soak":
        soak(arguments.minutes)
    else:
        {"tasks": tasks, "fisher": fisher, "jobs": jobs}[arguments.load]()


if __name__ == "__main__":
    main()
