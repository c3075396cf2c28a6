"""Standard errors, intervals and tests: against statsmodels, in simulations, of a network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kstest
from sklearn.datasets import load_diabetes
from torch import Tensor

from ewc import Dense, DenseFisher, Diagonal, Kronecker, LowRank
from ewc.fisher import (
    Empirical,
    fisher_information,
)
from ewc.likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from ewc.parameters import Parameters, flatten
from ewc.statistics import (
    ChiSquaredTest,
    confidence_intervals,
    likelihood_ratio_test,
    robust_covariance,
    score_test,
    standard_errors,
    wald_test,
)
from studies.digits import digits, principal_components, tanh_network, train
from studies.findings import Claim, Findings, Setting
from studies.regressions import Regression, maxima

FITS = 2000
"""The number of simulated regressions."""

EXAMPLES = 500
"""The number of examples per regression."""

TRUTH = torch.tensor([0.5, -0.3, 0.0, 0.0, -0.5], dtype=torch.float64)
"""The coefficients of four principal components, two of them without effect, and the constant."""

HELD = (2, 3)
"""The coefficients that the null hypothesis says are 0."""

PRIOR = 1.0
"""The precision of the normal prior of a network's parameters."""

STRUCTURES: dict[str, Any] = {
    "Kronecker": Kronecker(),
    "low rank": LowRank(rank=100),
    "diagonal": Diagonal(),
}


def measure(setting: Setting) -> Findings:
    """Agreement with statsmodels, coverage and p-values, and a network's errors by structure."""
    compared = _statsmodels()
    simulated = _simulated(setting.seed)
    errors = _network_errors(setting.seed)
    figure = Figure(figsize=(9, 3.2))
    first, second, third = figure.subplots(1, 3)
    _p_value_panel(first, simulated)
    _coverage_panel(second, simulated)
    _network_panel(third, errors.by_structure)
    for axes, columns in ((first, 1), (second, 2), (third, 1)):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncol=columns, columnspacing=1.0, handlelength=1.2)
    figure.tight_layout()
    return Findings([*compared, *simulated.claims(), *errors.claims()], figure)


def _held(p: Parameters) -> Tensor:
    return p["weight"][0, list(HELD)]


def _statsmodels() -> list[Claim]:
    """Real regressions, fitted and judged here and there."""
    import statsmodels.api as sm

    pixels, labels = digits()
    x, y = load_diabetes(return_X_y=True)
    inputs = torch.from_numpy(x[:, :5])
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    cases = {
        "digits, logistic": (
            principal_components(pixels, 5),
            (labels == 8).double(),
            Bernoulli(),
            sm.families.Binomial(),
        ),
        "diabetes, Poisson": (inputs, torch.from_numpy(y), Poisson(), sm.families.Poisson()),
    }
    claims = []
    for name, (covariates, targets, likelihood, family) in cases.items():
        design = torch.cat([covariates, torch.ones(len(covariates), 1).double()], dim=1)

        def fit(columns: Tensor, y: Tensor = targets, family: Any = family, **options: Any) -> Any:
            return sm.GLM(y.numpy(), columns.numpy(), family=family).fit(tol=1e-14, **options)

        claims += _against(name, design, targets, likelihood, fit)
    return claims


