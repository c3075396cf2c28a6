"""Steps and seconds to 97 % of MNIST's test images, optimizer by optimizer.

    python scripts/bench_natural_gradient.py [--seeds 0 1 2] [--data-root DIR]

A network 784-400-400-10 on one thread.  All optimizers begin from the same parameters and see
the same images in the same order; they take turns, so that a busy machine is busy for all.
Seconds are of the processor, in training.  SINGD (Lin et al. 2023, arXiv:2312.05705, with its
K-FAC update) is in the extra ``bench``; without it its row is left out.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ewc import Diagonal, EigenvalueCorrected
from experiments.tasks.images import MNIST, default_data_root
from studies.natural_gradient.race import Course, Runner, Step, plain, race
from studies.natural_gradient.study import (
    IN_LARGE_BATCHES,
    IN_SMALL_BATCHES,
    LARGE,
    LARGE_BATCH,
    TARGET,
    mlp,
)


def singd(model: nn.Module) -> Step:
    """A step of the public optimizer."""
    from singd.optim.optimizer import SINGD

    optimizer = SINGD(
        model,
        lr=0.03,
        damping=0.1,
        lr_cov=0.1,
        momentum=0.9,
        T=2,
        alpha1=0.0,
        kfac_like=True,
        normalize_lr_cov=True,
    )
    return plain(model, optimizer)


def runners() -> list[Runner]:
    """Those of the study, with other structures and the public optimizer."""
    ekfac = partial(LARGE.start, structure=EigenvalueCorrected())
    diagonal = partial(LARGE.start, structure=Diagonal())
    available = [
        *IN_SMALL_BATCHES,
        *IN_LARGE_BATCHES,
        Runner("natural gradient, EKFAC", LARGE_BATCH, ekfac, limit=200),
        Runner("natural gradient, diagonal", LARGE_BATCH, diagonal, limit=200),
    ]
    try:
        import singd as _  # noqa: F401
    except ImportError:
        print("SINGD is not installed: pip install -e '.[bench]'")
        return available
    return [*available, Runner("SINGD, K-FAC update", LARGE_BATCH, singd, limit=200)]


def described(runner: Runner, courses: list[Course]) -> str:
    """A row of the table: medians over seeds, and the best a runner that gave up reached."""
    arrived = [course for course in courses if course.arrived]
    steps = " ".join(str(c.steps) if c.arrived else f">{c.steps}" for c in courses)
    seconds = median(course.seconds for course in courses)
    a_step = 1e3 * seconds / median(course.steps for course in courses)
    more = "" if len(arrived) == len(courses) else ">"
    return f"| {runner.name} | {runner.batch_size} | {steps} | {more}{seconds:.1f} | {a_step:.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
    train, test = MNIST().load(options.data_root)
    everyone = runners()
    races = [race(everyone, mlp, train, test, target=TARGET, seed=seed) for seed in options.seeds]
    print("| optimizer | batch | steps, by seed | seconds, median | ms a step |")
    print("|---|---|---|---|---|")
    for runner in everyone:
        print(described(runner, [courses[runner.name] for courses in races]), flush=True)


if __name__ == "__main__":
    main()
