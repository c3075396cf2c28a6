"""The classifiers in closed form against densities and discriminants from their definition."""

from pathlib import Path

import closed_form
import torch
from torch.distributions import MultivariateNormal

from experiments.tasks.images import Digits

RANK = 5


def test_gaussian_scores_are_log_densities():
    train, test = Digits().load(Path())
    scores = closed_form.gaussian_scores(train, test, RANK)
    for label in range(10):
        pixels = train.pixels[train.labels == label].double()
        values, vectors = torch.linalg.eigh(torch.cov(pixels.T, correction=0))
        rest = values[:-RANK].mean()  # the maximum-likelihood variance of the other directions
        kept = vectors[:, -RANK:] * values[-RANK:] @ vectors[:, -RANK:].T
        density = MultivariateNormal(pixels.mean(0), kept + rest * torch.eye(64))
        constant = 32 * torch.log(torch.tensor(2 * torch.pi))
        expected = density.log_prob(test.pixels.double()) + constant
        torch.testing.assert_close(scores[:, label], expected, rtol=1e-3, atol=1e-2)


def test_discriminant_scores_are_log_posteriors_up_to_a_constant():
    train, test = Digits().load(Path())
    scores = closed_form.discriminant_scores(train, test, 20, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights, bias = torch.randn(64, 20, generator=generator), torch.randn(20, generator=generator)
    units, shown = (
        (images.pixels @ weights / 28 + bias / 10).relu().double() for images in (train, test)
    )
    means = torch.stack([units[train.labels == k].mean(0) for k in range(10)])
    deviations = units - means[train.labels]
    within = deviations.T @ deviations / len(units)
    within = within + closed_form.RIDGE * within.trace() / 20 * torch.eye(20)
    posteriors = []
    for label in range(10):
        share = (train.labels == label).double().mean().log()
        posteriors.append(MultivariateNormal(means[label], within).log_prob(shown) + share)
    expected = torch.stack(posteriors, 1).log_softmax(1)
    torch.testing.assert_close(scores.log_softmax(1), expected, rtol=1e-2, atol=1e-2)
