r"""K-FAC against the exact matrix: where it is exact, and its error elsewhere.

Relative Frobenius errors by layer, for networks before, after and long after they have learnt
digits; the share between layers; and the consequences for a Laplace posterior.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from ewc import (
    BlockDiagonal,
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Gaussian,
    Kronecker,
    Likelihood,
    fisher_information,
)
from ewc.fisher import Structure
from ewc.parameters import Parameters, flatten, trainable_parameters
from ewc.statistics import (
    error_by_layer,
    laplace_log_evidence,
    share_between_layers,
    standard_errors,
)
from experiments.tasks.images import MNIST, Digits, Images
from studies.findings import Claim, Findings, Setting

Data = list[tuple[Tensor, Tensor]]

STRUCTURES: dict[str, Structure[Any]] = {
    "diagonal": Diagonal(),
    "K-FAC": Kronecker(),
    "EKFAC": EigenvalueCorrected(),
}

SIZES = (64, 16, 16, 10)
"""The widths of the networks for the digits: 1,482 parameters."""

BATCH_SIZE = 256
"""The batch size of the networks without a posterior."""

EXACT: dict[str, Structure[Any]] = {"dense": Dense(), "blocks": BlockDiagonal()}

PRIOR_PRECISIONS = (1.0, 0.1)
"""The precisions of the prior of the networks with a posterior."""

STYLES = ("-C3o", "-C0s", "-C2^")
"""The styles of the structures in the picture."""

EXAMPLES = 2000
"""The number of MNIST images behind the matrices; the networks learn from all 60,000."""


@dataclass
class State:
    """A network at some time, and its matrices.

    Attributes:
        name: what and when.
        errors: relative errors by structure and layer.
        between: the share of the squared norm between layers.
        trace: the relative error of EKFAC's trace.
    """

    name: str
    errors: dict[str, dict[str, float]]
    between: float
    trace: float


@dataclass
class Posterior:
    """A Laplace posterior by structure.

    Attributes:
        prior: the precision of the prior.
        evidence: log-evidence in nats.
        errors: standard errors of the parameters.
        predictive: standard errors of the outputs for test images.
    """

    prior: float
    evidence: dict[str, float]
    errors: dict[str, Tensor]
    predictive: dict[str, Tensor]


def measure(setting: Setting) -> Findings:
    """Exact cases, tables of errors, and a posterior."""
    claims = _exact_cases()
    digits, unseen = Digits().load(setting.data_root)
    states = _through_training(digits, setting.seed)
    states += _on_mnist(_pooled(MNIST().load(setting.data_root)[0]), setting.seed)
    for state in states:
        claims += _of_state(state)
    posteriors = [_posterior(digits, unseen, p, setting.seed) for p in PRIOR_PRECISIONS]
    for posterior in posteriors:
        claims += _of_posterior(posterior)
    return Findings(claims, _picture(states, posteriors[0]))


# --- where it is exact -------------------------------------------------------------------


def _exact_cases() -> list[Claim]:
    """Deep linear networks with a Gaussian likelihood, and one datum."""
    errors = []
    for sizes in ([6, 4, 3], [5, 8, 8, 2], [3, 7, 5, 7, 4]):
        layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
        x, y = torch.randn(40, sizes[0]), torch.randn(40, sizes[-1])
        errors.append(_largest_error(nn.Sequential(*layers), x, y, Gaussian(0.5)))
    bent = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    single = _largest_error(bent, x[:1], y[:1], Categorical())
    many = _largest_error(bent, x, y, Categorical())
    return [
        Claim.at_most("three deep linear networks, Gaussian: largest error", max(errors), 1e-12),
        Claim.at_most("one example, tanh, ReLU and classes: largest error", single, 1e-12),
        Claim.at_least("same network, 40 examples (not exact): largest error", many, 0.01),
    ]


def _largest_error(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> float:
    """The largest error of K-FAC and EKFAC in a layer, against the exact block."""
    model = model.double()
    data = [(x.double(), y if y.dtype == torch.long else y.double())]
    exact = fisher_information(model, data, likelihood, structure=BlockDiagonal())
    matrices = [
        fisher_information(model, data, likelihood, structure=STRUCTURES[name])
        for name in ("K-FAC", "EKFAC")
    ]
    return max(error for f in matrices for error in error_by_layer(f, exact).values())


# --- on trained networks -----------------------------------------------------------------


def _mlp(*sizes: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _pooled(images: Images) -> Images:
    """Images of 7x7 pixels, each the mean of 4x4."""
    pixels = avg_pool2d(images.pixels.reshape(-1, 1, 28, 28), 4)
    return Images(pixels.flatten(1), images.labels)


def _learn(
    model: nn.Module, images: Images, steps: int, batch_size: int | None, decay: float = 0.0
) -> None:
    """Some steps of Adam, with a decay of the weights in nats per example; the rate falls to 0."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        x, y = images.pixels, images.labels
        if batch_size is not None:
            batch = torch.randint(len(images), (batch_size,))
            x, y = x[batch], y[batch]
        loss = cross_entropy(model(x), y)
        if decay:
            loss = loss + 0.5 * decay * sum(p.square().sum() for p in model.parameters())
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        schedule.step()


