r"""Influence functions against refits without single examples, and planted label errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Implicit,
    Kronecker,
    Likelihood,
    fisher_information,
)
from ewc.fisher import Structure
from ewc.natural_gradient import NaturalGradient
from ewc.statistics import influence, loss_gradient, parameters_without, self_influence
from experiments.tasks.images import Digits, Images
from studies.findings import Claim, Findings, Setting

DECAY = 1e-3
"""The decay of the fits, and the damping of the solves."""

LEFT_OUT = 100
"""The number of examples that are left out, one by one."""

OUTPUTS = 20
"""The number of test digits whose outputs are compared."""

WRONG, DECAY_WITH_WRONG = 0.1, 0.01
"""The share of labels that are made wrong, and the decay of the fits to them."""

SOLVES: dict[str, Structure[Any]] = {
    "dense": Dense(),
    "matrix-free": Implicit(),
    "Kronecker": Kronecker(),
}


@dataclass(frozen=True)
class Regression:
    """A linear model of digits at its fit, and the digits.

    Attributes:
        likelihood: what its outputs mean.
        model: without a bias, as the last pixel is 1.
        train: images ``[n, 65]`` and targets.
        test: likewise.
    """

    likelihood: Likelihood
    model: nn.Linear
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loss(self, weight: Tensor) -> float:
        """On the test set, in nats per example."""
        x, y = self.test
        return -float(self.likelihood.log_prob(x @ weight.T, y).mean())


def measure(setting: Setting) -> Findings:
    """Correlations with refits, agreement of the solves, and detected label errors."""
    train, test = Digits().load(setting.data_root)
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
    claims = []
    four_or_nine = _logistic(train, test), ("dense", "matrix-free", "Kronecker")
    ten = _softmax(train, test), ("dense", "matrix-free")
    for name, (regression, held) in (("4 against 9", four_or_nine), ("ten digits", ten)):
        generator = torch.Generator().manual_seed(setting.seed)
        left_out = torch.randperm(len(regression.train[1]), generator=generator)[:LEFT_OUT]
        weights = list(_refits(regression, left_out))
        before = regression.loss(regression.model.weight.detach())
        actual = torch.tensor([regression.loss(weight) - before for weight in weights])
        changes = {solve: _on_test_loss(regression, kind) for solve, kind in SOLVES.items()}
        for solve in held:
            close = _correlation(changes[solve][left_out], actual)
            quantity = f"{name}, {solve}: correlation with refits, test loss"
            claims.append(Claim.at_least(quantity, close, 0.95))
        gap = (changes["matrix-free"] - changes["dense"]).abs().max() / changes["dense"].abs().max()
        claims.append(
            Claim.at_most(f"{name}: matrix-free against dense, relative", float(gap), 1e-6)
        )
        step = _on_test_loss(regression, Dense(), leverage=True)[left_out]
        first_order = _of_the_fit(regression, left_out, weights, leverage=False)
        with_leverage = {"test loss": _correlation(step, actual)}
        with_leverage |= _of_the_fit(regression, left_out, weights, leverage=True)
        refits = "correlation with refits"
        for what, close in first_order.items():
            claims.append(Claim.shown(f"{name}, first order: {refits}, {what}", close))
        for what, close in with_leverage.items():
            claims.append(Claim.at_least(f"{name}, with leverage: {refits}, {what}", close, 0.95))
    predicted = {solve: changes[solve][left_out] for solve in SOLVES}
    _scatter(panels[0], actual, predicted | {"with leverage": step})
    claims += _planted(train, setting.seed, panels[1:])
    figure.tight_layout()
    return Findings(claims, figure)


# --- leaving out, one by one ---------------------------------------------------------------


def _with_one(pixels: Tensor) -> Tensor:
    return functional.pad(pixels.double(), (0, 1), value=1.0)


def _logistic(train: Images, test: Images) -> Regression:
    """Fours against nines."""
    pairs = []
    for images in (train, test):
        kept = (images.labels == 4) | (images.labels == 9)
        nine = (images.labels[kept] == 9).double()[:, None]
        pairs.append((_with_one(images.pixels[kept]), nine))
    return _fitted(Regression(Bernoulli(), nn.Linear(65, 1, bias=False).double(), *pairs))


def _softmax(train: Images, test: Images) -> Regression:
    """All ten."""
    pairs = [(_with_one(images.pixels), images.labels) for images in (train, test)]
    return _fitted(Regression(Categorical(), nn.Linear(65, 10, bias=False).double(), *pairs))


def _fitted(regression: Regression) -> Regression:
    """The minimum of the mean loss and half the decay of the squares, by Newton's method."""
    model, likelihood, (x, y) = regression.model, regression.likelihood, regression.train
    nn.init.zeros_(model.weight)
    # The Fisher information of a linear model is its Hessian.
    newton = NaturalGradient(
        model, likelihood, lr=1.0, weight_decay=DECAY, damping=DECAY, structure=Dense()
    )
    for _ in range(20):
        newton.update_fisher([(x, y)])
        newton.zero_grad()
        loss: Tensor = -likelihood.log_prob(model(x), y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        before = model.weight.detach().clone()
        newton.step()
        if float((model.weight.detach() - before).abs().max()) < 1e-10:
            return regression
    raise ArithmeticError("Newton's method has not converged.")


def _refits(regression: Regression, left_out: Tensor) -> Iterator[Tensor]:
    """The weights without each of some examples, to 1e-9, by steps with the full Hessian."""
    likelihood, (x, y) = regression.likelihood, regression.train
    full = regression.model.weight.detach()
    hessian = fisher_information(regression.model, [(x, y)], likelihood, structure=Dense())
    damped = hessian.to_dense() + DECAY * torch.eye(full.numel(), dtype=torch.float64)
    factor = torch.linalg.cholesky(damped)
    for index in left_out:
        kept = torch.ones(len(x), 1, dtype=torch.float64)
        kept[index] = 0
        weight = full
        for _ in range(500):
            scores = kept * likelihood.score(x @ weight.T, y)
            gradient = DECAY * weight - scores.T @ x / len(x)
            step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).view_as(weight)
            weight = weight - step
            if float(step.abs().max()) < 1e-9:
                break
        else:
            raise ArithmeticError("A refit has not converged.")
        yield weight


