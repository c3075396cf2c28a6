"""A stream of permuted MNIST tasks, learnt one image at a time.

    python scripts/permuted_stream.py [--data-root DIR] [--tasks 200] [--seeds 0 1 2]

The protocol of MESU (Nature Communications 2025, doi:10.1038/s41467-025-64601-w): 200 tasks of
60,000 images, a network 784-512-10, one pass of batches of one image, and the accuracy on the last
five tasks.  EWC keeps one quadratic whose information fades (``Online(decay)``), and takes an
implicit step of it every hundred images.  Unlike MESU it is told where a task ends.  There it reads
the last 5,000 images of the task a second time, for their Fisher information.  Strength and decay
were chosen on seed 100 with 16 tasks.

A step of the experiment runner takes 1.4 ms, which is five hours for such a stream.  The step here
reads and writes only the weights of pixels that are not 0, and is an exact step of gradient descent
(``tests/scripts/test_permuted_stream.py``).
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ewc import EWCPenalty, Online, fisher_information
from ewc.checks import check_count
from experiments.tasks.images import MNIST, Images, default_data_root

Indices = NDArray[np.int64]

LAST = 5
"""The tasks that count in the end."""

FISHER_IMAGES = 5000
"""The images of a task from which its information is taken."""

IMPLICIT_EVERY = 100
"""The images between two implicit steps."""

EVERY = 10
"""The tasks between two lines of output."""


def network(num_inputs: int, units: int, num_outputs: int) -> nn.Sequential:
    """A network with one hidden layer; the weights of one input lie side by side."""
    first = nn.Linear(num_inputs, units)
    first.weight.data = first.weight.data.T.contiguous().T
    return nn.Sequential(first, nn.ReLU(), nn.Linear(units, num_outputs))


@torch.no_grad()
def step(model: nn.Sequential, inputs: Indices, values: Tensor, label: int, lr: float) -> None:
    """A step of gradient descent on the cross-entropy of one image.

    Args:
        model: of :func:`network`, changed in place.
        inputs: the inputs that are not 0, ``[k]``.
        values: their values, ``[k]``.
        label: the class.
        lr: the learning rate.
    """
    first, second = model[0], model[2]
    by_input = first.weight.detach().numpy().T  # numpy writes rows five times as fast
    rows = torch.from_numpy(by_input[inputs])
    hidden = torch.addmv(first.bias, rows.T, values).relu_()
    error = torch.addmv(second.bias, second.weight, hidden).softmax(0)
    error[label] -= 1
    error *= lr
    back = torch.mv(second.weight.T, error).mul_(hidden > 0)
    second.weight.addr_(error, hidden, alpha=-1)
    second.bias.sub_(error)
    by_input[inputs] = rows.addr_(values, back, alpha=-1).numpy()
    first.bias.sub_(back)


def accuracy(model: nn.Sequential, test: Images, permutation: Tensor) -> float:
    """The accuracy on a task, in percent."""
    with torch.no_grad():
        right = model(permuted(test.pixels, permutation)).argmax(1) == test.labels
    return 100 * float(right.double().mean())


def permuted(pixels: Tensor, permutation: Tensor) -> Tensor:
    """Images whose pixel ``i`` lies at ``permutation[i]``."""
    moved = torch.empty_like(pixels)
    moved[:, permutation] = pixels
    return moved


def run(
    train: Images, test: Images, seed: int, options: argparse.Namespace
) -> tuple[list[float], float]:
    """The accuracies on the last tasks in the end, and the mean accuracy on a task just learnt."""
    torch.manual_seed(seed)
    model = network(train.pixels.shape[1], options.units, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)  # its learning rate is read
    penalty = EWCPenalty(options.strength, Online(options.decay))
    active = [row.nonzero()[:, 0].numpy() for row in train.pixels]
    values = [row[row != 0] for row in train.pixels]
    labels = train.labels.tolist()
    permutations: deque[Tensor] = deque(maxlen=LAST)
    learnt: list[float] = []
    last: list[float] = []
    started = time.perf_counter()
    for task in range(1, options.tasks + 1):
        permutations.append(torch.randperm(train.pixels.shape[1]))
        places = permutations[-1].numpy()
        order = torch.randperm(len(train))
        for count, index in enumerate(order.tolist(), 1):
            step(model, places[active[index]], values[index], labels[index], options.lr)
            if count % IMPLICIT_EVERY == 0:
                penalty.implicit_step(model, optimizer, IMPLICIT_EVERY)
        if options.strength:
            rows = order[-FISHER_IMAGES:]
            images = permuted(train.pixels[rows], permutations[-1]).split(1000)
            fisher = fisher_information(
                model, zip(images, train.labels[rows].split(1000), strict=True)
            )
            penalty.consolidate(fisher, model, num_examples=len(train))
        last = [accuracy(model, test, permutation) for permutation in permutations]
        learnt.append(last[-1])
        if task % EVERY == 0 or task == options.tasks:
            print(_line(seed, task, last, time.perf_counter() - started), flush=True)
    return last, sum(learnt) / len(learnt)


def _line(seed: int, task: int, last: Sequence[float], seconds: float) -> str:
    each = ", ".join(f"{value:.1f}" for value in last)
    return f"| {seed} | {task} | {sum(last) / len(last):.2f} | {each} | {seconds:.0f} |"


def main() -> None:
    """Print a line for every ten tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--strength", type=float, default=10.0, help="0 for fine-tuning")
    parser.add_argument("--decay", type=float, default=0.7)
    options = parser.parse_args()
    check_count(options.tasks, "--tasks")
    torch.set_flush_denormal(True)  # denormal numbers are up to six times as slow
    train, test = MNIST().load(options.data_root)
    print(
        f"| seed | tasks | mean of the last {LAST} | each, in % | seconds |\n|---|---|---|---|---|"
    )
    for seed in options.seeds:
        last, learnt = run(train, test, seed, options)
        print(f"seed {seed}: {sum(last) / len(last):.2f}; a new task is learnt to {learnt:.2f}")


if __name__ == "__main__":
    main()
