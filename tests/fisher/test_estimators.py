"""Monte Carlo: unbiased, with the error of its size, and the same for any batches."""

import pytest
import torch
from conftest import MODELS, batches, oracle, targets_for

from ewc import Categorical, Empirical, Exact, Gaussian, MonteCarlo, fisher_information
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
            for seed in range(100)
        ]
    )
    error = estimates.std(0) / len(estimates) ** 0.5
    z = (estimates.mean(0) - expected)[error > 0] / error[error > 0]
    assert bool((expected[error == 0] < 1e-12).all())
    # Each z is about standard normal; over some hundred dependent ones the largest stays
    # under 5, and their mean square is about 1.
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.square().mean()) < 3


@pytest.mark.slow
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


class ObservedProbability(Categorical):
    """As in docs/fisher.md."""

    def score(self, outputs, targets):
        weights = self.log_prob(outputs, targets).exp().sqrt()
        return weights[:, None] * super().score(outputs, targets)


def test_a_likelihood_of_three_lines_gives_the_matrix_of_mammoth(network):
    """The loop of EwcOn.end_task: squared gradients of log p(y), times p(y)."""
    model, x, y = network
    model.eval()
    fish = 0.0
    for x_n, y_n in zip(x, y, strict=True):
        model.zero_grad()
        log_probability = model(x_n[None]).log_softmax(1)[0, y_n]
        log_probability.backward()
        gradient = flatten({n: p.grad for n, p in model.named_parameters()})
        fish = fish + log_probability.detach().exp() * gradient.square()
    found = fisher_information(
        model, batches(x, y, 3), ObservedProbability(), estimator=Empirical()
    ).diagonal()
    torch.testing.assert_close(flatten(found), fish / len(x))
    plain = fisher_information(model, [(x, y)], estimator=Empirical()).trace()
    assert float(fish.sum()) / len(x) < 0.9 * plain.item()
