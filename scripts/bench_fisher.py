"""Fisher matrices of four networks beside every library that has them, measured in one run.

    pip install -e ".[bench]"
    python scripts/bench_fisher.py --data-root DIR [--threads 2] [--models mlp,cnn] [--output FILE]

Everything in a row takes the same batches with the same threads, in turns; printed are the least
seconds, and in brackets the trace over ours.  Nothing here is a test.  The other libraries are in
``bench_peers.py``.  Page faults are part of it: with glibc, MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keep most of them out.
"""

import argparse
import gc
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_networks import (  # noqa: E402
    CLASSES,
    WIDTHS,
    WORKLOADS,
    Batches,
    count_of,
    plain_parameters,
    workload,
)
from bench_peers import PEERS  # noqa: E402

import ewc  # noqa: E402

ESTIMATORS = {"exact": ewc.Exact(), "Monte Carlo": ewc.MonteCarlo(), "empirical": ewc.Empirical()}
STRUCTURES = {"diagonal": ewc.Diagonal(), "Kronecker": ewc.Kronecker()}
INFINITY = float("inf")
PATIENCE, ENOUGH = 2.0, 10.0
"""Seconds: a peer that takes longer than the one for a batch is timed on this batch alone, without
further turns; no call that takes longer than the other is repeated."""
PRODUCT = 2000
LIBRARIES = ("torch", "backpack-for-pytorch", "nngeometry", "curvlinops-for-pytorch")
LIBRARIES += ("laplace-torch", "avalanche-lib")
FOOT = """
Seconds: the least of all turns. In brackets: the trace of a peer's matrix over that of ours on the
same examples, both means over examples; 1 is agreement (with Monte Carlo about 1: other draws).
BackPACK's Kronecker factors of a convolution are another approximation: those of gradients summed
over positions, times the number of positions, as its source says. `~`: measured on fewer examples
and scaled up. `*`: over parameters of Linear and Conv2d layers alone, ours like theirs. The ratio
is the worst over peers, each against ours over the same parameters. Avalanche squares gradients of
batch means, another quantity: never the fastest. "of rate" is the share of the rate of matrix
products.
"""


@dataclass
class Contestant:
    """What takes its turns in a row.

    Attributes:
        call: the computation over batches; returns the trace.
        batches: all that there are for it.
        rests: whether it takes no further turns.
    """

    call: Callable[[Batches], float]
    batches: Batches
    seconds: float = INFINITY
    trace: float = float("nan")
    rests: bool = False

    def run(self) -> None:
        """Call it once."""
        gc.collect()
        start = time.perf_counter()
        self.trace = self.call(self.batches)
        self.seconds = min(self.seconds, time.perf_counter() - start)

    def prepare(self) -> None:
        """Warm up on one batch, and keep as many batches as there is patience for."""
        everything, self.batches = self.batches, self.batches[:1]
        self.run()
        if self.seconds < ENOUGH:
            self.run()
        self.rests = self.seconds > PATIENCE
        if not self.rests:
            self.batches = everything[: max(1, int(PATIENCE / self.seconds))]
            self.seconds = INFINITY


