"""The smoothed categorical likelihood against its definition."""

import pytest
import torch
from torch import nn

from ewc import Categorical, Dense, MonteCarlo, SmoothedCategorical, fisher_information
from ewc.parameters import flatten

N, C = 7, 4


def outputs(scale=3.0):
    torch.manual_seed(0)
    return scale * torch.randn(N, C, dtype=torch.float64)


def smoothed(f, smoothing):
    return (1 - smoothing) * f.softmax(1) + smoothing / C


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_factor_is_that_of_the_smoothed_probabilities(smoothing, scale):
    f = outputs(scale)
    factor = SmoothedCategorical(smoothing).fisher_factor(f)
    assert factor.shape == (C - 1, N, C)
    p = smoothed(f, smoothing)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = torch.einsum("knc,knd->ncd", factor, factor)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_scores_under_the_smoothed_probabilities_have_this_covariance():
    f, likelihood = outputs(), SmoothedCategorical(0.2)
    p = smoothed(f, 0.2)
    mean, second = 0, 0
    for label in range(C):
        score = likelihood.score(f, torch.full((N,), label))
        mean = mean + p[:, label, None] * score
        second = second + p[:, label, None, None] * score[:, :, None] * score[:, None, :]
    factor = likelihood.fisher_factor(f)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(second, torch.einsum("knc,knd->ncd", factor, factor))


def test_samples_come_from_the_smoothed_probabilities():
    f, draws = outputs(), 40000
    generator = torch.Generator().manual_seed(1)
    drawn = SmoothedCategorical(0.3).sample(f, draws, generator)
    p = smoothed(f, 0.3)
    counts = torch.stack([torch.bincount(drawn[:, n], minlength=C) for n in range(N)])
    z = (counts - draws * p) / (draws * p * (1 - p)).sqrt()
    assert float(z.abs().max()) < 4


def test_without_smoothing_it_is_the_categorical_likelihood():
    f, y = outputs(), torch.randint(C, (N,))
    plain, same = Categorical(), SmoothedCategorical(0.0)
    torch.testing.assert_close(same.fisher_factor(f), plain.fisher_factor(f))
    torch.testing.assert_close(same.score(f, y), plain.score(f, y))
    # The densities are never smoothed.
    other = SmoothedCategorical(0.4)
    torch.testing.assert_close(other.log_prob(f, y), plain.log_prob(f, y), rtol=0, atol=0)
    torch.testing.assert_close(other.kl(f, 2 * f), plain.kl(f, 2 * f), rtol=0, atol=0)


def test_the_information_of_a_sure_network_does_not_vanish():
    torch.manual_seed(3)
    model = nn.Linear(5, C).double()
    with torch.no_grad():
        model.weight.mul_(100)
    data = [(torch.randn(50, 5, dtype=torch.float64), torch.randint(C, (50,)))]
    plain = fisher_information(model, data, structure=Dense())
    found = fisher_information(model, data, SmoothedCategorical(0.1), structure=Dense())
    assert float(found.trace()) > 5 * float(plain.trace())
    x = torch.cat([data[0][0], torch.ones(50, 1, dtype=torch.float64)], 1)
    p = smoothed(model(data[0][0]).detach(), 0.1)
    expected = ((1 - p.square().sum(1)) * x.square().sum(1)).mean()
    torch.testing.assert_close(found.trace(), expected)
    drawn = fisher_information(
        model, data, SmoothedCategorical(0.1), estimator=MonteCarlo(4000), structure=Dense()
    )
    error = flatten(drawn.diagonal()) / flatten(found.diagonal()) - 1
    assert float(error.abs().max()) < 0.05


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\], got"):
        SmoothedCategorical(smoothing)
