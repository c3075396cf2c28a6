r"""Where the empirical Fisher misleads: on regressions in closed form, on digits measured.

The regressions are those of Kunstner, Balles & Hennig 2019 (arXiv:1905.12558, figures 1 and 3
and their appendix): one input, a slope and an intercept, unit noise in the model.
"""

import copy
import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ewc import (
    Dense,
    DenseFisher,
    Diagonal,
    Empirical,
    Exact,
    FisherMatrix,
    Gaussian,
    fisher_information,
)
from ewc.fisher import Structure
from ewc.fisher.estimators import Estimator
from ewc.natural_gradient import NaturalGradient
from ewc.parameters import Parameters, dot
from ewc.statistics import robust_covariance, standard_errors
from experiments.tasks.images import Digits
from studies.findings import Claim, Findings, Setting

Data = list[tuple[Tensor, Tensor]]

STEPS = 30
"""The steps from every start with each learning rate."""

LEARNING_RATES = [10 ** (k / 2) for k in range(-1, 5)]
STARTS = [(-3.0, 6.0), (7.0, 4.0), (0.0, -2.0), (6.0, -1.0)]
"""Slopes and intercepts; the minimum is at about (2, 2)."""

CHECKPOINTS = (0, 10, 30, 100, 200, 400, 1000)
"""The steps of Adam at which the matrices of the digits are computed."""

RANDOM_LABELS = 0.2
"""The share of the digits with a label drawn at random."""

DAMPING = 0.01
"""The damping of the matrices of the digits, as a multiple of their mean eigenvalue."""


def measure(setting: Setting) -> Findings:
    """Regressions against closed forms, then digits."""
    figure = Figure(figsize=(10, 3.4))
    panels = figure.subplots(1, 3)
    claims = _fields(setting.seed, panels[0])
    claims += _lengths(setting.seed, panels[1])
    claims += _misspecified(setting.seed)
    claims += _digits(setting, panels[2])
    figure.tight_layout()
    return Findings(claims, figure)


# --- linear regression -----------------------------------------------------------------


def _regression(seed: int, noise: float = 1.0) -> Data:
    """The regression of the paper's figure 1: log-normal inputs, intercept and slope 2."""
    generator = torch.Generator().manual_seed(seed)
    x = (0.75 * torch.randn(1000, 1, generator=generator, dtype=torch.float64)).exp()
    return [(x, 2 + 2 * x + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype))]


def _least_squares(data: Data) -> Tensor:
    """Slope and intercept at the minimum, ``[2]``."""
    ((x, y),) = data
    solution: Tensor = torch.linalg.lstsq(_columns(x), y).solution
    return solution[:, 0]


def _columns(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x)], 1)


def _line(theta: Tensor) -> nn.Linear:
    line = nn.Linear(1, 1).double()
    nn.utils.vector_to_parameters(theta.clone(), line.parameters())
    return line


def _loss(model: nn.Module, data: Data) -> Tensor:
    """The mean negative log-likelihood of unit noise, but for its constant."""
    ((x, y),) = data
    residuals: Tensor = model(x) - y
    return 0.5 * residuals.square().mean()


def _matrix(theta: Tensor, data: Data, estimator: Estimator) -> DenseFisher:
    return fisher_information(
        _line(theta), data, Gaussian(), estimator=estimator, structure=Dense()
    )


