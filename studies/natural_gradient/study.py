r"""Natural gradient descent: one step on what is quadratic, any parametrisation, and MNIST."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ewc import (
    Bernoulli,
    Dense,
    EigenvalueCorrected,
    Gaussian,
    Kronecker,
    MonteCarlo,
)
from ewc.fisher import Structure
from ewc.natural_gradient import NaturalGradient
from experiments.tasks.images import MNIST, Digits, Images
from studies.findings import Claim, Findings, Setting
from studies.natural_gradient.race import Course, Runner, Step, plain, race

TARGET = 0.97
"""The test accuracy on MNIST that ends the race."""

HORIZON = 5000.0
"""The number of images that a running mean of the parameters covers."""


def measure(setting: Setting) -> Findings:
    """Regression, logistic regression in two parametrisations, and a race."""
    digits, _ = Digits().load(setting.data_root)
    train, test = MNIST().load(setting.data_root)
    claims = _one_step(digits)
    path, distances = _two_parametrisations(digits)
    everyone = IN_SMALL_BATCHES + IN_LARGE_BATCHES
    courses = race(everyone, mlp, train, test, target=TARGET, seed=setting.seed)
    return Findings(claims + path + _of_race(courses), _picture(distances, courses))


# --- what is quadratic -------------------------------------------------------------------


def _inputs(images: Images) -> Tensor:
    """The pixels that are not the same in all images, in double precision."""
    pixels = images.pixels.double()
    return pixels[:, pixels.std(0) > 0.05]


def _one_step(images: Images) -> list[Claim]:
    """Least squares of the classes as 0 and 1, from the pixels."""
    x = _inputs(images)
    y = nn.functional.one_hot(images.labels, 10).double()
    columns = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(columns, y).solution.T
    claims = []
    structures: dict[str, Structure[Any]] = {
        "dense": Dense(),
        "K-FAC": Kronecker(),
        "EKFAC": EigenvalueCorrected(),
    }
    for name, structure in structures.items():
        line = nn.Linear(x.shape[1], 10).double()
        optimizer = NaturalGradient(line, Gaussian(), lr=1.0, damping=0.0, structure=structure)
        optimizer.update_fisher([(x, y)])
        torch.autograd.backward(0.5 * (line(x) - y).square().sum(1).mean())
        optimizer.step()
        fitted = torch.cat([line.weight, line.bias[:, None]], 1).detach()
        error = float((fitted - solution).norm() / solution.norm())
        quantity = f"least squares, one step, {name}: relative distance from the solution"
        claims.append(Claim.at_most(quantity, error, 1e-9))
    return claims


# --- any parametrisation -----------------------------------------------------------------


def _two_parametrisations(images: Images) -> tuple[list[Claim], dict[str, list[float]]]:
    """Logistic regression of 3 against 8 from pixels and from mixtures of pixels."""
    chosen = (images.labels == 3) | (images.labels == 8)
    x = _inputs(images)[chosen]
    y = (images.labels[chosen] == 8).double()[:, None]
    generator = torch.Generator().manual_seed(0)
    size = x.shape[1]
    noise = torch.randn(size, size, generator=generator, dtype=x.dtype)
    mixing = torch.eye(size, dtype=x.dtype) + 0.5 * noise / size**0.5
    starts: dict[str, Callable[[nn.Module], Step]] = {
        "natural gradient": _natural_step,
        "SGD": _plain_step,
    }
    distances: dict[str, list[float]] = {}
    for name, start in starts.items():
        pair = [nn.Linear(size, 1).double() for _ in range(2)]
        for model in pair:
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
        steps = [start(model) for model in pair]
        distances[name] = []
        for number in range(8):
            steps[0](number, x, y)
            steps[1](number, x @ mixing, y)
            first, second = pair[0](x).detach(), pair[1](x @ mixing).detach()
            distances[name].append(float((first - second).norm() / first.norm()))
    return [
        Claim.at_most(
            "two parametrisations, natural gradient: relative difference of the outputs",
            max(distances["natural gradient"]),
            1e-6,
        ),
        Claim.at_least(
            "two parametrisations, SGD: relative difference of the outputs",
            max(distances["SGD"]),
            0.01,
        ),
    ], distances


def _natural_step(model: nn.Module) -> Step:
    optimizer = NaturalGradient(model, Bernoulli(), lr=0.5, damping=0.0, structure=Dense())

    def step(_number: int, x: Tensor, y: Tensor) -> None:
        optimizer.update_fisher([(x, y)])
        optimizer.zero_grad()
        torch.autograd.backward(binary_cross_entropy_with_logits(model(x), y))
        optimizer.step()

    return step


def _plain_step(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(_number: int, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(binary_cross_entropy_with_logits(model(x), y))
        optimizer.step()

    return step


# --- MNIST -------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    """A network 784-400-400-10 with ReLU and the initialisation of torch."""
    layers = nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Recipe:
    """How natural gradient is run.

    Attributes:
        options: the options of the optimizer.
        updates: the steps at which the curvature is computed: often while it changes fast.
        images: the number of images of the batch that the curvature is computed from.
        bounded: the number of first steps with a bound, and the interval of bounds after them.
        bounding: the number of images of the batch that the bound is computed from.
    """

    options: Mapping[str, Any]
    updates: frozenset[int]
    images: int
    bounded: tuple[int, int]
    bounding: int

    def start(self, model: nn.Module, **other: Any) -> Step:
        """The function that takes a step.

        Args:
            model: the network.
            other: options that replace those of the recipe.
        """
        optimizer = NaturalGradient(model, estimator=MonteCarlo(1), **{**self.options, **other})
        first, every = self.bounded

        def step(number: int, x: Tensor, y: Tensor) -> None:
            if number in self.updates:
                optimizer.update_fisher([(x[: self.images], y[: self.images])])
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model(x), y))
            careful = number < first or number % every == 0
            batch = x[: self.bounding], y[: self.bounding]
            optimizer.step(batch=batch if careful else None)

        return step


def falling(step: int) -> float:
    """A damping that falls from 1 in the first steps."""
    return 1.0 if step < 8 else 0.3 if step < 24 else 0.2


LARGE = Recipe(
    {"lr": 0.1, "momentum": 0.7, "damping": 0.03, "tolerance": 0.1},
    frozenset({0, 1, 2, 4, 7, 12, 20, 32, 48, 70, 100, 140}),
    512,
    (20, 4),
    512,
)
"""The recipe for batches of 2,048."""

SMALL = Recipe(
    {"lr": 0.2, "momentum": 0.8, "damping": falling, "tolerance": 0.3},
    frozenset({0, 2, 8, 24, 64, 128}),
    256,
    (12, 16),
    128,
)
"""The recipe for batches of 256."""


def sgd(rate: float, momentum: float = 0.0) -> Callable[[nn.Module], Step]:
    """Starts stochastic gradient descent."""
    return lambda m: plain(m, torch.optim.SGD(m.parameters(), lr=rate, momentum=momentum))


def adam(rate: float) -> Callable[[nn.Module], Step]:
    """Starts Adam."""
    return lambda m: plain(m, torch.optim.Adam(m.parameters(), lr=rate))


OURS = "natural gradient"
MEAN = ", mean"
"""The end of the names of optimizers that are judged by a running mean of the parameters."""

COLOURS = {OURS: "C0", "SGD, momentum": "C2", "SGD": "C1", "Adam": "C3"}
"""The colours of the picture by the beginning of a name; the first match counts."""

LARGE_BATCH = 2048
IN_LARGE_BATCHES = [
    Runner(f"{OURS} ({LARGE_BATCH})", LARGE_BATCH, LARGE.start, limit=200),
    Runner(f"SGD ({LARGE_BATCH})", LARGE_BATCH, sgd(1.0), limit=300),
    Runner(f"SGD, momentum ({LARGE_BATCH})", LARGE_BATCH, sgd(0.3, 0.9), limit=300),
    Runner(f"Adam ({LARGE_BATCH})", LARGE_BATCH, adam(0.006), limit=300),
]
IN_SMALL_BATCHES = [
    Runner(OURS + MEAN, 256, partial(SMALL.start, lr=0.1), limit=400, every=10, horizon=HORIZON),
    Runner(OURS, 512, partial(SMALL.start, lr=0.3), limit=200, every=5),
    Runner("SGD", 128, sgd(0.6), limit=1000, every=20),
    Runner("SGD" + MEAN, 64, sgd(0.6), limit=2000, every=40, horizon=HORIZON),
    Runner("SGD, momentum", 256, sgd(0.2, 0.9), limit=600),
    Runner("SGD, momentum" + MEAN, 256, sgd(0.2, 0.9), limit=600, horizon=HORIZON),
    Runner("Adam", 512, adam(0.008), limit=600, every=5),
    Runner("Adam" + MEAN, 256, adam(0.008), limit=600, horizon=HORIZON),
]
"""Batch size and rate are the best of eight trials each; all are tested every 2,560 images."""

HELD_TO_STEPS = {"SGD", "SGD" + MEAN, *(runner.name for runner in IN_LARGE_BATCHES[1:])}
"""The optimizers that must take more steps than natural gradient."""


def _of_race(courses: dict[str, Course]) -> list[Claim]:
    """Steps and seconds of natural gradient over those of the others, or over their limit."""
    claims: list[Claim] = []
    for runners in (IN_SMALL_BATCHES, IN_LARGE_BATCHES):
        first, *peers = (runner.name for runner in runners)
        ours = courses[first]
        quantity = f"MNIST, {first}, {ours.steps} steps: test accuracy"
        claims.append(Claim.at_least(quantity, ours.accuracies[-1][2], TARGET))
        for name in peers:
            course = courses[name]
            so_far = "" if course.arrived else "more than "
            quantity = f"MNIST, steps: {first} over {name} ({so_far}{course.steps})"
            steps = ours.steps / course.steps
            if name in HELD_TO_STEPS:
                claims.append(Claim.at_most(quantity, steps, 1.0))
            else:
                claims.append(Claim.shown(quantity, steps))
            quantity = (
                f"MNIST, seconds: {first} ({ours.seconds:.1f}) over {name} ({course.seconds:.1f})"
            )
            # Seconds depend on the machine: nothing is required of them.
            claims.append(Claim.shown(quantity, ours.seconds / course.seconds))
    return claims


def _line_style(name: str) -> str:
    """Dashed with a mean of the parameters, dotted in large batches."""
    return "--" if name.endswith(MEAN) else ":" if f"({LARGE_BATCH})" in name else "-"


def _picture(distances: dict[str, list[float]], courses: dict[str, Course]) -> Figure:
    figure = Figure(figsize=(12, 3.6))
    left, middle, right = figure.subplots(1, 3)
    for name, values in distances.items():
        left.plot(range(1, len(values) + 1), values, ".-", label=name)
    left.set(yscale="log", xlabel="steps", title="two parametrisations: difference")
    left.title.set_fontsize("medium")
    left.legend(fontsize="x-small")
    left.grid(alpha=0.3)
    for name, course in courses.items():
        steps, seconds, accuracies = zip(*course.accuracies, strict=True)
        errors = [1 - accuracy for accuracy in accuracies]
        style: dict[str, Any] = {
            "color": next(COLOURS[start] for start in COLOURS if name.startswith(start)),
            "linewidth": 2.2 if name.startswith(OURS) else 1.0,
            "linestyle": _line_style(name),
        }
        middle.plot(steps, errors, **style)
        right.plot(seconds, errors, label=name, **style)
    for axes, label in ((middle, "steps"), (right, "seconds of training, one thread")):
        axes.axhline(1 - TARGET, color="k", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", ylim=(0.025, 1), xlabel=label)
        axes.grid(alpha=0.3)
        axes.set_title("MNIST: share of errors", fontsize="medium")
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure
