"""A race of optimizers, which train the same network in turns until it is accurate enough."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.tasks.images import Images

Step = Callable[[int, Tensor, Tensor], None]
"""One step of training: its number from 0, inputs and labels."""


@dataclass(frozen=True)
class Runner:
    """An optimizer in the race.

    Attributes:
        name: its name.
        batch_size: the batch size of its steps.
        start: returns the function that takes one step of training for a network.
        limit: the number of steps after which it gives up.
        every: the number of steps between two tests.
        horizon: the number of images in an exponentially decaying mean of the parameters, which
            is tested in their place; ``None`` for the parameters themselves.
    """

    name: str
    batch_size: int
    start: Callable[[nn.Module], Step]
    limit: int
    every: int = 10
    horizon: float | None = None

    def averaged(self, model: nn.Module) -> AveragedModel | None:
        """The network with the running mean of the parameters; ``None`` without a horizon."""
        if self.horizon is None:
            return None
        decay = math.exp(-self.batch_size / self.horizon)
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        return AveragedModel(model, multi_avg_fn=mean)


@dataclass
class Course:
    """The progress of a runner.

    Attributes:
        steps: the number of steps so far.
        seconds: the processor time of its training so far, without the tests.
        accuracies: of every test, the steps, the seconds and the accuracy.
        arrived: whether the last accuracy reaches the target.
    """

    steps: int = 0
    seconds: float = 0.0
    accuracies: list[tuple[int, float, float]] = field(default_factory=list)
    arrived: bool = False


def plain(model: nn.Module, optimizer: Optimizer) -> Step:
    """The step of an optimizer that needs only gradients."""

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
    """Train one network per runner, all from the same parameters with images in the same order.

    They take turns of ``every`` steps, so that a busy machine slows all of them down.

    Args:
        runners: the optimizers, with different names.
        build: builds the network, the same from the same random state.
        train: the training images, shuffled for every pass.
        test: the test images.
        target: the test accuracy that ends the race for a runner.
        seed: the seed of the parameters and of the order.
    """
    courses = {runner.name: Course() for runner in runners}
    lanes = [_Lane(runner, build, len(train), seed) for runner in runners]
    while lanes:
        running = []
        for lane in lanes:
            course = courses[lane.runner.name]
            lane.advance(course, train)
            with torch.no_grad():
                right = (lane.judged(test.pixels).argmax(1) == test.labels).double().mean()
            course.accuracies.append((course.steps, course.seconds, float(right)))
            course.arrived = float(right) >= target
            if not course.arrived and course.steps < lane.runner.limit:
                running.append(lane)
        lanes = running
    return courses


class _Lane:
    """One runner with its network."""

    def __init__(
        self, runner: Runner, build: Callable[[], nn.Module], count: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.runner = runner
        model = build()
        self.step = runner.start(model)
        self.model = model
        self.averaged = runner.averaged(model)
        self.order = _Order(count, torch.Generator().manual_seed(seed))

    @property
    def judged(self) -> nn.Module:
        """The network that is tested."""
        return self.model if self.averaged is None else self.averaged

    def advance(self, course: Course, train: Images) -> None:
        """Train until the next test."""
        for _ in range(min(self.runner.every, self.runner.limit - course.steps)):
            places = self.order.next(self.runner.batch_size)
            x, y = train.pixels[places], train.labels[places]
            start = time.process_time()
            self.step(course.steps, x, y)
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
            course.seconds += time.process_time() - start
            course.steps += 1


class _Order:
    """Batches of a shuffled set, pass after pass."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator
        self.left = torch.empty(0, dtype=torch.long)

    def next(self, size: int) -> Tensor:
        """The indices of the next batch."""
        if len(self.left) < size:
            self.left = torch.randperm(self.count, generator=self.generator)
        batch, self.left = self.left[:size], self.left[size:]
        return batch
