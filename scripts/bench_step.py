"""The cost of a training step with a Kronecker penalty beside a naive one.

``python scripts/bench_step.py [--width 1000] [--threads 2]``: MLP 784-w-w-10, ReLU, batches of
128, Adam; the penalty in the loss, whole and by paced eigenvectors, and by implicit steps, after
two and after fifty tasks.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ewc import EWCPenalty, Kronecker, Online, fisher_information

STEPS = 40
ROUNDS = 5


def network(width: int) -> nn.Module:
    """The MLP."""
    torch.manual_seed(0)
    sizes = (784, width, width)
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def penalty_after(tasks: int, model: nn.Module) -> EWCPenalty:
    """A penalty that has seen some tasks of random images."""
    penalty = EWCPenalty(10.0, Online())
    for _ in range(tasks):
        data = [(torch.rand(256, 784), torch.randint(10, (256,)))]
        penalty.consolidate(fisher_information(model, data, structure=Kronecker()), model)
    return penalty


@dataclass(frozen=True)
class Way:
    """How the penalty takes its part: in the loss, or by an implicit step every so often."""

    penalty: EWCPenalty | None = None
    share: float = 1.0
    every: int | None = None


def milliseconds(model: nn.Module, way: Way) -> float:
    """One step, the mean over some."""
    penalty, every = way.penalty, way.every
    if penalty is not None:
        penalty.eigenvector_share = way.share
        penalty(model)  # the eigenvectors, which are made once a task
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x, y = torch.rand(128, 784), torch.randint(10, (128,))
    start = time.perf_counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        if penalty is not None and every is None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()
        if penalty is not None and every is not None and (step + 1) % every == 0:
            penalty.implicit_step(model, optimizer, every)
    return 1e3 * (time.perf_counter() - start) / STEPS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    model = network(arguments.width)
    few, many = penalty_after(2, model), penalty_after(50, model)
    ways = {
        "naive": Way(),
        "K-FAC in the loss, 2 tasks": Way(few),
        "K-FAC in the loss, 50 tasks": Way(many),
        "K-FAC, a tenth a step, 2 tasks": Way(few, share=0.1),
        "K-FAC, a twentieth a step, 2 tasks": Way(few, share=0.05),
        "K-FAC, a twentieth a step, 50 tasks": Way(many, share=0.05),
        "K-FAC implicit every 10, 2 tasks": Way(few, every=10),
        "K-FAC implicit every 10, 50 tasks": Way(many, every=10),
    }
    for way in ways.values():
        milliseconds(model, way)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(milliseconds(model, way))
    naive = statistics.median(times["naive"])
    print(f"torch {torch.__version__}, {arguments.threads} threads, width {arguments.width}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:35s} {median:7.2f} ms  {median / naive:5.2f} x naive")


if __name__ == "__main__":
    main()