def _on_test_loss(
    regression: Regression, structure: Structure[Any], leverage: bool = False
) -> Tensor:
    model, likelihood = regression.model, regression.likelihood
    fisher = fisher_information(model, [regression.train], likelihood, structure=structure)
    gradient = loss_gradient(model, [regression.test], fisher, likelihood)
    return influence(
        model,
        [regression.train],
        gradient,
        fisher,
        likelihood,
        damping=DECAY,
        leverage=leverage,
    )


def _of_the_fit(
    regression: Regression, left_out: Tensor, weights: list[Tensor], leverage: bool
) -> dict[str, float]:
    """Correlations of outputs and of all parameters with those of refits."""
    model, likelihood, (x, y) = regression.model, regression.likelihood, regression.train
    fisher = fisher_information(model, [(x, y)], likelihood, structure=Dense())
    full = model.weight.detach()
    images = regression.test[0][:OUTPUTS]
    of_outputs = []
    for image in images:
        (gradient,) = torch.autograd.grad(model(image)[-1], [model.weight])
        direction, examples = {"weight": gradient}, [(x[left_out], y[left_out])]
        changes = influence(
            model, examples, direction, fisher, likelihood, damping=DECAY, leverage=leverage
        )
        of_outputs.append(changes)
    outputs = torch.stack([images @ (weight - full)[-1] for weight in weights], 1)
    moves = []
    for index in left_out:
        example = [(x[index][None], y[index][None])]
        moved = parameters_without(
            model, example, fisher, likelihood, damping=DECAY, leverage=leverage
        )
        moves.append(moved["weight"] - full)
    actual = torch.stack([weight - full for weight in weights])
    return {
        f"outputs of {OUTPUTS} digits": _correlation(
            torch.stack(of_outputs).ravel(), outputs.ravel()
        ),
        "every parameter": _correlation(torch.stack(moves).flatten(), actual.flatten()),
    }


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1])


