r"""Forgetting as the penalty predicts it, against what happens."""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from ewc import (
    Diagonal,
    EWCPenalty,
    Kronecker,
    Online,
    fisher_information,
)
from ewc.fisher import Structure
from experiments.tasks.images import MNIST, Images
from studies.findings import Claim, Findings, Setting

EXAMPLES = 10_000
TASKS = 5
STEPS = 600
BATCH = 128
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
STRUCTURES: dict[str, Structure[Any]] = {"diagonal": Diagonal(), "K-FAC": Kronecker()}


@dataclass
class Run:
    """A sequence of tasks.

    Attributes:
        accuracy: the mean over all tasks after the last, in per cent.
        predicted: the predicted rise of the old tasks' mean loss, for every task but the first.
        measured: what it then was.
    """

    accuracy: float
    predicted: list[float]
    measured: list[float]


def measure(setting: Setting) -> Findings:
    """Every strength, for both structures."""
    permuted = Permuted(*MNIST().load(setting.data_root), setting.seed)
    claims, runs_of = [], {}
    for name, structure in STRUCTURES.items():
        runs = [learnt(permuted, structure, strength) for strength in STRENGTHS]
        runs_of[name] = runs
        predicted = [value for run in runs for value in run.predicted]
        measured = [value for run in runs for value in run.measured]
        claims += [
            Claim.at_least(
                f"{name}: rank correlation of predicted and measured rise, {len(predicted)} tasks",
                float(spearmanr(predicted, measured).statistic),
                0.5,
            ),
            Claim.shown(
                f"{name}: measured over predicted rise, median of {len(predicted)} tasks",
                median(m / p for p, m in zip(predicted, measured, strict=True)),
            ),
        ]
    return Findings(claims, _picture(runs_of))


class Permuted:
    """Permuted tasks of MNIST at a quarter of its pixels, 14x14.

    Args:
        train: the images of which the first are learnt.
        test: the images to test with.
        seed: decides the permutations.
    """

    def __init__(self, train: Images, test: Images, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(196, generator=generator) for _ in range(TASKS)]
        self.train = Images(_pooled(train.pixels[:EXAMPLES]), train.labels[:EXAMPLES])
        self.test = Images(_pooled(test.pixels), test.labels)

    def loss(self, model: nn.Module, tasks: int) -> float:
        """The mean training loss over the first so many tasks."""
        return sum(self._loss(model, order) for order in self.orders[:tasks]) / tasks

    @torch.no_grad()
    def _loss(self, model: nn.Module, order: Tensor) -> float:
        return float(cross_entropy(model(self.train.pixels[:, order]), self.train.labels))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The mean test accuracy over all tasks, in per cent."""
        predictions = [model(self.test.pixels[:, order]).argmax(1) for order in self.orders]
        return 100 * float((torch.stack(predictions) == self.test.labels).float().mean())


def _pooled(pixels: Tensor) -> Tensor:
    return avg_pool2d(pixels.view(-1, 1, 28, 28), 2).flatten(1)


def learnt(permuted: Permuted, structure: Structure[Any], strength: float) -> Run:
    """A network that learns the tasks one after the other with online EWC."""
    torch.manual_seed(permuted.seed)
    layers = [nn.Linear(196, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]
    model = nn.Sequential(*layers)
    penalty = EWCPenalty(strength, Online())
    run = Run(0.0, [], [])
    labels = permuted.train.labels
    for task, order in enumerate(permuted.orders):
        pixels = permuted.train.pixels[:, order]
        before = permuted.loss(model, task) if task else 0.0
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(pixels), (BATCH,))
            loss = cross_entropy(model(pixels[batch]), labels[batch])
            if task:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            annealing.step()
        if task:
            run.predicted.append(penalty.predicted_rise(model))
            run.measured.append(permuted.loss(model, task) - before)
        batches = list(zip(torch.split(pixels, 1000), torch.split(labels, 1000), strict=True))
        fisher = fisher_information(model, batches, structure=structure)
        penalty.consolidate(fisher, model)
    run.accuracy = permuted.accuracy(model)
    return run


def _picture(runs_of: dict[str, list[Run]]) -> Figure:
    """Measured against predicted rises, and accuracy over the strength."""
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    left.set_xscale("log")
    left.set_yscale("symlog", linthresh=1e-3)  # a measured rise may be negative
    for name, runs in runs_of.items():
        predicted = [value for run in runs for value in run.predicted]
        measured = [value for run in runs for value in run.measured]
        left.plot(predicted, measured, "o", alpha=0.7, label=name)
        right.plot(STRENGTHS, [run.accuracy for run in runs], marker="o", label=name)
    low, high = left.get_xlim()
    equal = torch.logspace(math.log10(low), math.log10(high), 100)  # the axis is linear near 0
    left.plot(equal, equal, color="grey", linewidth=1, label="as predicted")
    left.set(xlabel="predicted rise of the old loss, nats", ylabel="measured rise, nats")
    right.set(xscale="log", xlabel="strength", ylabel=f"accuracy in %, {TASKS} tasks")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    return figure