def _state(name: str, model: nn.Module, images: Images) -> State:
    data = [(images.pixels, images.labels)]
    exact = fisher_information(model, data, structure=Dense())
    matrices = {
        key: fisher_information(model, data, structure=structure)
        for key, structure in STRUCTURES.items()
    }
    errors = {key: error_by_layer(matrix, exact) for key, matrix in matrices.items()}
    trace = abs(float(matrices["EKFAC"].trace() / exact.trace()) - 1)
    return State(name, errors, share_between_layers(exact), trace)


def _through_training(images: Images, seed: int) -> list[State]:
    """A network before it learns the 1,437 training digits of 8x8 pixels, after, and long after."""
    torch.manual_seed(seed)
    model = _mlp(*SIZES)
    states = [_state("digits, untrained", model, images)]
    for name, steps in (("digits, trained", 300), ("digits, long", 3000)):
        _learn(model, images, steps, BATCH_SIZE)
        states.append(_state(name, model, images))
    return states


def _on_mnist(images: Images, seed: int) -> list[State]:
    """A network after 2 and 6 more passes over MNIST at 7x7 pixels."""
    torch.manual_seed(seed)
    model = _mlp(49, 24, 24, 10)
    sample = Images(images.pixels[:EXAMPLES], images.labels[:EXAMPLES])
    states = []
    for name, epochs in (("MNIST, trained", 2), ("MNIST, long", 6)):
        _learn(model, images, epochs * len(images) // BATCH_SIZE, BATCH_SIZE)
        states.append(_state(name, model, sample))
    return states


def _of_state(state: State) -> list[Claim]:
    diagonal, kfac, ekfac = (list(state.errors[key].values()) for key in STRUCTURES)
    gain = max(e - k for e, k in zip(ekfac, kfac, strict=True))
    ratio = max(k / d for k, d in zip(kfac, diagonal, strict=True))
    return [
        Claim.at_most(f"{state.name}: error of EKFAC minus that of K-FAC, largest", gain, 1e-6),
        Claim.at_most(f"{state.name}: relative error of EKFAC's trace", state.trace, 1e-4),
        Claim.at_most(
            f"{state.name}: error of K-FAC over that of the diagonal, largest", ratio, 1.0
        ),
    ]


# --- as a posterior ----------------------------------------------------------------------


def _posterior(train: Images, test: Images, prior: float, seed: int) -> Posterior:
    """The Laplace posterior of a network at its mode, by every structure."""
    torch.manual_seed(seed)
    model = _mlp(*SIZES)
    _learn(model, train, 1000, None, prior / len(train))
    x, y = train.pixels, train.labels
    mode = {name: p.detach().double() for name, p in trainable_parameters(model).items()}
    log_likelihood = -float(cross_entropy(model(x), y, reduction="sum").detach())
    jacobian = _jacobian(model, mode, test.pixels[::9].double())
    posterior = Posterior(prior, {}, {}, {})
    for name, structure in (EXACT | STRUCTURES).items():
        fisher = fisher_information(model, [(x, y)], structure=structure).to(dtype=torch.float64)
        posterior.evidence[name] = laplace_log_evidence(log_likelihood, fisher, mode, prior)
        posterior.errors[name] = flatten(standard_errors(fisher, prior_precision=prior))
        precision = fisher.precision.to_dense()
        precision.diagonal().add_(prior)
        root = torch.linalg.cholesky(precision)
        # The standard errors of the outputs, linear in the parameters around the mode.
        rows = torch.linalg.solve_triangular(root, jacobian.T, upper=False)
        posterior.predictive[name] = rows.norm(dim=0)
    return posterior


def _jacobian(model: nn.Module, mode: Parameters, x: Tensor) -> Tensor:
    """The derivatives of the outputs, ``[n * c, p]``."""
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(mode)
    return torch.cat([jacobian.flatten(0, 1).flatten(1) for jacobian in jacobians.values()], 1)


def _of_posterior(posterior: Posterior) -> list[Claim]:
    """The figures, all against the dense matrix."""
    about = f"posterior, prior precision {posterior.prior:g},"
    evidence = {
        name: value - posterior.evidence["dense"] for name, value in posterior.evidence.items()
    }
    nats = evidence["K-FAC"] / evidence["diagonal"]
    kfac = _spread(posterior.errors, "K-FAC")
    share = kfac / _spread(posterior.errors, "diagonal")
    outputs = [_spread(posterior.predictive, name) for name in ("K-FAC", "diagonal")]
    rotated = evidence["EKFAC"] - evidence["blocks"]
    longest = {
        name: float((posterior.errors[name] / posterior.errors["dense"]).max())
        for name in ("blocks", "diagonal")
    }
    return [
        Claim.at_most(
            f"{about} blocks: log-evidence minus the dense one, nats", evidence["blocks"], 0.0
        ),
        Claim.at_most(f"{about} EKFAC: log-evidence minus that of the blocks, nats", rotated, 0.0),
        Claim.at_most(f"{about} K-FAC: error of the log-evidence over the diagonal's", nats, 0.5),
        *(
            Claim.at_most(
                f"{about} {name}: largest standard error over the dense one", ratio, 1 + 1e-9
            )
            for name, ratio in longest.items()
        ),
        Claim.shown(f"{about} K-FAC, parameters: rms log ratio of standard errors", kfac),
        Claim.at_most(f"{about} K-FAC, parameters: the same over the diagonal's", share, 0.5),
        Claim.at_most(f"{about} K-FAC, outputs: rms log ratio of standard errors", outputs[0], 0.5),
        Claim.shown(f"{about} diagonal, outputs: rms log ratio of standard errors", outputs[1]),
    ]


def _spread(errors: dict[str, Tensor], name: str) -> float:
    """The root mean square of the logarithm of standard errors over those of the dense matrix."""
    return float((errors[name] / errors["dense"]).log().square().mean().sqrt())


# --- the picture -------------------------------------------------------------------------


def _picture(states: list[State], posterior: Posterior) -> Figure:
    figure = Figure(figsize=(10, 3.4))
    wide, narrow = figure.subplots(1, 2, width_ratios=(2.1, 1))
    layers = len(states[0].errors["K-FAC"])
    for number, state in enumerate(states):
        places = torch.arange(layers) + number * (layers + 1.0)
        label = "share between layers" if number == 0 else None
        wide.bar(places.mean(), state.between, layers, color="0.88", label=label)
        for (name, errors), style in zip(state.errors.items(), STYLES, strict=True):
            values = list(errors.values())
            wide.plot(places, values, style, label=name if number == 0 else None)
    ticks = [number * (layers + 1.0) + (layers - 1) / 2 for number in range(len(states))]
    wide.set_xticks(ticks, [state.name.replace(", ", "\n") for state in states])
    wide.set(ylim=(0, 1.35), title="relative error of the blocks, first to last layer")
    wide.legend(fontsize="x-small", ncol=4, loc="upper center")
    wide.grid(alpha=0.3, axis="y")
    dense = posterior.errors["dense"]
    for name, style in zip(("diagonal", "K-FAC"), STYLES, strict=False):
        narrow.plot(dense, posterior.errors[name], style[1:], markersize=2, alpha=0.4, label=name)
    narrow.plot(dense.sort().values, dense.sort().values, "k--", linewidth=1, label="equal")
    narrow.set(
        xscale="log", yscale="log", xlabel="dense", title="standard errors of the parameters"
    )
    narrow.legend(fontsize="x-small", markerscale=3)
    narrow.grid(alpha=0.3)
    figure.tight_layout()
    return figure
