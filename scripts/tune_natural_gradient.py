"""Rates and batch sizes for the race of bench_natural_gradient.py, eight trials an optimizer.

    python scripts/tune_natural_gradient.py [--seeds 10 11] [--data-root DIR]

Every optimizer has two batch sizes and four rates for each, with and without the mean of its
parameters.  They learn from the first 50,000 training images of MNIST and are judged by the
last 10,000; the test images are not looked at, and the seeds are none of the benchmark's.
The least median of seconds decides; a trial that does not arrive counts as infinitely slow.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from experiments.data import MNIST, Images, default_data_root
from studies.natural_gradient.race import Runner, Step, race
from studies.natural_gradient.study import HORIZON, SMALL, TARGET, adam, mlp, sgd

IMAGES = 90_000
"""After which a trial gives up."""

LOOK = 2_560
"""Images between two looks."""


def natural(rate: float) -> Callable[[nn.Module], Step]:
    """Starts the natural gradient."""
    return partial(SMALL.start, lr=rate)


def momentum(rate: float) -> Callable[[nn.Module], Step]:
    """Starts SGD with momentum 0.9."""
    return sgd(rate, 0.9)


GRIDS: dict[str, tuple[Callable[[float], Callable[[nn.Module], Step]], list[int], list[float]]] = {
    "natural gradient": (natural, [256, 512], [0.1, 0.2, 0.3, 0.4]),
    "SGD": (sgd, [64, 128], [0.15, 0.3, 0.6, 1.2]),
    "SGD, momentum": (momentum, [256, 512], [0.05, 0.1, 0.2, 0.4]),
    "Adam": (adam, [256, 512], [0.001, 0.002, 0.004, 0.008]),
}


def seconds(runner: Runner, train: Images, judging: Images, seed: int) -> float:
    """Processor time to the target."""
    try:
        courses = race([runner], mlp, train, judging, target=TARGET, seed=seed)
    except FloatingPointError:  # it diverged
        return math.inf
    course = courses[runner.name]
    return course.seconds if course.arrived else math.inf


def main() -> None:
    """Print the seconds of every trial, and the best of every optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    everything, _ = MNIST().load(options.data_root)
    train = Images(everything.pixels[:50_000], everything.labels[:50_000])
    judging = Images(everything.pixels[50_000:], everything.labels[50_000:])
    print("| optimizer | mean | batch | rate | seconds, by seed |")
    print("|---|---|---|---|---|")
    for name, (start, sizes, rates) in GRIDS.items():
        for horizon in (None, HORIZON):
            found: dict[tuple[int, float], float] = {}
            for size in sizes:
                for rate in rates:
                    every = max(1, LOOK // size)
                    runner = Runner(
                        name, size, start(rate), IMAGES // size, every=every, horizon=horizon
                    )
                    trials = [seconds(runner, train, judging, seed) for seed in options.seeds]
                    found[size, rate] = median(trials)
                    times = " ".join(f"{trial:.1f}" for trial in trials)
                    mean = "yes" if horizon else "no"
                    print(f"| {name} | {mean} | {size} | {rate} | {times} |", flush=True)
            size, rate = min(found, key=lambda key: found[key])
            print(f"best: batches of {size}, rate {rate}, {found[size, rate]:.1f} s", flush=True)


if __name__ == "__main__":
    main()