def _against(
    name: str, design: Tensor, targets: Tensor, likelihood: Likelihood, fit: Callable[..., Any]
) -> list[Claim]:
    kept = [column for column in range(design.shape[1]) if column not in HELD]
    full = Regression.fitted(design, targets, likelihood)
    null = Regression.fitted(design, targets, likelihood, HELD)
    reference, robust, smaller = fit(design), fit(design, cov_type="HC0"), fit(design[:, kept])
    information = full.fisher()
    errors = standard_errors(information)
    ends = confidence_intervals(full.parameters, errors)["weight"]
    sandwich = robust_covariance(information, full.fisher(estimator=Empirical()))
    restriction = torch.eye(design.shape[1]).double()[list(HELD)].numpy()
    statistics = [
        reference.wald_test(restriction, use_f=False, scalar=True).statistic,
        smaller.model.score_test(smaller.params, exog_extra=design[:, list(HELD)].numpy())[
            0
        ].item(),
        2 * (reference.llf - smaller.llf),
    ]
    ours = [test.statistic for test in _tests(full, null, information).values()]
    pairs: dict[str, tuple[Tensor, Any]] = {
        "estimates": (full.theta, reference.params),
        "standard errors": (errors["weight"][0], reference.bse),
        "robust errors": (sandwich.diagonal().sqrt(), robust.bse),
        "intervals": (torch.cat(ends).T, reference.conf_int()),
        "statistics of the three tests": (torch.tensor(ours, dtype=torch.float64), statistics),
    }
    return [
        Claim.at_most(
            f"{name}, {what}: relative to statsmodels",
            _relative(ours, torch.as_tensor(other)),
            1e-6,
        )
        for what, (ours, other) in pairs.items()
    ]


def _tests(
    full: Regression, null: Regression, information: DenseFisher
) -> dict[str, ChiSquaredTest]:
    return {
        "Wald": wald_test(_held, full.parameters, information),
        "score": score_test(null.score(), null.fisher(), len(HELD)),
        "likelihood-ratio": likelihood_ratio_test(
            full.log_likelihood(), null.log_likelihood(), len(HELD)
        ),
    }


def _relative(values: Tensor, expected: Tensor) -> float:
    """The largest relative difference of entries."""
    return float(((values - expected) / expected).abs().max())


@dataclass(frozen=True)
class Simulated:
    """What the library said of the simulated fits.

    Attributes:
        covered: whether each 95 % interval holds the truth, ``[fits, p]``.
        z: the distance of each estimate from the truth in standard errors, ``[fits, p]``.
        p_values: of each test, ``[fits]``.
    """

    covered: Tensor
    z: Tensor
    p_values: dict[str, Tensor]

    def claims(self) -> list[Claim]:
        """Coverage and uniformity."""
        coverage = 100 * self.covered.double().mean(0)
        about = f"{FITS:,} fits to {EXAMPLES} examples"
        return [
            Claim.at_most(
                f"{about}: coverage of 95 % intervals, largest deviation in points",
                float((coverage - 95).abs().max()),
                2.0,
            ),
            *(
                Claim.at_least(
                    f"{about}, {name} test: p-value for uniform p-values",
                    float(kstest(values.numpy(), "uniform").pvalue),
                    0.01,
                )
                for name, values in self.p_values.items()
            ),
        ]


def _simulated(seed: int) -> Simulated:
    """Logistic regressions with real inputs, of which the null hypothesis holds."""
    pixels, _ = digits()
    components = principal_components(pixels, 4)[:EXAMPLES]
    design = torch.cat([components, torch.ones(EXAMPLES, 1).double()], dim=1)
    chance = torch.sigmoid(design @ TRUTH).expand(FITS, -1)
    y = torch.bernoulli(chance, generator=torch.Generator().manual_seed(seed))
    maximum, restricted = maxima(design, y, Bernoulli()), maxima(design, y, Bernoulli(), HELD)
    covered, z, p_values = [], [], dict[str, list[float]]()
    for targets, theta, at_null in zip(y, maximum, restricted, strict=True):
        full = Regression(design, targets, Bernoulli(), theta)
        null = Regression(design, targets, Bernoulli(), at_null)
        information = full.fisher()
        errors = standard_errors(information)
        lower, upper = confidence_intervals(full.parameters, errors)["weight"]
        covered.append((lower[0] <= TRUTH) & (upper[0] >= TRUTH))
        z.append((theta - TRUTH) / errors["weight"][0])
        for name, test in _tests(full, null, information).items():
            p_values.setdefault(name, []).append(test.p_value)
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in p_values.items()}
    return Simulated(torch.stack(covered), torch.stack(z), values)


