r"""The Fisher information of parametric families against their closed forms."""

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Exponential, Gamma, Normal, Poisson

from ewc.parameters import Parameters
from ewc.statistics import Density, parametric_fisher, sampled_parametric_fisher
from ewc.statistics.families.parametric import Family
from studies.findings import Claim, Findings, Setting

SAMPLES = 20_000


def _t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def _categorical(p: Parameters) -> Categorical:
    return Categorical(torch.cat([p["p"], 1 - p["p"].sum(0, keepdim=True)]))


def _logistic(p: Parameters) -> Density:
    """A family given by its log-density and its location."""
    return Density(lambda x: -2 * ((x - p["m"]) / 2).cosh().log() - math.log(4), location=2.0)


FAMILIES: dict[str, tuple[Family, Parameters, list[list[float]]]] = {
    "Bernoulli": (lambda p: Bernoulli(p["p"]), {"p": _t(0.3)}, [[1 / 0.21]]),
    "Gaussian mean and variance": (
        lambda p: Normal(p["m"], p["v"].sqrt()),
        {"m": _t(1.0), "v": _t(2.0)},
        [[1 / 2, 0.0], [0.0, 1 / 8]],
    ),
    "Poisson": (lambda p: Poisson(p["rate"]), {"rate": _t(7.5)}, [[1 / 7.5]]),
    "exponential": (lambda p: Exponential(p["rate"]), {"rate": _t(2.5)}, [[1 / 2.5**2]]),
    "categorical": (
        _categorical,
        {"p": _t(0.5, 0.2)},
        [[1 / 0.5 + 1 / 0.3, 1 / 0.3], [1 / 0.3, 1 / 0.2 + 1 / 0.3]],
    ),
    "Gamma, whose density is infinite at 0": (
        lambda p: Gamma(p["a"], p["b"]),
        {"a": _t(0.5), "b": _t(2.0)},
        [[math.pi**2 / 2, -1 / 2], [-1 / 2, 0.5 / 4]],
    ),
}
"""Families, their parameters, and the information in closed form."""

OWN: tuple[Family, Parameters, list[list[float]]] = (_logistic, {"m": _t(2.0)}, [[1 / 3]])


def measure(setting: Setting) -> Findings:
    """The errors of exact matrices, and the z-scores of sampled ones."""
    claims = []
    exact = FAMILIES | {"logistic, by its log-density alone": OWN}
    for name, (family, parameters, closed) in exact.items():
        expected = torch.tensor(closed, dtype=torch.float64)
        information = parametric_fisher(family, parameters).to_dense()
        error = float((information - expected).abs().max() / expected.abs().max())
        claims.append(Claim.at_most(f"{name}: relative error", error, 1e-8))
    scores = torch.cat([_z_scores(name, setting.seed) for name in FAMILIES])
    about = f"of {len(scores)} z-scores, {SAMPLES:,} draws"
    claims += [
        Claim.at_most(f"largest {about}", float(scores.abs().max()), 4.0),
        Claim.between(f"root mean square {about}", float(scores.square().mean().sqrt()), 0.5, 1.5),
    ]
    return Findings(claims, _picture(setting.seed))


def _z_scores(name: str, seed: int) -> Tensor:
    """The errors of the entries of a sampled matrix, in standard errors."""
    family, parameters, closed = FAMILIES[name]
    sampled, errors = sampled_parametric_fisher(family, parameters, SAMPLES, seed)
    rows, columns = torch.triu_indices(len(closed), len(closed))
    off = sampled.to_dense() - torch.tensor(closed, dtype=torch.float64)
    return (off / errors)[rows, columns]


def _picture(seed: int) -> Figure:
    """The information of one draw along three families: exact, sampled and in closed form."""
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    lines: list[tuple[str, Family, tuple[float, float], Callable[[Tensor], Tensor]]] = [
        ("Bernoulli: p", lambda p: Bernoulli(p["x"]), (0.03, 0.97), lambda x: 1 / (x * (1 - x))),
        ("Poisson: rate", lambda p: Poisson(p["x"]), (0.2, 8.0), lambda x: 1 / x),
        ("exponential: rate", lambda p: Exponential(p["x"]), (0.3, 4.0), lambda x: x**-2),
    ]
    for axes, (title, family, (low, high), closed) in zip(panels, lines, strict=True):
        fine = torch.linspace(low, high, 200, dtype=torch.float64)
        axes.plot(fine, closed(fine), label="closed form")
        points = torch.linspace(low, high, 9, dtype=torch.float64)
        exact = [float(parametric_fisher(family, {"x": x}).trace()) for x in points]
        axes.plot(points, exact, "o", label="parametric_fisher")
        sampled = [
            sampled_parametric_fisher(family, {"x": x}, 400, seed + index)
            for index, x in enumerate(points)
        ]
        means = [float(fisher.trace()) for fisher, _ in sampled]
        errors = [float(error) for _, error in sampled]
        axes.errorbar(points, means, errors, fmt=".", capsize=3, alpha=0.7, label="400 draws")
        axes.set(xlabel=title, yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("information of one draw")
    panels[0].legend(fontsize="x-small")
    figure.tight_layout()
    return figure
