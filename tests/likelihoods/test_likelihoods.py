"""Likelihoods against autograd and against torch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal, kl_divergence

from ewc import Categorical, Gaussian
from ewc.likelihoods import GaussianWithVariance

LIKELIHOODS = [
    Categorical(),
    Gaussian(0.4),
    Gaussian((0.4, 1.0, 2.5, 0.1)),
    GaussianWithVariance(),
]
N, C = 6, 4


def outputs():
    return 2 * torch.randn(N, C, dtype=torch.float64)


def targets_for(likelihood):
    if isinstance(likelihood, Categorical):
        return torch.randint(C, (N,))
    targets = torch.randn(N, C, dtype=torch.float64)
    return targets[:, : C // 2] if isinstance(likelihood, GaussianWithVariance) else targets


def distribution(likelihood, f):
    if isinstance(likelihood, Categorical):
        return TorchCategorical(logits=f)
    if isinstance(likelihood, GaussianWithVariance):
        return Independent(Normal(f[:, : C // 2], (f[:, C // 2 :] / 2).exp()), 1)
    return Independent(Normal(f, torch.tensor(likelihood.variance).double().sqrt()), 1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_log_prob_and_kl_are_those_of_torch(likelihood):
    f, g, y = outputs(), outputs(), targets_for(likelihood)
    expected = distribution(likelihood, f).log_prob(y)
    torch.testing.assert_close(likelihood.log_prob(f, y), expected)
    expected = kl_divergence(distribution(likelihood, f), distribution(likelihood, g))
    torch.testing.assert_close(likelihood.kl(f, g), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_score_is_the_gradient_of_log_prob(likelihood):
    f, y = outputs().requires_grad_(), targets_for(likelihood)
    (expected,) = torch.autograd.grad(likelihood.log_prob(f, y).sum(), f)
    torch.testing.assert_close(likelihood.score(f.detach(), y), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_factor_gives_the_curvature_of_the_kl(likelihood):
    """The Fisher information of the outputs is the Hessian of the KL at no distance."""
    f = outputs()
    factor = likelihood.fisher_factor(f)
    for n in range(N):
        row = f[n : n + 1]
        expected = torch.autograd.functional.hessian(
            lambda other, row=row: likelihood.kl(row, other[None]).sum(), f[n]
        )
        found = factor[:, n].T @ factor[:, n]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_categorical_factor_has_no_vector_too_many():
    assert Categorical().fisher_factor(outputs()).shape == (C - 1, N, C)
    assert Categorical().fisher_factor(torch.zeros(N, 1)).shape == (0, N, 1)
    assert Gaussian().fisher_factor(outputs()).shape == (C, N, C)


@pytest.mark.parametrize(
    "logits",
    [
        [200.0, 0.0, -200.0, 0.0],
        [-200.0, 0.0, 0.0, 200.0],
        [0.0, 0.0, -1000.0, -1000.0],
        [-math.inf, 0.0, 1.0, -math.inf],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_categorical_factor_survives_saturation(logits, dtype):
    f = torch.tensor([logits], dtype=dtype)
    factor = Categorical().fisher_factor(f)[:, 0]
    p = f.softmax(1)[0]
    torch.testing.assert_close(factor.T @ factor, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_samples_follow_the_distribution(likelihood):
    f, count = outputs(), 20000
    draws = likelihood.sample(f, count, torch.Generator().manual_seed(0))
    scores = torch.stack([likelihood.score(f, y) for y in draws])
    # The score has mean zero, and the Fisher information as covariance.
    z = scores.mean(0) / (scores.std(0) / count**0.5)
    assert float(z.abs().max()) < 5
    products = scores[..., :, None] * scores[..., None, :]
    factor = likelihood.fisher_factor(f)
    expected = torch.einsum("kni,knj->nij", factor, factor)
    error = products.std(0) / count**0.5
    z = (products.mean(0) - expected) / error
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_samples_come_example_by_example(likelihood):
    f = outputs()
    whole = likelihood.sample(f, 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [likelihood.sample(part, 3, generator) for part in f.split(4)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_impossible_variances_are_refused(variance):
    with pytest.raises(ValueError, match="variance must be a finite number above 0, got"):
        Gaussian(variance)


def test_impossible_targets_are_refused():
    f = outputs()
    with pytest.raises(ValueError, match=r"the outputs\' shape \[6, 4\], got \[6, 2\]"):
        Gaussian().check_targets(f, f[:, :2])
    with pytest.raises(ValueError, match="Targets of the Gaussian likelihood must be finite"):
        Gaussian().check_targets(f, f * math.nan)
    with pytest.raises(ValueError, match="Label 4 is outside the model's 4 outputs"):
        Categorical().check_targets(f, torch.full((N,), 4))
