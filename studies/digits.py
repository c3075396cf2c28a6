"""The handwritten digits as the studies use them, and networks fitted to them."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ewc.likelihoods import Likelihood
from ewc.parameters import flatten
from experiments.tasks.images import Digits


def digits(side: int = 8) -> tuple[Tensor, Tensor]:
    """The 1,437 training digits in double precision: pixels ``[n, side^2]`` and labels.

    Args:
        side: of the images: 8, or 4 or 2 by means over squares of pixels.
    """
    images, _ = Digits().load(Path())
    square = images.pixels.double().view(-1, 1, 8, 8)
    return avg_pool2d(square, 8 // side).flatten(1), images.labels


def principal_components(pixels: Tensor, count: int) -> Tensor:
    """The leading principal components of images, each of unit variance, ``[n, count]``."""
    centred = pixels - pixels.mean(0)
    left = torch.linalg.svd(centred, full_matrices=False).U[:, :count]
    # The sign of a singular vector is arbitrary: the largest entry is positive here.
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    components: Tensor = left * sign * len(pixels) ** 0.5
    return components


def tanh_network(*widths: int, seed: int = 0) -> nn.Sequential:
    """A fully connected network in double precision."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    *,
    steps: int,
    prior_precision: float = 0.0,
) -> None:
    """Maximise the likelihood, or the posterior with a normal prior, by Adam on all the data."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -likelihood.log_prob(model(x), y).mean()
        if prior_precision:
            squares = flatten(dict(model.named_parameters())).square().sum()
            loss = loss + prior_precision / (2 * len(x)) * squares
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
