r"""Distances of distributions, lengths of training paths, and the steepest way down a nat."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Distribution, Gamma, Normal, Poisson
from torch.distributions import Categorical as CategoricalDistribution
from torch.func import functional_call
from torch.nn import functional
from torch.optim import Optimizer

from ewc import (
    Categorical,
    Dense,
    FisherMatrix,
    Implicit,
    fisher_information,
)
from ewc.natural_gradient import NaturalGradient
from ewc.parameters import Parameters
from ewc.statistics import (
    fisher_metric,
    fisher_rao_distance,
    geodesic,
    geodesic_distance,
    path_length,
)
from experiments.tasks.images import Digits
from studies.findings import Claim, Findings, Setting

EXAMPLES, WIDTH, NATS = 300, 8, 1e-8
"""The examples and the width of the network on digits; the divergence of compared steps."""

DIRECTIONS = 200
"""The number of random directions that the natural gradient is compared with."""

Data = tuple[Tensor, Tensor]


def measure(setting: Setting) -> Findings:
    """Errors of distances and lengths, the order of the divergence, and how steep steps are."""
    digits, _ = Digits().load(setting.data_root)
    data = digits.pixels[:EXAMPLES].double(), digits.labels[:EXAMPLES]
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    claims = _distances()
    _geodesics(panels[0])
    torch.manual_seed(setting.seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)).double()
    start = _parameters(model)
    claims += _lengths(model, data, panels[2])
    for name, steps in (("at the start", 0), ("half-way", 20)):
        _put(model, start)
        list(_natural(model, data, steps))
        claims.append(_steepest(model, data, name, setting.seed))
    claims.append(_divergences(model, data, panels[1]))
    figure.tight_layout()
    return Findings(claims, figure)


# --- families -----------------------------------------------------------------------------------


def _t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def _categorical(p: Parameters) -> Distribution:
    return CategoricalDistribution(torch.cat([p["p"], 1 - p["p"].sum(0, keepdim=True)]))


Family = Callable[[Parameters], Distribution]
CLOSED: dict[str, tuple[Family, Parameters, Parameters]] = {
    "Bernoulli": (lambda p: Bernoulli(p["p"]), {"p": _t(0.01)}, {"p": _t(0.9)}),
    "Poisson": (lambda p: Poisson(p["rate"]), {"rate": _t(0.1)}, {"rate": _t(30.0)}),
    "categorical": (_categorical, {"p": _t(0.01, 0.01)}, {"p": _t(0.8, 0.19)}),
    "normal, mean and deviation": (
        lambda p: Normal(p["m"], p["s"]),
        {"m": _t(0.0), "s": _t(0.1)},
        {"m": _t(10.0), "s": _t(0.1)},
    ),
    "normal, mean and variance": (
        lambda p: Normal(p["m"], p["v"].sqrt()),
        {"m": _t(-3.0), "v": _t(16.0)},
        {"m": _t(2.0), "v": _t(0.01)},
    ),
}
"""Families with a closed form, and two members of each."""

OTHER: dict[str, tuple[Family, Family, list[tuple[float, float]]]] = {
    "Gamma": (
        lambda p: Gamma(p["x"], p["y"]),
        lambda p: Gamma(p["x"].exp(), p["y"].exp()),
        [(1.0, 2.0), (5.0, 0.5), (0.5, 3.0)],
    ),
    "Beta": (
        lambda p: Beta(p["x"], p["y"]),
        lambda p: Beta(p["x"].exp(), p["y"].exp()),
        [(1.0, 2.0), (5.0, 0.5), (0.5, 3.0)],
    ),
}
"""Families without a closed form, by their parameters and their logarithms; three members each."""


def _distances() -> list[Claim]:
    """Numeric geodesics against closed forms, each other, and other parameters."""
    claims = []
    for name, (family, start, end) in CLOSED.items():
        exact = fisher_rao_distance(family(start), family(end)).item()
        error = abs(geodesic_distance(family, start, end) / exact - 1)
        claims.append(
            Claim.at_most(f"{name}: relative error of the geodesic distance", error, 1e-6)
        )
    for name, (family, by_logarithm, members) in OTHER.items():
        first, second, third = ({"x": _t(x), "y": _t(y)} for x, y in members)
        forward = geodesic_distance(family, first, second)
        back = geodesic_distance(family, second, first)
        logarithms = [{n: tensor.log() for n, tensor in p.items()} for p in (first, second)]
        again = geodesic_distance(by_logarithm, *logarithms)
        detour = geodesic_distance(family, first, third)
        detour += geodesic_distance(family, third, second)
        claims += [
            Claim.at_most(
                f"{name}: distance there against back, relative", abs(forward / back - 1), 1e-6
            ),
            Claim.at_most(
                f"{name}: distance in log parameters, relative", abs(again / forward - 1), 1e-6
            ),
            Claim.at_most(f"{name}: distance over that of a detour", forward / detour, 1.0),
        ]
    return claims


def _geodesics(axes: Axes) -> None:
    """Of normal and Gamma distributions, over mean and standard deviation."""
    normal = fisher_metric(lambda p: Normal(p["m"], p["s"]))
    # By mean and deviation as well, to be drawn in the same plane.
    gamma = fisher_metric(
        lambda p: Gamma((p["m"] / p["s"]).square(), p["m"] / p["s"].square()),
    )
    ends = [((1.0, 0.5), (7.0, 0.5)), ((1.0, 0.5), (3.0, 4.0))]
    for number, (start, end) in enumerate(ends):
        pair = [{"m": _t(m), "s": _t(s)} for m, s in (start, end)]
        for colour, label, metric in (("C0", "normal", normal), ("C1", "Gamma", gamma)):
            path = geodesic(metric, *pair, num_points=17).path
            axes.plot(path["m"], path["s"], ".-", color=colour, ms=4, lw=1,
                      label=label if number == 0 else None)  # fmt: skip
    axes.set(xlabel="mean", ylabel="standard deviation", xlim=(0, 8))
    axes.set_title("geodesics, points at equal distances", fontsize="small")
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


# --- networks -----------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _put(model: nn.Module, parameters: Parameters) -> None:
    model.load_state_dict(parameters)


def _loss(model: nn.Module, parameters: Parameters, data: Data) -> float:
    return float(functional.cross_entropy(functional_call(model, parameters, data[0]), data[1]))


def _divergence(model: nn.Module, first: Parameters, second: Parameters, x: Tensor) -> float:
    """The mean divergence of the predictions, in nats per example."""
    outputs = [functional_call(model, parameters, x) for parameters in (first, second)]
    return float(Categorical().kl(*outputs).mean())


def _natural(model: nn.Module, data: Data, steps: int) -> Iterator[Parameters]:
    """The flow along the natural gradient, in steps of 0.05 in the metric."""
    optimizer = NaturalGradient(
        model, lr=100.0, damping=1e-2, max_kl=0.05**2 / 2, structure=Dense()
    )
    for _ in range(steps):
        optimizer.update_fisher([data])
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield _parameters(model)


def _usual(
    model: nn.Module, data: Data, kind: Callable[..., Optimizer], *, lr: float, steps: int
) -> Iterator[Parameters]:
    optimizer = kind(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield _parameters(model)


def _lengths(model: nn.Module, data: Data, axes: Axes) -> list[Claim]:
    """The lengths of three training paths, by the metric and by divergences."""
    start = _parameters(model)

    def fisher_at(parameters: Parameters) -> FisherMatrix:
        _put(model, parameters)
        return fisher_information(model, [data], structure=Implicit())

    claims = []
    for name, train in (
        ("natural gradient", _natural(model, data, 60)),
        ("gradient descent", _usual(model, data, torch.optim.SGD, lr=0.5, steps=200)),
        ("Adam", _usual(model, data, torch.optim.Adam, lr=0.02, steps=75)),
    ):
        _put(model, start)
        path = [start, *train]
        steps = [path_length(pair, fisher_at) for pair in pairwise(path)]
        by_divergence = sum(
            math.sqrt(_divergence(model, a, b, data[0]) + _divergence(model, b, a, data[0]))
            for a, b in pairwise(path)
        )
        length = sum(steps)
        quantity = f"{name}, path of length {length:.2f}: relative distance from root divergences"
        claims.append(Claim.at_most(quantity, abs(length / by_divergence - 1), 0.01))
        outputs = [functional_call(model, path[end], data[0]).softmax(1) for end in (0, -1)]
        apart = fisher_rao_distance(*(CategoricalDistribution(p) for p in outputs))
        direct = float(apart.square().mean().sqrt())
        quantity = f"{name}: distance between the predictions at the ends over the length"
        claims.append(Claim.at_most(quantity, direct / length, 1.0))
        travelled = torch.tensor([0.0, *steps]).cumsum(0)
        axes.plot(travelled, [_loss(model, point, data) for point in path], label=name)
    axes.set(xlabel="length of the path so far", yscale="log")
    axes.set_title("training loss, nats", fontsize="small")
    axes.legend(fontsize="x-small", loc="lower left")
    axes.grid(alpha=0.3)
    _put(model, start)
    return claims


def _steepest(model: nn.Module, data: Data, where: str, seed: int) -> Claim:
    """The fall of the loss along the best other direction, over that along the natural gradient."""
    here = _parameters(model)
    model.zero_grad()
    functional.cross_entropy(model(data[0]), data[1]).backward()  # type: ignore[no-untyped-call]
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    fisher = fisher_information(model, [data], structure=Dense())
    natural = fisher.solve(gradient, 1e-9)
    generator = torch.Generator().manual_seed(seed)
    directions = [gradient, {n: g.sign() for n, g in gradient.items()}]
    directions += [
        {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in gradient.items()}
        for _ in range(DIRECTIONS)
    ]
    # Random ways from the natural gradient, near and far, may be steeper if it is not steepest.
    size = math.sqrt(sum(float(t.square().sum()) for t in natural.values()))
    for number, noise in enumerate(directions[2:]):
        scale = size * 10 ** (-3 * number / DIRECTIONS) / math.sqrt(fisher.num_parameters)
        directions.append({n: natural[n] + scale * noise[n] for n in natural})
    before = _loss(model, here, data)

    def fall(direction: Parameters) -> float:
        """By how much the loss falls along a direction, at NATS nats of divergence."""
        length = math.sqrt(2 * NATS / float(fisher.quadratic_form(direction)))
        for _ in range(3):  # the divergence is nearly quadratic
            nats = _divergence(model, here, moved(direction, length), data[0])
            length *= math.sqrt(NATS / nats)
        return before - _loss(model, moved(direction, length), data)

    def moved(direction: Parameters, by: float) -> Parameters:
        return {n: tensor - by * direction[n] for n, tensor in here.items()}

    best = max(fall(direction) for direction in directions)
    quantity = (
        f"{where}, {NATS:g} nats: best fall of the loss in {len(directions)} other directions over "
        "the natural gradient's"
    )
    return Claim.at_most(quantity, best / fall(natural), 1.0)


def _divergences(model: nn.Module, data: Data, axes: Axes) -> Claim:
    """The order in the step of divergence minus metric, in a few random directions."""
    here = _parameters(model)
    fisher = fisher_information(model, [data], structure=Implicit())
    sizes = torch.logspace(-3, -0.5, 11, dtype=torch.float64)
    orders = []
    for number in range(5):
        direction = {n: torch.randn_like(t) for n, t in here.items()}
        half = float(fisher.quadratic_form(direction)) / 2
        divergences = torch.tensor([
            _divergence(model, here, {n: t + e * direction[n] for n, t in here.items()}, data[0])
            for e in sizes.tolist()
        ], dtype=torch.float64)  # fmt: skip
        gaps = (divergences - half * sizes.square()).abs()
        # Between rounding and the next order.
        orders.append(float((gaps[4] / gaps[0]).log() / (sizes[4] / sizes[0]).log()))
        if number == 0:
            axes.loglog(sizes, half * sizes.square(), label="metric: half d'Fd")
            axes.loglog(sizes, divergences, "o", ms=4, label="divergence")
            axes.loglog(sizes, gaps, "x--", ms=4, lw=0.8, label="difference")
    axes.set(xlabel="size of a random step")
    axes.set_title("network on digits: nats per example", fontsize="small")
    axes.legend(fontsize="x-small", loc="lower right")
    axes.grid(alpha=0.3)
    order = sorted(orders)[len(orders) // 2]
    quantity = "divergence minus metric: order in the step, median of 5"
    return Claim.between(quantity, order, 2.8, 3.2)
