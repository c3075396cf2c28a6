"""Optimizers that train the same network until it is good enough, turn by turn."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
        horizon: the images over which the parameters that are looked at are an exponentially
            decaying mean; ``None`` for the parameters as they are.
    """

    name: str
    batch_size: int
    start: Callable[[nn.Module], Step]
    limit: int
    every: int = 10
    horizon: float | None = None

    def averaged(self, model: nn.Module) -> AveragedModel | None:
        """The network with the mean of the parameters, which follows the training."""
        if self.horizon is None:
            return None
        decay = math.exp(-self.batch_size / self.horizon)
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        return AveragedModel(model, multi_avg_fn=mean)


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
        """The network that is looked at."""
        return self.model if self.averaged is None else self.averaged

    def advance(self, course: Course, train: Images) -> None:
        """Train until the next look."""
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
        """The places of the next batch."""
        if len(self.left) < size:
            self.left = torch.randperm(self.count, generator=self.generator)
        batch, self.left = self.left[:size], self.left[size:]
        return batch
