"""Optimizers that train the same network until it is good enough, turn by turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from experiments.data import Images

Step = Callable[[int, Tensor, Tensor], None]
"""One step of training: its number from 0, inputs and labels."""


@dataclass(frozen=True)
class Runner:
    """An optimizer with its options.

    Attributes:
        name: what it is called.
        batch_size: of its steps.
        start: makes of a network what takes a step of training with it.
        limit: the steps after which it gives up.
        every: the steps between two looks at the test images.
    """

    name: str
    batch_size: int
    start: Callable[[nn.Module], Step]
    limit: int
    every: int = 10


@dataclass
class Course:
    """How far a runner got.

    Attributes:
        steps: so far.
        seconds: processor time of its training so far, without the looks.
        accuracies: at every look: steps, seconds, the share of test images it gets right.
        arrived: whether the last one reaches the target.
    """

    steps: int = 0
    seconds: float = 0.0
    accuracies: list[tuple[int, float, float]] = field(default_factory=list)
    arrived: bool = False


def plain(model: nn.Module, optimizer: Optimizer) -> Step:
    """The step of an optimizer that needs gradients and nothing else."""

    def step(_number: int, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()

    return step


def race(
    runners: list[Runner],
    build: Callable[[], nn.Module],
    train: Images,
    test: Images,
    *,
    target: float,
    seed: int = 0,
) -> dict[str, Course]:
    """Train one network a runner, all from the same parameters and in the same order of images.

    They take turns of ``every`` steps, so that a busy machine is busy for all of them.

    Args:
        runners: with different names.
        build: makes the network, the same from the same random state.
        train: the images to learn from, shuffled anew for every pass.
        test: the images that decide.
        target: the share of them to get right.
        seed: of the parameters and of the order.
    """
    courses = {runner.name: Course() for runner in runners}
    lanes = []
    for runner in runners:
        torch.manual_seed(seed)
        model = build()
        generator = torch.Generator().manual_seed(seed)
        lanes.append((runner, model, runner.start(model), _Order(len(train), generator)))
    while lanes:
        running = []
        for runner, model, step, order in lanes:
            course = courses[runner.name]
            _advance(course, runner, step, order, train)
            with torch.no_grad():
                right = (model(test.pixels).argmax(1) == test.labels).double().mean()
            course.accuracies.append((course.steps, course.seconds, float(right)))
            course.arrived = float(right) >= target
            if not course.arrived and course.steps < runner.limit:
                running.append((runner, model, step, order))
        lanes = running
    return courses


class _Order:
    """Batches of a shuffled set, pass after pass."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator
        self.left = torch.empty(0, dtype=torch.long)

    def next(self, size: int) -> Tensor:
        """The places of the next batch."""
        if len(self.left) < size:
            self.left = torch.randperm(self.count, generator=self.generator)
        batch, self.left = self.left[:size], self.left[size:]
        return batch


def _advance(course: Course, runner: Runner, step: Step, order: _Order, train: Images) -> None:
    for _ in range(min(runner.every, runner.limit - course.steps)):
        places = order.next(runner.batch_size)
        x, y = train.pixels[places], train.labels[places]
        start = time.process_time()
        step(course.steps, x, y)
        course.seconds += time.process_time() - start
        course.steps += 1
