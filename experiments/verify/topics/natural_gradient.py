r"""Natural gradient descent: one step on what is quadratic, any parametrisation, and MNIST."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ewc import (
    Bernoulli,
    DenseFisher,
    EigenvalueCorrectedFisher,
    Gaussian,
    KroneckerFisher,
    MonteCarlo,
)
from ewc.natural_gradient import NaturalGradient
from experiments.data import MNIST, Digits, Images
from experiments.verify.check import Check, Surroundings
from experiments.verify.race import Course, Runner, Step, plain, race

TARGET = 0.97
"""The share of MNIST's test images to get right."""

BATCH_SIZE = 2048
LOOKS = frozenset({0, 1, 2, 4, 7, 12, 20, 32, 48, 70, 100, 140})
"""Steps at which the natural gradient looks at the curvature: often while it changes fast."""

LOOKED_AT = 512
"""Images of the batch that the curvature and the length of a step are taken from."""


def verify(surroundings: Surroundings) -> list[Check]:
    """Regression, logistic regression in two parametrisations, and a race."""
    digits, _ = Digits().load(surroundings.data_root)
    train, test = MNIST().load(surroundings.data_root)
    checks = _one_step(digits)
    path, distances = _two_parametrisations(digits)
    courses = race(RUNNERS, mlp, train, test, target=TARGET, seed=surroundings.seed)
    _picture(distances, courses).savefig(surroundings.pictures / "natural_gradient.png", dpi=120)
    return checks + path + _of_race(courses)


# --- what is quadratic -------------------------------------------------------------------


def _inputs(images: Images) -> Tensor:
    """The pixels that are not the same in all images, in double precision."""
    pixels = images.pixels.double()
    return pixels[:, pixels.std(0) > 0.05]


def _one_step(images: Images) -> list[Check]:
    """Least squares of the classes as 0 and 1, from the pixels."""
    x = _inputs(images)
    y = nn.functional.one_hot(images.labels, 10).double()
    columns = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(columns, y).solution.T
    checks = []
    for structure in (DenseFisher, KroneckerFisher, EigenvalueCorrectedFisher):
        line = nn.Linear(x.shape[1], 10).double()
        optimizer = NaturalGradient(line, Gaussian(), lr=1.0, damping=0.0, structure=structure)
        optimizer.update_fisher([(x, y)])
        torch.autograd.backward(0.5 * (line(x) - y).square().sum(1).mean())
        optimizer.step()
        found = torch.cat([line.weight, line.bias[:, None]], 1).detach()
        error = float((found - solution).norm() / solution.norm())
        name = structure.__name__
        checks.append(Check.at_most(f"least squares, one step, {name}: distance", error, 1e-9))
    return checks


# --- any parametrisation -----------------------------------------------------------------


def _two_parametrisations(images: Images) -> tuple[list[Check], dict[str, list[float]]]:
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
            one, other = pair[0](x).detach(), pair[1](x @ mixing).detach()
            distances[name].append(float((one - other).norm() / one.norm()))
    return [
        Check.at_most(
            "two parametrisations: the natural gradient's outputs differ by, relative",
            max(distances["natural gradient"]),
            1e-6,
        ),
        Check.at_least("SGD's by", max(distances["SGD"]), 0.01),
    ], distances


def _natural_step(model: nn.Module) -> Step:
    optimizer = NaturalGradient(model, Bernoulli(), lr=0.5, damping=0.0, structure=DenseFisher)

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
    """784-400-400-10 with ReLU, as torch begins it."""
    layers = nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    return nn.Sequential(*layers)


def natural(model: nn.Module, **options: object) -> Step:
    """A step of the natural gradient with the options of the race, and others."""
    chosen = {"lr": 0.1, "momentum": 0.7, "damping": 0.03, "tolerance": 0.1} | options
    optimizer = NaturalGradient(model, estimator=MonteCarlo(1), **chosen)  # type: ignore[arg-type]

    def step(number: int, x: Tensor, y: Tensor) -> None:
        some = x[:LOOKED_AT], y[:LOOKED_AT]
        if number in LOOKS:
            optimizer.update_fisher([some])
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step(batch=some if number < 20 or number % 4 == 0 else None)

    return step


def sgd(rate: float, momentum: float = 0.0) -> Callable[[nn.Module], Step]:
    """Starts stochastic gradient descent."""
    return lambda m: plain(m, torch.optim.SGD(m.parameters(), lr=rate, momentum=momentum))


def adam(rate: float) -> Callable[[nn.Module], Step]:
    """Starts Adam."""
    return lambda m: plain(m, torch.optim.Adam(m.parameters(), lr=rate))


OURS = "natural gradient"
RUNNERS = [
    Runner(OURS, BATCH_SIZE, natural, limit=200),
    Runner("SGD", BATCH_SIZE, sgd(1.0), limit=300, every=20),
    Runner("SGD, momentum", BATCH_SIZE, sgd(0.3, 0.9), limit=300),
    Runner("Adam", BATCH_SIZE, adam(0.006), limit=300),
    Runner("SGD, batches of 64", 64, sgd(0.6), limit=2000, every=40),
    Runner("Adam, batches of 512", 512, adam(0.004), limit=600),
]
"""Learning rates and, in the last two, batch sizes are the best of those tried (page)."""

HELD_TO_SECONDS = {"SGD", "SGD, momentum", "SGD, batches of 64"}
"""Whom ours is held to in seconds too."""


def _of_race(courses: dict[str, Course]) -> list[Check]:
    """Steps and seconds of ours over those of the others; of who gives up, over its limit."""
    ours = courses[OURS]
    checks = [
        Check.at_least(
            f"MNIST: ours after {ours.steps} steps, share of test images that are right",
            ours.accuracies[-1][2],
            TARGET,
        )
    ]
    for name, course in courses.items():
        if name == OURS:
            continue
        steps, seconds = ours.steps / course.steps, ours.seconds / course.seconds
        so_far = "" if course.arrived else "more than "
        claim = f"MNIST: our steps over those of {name} ({so_far}{course.steps})"
        checks.append(Check.at_most(claim, steps, 1.0))
        claim = f"MNIST: our {ours.seconds:.1f} s over those of {name} ({course.seconds:.1f} s)"
        if name in HELD_TO_SECONDS:
            checks.append(Check.at_most(claim, seconds, 1.0))
        else:
            checks.append(Check(claim, seconds, "reported", holds=True))
    return checks


def _picture(distances: dict[str, list[float]], courses: dict[str, Course]) -> Figure:
    figure = Figure(figsize=(10, 3.4))
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
        style = {"linewidth": 2.2 if name == OURS else 1.0}
        middle.plot(steps, errors, label=name, **style)
        right.plot(seconds, errors, **style)
    for axes, label in ((middle, "steps"), (right, "seconds of training, one thread")):
        axes.axhline(1 - TARGET, color="k", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", ylim=(0.025, 1), xlabel=label)
        axes.grid(alpha=0.3)
    middle.set_title("MNIST: share of errors", fontsize="medium")
    middle.legend(fontsize="xx-small")
    figure.tight_layout()
    return figure
