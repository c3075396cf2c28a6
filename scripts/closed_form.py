"""How well sums over each class classify MNIST, without a network that learns.

    python scripts/closed_form.py [--data-root DIR] [--units 400 1000] [--seeds 3]

What class-incremental learners have to beat: two classifiers that are solved in closed form from
sums over the images of each class, so the order of the classes does not matter.

- A Gaussian for each class: its mean, its leading principal components and one variance for all
  other directions (probabilistic PCA, Tipping and Bishop 1999, doi:10.1111/1467-9868.00196).  The
  means and components are what ``strategy=pseudo_rehearsal`` keeps.
- Linear discriminant analysis on fixed random ReLU units: the mean of each class, and one
  covariance within the classes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.strategies.pseudo_rehearsal import ClassGaussians
from experiments.tasks.images import MNIST, Images, default_data_root

CLASSES = 10
RIDGE = 1e-2
"""What is added to the covariance within the classes, as a share of its mean variance."""


def gaussian_scores(train: Images, test: Images, rank: int) -> Tensor:
    """The log-densities of the test images by class, ``[n, classes]``."""
    gaussians = ClassGaussians.of(train.pixels, train.labels, rank)
    scores = []
    for label in range(CLASSES):
        mean, factor = gaussians.means[label].double(), gaussians.factors[label].double()
        deviations = train.pixels[train.labels == label].double() - mean
        directions = len(mean) - len(factor)
        rest = (deviations.square().sum() / len(deviations) - factor.square().sum()) / directions
        # The inverse of rest * I + factor' factor, by Woodbury's identity in orthogonal rows.
        variances = factor.square().sum(1)
        shifts = test.pixels.double() - mean
        along = (shifts @ factor.T).square() / variances
        distances = shifts.square().sum(1) / rest - (along / rest).sum(1)
        distances += (along / (variances + rest)).sum(1)
        logdet = (variances + rest).log().sum() + directions * rest.log()
        scores.append(-0.5 * (distances + logdet))
    return torch.stack(scores, 1)


def discriminant_scores(train: Images, test: Images, units: int, seed: int) -> Tensor:
    """The linear discriminants of the test images, ``[n, classes]``."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(train.pixels.shape[1], units, generator=generator) / 28
    bias = torch.randn(units, generator=generator) / 10
    second, sums = torch.zeros(units, units), torch.zeros(CLASSES, units)
    for pixels, labels in zip(train.pixels.split(5000), train.labels.split(5000), strict=True):
        features = (pixels @ weights + bias).relu()
        second += features.T @ features
        sums.index_add_(0, labels, features)
    counts = train.labels.bincount(minlength=CLASSES)
    means = sums / counts[:, None]
    within = ((second - sums.T @ means) / counts.sum()).double()
    within += RIDGE * within.diagonal().mean() * torch.eye(units)
    slopes = torch.linalg.solve(within, means.T.double())
    offsets = (counts / counts.sum()).log() - 0.5 * (means.T * slopes).sum(0)
    return (test.pixels @ weights + bias).relu().double() @ slopes + offsets


def accuracy(scores: Tensor, test: Images) -> float:
    """The mean over the classes of the accuracy, in percent."""
    right = (scores.argmax(1) == test.labels).double()
    return 100 * float(torch.stack([right[test.labels == k].mean() for k in range(CLASSES)]).mean())


def main() -> None:
    """Print a line for each classifier."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--units", type=int, nargs="*", default=[400, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    train, test = MNIST().load(options.data_root)
    print("| classifier | accuracy in % | MB of sums | seconds |")
    print("|---|---|---|---|")
    started = time.perf_counter()
    value = accuracy(gaussian_scores(train, test, 50), test)
    size = 4e-6 * CLASSES * (51 * train.pixels.shape[1] + 1)
    seconds = time.perf_counter() - started
    print(
        f"| a Gaussian for each class, 50 components | {value:.1f} | {size:.1f} | {seconds:.0f} |"
    )
    for units in options.units:
        started = time.perf_counter()
        values = [
            accuracy(discriminant_scores(train, test, units, seed), test)
            for seed in range(options.seeds)
        ]
        seconds = (time.perf_counter() - started) / options.seeds
        size = 4e-6 * units * (units + CLASSES)
        shown = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {units} random ReLU units | {shown} | {size:.1f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
