"""The two formulations of the Fisher information, of families and of networks, and their gap."""

import math
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Gamma, Laplace, NegativeBinomial, Normal
from torch.distributions import Poisson as PoissonCount
from torch.nn.functional import one_hot

from ewc.fisher import Empirical
from ewc.likelihoods import Categorical, Gaussian, Poisson
from ewc.parameters import Parameters
from ewc.statistics import formulations, network_formulations
from ewc.statistics.families.parametric import Family
from studies.digits import digits, principal_components, tanh_network, train
from studies.findings import Claim, Findings, Setting
from studies.regressions import covariances, maxima

FITS = 2000
"""The number of simulated regressions."""

EXAMPLES = 600
"""The number of examples per regression."""

DISPERSION = 2.0
"""Negative binomial counts with the mean ``m`` have the variance ``m + m^2 / DISPERSION``."""

TRUTH = torch.tensor([0.3, -0.2, 0.1, 1.0], dtype=torch.float64)
"""The coefficients of three principal components, and the constant."""


def _t(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


FAMILIES: dict[str, tuple[Family, Parameters]] = {
    "Gaussian": (lambda p: Normal(p["m"], p["v"].sqrt()), {"m": _t(1.0), "v": _t(2.0)}),
    "Poisson": (lambda p: PoissonCount(p["rate"]), {"rate": _t(7.5)}),
    "Gamma": (lambda p: Gamma(p["a"], p["b"]), {"a": _t(0.5), "b": _t(2.0)}),
}


def measure(setting: Setting) -> Findings:
    """Gaps with targets of the model and other targets, for families, networks and regressions."""
    curves = _training(setting.seed)
    drawn = _drawn_labels(setting.seed)
    regressions = _regressions(setting.seed)
    claims = [
        *_families(),
        *_networks(setting.seed, curves),
        Claim.between(
            "labels drawn from the model: power of N in the gap",
            _slope(torch.tensor(list(drawn)), torch.tensor(list(drawn.values()))),
            -0.6,
            -0.4,
        ),
        *regressions.claims(),
    ]
    return Findings(claims, _picture(curves, drawn, regressions))


def _families() -> list[Claim]:
    """Right families, and wrong ones whose gap and sandwich have a closed form."""
    right = max(formulations(*case).gap for case in FAMILIES.values())
    m, r = 7.5, DISPERSION
    counts = formulations(*FAMILIES["Poisson"], NegativeBinomial(_t(r), probs=_t(m / (m + r))))
    spread = float(counts.sandwich)
    laplace = formulations(*FAMILIES["Gaussian"], Laplace(_t(1.0), _t(1.0)))
    # The fourth moment 24 b^4 of a Laplace distribution with the variance 2 b^2 = 2.
    fourth = float(laplace.sandwich[1, 1])
    return [
        Claim.at_most("Gaussian, Poisson, Gamma: largest gap", right, 1e-8),
        Claim.at_most(
            "Poisson fitted to negative binomial counts: relative error of the sandwich",
            abs(spread / (m + m * m / r) - 1),
            1e-8,
        ),
        Claim.at_most(
            "Gaussian fitted to Laplace draws: relative error of the sandwich",
            abs(fourth / (24 - 4) - 1),
            1e-8,
        ),
    ]


@dataclass(frozen=True)
class Curves:
    """Gaps while a network learns the digits, at the observed labels.

    Attributes:
        steps: of training.
        hessian: the relative distance of the Hessian matrix from the Fisher information.
        scores: the same of the scores' second moments, the empirical Fisher.
        under_model: the gap of the two formulations with the model's own labels.
    """

    steps: list[int]
    hessian: list[float]
    scores: list[float]
    under_model: list[float]


def _training(seed: int) -> Curves:
    x, y = digits(side=4)
    model = tanh_network(16, 12, 10, seed=seed)
    curves = Curves([], [], [], [])
    for step in (0, 10, 30, 100, 300, 1000, 3000):
        train(model, x, y, Categorical(), steps=step - (curves.steps or [0])[-1])
        expected = network_formulations(model, [(x, y)])
        observed = network_formulations(model, [(x, y)], estimator=Empirical())
        curves.steps.append(step)
        curves.hessian.append(_distance(observed.curvature, expected.score))
        curves.scores.append(_distance(observed.score, expected.score))
        curves.under_model.append(expected.gap)
    return curves


def _networks(seed: int, curves: Curves) -> list[Claim]:
    x, y = digits(side=4)
    linear = nn.Linear(16, 10).double()
    expected = network_formulations(linear, [(x, y)])
    observed = network_formulations(linear, [(x, y)], estimator=Empirical())
    # Regression on the digit's indicator, with what is left of the residuals made smaller.
    model = tanh_network(16, 12, 10, seed=seed)
    goal = one_hot(y, 10).double()
    train(model, x, goal, Gaussian(), steps=300)
    outputs = model(x).detach()
    fisher = network_formulations(model, [(x, goal)], Gaussian()).score
    shares = torch.tensor([1.0, 0.1, 0.01])
    gaps = []
    for share in shares.tolist():
        data = [(x, outputs + share * (goal - outputs))]
        shrunk = network_formulations(model, data, Gaussian(), estimator=Empirical())
        gaps.append(_distance(shrunk.curvature, fisher))
    return [
        Claim.at_most(
            f"network, {curves.steps[-1]:,} training steps: largest gap with labels of the model",
            max(curves.under_model),
            1e-10,
        ),
        Claim.at_most(
            "softmax regression: relative distance of the observed Hessian from the Fisher",
            _distance(observed.curvature, expected.score),
            1e-12,
        ),
        Claim.between(
            "network: power of the residuals in the distance of the Hessian",
            _slope(shares, torch.tensor(gaps)),
            0.99,
            1.01,
        ),
        Claim.at_most(
            "network: distance of the Hessian after training over that before",
            curves.hessian[-1] / curves.hessian[0],
            0.01,
        ),
        Claim.at_least(
            "network, after training: distance of the second moments over the Hessian's",
            curves.scores[-1] / curves.hessian[-1],
            10,
        ),
    ]


def _drawn_labels(seed: int) -> dict[int, float]:
    """The gap at labels that the model draws itself, by their number."""
    x, y = digits(side=4)
    model = tanh_network(16, 12, 10, seed=seed)
    train(model, x, y, Categorical(), steps=30)
    generator = torch.Generator().manual_seed(seed)
    mean_gaps = {}
    for examples, repeats in ((90, 8), (359, 4), (1437, 2), (5748, 1)):
        gaps = []
        for _ in range(repeats):
            rows = torch.randint(len(x), (examples,), generator=generator)
            labels = Categorical().sample(model(x[rows]).detach(), 1, generator)[0]
            observed = network_formulations(model, [(x[rows], labels)], estimator=Empirical())
            gaps.append(observed.gap)
        mean_gaps[examples] = sum(gaps) / repeats
    return mean_gaps


@dataclass(frozen=True)
class Regressions:
    """Poisson regressions of counts that vary more than Poisson's.

    Attributes:
        off: the distance of each estimate from the truth, ``[fits, p]``.
        plain: standard errors from the inverse information.
        robust: those from the sandwich.
        apart: relative distance of both from :func:`network_formulations`, for some fits.
    """

    off: Tensor
    plain: Tensor
    robust: Tensor
    apart: float

    def claims(self) -> list[Claim]:
        """How large the errors are, and how often an interval holds the truth."""
        spread = self.off.std(0)
        ratios = [errors.mean(0) / spread for errors in (self.plain, self.robust)]
        coverage = [
            100 * (self.off.abs() <= 1.959964 * errors).double().mean(0)
            for errors in (self.plain, self.robust)
        ]
        return [
            Claim.at_most(
                f"overdispersed counts, {FITS:,} fits: largest plain error over the true one",
                float(ratios[0].max()),
                0.9,
            ),
            Claim.at_most(
                "overdispersed counts: covariances by the library, relative error", self.apart, 1e-9
            ),
            Claim.at_most(
                "overdispersed counts: largest coverage of plain 95 % intervals, %",
                float(coverage[0].max()),
                90,
            ),
            Claim.at_most(
                "overdispersed counts: sandwich error over the true one, distance from 1",
                float((ratios[1] - 1).abs().max()),
                0.05,
            ),
            Claim.at_most(
                "overdispersed counts: coverage of sandwich intervals, distance from 95 %",
                float((coverage[1] - 95).abs().max()),
                2.0,
            ),
        ]


def _regressions(seed: int) -> Regressions:
    x, _ = digits()
    constant = torch.ones(EXAMPLES, 1, dtype=torch.float64)
    design = torch.cat([principal_components(x, 3)[:EXAMPLES], constant], dim=1)
    mean = (design @ TRUTH).exp()
    counts = NegativeBinomial(_t(DISPERSION), probs=mean / (mean + DISPERSION))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        y = counts.sample((FITS,))  # type: ignore[no-untyped-call]
    theta = maxima(design, y, Poisson())
    inverse, sandwich = covariances(design, y, Poisson(), theta)
    model = nn.Linear(4, 1, bias=False).double()
    apart = 0.0
    for index in range(5):
        with torch.no_grad():
            model.weight.copy_(theta[index])
        data = [(design, y[index][:, None])]
        by_library = network_formulations(model, data, Poisson(), estimator=Empirical())
        for formula, library in (
            (inverse[index], by_library.curvature.inverse() / EXAMPLES),
            (sandwich[index], by_library.sandwich / EXAMPLES),
        ):
            apart = max(apart, _distance(formula, library))
    plain, robust = (m.diagonal(dim1=1, dim2=2).sqrt() for m in (inverse, sandwich))
    return Regressions(theta - TRUTH, plain, robust, apart)


def _distance(matrix: Tensor, other: Tensor) -> float:
    return float((matrix - other).norm() / other.norm())


def _slope(x: Tensor, y: Tensor) -> float:
    """The power of ``x`` that ``y`` is proportional to, by least squares."""
    a, b = x.double().log(), y.double().log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def _picture(curves: Curves, drawn: dict[int, float], regressions: Regressions) -> Figure:
    figure = Figure(figsize=(9, 3.2))
    first, second, third = figure.subplots(1, 3)
    numbers = torch.tensor(list(drawn), dtype=torch.float64)
    gaps = torch.tensor(list(drawn.values()), dtype=torch.float64)
    first.loglog(numbers, gaps, "o", label="gap")
    middle = float((gaps.log() + numbers.log() / 2).mean().exp())
    first.loglog(numbers, middle / numbers.sqrt(), "k:", label="$N^{-1/2}$")
    first.set(xlabel="labels drawn from the model", ylabel="relative gap")
    second.semilogy(curves.steps, curves.hessian, "o-", ms=3, label="Hessian")
    second.semilogy(curves.steps, curves.scores, "s-", ms=3, label="scores' second moments")
    second.set_xscale("symlog", linthresh=10)  # there is a step 0
    second.set(xlabel="steps of training", ylabel="distance from the Fisher")
    _coverage_panel(third, regressions)
    for axes in (first, second, third):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    return figure


def _coverage_panel(axes: Axes, regressions: Regressions) -> None:
    edges = torch.linspace(-6, 6, 49)
    for name, errors in (("plain error", regressions.plain), ("sandwich", regressions.robust)):
        z = (regressions.off / errors).flatten().numpy()
        axes.hist(z, edges.tolist(), density=True, histtype="step", label=name)
    axes.plot(edges, (-(edges**2) / 2).exp() / math.sqrt(2 * math.pi), "k:", label="normal")
    axes.set(xlabel="off the truth, in standard errors", ylabel="density", ylim=(0, 0.55))
