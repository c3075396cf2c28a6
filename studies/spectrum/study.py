r"""Spectra by products against dense ones, rank against data, and sharpness along training."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional

from ewc import (
    Dense,
    FisherMatrix,
    Gaussian,
    Implicit,
    fisher_information,
)
from ewc.fisher import Structure
from ewc.statistics import (
    SpectralDensity,
    effective_dimension,
    effective_dimension_estimate,
    largest_eigenvalue,
    spectral_density,
)
from experiments.tasks.images import Digits, Images
from studies.findings import Claim, Findings, Setting

EXAMPLES = 300
"""The number of digits behind the spectrum; they determine at most 2,700 directions."""

STEPS, SAMPLES = 150, 4
"""The steps of the Lanczos process, and the number of random vectors."""

COUNTS = (5, 10, 20, 40, 80, 160, 320)
"""The numbers of examples behind the ranks."""

RATES, TRAINING = (0.125, 0.2), 2000
"""The learning rates of gradient descent, and the number of steps."""


def measure(setting: Setting) -> Findings:
    """Differences of spectra, degrees of freedom, ranks, and sharpness in units of 2 / rate."""
    digits, _ = Digits().load(setting.data_root)
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    torch.manual_seed(setting.seed)
    claims = _densities(digits, setting.seed, panels[0])
    claims += _ridge()
    claims += _ranks(digits, panels[1])
    claims += _along_training(digits, panels[2])
    figure.tight_layout()
    return Findings(claims, figure)


def _network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def _information(
    model: nn.Module, digits: Images, count: int, structure: Structure[Any]
) -> FisherMatrix:
    """The information of the first digits, in double precision."""
    data = [(digits.pixels[:count].double(), digits.labels[:count])]
    fisher: FisherMatrix = fisher_information(model, data, structure=structure)
    return fisher


def _densities(digits: Images, seed: int, axes: Axes) -> list[Claim]:
    """By products through the network, against all eigenvalues of the dense matrix."""
    model = _network(20).double()
    implicit = _information(model, digits, EXAMPLES, Implicit())
    dense = _information(model, digits, EXAMPLES, Dense())
    values = dense.eigenvalues()
    density = spectral_density(implicit, num_steps=STEPS, num_samples=SAMPLES, seed=seed)
    largest = float(values[-1])
    off = [
        abs(density.share_above(float(at)) - float((values > at).double().mean()))
        for at in torch.logspace(-5, 0, 51) * largest
    ]
    sharpness = largest_eigenvalue(implicit, tolerance=1e-9, seed=seed)
    estimate = effective_dimension_estimate(implicit, 1.0, num_samples=SAMPLES, seed=seed)
    exact = effective_dimension(dense, 1.0)
    _histogram(axes, values, density)
    return [
        Claim.at_most(
            "share of eigenvalues above 1e-5 to 1 of the largest: largest error", max(off), 0.02
        ),
        Claim.at_most(
            "largest eigenvalue by products: relative error", abs(sharpness / largest - 1), 1e-6
        ),
        Claim.at_most(
            f"effective dimension by products (exact: {exact:.0f}): z-score",
            abs(estimate.value - exact) / estimate.standard_error,
            4.0,
        ),
    ]


def _ridge() -> list[Claim]:
    """The effective dimension against the trace of the hat matrix, on the diabetes data."""
    inputs, outcome = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    x = inputs / inputs.std(0)
    noise, penalties = 0.5, (0.1, 10.0, 1000.0)
    model = nn.Linear(10, 1, bias=False).double()
    fisher = fisher_information(model, [(x, outcome[:, None])], Gaussian(noise), structure=Dense())
    off = []
    for penalty in penalties:
        gram = x.T @ x + noise * penalty * torch.eye(10, dtype=torch.float64)
        freedom = float((x @ torch.linalg.solve(gram, x.T)).trace())
        off.append(abs(effective_dimension(fisher, penalty) / freedom - 1))
    return [Claim.at_most("ridge regression, degrees of freedom: relative error", max(off), 1e-8)]


def _ranks(digits: Images, axes: Axes) -> list[Claim]:
    """Ranks and effective dimensions of one network with more and more examples."""
    model = _network(20).double()
    size = sum(p.numel() for p in model.parameters())
    ranks, dimensions = [], []
    for count in COUNTS:
        fisher = _information(model, digits, count, Dense())
        values = fisher.eigenvalues()
        ranks.append(int((values > 1e-12 * values[-1]).sum()))
        dimensions.append(effective_dimension(fisher, 1.0))
    few = [(rank, 9 * n) for rank, n in zip(ranks, COUNTS, strict=True) if 9 * n < size / 2]
    axes.plot(COUNTS, ranks, "o-", ms=4, label="rank")
    axes.plot(COUNTS, dimensions, "s-", ms=4, label="effective dimension")
    axes.plot(COUNTS, [9 * n for n in COUNTS], "k:", lw=1, label="9 per example")
    axes.axhline(size, color="grey", lw=0.8)
    axes.text(COUNTS[0], 1.1 * size, f"{size} parameters", fontsize="x-small", color="grey")
    axes.set(xlabel="examples", xscale="log", yscale="log", ylim=(5, 4000))
    axes.set_title("directions that the data determine", fontsize="small")
    axes.legend(fontsize="x-small", loc="lower right")
    axes.grid(alpha=0.3)
    return [
        Claim.at_most(
            f"rank, {COUNTS[0]} to {COUNTS[len(few) - 1]} examples: distance from 9 per example",
            max(abs(rank - expected) for rank, expected in few),
            0,
        )
    ]


def _along_training(digits: Images, axes: Axes) -> list[Claim]:
    """Gradient descent on squared errors sharpens up to where it would diverge."""
    count = 500
    x, y = digits.pixels[:count], functional.one_hot(digits.labels[:count], 10).float()
    start = torch.random.get_rng_state()
    claims = []
    for colour, rate in zip(("C0", "C1"), RATES, strict=True):
        torch.random.set_rng_state(start)
        model = _network(32)
        steps, sharpness = [], []
        for step in range(TRAINING + 1):
            if step % 50 == 0:
                steps.append(step)
                sharpness.append(_sharpness(model, x, y))
            _descend(model, x, y, rate)
        axes.plot(steps, sharpness, ".-", ms=3, color=colour, label=f"learning rate {rate}")
        axes.axhline(2 / rate, color=colour, ls=":", lw=1)
        late = [s for n, s in zip(steps, sharpness, strict=True) if n >= TRAINING / 2]
        ratio = sum(late) / len(late) * rate / 2
        quantity = f"gradient descent, rate {rate}: late sharpness in units of 2 / rate"
        claims.append(Claim.between(quantity, ratio, 0.9, 1.1))
    axes.plot([], [], "k:", lw=1, label="2 / learning rate")
    axes.set(xlabel="steps of gradient descent", ylim=(8, 22))
    axes.set_title("largest eigenvalue along training", fontsize="small")
    axes.legend(fontsize="x-small", loc="upper left")
    axes.grid(alpha=0.3)
    return claims


def _sharpness(model: nn.Module, x: Tensor, y: Tensor) -> float:
    fisher = fisher_information(model, [(x, y)], Gaussian(), structure=Implicit())
    return largest_eigenvalue(fisher, tolerance=1e-3)


def _descend(model: nn.Module, x: Tensor, y: Tensor, rate: float) -> None:
    loss = -Gaussian().log_prob(model(x), y).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)


def _histogram(axes: Axes, values: Tensor, density: SpectralDensity) -> None:
    """Both densities over the logarithms of the eigenvalues; the first bin has all below."""
    edges = [10 ** (0.25 * k) for k in range(-21, 3)]
    share = torch.full_like(values, 1 / len(values))
    low = 1.1 * edges[0]
    axes.hist(values.clamp_min(low), edges, weights=share, alpha=0.5, label="dense matrix")
    axes.hist(
        density.values.clamp_min(low),
        edges,
        weights=density.weights,
        histtype="step",
        color="k",
        label="by products",
    )
    axes.set(xlabel="eigenvalue (the first bin: all below)", xscale="log", yscale="log")
    axes.set_title("share of the eigenvalues", fontsize="small")
    axes.legend(fontsize="x-small", loc="upper right")
