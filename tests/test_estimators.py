"""Monte Carlo: unbiased, with the error of its size, and the same for any batches."""

import pytest
import torch
from conftest import MODELS, batches, oracle, targets_for

from ewc import Categorical, Exact, Gaussian, MonteCarlo, fisher_information
from ewc.parameters import flatten


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.7)], ids=repr)
def test_monte_carlo_is_unbiased(network, likelihood):
    model, x, y = network
    y = targets_for(model, x, y, likelihood)
    expected = oracle(model, x, y, likelihood, Exact()).diagonal()
    estimates = torch.stack(
        [
            flatten(
                fisher_information(
                    model, [(x, y)], likelihood, estimator=MonteCarlo(20, seed=seed)
                ).diagonal()
            )
            for seed in range(200)
        ]
    )
    error = estimates.std(0) / len(estimates) ** 0.5
    z = (estimates.mean(0) - expected)[error > 0] / error[error > 0]
    assert bool((expected[error == 0] < 1e-12).all())
    # Each z is about standard normal; over some hundred dependent ones the largest stays
    # under 5, and their mean square is about 1.
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.square().mean()) < 3


def test_monte_carlo_error_falls_as_the_square_root():
    model = MODELS["mlp"][0]().double()
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.zeros(10, dtype=torch.long)
    exact = fisher_information(model, [(x, y)]).trace()
    counts = torch.tensor([1, 4, 16, 64, 256])
    errors = torch.stack(
        [
            torch.stack(
                [
                    fisher_information(
                        model, [(x, y)], estimator=MonteCarlo(int(count), seed=seed)
                    ).trace()
                    - exact
                    for seed in range(100)
                ]
            )
            .square()
            .mean()
            .sqrt()
            for count in counts
        ]
    )
    log_counts = counts.double().log()
    centred = log_counts - log_counts.mean()
    slope = (centred * errors.log()).sum() / centred.square().sum()
    # 100 squared errors give each root mean square to about 7 %, the slope to about 0.02.
    assert abs(float(slope) + 0.5) < 0.06


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.7)], ids=repr)
def test_monte_carlo_does_not_depend_on_the_batches(likelihood):
    model = MODELS["mlp"][0]().double()
    x = torch.randn(40, 6, dtype=torch.float64)
    y = torch.zeros(40, dtype=torch.long)
    y = targets_for(model, x, y, likelihood)
    one, other, third = (
        fisher_information(model, batches(x, y, size), likelihood, estimator=MonteCarlo(3, 5))
        for size in (1, 17, 40)
    )
    torch.testing.assert_close(one.diagonal(), other.diagonal())
    torch.testing.assert_close(one.diagonal(), third.diagonal())