class Table:
    """The rows of the table as they come, and the notes below it.

    Args:
        repeats: the turns that everything takes.
        output: a file that gets all lines, too.
    """

    def __init__(self, repeats: int, output: Path | None) -> None:
        self.repeats = repeats
        self.output = output
        self.notes: list[str] = []
        self.rate = 0.0
        if output is not None:
            output.write_text("")

    def line(self, text: str = "") -> None:
        """Print a line."""
        print(text, flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(f"{text}\n")

    def cells(self, cells: list[str]) -> None:
        """Print a row."""
        self.line(f"| {' | '.join(cells)} |")

    def note(self, text: str) -> str:
        """The mark of a note."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def head(self) -> None:
        """Print the head."""
        names = [peer.name for peer in PEERS]
        cells = ["model", "matrix", "ours", "of rate", *names, "fastest", "ours / fastest"]
        self.cells(cells)
        self.cells(["---"] * len(cells))

    def foot(self) -> None:
        """Print what the table needs to be read."""
        self.line(FOOT)
        for number, text in enumerate(self.notes, 1):
            self.line(f"[{number}] {text}  ")
        libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        self.line(
            f"\nMatrix products of {PRODUCT} x {PRODUCT}: {self.rate / 1e9:.0f} GFLOP/s. "
            f"{datetime.now(UTC).date()}, Python {platform.python_version()}, {libraries}, "
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads."
        )


class Rows:
    """The rows of one network.

    Args:
        table: what they are printed into.
        name: the network.
        data_root: the folder of the images.
    """

    def __init__(self, table: Table, name: str, data_root: Path) -> None:
        self.table = table
        self.name = name
        self.model, self.batches = workload(name, data_root)
        self.count = count_of(self.batches)
        self.peers = {kind.name: kind(self.model) for kind in PEERS}

    def print(self) -> None:
        """Print them."""
        for structure in STRUCTURES:
            for estimator in ESTIMATORS:
                self.row(structure, estimator)

    def row(self, structure: str, estimator: str) -> None:
        """Measure and print one row: everything takes turns."""
        options = {"estimator": ESTIMATORS[estimator], "structure": STRUCTURES[structure]}

        def fisher(batches: Batches) -> ewc.FisherMatrix:
            return ewc.fisher_information(self.model, batches, **options)

        plain = plain_parameters(self.model)
        some_only = structure == "Kronecker" and len(plain) < len(list(self.model.parameters()))
        ours = self.ours(lambda batches: float(fisher(batches).trace()))
        contestants = [ours]
        if some_only:  # as the peers do that know Linear and Conv2d layers alone
            options_plain = {**options, "parameters": list(plain)}
            contestants.append(
                self.ours(
                    lambda batches: float(
                        ewc.fisher_information(self.model, batches, **options_plain).trace()
                    )
                )
            )
        left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
        product = Contestant(lambda _: float((left @ right)[0, 0]), self.batches)
        cells = {}
        running: dict[str, Contestant] = {}
        for key, peer in self.peers.items():
            try:
                cut = peer.cut(structure, estimator, self.batches)
                call = partial(peer.trace, structure, estimator)
                contestant = Contestant(call, cut)
                contestant.prepare()
                running[key] = contestant
            except Exception as error:
                cells[key] = f"- {self.table.note(f'{key}: {reason(error)}')}"
        for _ in range(self.table.repeats):
            for contestant in (*contestants, product, *running.values()):
                if not contestant.rests:
                    contestant.run()
                    contestant.rests = contestant.seconds > ENOUGH
        self.table.rate = max(self.table.rate, 2 * PRODUCT**3 / product.seconds)

        ratios, diagonals = {}, {}
        for key, contestant in running.items():
            peer = self.peers[key]
            partly = peer.partial and some_only
            examples = count_of(contestant.batches)
            if examples not in diagonals:
                diagonals[examples] = fisher(contestant.batches).diagonal()
            diagonal = diagonals[examples]
            trace = sum(float(diagonal[n].sum()) for n in (plain if partly else diagonal))
            scaled = contestant.seconds * self.count / examples
            cells[key] = (
                f"{'~' * (examples < self.count)}{scaled:.3g}{'*' * partly} "
                f"({contestant.trace / trace:.3f})"
            )
            if peer.comparable:
                ratios[key + "*" * partly] = contestants[partly].seconds / scaled
        share = ""
        if self.name == "mlp" and structure == "diagonal":
            share = f"{operations(estimator, self.count) / ours.seconds / self.table.rate:.0%}"
        fastest = max(ratios, key=ratios.__getitem__, default="-")
        against = f"{ratios[fastest]:.2f}" if ratios else "-"
        times = ", ".join(f"{c.seconds:.3g}{'*' * i}" for i, c in enumerate(contestants))
        left_cells = [self.name, f"{estimator} {structure}", times, share]
        self.table.cells([*left_cells, *(cells[key] for key in self.peers), fastest, against])

    def ours(self, call: Callable[[Batches], float]) -> Contestant:
        """Our own computation, warm, over all batches and in every turn."""
        contestant = Contestant(call, self.batches)
        contestant.prepare()
        contestant.batches, contestant.seconds, contestant.rests = self.batches, INFINITY, False
        return contestant


def reason(error: Exception) -> str:
    """One short line about an error."""
    kind = "" if type(error) is NotImplementedError else f"{type(error).__name__}: "
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(error)).partition("\n")[0]
    return f"{kind}{text or 'not implemented'}"[:120]


def operations(estimator: str, count: int) -> float:
    """The floating-point operations of a diagonal of the MLP: its matrix products."""
    sizes = list(pairwise(WIDTHS))
    vectors = CLASSES - 1 if estimator == "exact" else 1
    forward = sum(2 * i * o for i, o in sizes)
    # Forward, the vectors to the outputs of the first layer, the final products.
    return count * (2 * forward + vectors * sum(2 * i * o for i, o in sizes[1:]))


def peak(what: str) -> None:
    """Print the bytes that a Fisher matrix or a training step takes at its peak."""
    model, batches = workload("resnet18", Path())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    before = memory("VmRSS")
    if what == "fisher":
        ewc.fisher_information(model, [(x, y)])
    else:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    print(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes of this process; getrusage's peak would be that of its parent, if larger."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peaks(threads: int) -> str:
    """Both peaks, each in a separate process."""
    mebibytes = {}
    for what in ("fisher", "step"):
        command = [sys.executable, __file__, "--data-root", ".", "--peak", what]
        command += ["--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        mebibytes[what] = int(done.stdout) / 2**20
    return (
        f"Peak memory over that before, ResNet-18, batch of 64: exact diagonal "
        f"{mebibytes['fisher']:.0f} MiB, a training step (SGD) {mebibytes['step']:.0f} MiB, "
        f"ratio {mebibytes['fisher'] / mebibytes['step']:.2f}."
    )


def main() -> None:
    """Print the table and what belongs to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="the folder of MNIST/raw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default=",".join(WORKLOADS), help="some of them, by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for the table")
    parser.add_argument("--peak", choices=("fisher", "step"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    if unknown := set(models) - set(WORKLOADS):
        parser.error(f"{', '.join(unknown)}: the models are {', '.join(WORKLOADS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(arguments.peak)
        return
    # A fused kernel for evaluation has no derivative, and no hooks of any library.
    torch.backends.mha.set_fastpath_enabled(False)
    table = Table(arguments.repeats, arguments.output)
    start = time.perf_counter()
    table.head()
    for name in models:
        Rows(table, name, arguments.data_root).print()
    table.foot()
    table.line(peaks(arguments.threads))
    table.line(f"{time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
