"""The variances of simulated estimators, against the Cramer-Rao bound."""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Normal

from ewc import Dense
from ewc.fisher import fisher_information
from ewc.likelihoods import Bernoulli
from ewc.matrices.matrix import FisherMatrix
from ewc.statistics import cramer_rao_bound, parametric_fisher
from studies.cramer_rao.estimators import SITUATIONS, Estimated, Situation, normal, scalar
from studies.digits import digits, principal_components
from studies.findings import Claim, Findings, Setting
from studies.regressions import maxima

SAMPLES = 20_000
"""The number of data sets that every estimator sees."""

REGRESSIONS = 10_000
"""The number of simulated logistic regressions."""

SIZES = (11, 31, 101, 301, 1001)
"""Numbers of draws in a data set; odd, so that the median is one of them."""

MORE = {"Laplace location": (4001,)}
"""More draws where a density has a kink: the bound is approached only as ``N^-1/2``."""

AT_ONCE = 2**18
"""The number of draws in memory at a time."""

LOGISTIC_SIZES = (200, 500, 1437)
"""Numbers of digits in a logistic regression."""

SLOPES = torch.tensor([0.8, -0.5, 0.3, -0.2], dtype=torch.float64)
"""The logistic regression: the coefficients of three principal components, and the constant."""


@dataclass(frozen=True)
class Variance:
    """A simulated variance over the bound, and its standard error.

    Attributes:
        ratio: of the two.
        error: of the ratio, by the fourth moment of the estimates.
        against_unbiased: the variance over the bound of unbiased estimators.
    """

    ratio: float
    error: float
    against_unbiased: float

    @property
    def z(self) -> float:
        """How many standard errors the variance lies above the bound."""
        return (self.ratio - 1) / self.error

    @classmethod
    def of(cls, estimates: Tensor, bound: float, unbiased: float) -> "Variance":
        """From simulated estimates."""
        squares = (estimates - estimates.mean()).square()
        error = float(squares.std()) / math.sqrt(len(estimates))
        variance = float(estimates.var())
        return cls(variance / bound, error / bound, variance / unbiased)


Variances = dict[tuple[str, str], dict[int, Variance]]
"""Variances by situation and estimator, then by the number of draws."""


def measure(setting: Setting) -> Findings:
    """The lowest variance over its bound, and how near maxima of the likelihood come."""
    variances = _simulated(setting.seed)
    slopes = _logistic_regression(setting.seed)
    every = [v for by_size in [*variances.values(), *slopes.values()] for v in by_size.values()]
    best = {
        f"{situation}, {name}": variances[situation, name][_sizes(situation)[-1]].ratio
        for situation, case in SITUATIONS.items()
        for name, estimator in case.estimators.items()
        if estimator.maximum_likelihood
    }
    worst = max(best, key=lambda name: abs(best[name] - 1))
    last = max(next(iter(slopes.values())))
    shrunk = variances["normal mean", "0.8 times the mean"][SIZES[-1]]
    claims = [
        Claim.at_least(
            f"lowest of {len(every)} variances: standard errors above its bound",
            min(v.z for v in every),
            -4.0,
        ),
        Claim.at_most(
            f"{len(best)} maximum-likelihood estimators, largest N: largest relative distance from "
            f"the bound ({worst})",
            abs(best[worst] - 1),
            0.05,
        ),
        Claim.at_most(
            f"logistic regression, N = {last}: largest relative distance from the bound",
            max(abs(by_size[last].ratio - 1) for by_size in slopes.values()),
            0.05,
        ),
        Claim.between(
            "normal mean, median: variance over pi / 2 times the bound",
            variances["normal mean", "median"][SIZES[-1]].ratio / (math.pi / 2),
            0.95,
            1.05,
        ),
        Claim.between(
            "0.8 times the normal mean: variance over the bound for its bias",
            shrunk.ratio,
            0.95,
            1.05,
        ),
        Claim.between(
            "0.8 times the normal mean: variance over the bound without bias (0.64)",
            shrunk.against_unbiased,
            0.6,
            0.68,
        ),
        _normal_matrix(setting.seed),
    ]
    return Findings(claims, _picture(variances, slopes))


def _sizes(situation: str) -> tuple[int, ...]:
    return SIZES + MORE.get(situation, ())


def _portions(size: int, samples: int) -> list[int]:
    """The data sets in portions of about as many draws."""
    count = AT_ONCE // size
    whole, rest = divmod(samples, count)
    return [count] * whole + [rest] * (rest > 0)