def _closed_forms(theta: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """Fisher and empirical Fisher by their formulas."""
    ((x, y),) = data
    columns = _columns(x)
    residuals = columns @ theta[:, None] - y
    return columns.T @ columns / len(x), columns.T @ (residuals.square() * columns) / len(x)


def _step(theta: Tensor, data: Data, estimator: Estimator) -> Tensor:
    """The step with learning rate 1 and no damping."""
    line = _line(theta)
    optimizer = NaturalGradient(
        line, Gaussian(), lr=1.0, damping=0.0, estimator=estimator, structure=Dense()
    )
    optimizer.update_fisher(data)
    torch.autograd.backward(_loss(line, data))
    optimizer.step()
    return nn.utils.parameters_to_vector(line.parameters()).detach() - theta


def _fields(seed: int, axes: Axes) -> list[Claim]:
    """Both steps on a grid around the minimum, and what both come to."""
    data = _regression(seed)
    best = _least_squares(data)
    grid = torch.cartesian_prod(*torch.linspace(-4, 8, 11).expand(2, -1)).double()
    natural = torch.stack([_step(theta, data, Exact()) for theta in grid])
    empirical = torch.stack([_step(theta, data, Empirical()) for theta in grid])
    errors, cosines = [], []
    for theta, n, e in zip(grid, natural, empirical, strict=True):
        fisher, second = _closed_forms(theta, data)
        matrices = _matrix(theta, data, Exact()), _matrix(theta, data, Empirical())
        for matrix, expected in zip(matrices, (fisher, second), strict=True):
            errors.append(float((matrix.to_dense() - expected).norm() / expected.norm()))
        cosines.append(float(n @ fisher @ e / ((n @ fisher @ n) * (e @ fisher @ e)).sqrt()))
    missed = float(((grid + natural - best).norm(dim=1) / (grid - best).norm(dim=1)).max())
    newton = _excess(data, best, Exact(), 1.0, 1)
    natural_step = "natural gradient, 1 step:"
    plain = torch.nn.functional.cosine_similarity(natural, empirical)
    tuned = min(_excess(data, best, Empirical(), rate, STEPS) for rate in LEARNING_RATES)
    named = {"natural gradient": (natural, "C0"), "empirical Fisher": (empirical, "C3")}
    for name, (field, colour) in named.items():
        unit = field / field.norm(dim=1, keepdim=True)
        axes.quiver(*grid.T, *unit.T, color=colour, scale=22, width=0.006, label=name)
    axes.plot(*best, "k*", markersize=8)
    axes.set(xlabel="slope", ylabel="intercept", title="directions", ylim=(-5, 11))
    axes.legend(fontsize="x-small", loc="upper center", ncol=2)
    return [
        Claim.at_most(
            "regression: both matrices against their closed forms, relative error",
            max(errors),
            1e-12,
        ),
        Claim.at_most(f"{natural_step} largest share of the distance that is left", missed, 1e-10),
        Claim.at_most(f"{natural_step} nats above the minimum", newton, 1e-12),
        Claim.at_least(
            f"empirical Fisher, {STEPS} steps, best rate: nats above the minimum", tuned, 1e-3
        ),
        Claim.at_most("smallest cosine between the two directions", float(plain.min()), 0.5),
        Claim.at_most("smallest cosine between them in the Fisher metric", min(cosines), 0.9),
    ]


def _excess(data: Data, best: Tensor, estimator: Estimator, rate: float, steps: int) -> float:
    """By how many nats the loss is above its minimum after some steps, the mean over starts."""
    excesses = []
    for start in STARTS:
        theta = torch.tensor(start, dtype=torch.float64)
        for _ in range(steps):
            theta = theta + rate * _step(theta, data, estimator)
        excesses.append(_loss(_line(theta), data).detach() - _loss(_line(best), data).detach())
    return float(torch.stack(excesses).mean())


def _lengths(seed: int, axes: Axes) -> list[Claim]:
    """How long a step is at a distance from the minimum, by the noise of the data."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    distances = torch.logspace(-4, 4, 33, dtype=torch.float64)
    lengths = {}
    for noise in (1.0, 0.1, 0.0):
        data = _regression(seed, noise)
        best = _least_squares(data) if noise else torch.tensor([2.0, 2.0], dtype=torch.float64)
        steps = [_step(best + d * direction, data, Empirical()).norm() for d in distances]
        lengths[noise] = torch.stack(steps)
        axes.plot(
            distances, lengths[noise], ".-", markersize=4, label=f"empirical, noise {noise:g}"
        )
    axes.plot(distances, distances, "k--", linewidth=1, label="natural gradient")
    axes.set(xscale="log", yscale="log", xlabel="distance to the minimum", title="length of a step")
    axes.set(ylim=(1e-5, 1e10))
    axes.legend(fontsize="x-small", loc="upper right")
    axes.grid(alpha=0.3)
    far = float((lengths[1.0][-1] / lengths[1.0][-9]).log10() / 2)  # the last two decades
    near = float((lengths[0.0][8] / lengths[0.0][0]).log10() / 2)
    return [
        Claim.between(
            "step far from the minimum: power of the distance in its length", far, -1.02, -0.98
        ),
        Claim.between(
            "step near the minimum, no noise: power of the distance in its length",
            near,
            -1.02,
            -0.98,
        ),
        Claim.between(
            "step near the minimum, noise 0.1: length over the distance (1 / noise^2)",
            float(lengths[0.1][0] / distances[0]),
            80,
            125,
        ),
    ]


def _misspecified(seed: int) -> list[Claim]:
    """The empirical Fisher at the maximum of the likelihood, in units of the Fisher."""
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, 400_000, 1, generator=generator, dtype=torch.float64)
    # E[r^2 (x, 1)(x, 1)'] of the population, for r the residual at its minimum.
    cases = {
        "right model": (1 + x + e, (1.0, 1.0)),
        "twice the noise": (1 + x + 2 * e, (4.0, 4.0)),
        "the mean is bent by x^2 / 2": (1 + x + x.square() / 2 + e, (3.5, 1.5)),
    }
    claims = []
    for name, (y, expected) in cases.items():
        data = [(x, y)]
        best = _least_squares(data)
        fisher, scores = _matrix(best, data, Exact()), _matrix(best, data, Empirical())
        ratio = torch.linalg.solve(fisher.to_dense(), scores.to_dense()).diagonal()
        population = torch.tensor(expected, dtype=torch.float64)
        off = float((ratio / population - 1).abs().max())
        quantity = f"{name}: F^-1 EF at the maximum against diag{expected}, relative error"
        claims.append(Claim.at_most(quantity, off, 0.05))
        honest = robust_covariance(fisher, scores).diagonal().sqrt()[0]
        short = float(honest / standard_errors(scores)["weight"])
        quantity = f"{name}: true standard error of the slope over that from EF"
        claims.append(Claim.between(quantity, short, 0.95 * expected[0], 1.05 * expected[0]))
    return claims


# --- digits ------------------------------------------------------------------------------


def _digits(setting: Setting, axes: Axes) -> list[Claim]:
    """Traces and directions while a network learns digits, some of them with wrong labels."""
    train, test = Digits().load(setting.data_root)
    generator = torch.Generator().manual_seed(setting.seed)
    wrong = torch.randperm(len(train), generator=generator)[: int(RANDOM_LABELS * len(train))]
    noisy = train.labels.clone()
    noisy[wrong] = torch.randint(10, (len(wrong),), generator=generator)
    torch.manual_seed(setting.seed)
    start = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    unseen = [(test.pixels, test.labels)]
    followed: list[tuple[list[float], list[float], list[float]]] = []
    for name, labels in (("right labels", train.labels), (f"{RANDOM_LABELS:.0%} random", noisy)):
        ratios, cosines, new = _followed(copy.deepcopy(start), [(train.pixels, labels)], unseen)
        colour = "C3" if followed else "C0"
        followed.append((ratios, cosines, new))
        places = [max(step, 1) for step in CHECKPOINTS]
        axes.plot(places, ratios, ".-", color=colour, label=f"{name}: training set")
        axes.plot(places, new, ".--", color=colour, label=f"{name}: test set")
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="steps of Adam", title="digits: tr EF / tr F")
    axes.legend(fontsize="x-small", handlelength=3.5)
    axes.grid(alpha=0.3)
    (ratios, cosines, new), (_, _, new_wrong) = followed
    return [
        Claim.between("digits, before training: tr EF / tr F", ratios[0], 0.8, 1.25),
        Claim.at_most(
            f"digits, {CHECKPOINTS[-1]:,} steps of Adam: tr EF / tr F", ratios[-1], 1 / 3
        ),
        Claim.shown("digits, same network on 360 test images: tr EF / tr F", new[-1]),
        Claim.shown(
            f"digits, {RANDOM_LABELS:.0%} random labels, test images: tr EF / tr F", new_wrong[-1]
        ),
        Claim.at_most(
            "digits: smallest cosine between the two directions in the Fisher metric",
            min(cosines),
            0.5,
        ),
    ]


def _followed(
    model: nn.Module, data: Data, unseen: Data
) -> tuple[list[float], list[float], list[float]]:
    """While a network learns: tr EF / tr F, the cosine of the two steps, tr EF / tr F unseen."""
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    ((x, y),) = data
    ratios, cosines, new = [], [], []
    for step in range(CHECKPOINTS[-1] + 1):
        adam.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        if step in CHECKPOINTS:
            exact, empirical = _both(model, data, Dense())
            ratios.append(float(empirical.trace() / exact.trace()))
            cosines.append(_cosine(model, data, exact, empirical))
            exact, empirical = _both(model, unseen, Diagonal())
            new.append(float(empirical.trace() / exact.trace()))
        adam.step()
    return ratios, cosines, new


def _both(model: nn.Module, data: Data, structure: Structure[Any]) -> list[FisherMatrix]:
    return [
        fisher_information(model, data, estimator=estimator, structure=structure)
        for estimator in (Exact(), Empirical())
    ]


def _cosine(model: nn.Module, data: Data, fisher: FisherMatrix, scores: FisherMatrix) -> float:
    r"""The cosine of the two directions by :math:`F + \delta I`.

    What a short step of as many nats lowers the loss by, as a share of what the natural
    gradient does.
    """
    ((x, y),) = data
    loss = cross_entropy(model(x), y)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    gradient: Parameters = dict(zip(fisher.shapes, slopes, strict=True))
    dampings = [DAMPING * float(m.trace()) / m.num_parameters for m in (fisher, scores)]
    natural = fisher.solve(gradient, dampings[0])
    empirical = scores.solve(gradient, dampings[1])
    length = fisher.quadratic_form(empirical) + dampings[0] * dot(empirical, empirical)
    return float(dot(empirical, gradient)) / math.sqrt(float(dot(natural, gradient) * length))
