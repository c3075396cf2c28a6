r"""Evidence in closed form, the degree of a polynomial, and the width of networks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.polynomial.legendre import legvander
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional

from ewc import (
    Categorical,
    Dense,
    Diagonal,
    Empirical,
    Exact,
    Gaussian,
    Kronecker,
    Likelihood,
    fisher_information,
)
from ewc.fisher import Structure
from ewc.natural_gradient import NaturalGradient
from ewc.statistics import aic, bic, laplace_log_evidence, tic
from experiments.tasks.images import Digits, Images
from studies.findings import Claim, Findings, Setting

TRUTH, DEGREES, DATA_SETS = 3, range(1, 9), 50
"""The true degree, the degrees that are compared, and the number of data sets."""

WIDTHS, PRIORS, SEEDS = (2, 3, 4, 6, 8, 12, 16, 24), (1.0, 0.5, 0.25), 2
"""The widths of the networks, the precisions of the prior, and the number of splits."""

EXAMPLES = 600
"""The number of digits that the networks learn from; the other 1,197 are held out."""

CHANCE = 0.643
"""Spearman's rank correlation of 8 pairs that chance exceeds in one case of 20."""

STRUCTURES: dict[str, Structure[Any]] = {
    "dense": Dense(),
    "Kronecker": Kronecker(),
    "diagonal": Diagonal(),
}


def measure(setting: Setting) -> Findings:
    """The error of the evidence, how often the degree is found, and rank correlations."""
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    claims = _closed_form()
    claims += _polynomials(setting.seed, panels[:2])
    claims += _widths(Digits().load(setting.data_root), setting.seed, panels[2])
    figure.tight_layout()
    return Findings(claims, figure)


# --- linear models ----------------------------------------------------------------------------


Data = tuple[Tensor, Tensor]


def _fitted(data: Data, likelihood: Gaussian, prior_precision: float) -> nn.Linear:
    """The mode of the posterior: one step of Newton's method."""
    x, y = data
    model = nn.Linear(x.shape[1], 1).double()
    share = prior_precision / len(x)
    newton = NaturalGradient(
        model, likelihood, lr=1.0, weight_decay=share, damping=share, structure=Dense()
    )
    newton.update_fisher([data])
    loss: Tensor = -likelihood.log_prob(model(x), y).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    newton.step()
    return model


def _log_likelihood(model: nn.Module, data: Data, likelihood: Likelihood) -> float:
    with torch.no_grad():
        return float(likelihood.log_prob(model(data[0]), data[1]).sum())


def _evidence(
    data: Data,
    likelihood: Gaussian,
    prior_precision: float,
    structure: Structure[Any] = Dense(),
) -> float:
    """That of a linear model."""
    model = _fitted(data, likelihood, prior_precision)
    fisher = fisher_information(model, [data], likelihood, structure=structure)
    mode = {name: p.detach() for name, p in model.named_parameters()}
    log_likelihood = _log_likelihood(model, data, likelihood)
    return laplace_log_evidence(log_likelihood, fisher, mode, prior_precision)


def _closed_form() -> list[Claim]:
    """Of a regression of the diabetes data the evidence is that of a normal distribution."""
    inputs, outcome = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    x, y = inputs / inputs.std(0), ((outcome - outcome.mean()) / outcome.std())[:, None]
    variance, prior_precision = 0.5, 20.0
    noise = Gaussian(variance)
    design = functional.pad(x, (0, 1), value=1.0)
    covariance = variance * torch.eye(len(x)) + design @ design.T / prior_precision
    prior = MultivariateNormal(torch.zeros_like(y[:, 0]), covariance)
    exact = float(prior.log_prob(y[:, 0]))  # type: ignore[no-untyped-call]
    claims = []
    for name in ("dense", "Kronecker"):
        evidence = _evidence((x, y), noise, prior_precision, STRUCTURES[name])
        quantity = f"diabetes, linear regression, {name}: relative error of the log-evidence"
        claims.append(Claim.at_most(quantity, abs(evidence / exact - 1), 1e-8))
    return claims


def _scores(data: Data, likelihood: Gaussian) -> dict[str, float]:
    """What the criteria say of a polynomial, all on the scale of the log-evidence."""
    model = _fitted(data, likelihood, 0.0)
    log_likelihood = _log_likelihood(model, data, likelihood)
    exact, scores = (
        fisher_information(model, [data], likelihood, estimator=estimator, structure=Dense())
        for estimator in (Exact(), Empirical())
    )
    size = exact.num_parameters
    return {
        "evidence": _evidence(data, likelihood, prior_precision=1.0),
        "BIC": -bic(log_likelihood, size, len(data[0])) / 2,
        "AIC": -aic(log_likelihood, size) / 2,
        "TIC": -tic(log_likelihood, exact, scores) / 2,
    }