# --- wrong labels ---------------------------------------------------------------------------


def _planted(train: Images, seed: int, panels: list[Axes]) -> list[Claim]:
    """The wrong labels among the fifth of the training set with the largest self-influence."""
    generator = torch.Generator().manual_seed(seed)
    x, y = train.pixels, train.labels.clone()
    wrong = torch.randperm(len(y), generator=generator)[: round(WRONG * len(y))]
    y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    planted = torch.zeros(len(y))
    planted[wrong] = 1
    torch.manual_seed(seed)
    models = {
        "softmax regression": nn.Linear(64, 10),
        "network": nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
    }
    inspected = torch.arange(1, len(y) + 1) / len(y)
    claims = []
    for name, model in models.items():
        _minimise(model, x, y)
        for solve in ("dense", "Kronecker"):
            fisher = fisher_information(model, [(x, y)], structure=SOLVES[solve])
            suspicion = self_influence(model, [(x, y)], fisher, damping=DECAY_WITH_WRONG)
            order = suspicion.argsort(descending=True)
            caught = planted[order].cumsum(0) / planted.sum()
            fifth = float(caught[round(0.2 * len(y)) - 1])
            quantity = f"{name}, {solve}: share of {len(wrong)} wrong labels in the top fifth"
            claims.append(Claim.at_least(quantity, fifth, 0.8))
            style = {"dense": "-", "Kronecker": "--"}[solve]
            panels[0].plot(inspected, caught, style, label=f"{name}, {solve}", lw=1.2)
    panels[0].plot([0, 1], [0, 1], color="grey", lw=0.8, label="at random")
    panels[0].axvline(0.2, color="grey", ls=":", lw=0.8)
    panels[0].set(xlabel="share of the training set looked at", xlim=(0, 0.4))
    panels[0].set_title("share of the wrong labels found", fontsize="small")
    panels[0].legend(fontsize="x-small", loc="lower right")
    _suspects(panels[1], x, y, order[:12], train.labels)
    return claims


def _minimise(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = functional.cross_entropy(model(x), y) + 0.5 * DECAY_WITH_WRONG * squares
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


# --- the picture ----------------------------------------------------------------------------


def _scatter(axes: Axes, actual: Tensor, predicted: dict[str, Tensor]) -> None:
    marks = ("Kronecker", "x", 4), ("dense", "o", 4), ("matrix-free", ".", 2)
    for solve, mark, size in (*marks, ("with leverage", "+", 5)):
        label = f"{solve}, r = {_correlation(predicted[solve], actual):.3f}"
        axes.plot(1e3 * actual, 1e3 * predicted[solve], mark, ms=size, label=label)
    ends = [1e3 * float(actual.min()), 1e3 * float(actual.max())]
    axes.plot(ends, ends, color="grey", lw=0.8)
    axes.set(xlabel="refit without an example", ylabel="influence", ylim=(-2.2, 1.3))
    axes.set_title("change of the test loss, millinats", fontsize="small")
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


def _suspects(axes: Axes, x: Tensor, y: Tensor, chosen: Tensor, truth: Tensor) -> None:
    """The training images of the largest self-influence, with their labels."""
    rows = [torch.cat([*x[places].view(-1, 8, 8).unbind()], 1) for places in chosen.view(-1, 4)]
    axes.imshow(torch.cat([functional.pad(row, (0, 0, 0, 4)) for row in rows]), cmap="gray_r")
    for place, index in enumerate(chosen.tolist()):
        right = int(y[index]) == int(truth[index])
        text = f"“{int(y[index])}”" + ("" if right else f" is {int(truth[index])}")
        where = 8 * (place % 4) + 4, 12 * (place // 4) + 10
        axes.text(*where, text, ha="center", va="center", fontsize="x-small")
    axes.set_title("the most suspicious labels", fontsize="small")
    axes.axis("off")
