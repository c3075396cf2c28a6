"""A stream of permuted MNIST tasks, learnt one image at a time.

    python scripts/permuted_stream.py [--data-root DIR] [--tasks 200] [--seeds 0 1 2]

The protocol of MESU (Nature Communications 2025, doi:10.1038/s41467-025-64601-w): 200 tasks of
60,000 images, a network 784-512-10, one pass of batches of one image, and the accuracy on the last
five tasks.  EWC keeps one quadratic whose information fades (``Online(decay)``), and takes an
implicit step of it every hundred images.  Unlike MESU it is told where a task ends.  There it reads
the last 5,000 images of the task a second time, for their Fisher information.

A little weight decay keeps the network able to learn: without it the weights grow from task to
task.  Strength, decay and weight decay were chosen on seed 100 with 40 tasks.

A step of the experiment runner takes 1.4 ms, which is five hours for such a stream.  Here a hundred
steps share two matrix products, and each is still an exact step of gradient descent on the loss of
its image (``tests/scripts/test_permuted_stream.py``).  Weight decay, of weights and biases, follows
every hundred images as the implicit step does.
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ewc import EWCPenalty, Online, fisher_information
from ewc.checks import check_count, check_not_negative, check_positive
from experiments.reporting.tables import mean_and_error
from experiments.tasks.images import MNIST, Images, default_data_root

LAST = 5
"""The tasks that count in the end."""

FISHER_IMAGES = 5000
"""The images of a task from which its information is taken."""

BLOCK = 100
"""The images between two implicit steps."""

EVERY = 10
"""The tasks between two lines of output."""


@dataclass(frozen=True)
class Stream:
    """What is learnt, and how.

    Args:
        tasks: the number of tasks.
        lr: the learning rate.
        strength: the weight of the penalty; 0 for fine-tuning.
        decay: what is left of the old information after each task.
        weight_decay: a step multiplies the parameters by 1 minus this times the learning rate.
        units: the hidden units.

    Raises:
        ValueError: a number is out of range.
    """

    tasks: int = 200
    lr: float = 0.01
    strength: float = 10.0
    decay: float = 0.7
    weight_decay: float = 1e-4
    units: int = 512

    def __post_init__(self) -> None:
        """Check the numbers, those of the penalty by making one."""
        check_count(self.tasks, "tasks")
        check_positive(self.lr, "lr")
        check_not_negative(self.weight_decay, "weight_decay")
        EWCPenalty(self.strength, Online(self.decay))


@torch.no_grad()
def descend(model: nn.Sequential, images: Tensor, labels: Sequence[int], lr: float) -> None:
    """Take a step of gradient descent on the cross-entropy of each image, one after another.

    The steps before image ``i`` have changed the input of its hidden layer by minus the sum over
    ``j < i`` of ``errors[j] * (images[j] @ images[i] + 1)``, the 1 for the bias.  So the weights of
    the layer are read once and written once.

    Args:
        model: linear, ReLU, linear; changed in place.
        images: one per step, ``[n, d]``.
        labels: their classes.
        lr: the learning rate.
    """
    first, second = model[0], model[2]
    weight, bias = second.weight.detach().numpy(), second.bias.detach().numpy()
    inputs = first(images).numpy()
    products = torch.addmm(torch.ones(1), images, images.T).numpy()
    errors = np.empty_like(inputs)  # the learning rate times the gradient of each input
    for i, label in enumerate(labels):
        hidden = np.maximum(inputs[i] - products[i, :i] @ errors[:i], 0)
        logits = weight @ hidden + bias
        error = np.exp(logits - logits.max())
        error /= error.sum()
        error[label] -= 1
        error *= np.float32(lr)
        np.multiply(error @ weight, hidden > 0, out=errors[i])
        weight -= np.outer(error, hidden)
        bias -= error
    moved = torch.from_numpy(errors)
    first.weight.addmm_(moved.T, images, alpha=-1)
    first.bias.sub_(moved.sum(0))


@torch.no_grad()
def shrink(model: nn.Module, factor: float) -> None:
    """Multiply the parameters by a factor: that is weight decay."""
    for parameter in model.parameters():
        parameter.mul_(factor)


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


def run(train: Images, test: Images, seed: int, stream: Stream) -> tuple[list[float], float]:
    """The accuracies on the last tasks in the end, and the mean accuracy on a task just learnt."""
    torch.manual_seed(seed)
    num_pixels = train.pixels.shape[1]
    layers = nn.Linear(num_pixels, stream.units), nn.ReLU(), nn.Linear(stream.units, 10)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=stream.lr)  # its learning rate is read
    penalty = EWCPenalty(stream.strength, Online(stream.decay))
    permutations: deque[Tensor] = deque(maxlen=LAST)
    learnt: list[float] = []
    last: list[float] = []
    started = time.perf_counter()
    for task in range(1, stream.tasks + 1):
        permutations.append(torch.randperm(num_pixels))
        order = torch.randperm(len(train))
        for rows in order.split(BLOCK):
            images = permuted(train.pixels[rows], permutations[-1])
            descend(model, images, train.labels[rows].tolist(), stream.lr)
            penalty.implicit_step(model, optimizer, len(rows))
            shrink(model, (1 - stream.lr * stream.weight_decay) ** len(rows))
        if stream.strength:
            rows = order[-FISHER_IMAGES:]
            batches = permuted(train.pixels[rows], permutations[-1]).split(1000)
            fisher = fisher_information(
                model, zip(batches, train.labels[rows].split(1000), strict=True)
            )
            penalty.consolidate(fisher, model, num_examples=len(train))
        learnt.append(accuracy(model, test, permutations[-1]))
        if task % EVERY == 0 or task == stream.tasks:
            last = [accuracy(model, test, permutation) for permutation in permutations]
            print(_line(seed, task, last, time.perf_counter() - started), flush=True)
    return last, sum(learnt) / len(learnt)


def _line(seed: int, task: int, last: Sequence[float], seconds: float) -> str:
    each = ", ".join(f"{value:.1f}" for value in last)
    return f"| {seed} | {task} | {sum(last) / len(last):.2f} | {each} | {seconds:.0f} |"


def main() -> None:
    """Print a line for every ten tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=Stream.tasks)
    parser.add_argument("--lr", type=float, default=Stream.lr)
    parser.add_argument("--strength", type=float, default=Stream.strength, help="0 to fine-tune")
    parser.add_argument("--decay", type=float, default=Stream.decay)
    parser.add_argument("--weight-decay", type=float, default=Stream.weight_decay)
    options = vars(parser.parse_args())
    root, seeds = options.pop("data_root"), options.pop("seeds")
    try:
        stream = Stream(**options)
        train, test = MNIST().load(root)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.set_flush_denormal(True)  # denormal numbers are up to six times as slow
    print(
        f"| seed | tasks | mean of the last {LAST} | each, in % | seconds |\n|---|---|---|---|---|"
    )
    results = [run(train, test, seed, stream) for seed in seeds]
    means = [statistics.fmean(last) for last, _ in results]
    learnt = ", ".join(f"{mean:.2f}" for _, mean in results)
    print(f"\nSeeds {', '.join(map(str, seeds))}: {mean_and_error(means)}")
    print(f"A new task is learnt to {learnt}.")


if __name__ == "__main__":
    main()