def _polynomials(seed: int, panels: Sequence[Axes]) -> list[Claim]:
    """How often each criterion prefers the true degree."""
    noise = Gaussian(0.3**2)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Counter[int]] = {}
    for number in range(DATA_SETS):
        x = 2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1
        y = 0.5 - x - 1.5 * x**2 + 2.5 * x**3
        y = y + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64)
        # Orthogonal ones: a prior on the coefficients of powers would depend on the degree.
        terms = torch.from_numpy(legvander(x.numpy(), max(DEGREES)))[:, 1:]
        rows = [_scores((terms[:, :degree], y[:, None]), noise) for degree in DEGREES]
        for name in rows[0]:
            values = [row[name] for row in rows]
            best = DEGREES[values.index(max(values))]
            chosen.setdefault(name, Counter())[best] += 1
            if number == 0:
                panels[0].plot(DEGREES, [v - max(values) for v in values], ".-", label=name)
    panels[0].set(xlabel="degree; the truth is 3", ylim=(-25, 2))
    panels[0].set_title("log-score below the best, nats", fontsize="small")
    panels[0].legend(fontsize="x-small", loc="lower right")
    for place, (name, counts) in enumerate(chosen.items()):
        places = [degree + 0.2 * (place - 1.5) for degree in DEGREES]
        panels[1].bar(places, [counts[degree] for degree in DEGREES], 0.2, label=name)
    panels[1].set(xlabel="degree chosen", xlim=(2.4, 8.6))
    panels[1].set_title(f"choices in {DATA_SETS} data sets", fontsize="small")
    panels[1].legend(fontsize="x-small")
    shares = {name: counts[TRUTH] / DATA_SETS for name, counts in chosen.items()}
    quantity = f"share of {DATA_SETS} data sets with the right degree"
    return [
        *(Claim.at_least(f"{name}: {quantity}", shares[name], 0.9) for name in ("evidence", "BIC")),
        *(Claim.shown(f"{name}: {quantity}", shares[name]) for name in ("AIC", "TIC")),
    ]


# --- networks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A network at one precision of the prior.

    Attributes:
        evidence: in nats, by structure.
        held_out: the log-likelihood of the held-out digits, in nats per example.
    """

    evidence: dict[str, float]
    held_out: float


def _widths(digits: tuple[Images, Images], seed: int, axes: Axes) -> list[Claim]:
    """How the evidence ranks widths, against how the held-out likelihood does."""
    pixels = torch.cat([images.pixels for images in digits])
    labels = torch.cat([images.labels for images in digits])
    ranks: dict[str, list[float]] = {}
    for number in range(SEEDS):
        generator = torch.Generator().manual_seed(seed + number)
        order = torch.randperm(len(labels), generator=generator)
        train, rest = order[:EXAMPLES], order[EXAMPLES:]
        split = (pixels[train], labels[train]), (pixels[rest], labels[rest])
        # The dense matrix takes longest: of the first seed only.
        names = list(STRUCTURES) if number == 0 else ["Kronecker", "diagonal"]
        torch.manual_seed(seed + number)
        candidates = [_candidates(width, *split, names) for width in WIDTHS]
        for name in names:
            best = [_best(of_width, name) for of_width in candidates]
            evidence, held_out = [c.evidence[name] for c in best], [c.held_out for c in best]
            ranks.setdefault(name, []).append(float(spearmanr(evidence, held_out).statistic))
            if number == 0:
                label = f"{name}, rank corr. {ranks[name][0]:.2f}"
                axes.plot(WIDTHS, evidence, ".-", label=label)
            if number == 0 and name == "dense":
                shown = held_out
    beside = axes.twinx()
    beside.plot(WIDTHS, shown, "k--", lw=1, label="held out (right)")
    axes.plot([], [], "k--", lw=1, label="held-out likelihood (right)")
    axes.set(xlabel="width of the hidden layer", xscale="log", ylim=(-1450, -220))
    axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS], fontsize="x-small", minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title("networks on digits: log-evidence, nats", fontsize="small")
    axes.legend(fontsize="x-small", loc="lower right")
    mean = {name: sum(values) / len(values) for name, values in ranks.items()}
    quantity = {
        name: f"widths, {name}: rank correlation with held-out likelihood (splits: {len(values)})"
        for name, values in ranks.items()
    }
    return [
        Claim.at_least(quantity["dense"], mean["dense"], CHANCE),
        Claim.at_least(quantity["Kronecker"], mean["Kronecker"], CHANCE),
        Claim.shown(quantity["diagonal"], mean["diagonal"]),
    ]


def _best(candidates: list[Candidate], structure: str) -> Candidate:
    return max(candidates, key=lambda candidate: candidate.evidence[structure])


def _candidates(width: int, train: Data, rest: Data, structures: list[str]) -> list[Candidate]:
    """A network of one width at the modes for all priors, each from the one before."""
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    likelihood = Categorical()
    candidates = []
    for prior_precision in PRIORS:
        _minimise(model, *train, prior_precision)
        mode = {name: p.detach().clone() for name, p in model.named_parameters()}
        of_train = _log_likelihood(model, train, likelihood)
        held_out = _log_likelihood(model, rest, likelihood) / len(rest[1])
        evidence = {}
        for name in structures:
            fisher = fisher_information(model, [train], likelihood, structure=STRUCTURES[name])
            evidence[name] = laplace_log_evidence(of_train, fisher, mode, prior_precision)
        candidates.append(Candidate(evidence, held_out))
    return candidates


def _minimise(model: nn.Module, x: Tensor, y: Tensor, prior_precision: float) -> None:
    """The mode of the posterior with a normal prior."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=100, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = functional.cross_entropy(model(x), y) + 0.5 * prior_precision / len(x) * squares
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
