r"""Forgetting as the penalty forecasts it, against what happens, and a budget for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ewc import (
    DiagonalFisher,
    EWCPenalty,
    FisherMatrix,
    KroneckerFisher,
    Online,
    fisher_information,
)
from ewc.forgetting import ForgettingBudget
from experiments.data import MNIST, Images
from experiments.verify.check import Check, Surroundings

EXAMPLES = 10_000
TASKS = 4
STEPS = 300
BATCH = 128
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
BUDGET = 0.002
STRUCTURES: dict[str, type[FisherMatrix]] = {"diagonal": DiagonalFisher, "K-FAC": KroneckerFisher}


@dataclass
class Run:
    """A sequence of tasks.

    Attributes:
        accuracy: the mean over all tasks after the last, in per cent.
        predicted: the forecast rise of the old tasks' mean loss, for every task but the first.
        measured: what it then was.
    """

    accuracy: float
    predicted: list[float]
    measured: list[float]


def verify(surroundings: Surroundings) -> list[Check]:
    """Every strength and the budget, for both structures."""
    train, test = MNIST().load(surroundings.data_root)
    train = Images(train.pixels[:EXAMPLES], train.labels[:EXAMPLES])
    generator = torch.Generator().manual_seed(surroundings.seed)
    orders = [torch.randperm(784, generator=generator) for _ in range(TASKS)]
    checks, found = [], {}
    for name, structure in STRUCTURES.items():
        runs = [
            learnt(orders, train, test, structure, strength, None, surroundings.seed)
            for strength in STRENGTHS
        ]
        kept = learnt(orders, train, test, structure, 1.0, BUDGET, surroundings.seed)
        found[name] = runs, kept
        best = max(runs, key=lambda run: run.accuracy)
        predicted = torch.tensor([r.predicted for r in runs]).flatten().log()
        measured = torch.tensor([r.measured for r in runs]).flatten().clamp_min(1e-5).log()
        correlation = float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1])
        short = best.accuracy - kept.accuracy
        spent = max(abs(r - BUDGET) for r in kept.predicted) / BUDGET
        checks += [
            Check.at_most(f"{name}: a budget of {BUDGET} nats, points under the best of "
                          f"{len(STRENGTHS)} strengths ({best.accuracy:.2f} %)", short, 1.0),
            Check.at_most(f"{name}: the forecast off the budget after a task, share", spent, 0.1),
            Check.at_least(f"{name}: correlation of forecast and measured rise, logarithms, "
                           f"{len(predicted)} tasks", correlation, 0.8),
        ]  # fmt: skip
    _picture(found).savefig(surroundings.pictures / "forgetting.png", dpi=120)
    return checks


def learnt(
    orders: Sequence[Tensor],
    train: Images,
    test: Images,
    structure: type[FisherMatrix],
    strength: float,
    nats: float | None,
    seed: int,
) -> Run:
    """A network that learns permuted tasks one after the other with online EWC."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    )
    penalty = EWCPenalty(strength, Online())
    budget = None if nats is None else ForgettingBudget(nats)
    run = Run(0.0, [], [])
    for task, order in enumerate(orders):
        pixels = train.pixels[:, order]
        before = [_loss(model, train, old) for old in orders[:task]]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(pixels), (BATCH,))
            loss = cross_entropy(model(pixels[batch]), train.labels[batch])
            if task:
                value = penalty(model)
                if budget is not None:
                    # Tasks of one size: the penalty is the strength times that of all of them.
                    budget.follow(float(value.detach()) / (penalty.strength * task))
                    value = budget.factor * value
                loss = loss + value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            annealing.step()
        if task:
            run.predicted.append(penalty.predicted_rise(model))
            after = [_loss(model, train, old) for old in orders[:task]]
            run.measured.append((sum(after) - sum(before)) / task)
        if budget is not None and task:
            penalty.strength *= budget.factor
            budget.start()
        batches = list(zip(pixels.split(1000), train.labels.split(1000), strict=True))
        penalty.consolidate(fisher_information(model, batches, structure=structure), model)
    with torch.no_grad():
        right = [(model(test.pixels[:, o]).argmax(1) == test.labels).float().mean() for o in orders]
    run.accuracy = 100 * float(torch.stack(right).mean())
    return run


@torch.no_grad()
def _loss(model: nn.Module, images: Images, order: Tensor) -> float:
    return float(cross_entropy(model(images.pixels[:, order]), images.labels))


def _picture(found: dict[str, tuple[list[Run], Run]]) -> Figure:
    """Measured against forecast rises, and accuracy over the strength with the budget's."""
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    for name, (runs, kept) in found.items():
        predicted = [value for run in runs for value in run.predicted]
        measured = [value for run in runs for value in run.measured]
        left.plot(predicted, measured, "o", alpha=0.7, label=name)
        left.plot(kept.predicted, kept.measured, "k*", markersize=9)
        (line,) = right.plot(
            STRENGTHS, [run.accuracy for run in runs], marker="o", label=f"{name}, by strength"
        )
        label = f"{name}, budget of {BUDGET} nats"
        right.axhline(kept.accuracy, linestyle="--", color=line.get_color(), label=label)
    low, high = left.get_xlim()
    ends = [max(low, 3e-4), high]
    left.plot(ends, ends, color="grey", linewidth=1, label="as forecast")
    left.set(xscale="log", yscale="symlog", xlabel="forecast rise of the old loss in nats",
             ylabel="measured rise in nats")  # fmt: skip
    left.set_yscale("symlog", linthresh=1e-3)
    left.plot([], [], "k*", label=f"budget of {BUDGET} nats")
    right.set(xscale="log", xlabel="strength", ylabel=f"accuracy in %, {TASKS} tasks")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    return figure
