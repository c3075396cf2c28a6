"""Fisher matrices on an accelerator: milliseconds and memory there, operations anywhere.

    python scripts/bench_accelerator.py [--networks mlp,resnet18,vit_s,gpt2] [--peers] [--limit 20]
    python scripts/bench_accelerator.py --operations [--networks ...]

The first form needs a CUDA device.  Every row is over the same batches as a forward and a
backward pass, beside BackPACK, curvlinops and torch.func with ``--peers`` (extra ``bench``).  The
second form counts the operations of a further batch on a CPU that works as an accelerator does,
and the values that are read back to the host.  Random inputs; nothing here is a test.
"""

import argparse
import gc
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

warnings.filterwarnings("ignore")
# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_networks import CLASSES, Batches, Gpt2, ResNet18, VisionTransformer  # noqa: E402
from bench_peers import BackPACK, Curvlinops, Peer, PerSample  # noqa: E402

import ewc  # noqa: E402
from ewc.linalg import devices  # noqa: E402

ESTIMATORS = {"exact": ewc.Exact(), "Monte Carlo": ewc.MonteCarlo(), "empirical": ewc.Empirical()}
STRUCTURES = {"diagonal": ewc.Diagonal(), "Kronecker": ewc.Kronecker()}
PEERS: tuple[type[Peer], ...] = (BackPACK, Curvlinops, PerSample)
REPEATS = 3


def mlp() -> nn.Module:
    """784-1000-1000-10."""
    sizes = (784, 1000, 1000)
    layers = [module for i, o in pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1000, CLASSES))


def images(side: int) -> Callable[[int], torch.Tensor]:
    """Random images of so many pixels a side."""
    return lambda count: torch.randn(count, 3, side, side)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], int, int]] = {
    "mlp": (mlp, lambda count: torch.rand(count, 784), 60_000, 1000),
    "resnet18": (ResNet18, images(32), 512, 128),
    "vit_s": (VisionTransformer, images(224), 64, 32),
    "gpt2": (Gpt2, lambda count: torch.randint(50_257, (count, 128)), 64, 16),
}
"""The network, its inputs, the number of examples, the size of a batch."""


def workload(name: str, device: str, examples: int, batch: int) -> tuple[nn.Module, Batches]:
    """A network in evaluation mode and its batches, the same every time."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name][:2]
    model, x, y = build(), inputs(examples), torch.randint(CLASSES, (examples,))
    model, x, y = model.to(device), x.to(device), y.to(device)
    with torch.no_grad():
        model(x[:batch])  # the statistics of a BatchNorm
    return model.eval(), list(zip(x.split(batch), y.split(batch), strict=True))


def training(model: nn.Module, batches: Batches) -> None:
    """Forward and backward passes."""
    for x, y in batches:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()


# --- times on a device ------------------------------------------------------------------


def stop(*_: object) -> None:
    """End what takes too long."""
    raise TimeoutError


def timed(call: Callable[[], Any], limit: int) -> tuple[float, float]:
    """The median seconds of a call, and its peak of memory in MiB."""
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, seconds = torch.cuda.memory_allocated(), []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), (torch.cuda.max_memory_allocated() - before) / 2**20
    finally:
        signal.alarm(0)


def print_times(name: str, limit: int, *, peers: bool) -> None:
    """One table: a row a matrix, ours and the peers'."""
    model, batches = workload(name, "cuda", *NETWORKS[name][2:])
    plain, memory = timed(lambda: training(model, batches), limit)
    print(f"\n{name}: forward + backward {1e3 * plain:.1f} ms, {memory:.0f} MiB\n")
    print("| matrix | by | ms | / forward + backward | MiB |\n|---|---|---|---|---|")
    for structure, request in STRUCTURES.items():
        for kind, estimator in ESTIMATORS.items():

            def ours(request: Any = request, estimator: Any = estimator) -> None:
                ewc.fisher_information(model, batches, estimator=estimator, structure=request)

            calls: dict[str, Callable[[], Any]] = {"ewc": ours}
            for peer in PEERS if peers else ():
                calls[peer.name] = peer_call(peer, model, structure, kind, batches)
            for who, call in calls.items():
                try:
                    seconds, peak = timed(call, limit)
                    cells = f"{1e3 * seconds:.1f} | {seconds / plain:.2f} | {peak:.0f}"
                except TimeoutError:
                    cells = f"over {limit} s | | "
                except NotImplementedError:
                    continue
                except Exception as error:
                    cells = f"{type(error).__name__} | | "
                print(f"| {kind} {structure} | {who} | {cells} |", flush=True)
                gc.collect()
                torch.cuda.empty_cache()


def peer_call(
    peer: type[Peer], model: nn.Module, structure: str, estimator: str, batches: Batches
) -> Callable[[], float]:
    """A peer's computation."""
    made = peer(model)
    return lambda: made.trace(structure, estimator, made.cut(structure, estimator, batches))


# --- operations on any machine ----------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count an operation and do it."""
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def further(model: nn.Module, batches: Batches, **request: Any) -> Counter[str]:
    """The operations of one further batch."""
    counts = []
    for number in (2, 3):
        with Operations() as operations:
            ewc.fisher_information(model, batches[:number], memory=2**34, **request)
        counts.append(operations.counts)
    counts[1].subtract(counts[0])
    return counts[1]


def print_operations(name: str) -> None:
    """The rows of one network."""
    model, batches = workload(name, "cpu", 6, 2)
    with Operations() as operations:
        training(model, batches[:1])
    plain = operations.counts.total()
    for structure, request in STRUCTURES.items():
        for kind, estimator in ESTIMATORS.items():
            counts = further(model, batches, estimator=estimator, structure=request)
            total, reads = counts.total(), counts["_local_scalar_dense"]
            row = f"| {name} | {kind} {structure} | {plain} | {total} | {total / plain:.1f} |"
            print(f"{row} {reads} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--limit", type=int, default=20, help="seconds that a row may take")
    parser.add_argument("--operations", action="store_true")
    options = parser.parse_args()
    names = options.networks.split(",")
    if options.operations:
        devices.BY_DEVICE["cpu"] = devices.ACCELERATOR
        print("| network | matrix | forward + backward | a batch | ratio | values read back |")
        print("|---|---|---|---|---|---|")
        for name in names:
            print_operations(name)
        return
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device: --operations works without one.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in names:
        print_times(name, options.limit, peers=options.peers)


if __name__ == "__main__":
    main()