def _simulated(seed: int) -> Variances:
    variances: Variances = {}
    for index, (situation, case) in enumerate(SITUATIONS.items()):
        fisher = parametric_fisher(case.family, case.parameters)
        generator = torch.Generator().manual_seed(seed + index)
        for size in _sizes(situation):
            estimates: dict[str, list[Tensor]] = {name: [] for name in case.estimators}
            for count in _portions(size, SAMPLES):
                x = case.draw((count, size), generator)
                for name, estimator in case.estimators.items():
                    estimates[name].append(estimator.estimate(x))
            for name, estimator in case.estimators.items():
                bound, unbiased = _bounds(fisher, case, estimator, size)
                variance = Variance.of(torch.cat(estimates[name]), bound, unbiased)
                variances.setdefault((situation, name), {})[size] = variance
    return variances


def _bounds(
    fisher: FisherMatrix, case: Situation, estimator: Estimated, size: int
) -> tuple[float, float]:
    """The bound with the estimator's bias, and without one."""
    about = {"parameters": case.parameters, "function": estimator.function}
    unbiased = float(cramer_rao_bound(fisher, size, **about))  # type: ignore[arg-type]
    if estimator.bias is None:
        return unbiased, unbiased
    biased = cramer_rao_bound(
        fisher,
        size,
        parameters=case.parameters,
        function=estimator.function,
        bias=estimator.bias(size),
    )
    return float(biased), unbiased


def _logistic_regression(seed: int) -> Variances:
    """The maximum of the likelihood with real inputs, all four coefficients unknown."""
    x, _ = digits()
    design = torch.cat([principal_components(x, 3), torch.ones(len(x), 1).double()], dim=1)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(SLOPES)
    generator = torch.Generator().manual_seed(seed)
    variances: Variances = {}
    for size in LOGISTIC_SIZES:
        inputs = design[:size]
        data = [(inputs, torch.zeros(size, 1).double())]  # the targets are not used
        fisher = fisher_information(model, data, Bernoulli(), structure=Dense())
        bound = cramer_rao_bound(fisher, size).diagonal()
        chance = torch.sigmoid(inputs @ SLOPES)
        theta = torch.cat(
            [
                maxima(
                    inputs,
                    torch.bernoulli(chance.expand(count, -1), generator=generator),
                    Bernoulli(),
                )
                for count in _portions(size, REGRESSIONS)
            ]
        )
        for index in range(4):
            name = f"component {index + 1}" if index < 3 else "constant"
            variance = Variance.of(theta[:, index], float(bound[index]), float(bound[index]))
            variances.setdefault(("logistic regression", name), {})[size] = variance
    return variances


def _normal_matrix(seed: int) -> Claim:
    """Mean and sample variance of a normal distribution: no combination is below the bound."""
    size = 31
    parameters = {"m": scalar(1.0), "v": scalar(4.0)}
    fisher = parametric_fisher(lambda p: Normal(p["m"], p["v"].sqrt()), parameters)
    bound = cramer_rao_bound(fisher, size)
    x = normal((SAMPLES, size), torch.Generator().manual_seed(seed))
    estimates = torch.stack([x.mean(1), x.var(1)], dim=1)
    # In units in which the bound is the identity.
    scaled = torch.linalg.solve_triangular(
        torch.linalg.cholesky(bound), (estimates - estimates.mean(0)).T, upper=False
    )
    values, vectors = torch.linalg.eigh(scaled @ scaled.T / (SAMPLES - 1))
    along = vectors[:, 0] @ scaled
    error = float(along.square().std()) / math.sqrt(SAMPLES)
    return Claim.at_least(
        "normal mean and variance, lowest combination: standard errors above the bound",
        (float(values[0]) - 1) / error,
        -4.0,
    )


def _of(variances: Variances, situation: str, prefix: str = "") -> dict[str, dict[int, Variance]]:
    return {prefix + key[1]: by_size for key, by_size in variances.items() if key[0] == situation}


def _picture(variances: Variances, slopes: Variances) -> Figure:
    """The variance over the bound by the number of draws, which N Var F is."""
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    rows = [
        ("normal mean", _of(variances, "normal mean")),
        (
            "Laplace location, exponential rate",
            _of(variances, "Laplace location", "Laplace, ")
            | _of(variances, "exponential rate", "exponential, "),
        ),
        ("logistic regression", _of(slopes, "logistic regression")),
    ]
    for axes, (title, lines) in zip(panels, rows, strict=True):
        for label, by_size in lines.items():
            ratios = [variance.against_unbiased for variance in by_size.values()]
            errors = [2 * variance.error for variance in by_size.values()]
            axes.errorbar(list(by_size), ratios, errors, fmt="o-", ms=3, capsize=2, label=label)
        axes.axhline(1.0, color="k", ls=":", lw=1)
        axes.set(xlabel=f"N ({title})", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="xx-small")
    panels[0].legend(fontsize="xx-small", loc="center right", bbox_to_anchor=(1.0, 0.62))
    panels[2].set_xticks(LOGISTIC_SIZES, labels=[str(size) for size in LOGISTIC_SIZES])
    panels[2].minorticks_off()
    panels[0].set_ylabel("N times variance times information")
    figure.tight_layout()
    return figure