@dataclass(frozen=True)
class NetworkErrors:
    """The standard errors of every parameter of a network.

    Attributes:
        by_structure: the errors ``[p]``, of the dense matrix among them.
        apart: their largest relative distance from those of the same matrix made dense.
    """

    by_structure: dict[str, Tensor]
    apart: float

    def claims(self) -> list[Claim]:
        """That the algebra is exact, and how far the structures are from the dense matrix."""
        dense = self.by_structure["dense"]
        ratios = {name: self.by_structure[name] / dense for name in STRUCTURES}
        medians = {name: float(ratios[name].median()) for name in ("Kronecker", "low rank")}
        about = f"network of {len(dense)} parameters"
        return [
            Claim.at_most(
                f"{about}: standard errors against the inverse of the same matrix, relative",
                self.apart,
                1e-8,
            ),
            *(
                Claim.shown(f"{about}, {name}: median standard error over the dense one", ratio)
                for name, ratio in medians.items()
            ),
            # Of each parameter with all others known: never above.
            Claim.at_most(
                f"{about}, diagonal: largest standard error over the dense one",
                float(ratios["diagonal"].max()),
                1 + 1e-9,
            ),
        ]


def _network_errors(seed: int) -> NetworkErrors:
    """Of a network at its maximum of the posterior."""
    x, y = digits(side=4)
    model = tanh_network(16, 12, 10, seed=seed)
    train(model, x, y, Categorical(), steps=500, prior_precision=PRIOR)
    names = [name for name, _ in model.named_parameters()]
    by_structure, apart = {}, 0.0
    for label, structure in {"dense": Dense(), **STRUCTURES}.items():
        matrix = fisher_information(model, [(x, y)], structure=structure)
        errors = standard_errors(matrix, prior_precision=PRIOR)
        by_structure[label] = flatten({name: errors[name] for name in names})
        precision = len(x) * matrix.to_dense()
        precision.diagonal().add_(PRIOR)
        all_errors = flatten({name: errors[name] for name in matrix.shapes})
        apart = max(apart, _relative(all_errors, precision.inverse().diagonal().sqrt()))
    return NetworkErrors(by_structure, apart)


def _p_value_panel(axes: Axes, simulated: Simulated) -> None:
    """How far the shares of p-values below each value are off, and what chance allows."""
    grid = torch.arange(1, FITS + 1) / FITS
    for (name, values), style in zip(simulated.p_values.items(), ("-", "--", ":"), strict=True):
        ordered = values.sort().values
        axes.plot(ordered, grid - ordered, style, label=name)
    band = 1.36 / FITS**0.5  # Kolmogorov's 95 %
    axes.axhspan(-band, band, color="k", alpha=0.08, label="95 % of uniform ones")
    axes.set(xlabel="p-value", ylabel="share below, less the value", ylim=(-0.06, 0.06))


def _coverage_panel(axes: Axes, simulated: Simulated) -> None:
    levels = torch.linspace(0.5, 0.995, 100, dtype=torch.float64)
    ends = torch.special.ndtri((1 + levels) / 2)
    shares = (simulated.z.abs()[:, :, None] <= ends).double().mean(0)
    for number, share in enumerate(shares):
        name = f"component {number + 1}" if number < len(shares) - 1 else "constant"
        axes.plot(100 * levels, 100 * (share - levels), label=name)
    axes.set(xlabel="level, %", ylabel="coverage less the level, points", ylim=(-6, 6))


def _network_panel(axes: Axes, errors: dict[str, Tensor]) -> None:
    dense = errors["dense"]
    for name, mark in zip(STRUCTURES, "o^.", strict=True):
        axes.loglog(dense, errors[name], mark, ms=3, alpha=0.6, label=name)
    axes.loglog(dense.aminmax(), dense.aminmax(), "k:", lw=1)
    axes.set(xlabel="error, dense", ylabel="error by structure")
    axes.set_xticks([0.4, 0.6, 1.0], labels=["0.4", "0.6", "1"])
    axes.minorticks_off()
