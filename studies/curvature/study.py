"""How sharply the log-likelihood of a network falls, against the quadratic of its information."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ewc import Dense, Implicit, Kronecker
from ewc.fisher import fisher_information
from ewc.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, dot, unflatten
from ewc.statistics import DivergenceProfile, divergence_profile, leading_eigenvector
from studies.digits import digits, tanh_network, train
from studies.findings import Claim, Findings, Setting

NATS = (1e-10, 1e-6)
"""The quadratic lies between these at the steps that determine the order, in nats per example.

Below, rounding adds to the error. Above, the fourth power of the step does, if the coefficient of
the cube happens to be small.
"""

Data = list[tuple[Tensor, Tensor]]


def measure(setting: Setting) -> Findings:
    """The order in the step of the error of the quadratic."""
    x, y = digits()
    data = [(x, y)]
    yes = torch.nn.functional.one_hot(y, 10).double()
    model = tanh_network(64, 32, 10, seed=setting.seed)
    train(model, x, y, Categorical(), steps=200)
    fisher = fisher_information(model, data, structure=Implicit())
    _, leading = leading_eigenvector(fisher)
    random = _random(fisher, setting.seed)
    kronecker = fisher_information(model, data, structure=Kronecker())
    profiles = {
        "leading eigenvector": _profile(model, data, fisher, leading),
        "random direction": _profile(model, data, fisher, random),
        "Kronecker, random": _profile(model, data, kronecker, random),
    }
    about = f"network of {fisher.num_parameters} parameters"
    claims = [
        _third(f"{about}, {name}: order of the error", profiles[name])
        for name in ("leading eigenvector", "random direction")
    ]
    for likelihood in (Bernoulli(), Gaussian(0.1)):
        other = tanh_network(64, 32, 10, seed=setting.seed)
        train(other, x, yes, likelihood, steps=200)
        matrix = fisher_information(other, [(x, yes)], likelihood, structure=Implicit())
        _, vector = leading_eigenvector(matrix)
        name = type(likelihood).__name__
        profile = _profile(other, [(x, yes)], matrix, vector, likelihood)
        claims.append(_third(f"{name} outputs, leading eigenvector: order of the error", profile))
    linear = nn.Linear(64, 10).double()
    matrix = fisher_information(linear, [(x, yes)], Gaussian(), structure=Implicit())
    direction = _random(matrix, setting.seed)
    exact = _profile(linear, [(x, yes)], matrix, direction, Gaussian())
    claims += [
        Claim.at_most(
            "linear regression: relative error of the quadratic",
            float((exact.error / exact.divergence).max()),
            1e-10,
        ),
        Claim.between(
            "Kronecker matrix, random direction: order of the error",
            profiles["Kronecker, random"].order,
            1.8,
            2.2,
        ),
    ]
    figure = Figure(figsize=(9, 3.2))
    first, second, third = figure.subplots(1, 3)
    _profile_panel(first, model, data, fisher, leading)
    _error_panel(second, profiles)
    claims.append(_spectrum_panel(third, setting.seed))
    for axes in (first, second, third):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    return Findings(claims, figure)


def _third(quantity: str, profile: DivergenceProfile) -> Claim:
    return Claim.between(quantity, profile.order, 2.7, 3.3)


def _random(fisher: FisherMatrix, seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(fisher.num_parameters, generator=generator, dtype=torch.float64)
    return unflatten(flat / flat.norm(), fisher.shapes)


def _profile(
    model: nn.Module,
    data: Data,
    fisher: FisherMatrix,
    direction: Parameters,
    likelihood: Likelihood = Categorical(),
) -> DivergenceProfile:
    """Along a direction, at lengths with equal ratios between the bounds in nats."""
    low, high = ((2 * nats / float(fisher.quadratic_form(direction))) ** 0.5 for nats in NATS)
    lengths = torch.logspace(0, 1, 9, base=high / low, dtype=torch.float64) * low
    steps = [*(-lengths).tolist(), *lengths.tolist()]
    return divergence_profile(model, data, fisher, likelihood, direction=direction, steps=steps)


def _profile_panel(
    axes: Axes, model: nn.Module, data: Data, fisher: FisherMatrix, leading: Parameters
) -> None:
    """Far from the fit: the quadratic, the divergence, and the loss on the data."""
    x, y = data[0]
    start = {name: tensor.detach() for name, tensor in model.named_parameters()}
    losses = []
    steps = [step for step in torch.linspace(-1.0, 1.0, 40).tolist() if step != 0]
    with torch.no_grad():
        for step in [0.0, *steps]:
            moved = {name: tensor + step * leading[name] for name, tensor in start.items()}
            outputs = torch.func.functional_call(model, moved, (x,))
            losses.append(-float(Categorical().log_prob(outputs, y).mean()))
    profile = divergence_profile(model, data, fisher, direction=leading, steps=steps)
    axes.plot(steps, profile.divergence, label="expected fall")
    axes.plot(steps, profile.quadratic, "--", label="quadratic")
    axes.plot(steps, [loss - losses[0] for loss in losses[1:]], ":", label="fall on the data")
    axes.set(xlabel="step along the leading eigenvector", ylabel="nats per example")


def _error_panel(axes: Axes, profiles: dict[str, DivergenceProfile]) -> None:
    """The error at the steps that determine the order, the mean of both directions."""
    for (name, profile), mark in zip(profiles.items(), "os^", strict=True):
        size = profile.quadratic.view(2, -1)[0].sqrt()
        error = profile.error.view(2, -1).mean(0)
        axes.loglog(size, error, mark, ms=4, label=name)
        power = 2 if name.startswith("Kronecker") else 3
        axes.loglog(size, error[0] * (size / size[0]) ** power, "k:", lw=0.8)
    axes.set(xlabel="root of the quadratic", ylabel="its error, nats")


def _spectrum_panel(axes: Axes, seed: int) -> Claim:
    """Steps of one length along every eigenvector of a smaller network, by half its eigenvalue."""
    x, y = digits(side=4)
    model = tanh_network(16, 12, 10, seed=seed)
    train(model, x, y, Categorical(), steps=200)
    fisher = fisher_information(model, [(x, y)], structure=Dense())
    values, vectors = torch.linalg.eigh(fisher.to_dense())
    for step in (3.0, 0.1):
        profiles = [
            divergence_profile(
                model,
                [(x, y)],
                fisher,
                direction=unflatten(vector, fisher.shapes),
                steps=[step],
            )
            for vector in vectors.T
        ]
        shown = values > 1e-9 * values[-1]
        divergence = torch.cat([profile.divergence for profile in profiles])[shown] * 2 / step**2
        axes.loglog(values[shown], divergence, ".", ms=3, label=f"step of {step:g}")
    axes.loglog(values[shown], values[shown], "k:", lw=0.8)
    axes.set(xlabel="eigenvalue", ylabel="2 KL / step²")
    value, vector = leading_eigenvector(fisher)
    along = float(dot(vector, unflatten(vectors[:, -1], fisher.shapes)).abs())
    return Claim.at_most(
        "leading eigenvector by products: relative distance from the dense matrix's",
        max(abs(value / float(values[-1]) - 1), 1 - along),
        1e-9,
    )
