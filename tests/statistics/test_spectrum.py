"""Spectra by products, against dense ones and ridge regression."""

import pytest
import torch
from torch import nn

from ewc import (
    Dense,
    EigenvalueCorrected,
    Gaussian,
    Implicit,
    Kronecker,
    fisher_information,
)
from ewc.statistics import (
    effective_dimension,
    effective_dimension_estimate,
    largest_eigenvalue,
    leading_eigenvector,
    spectral_density,
)


def network():
    """More parameters than its 12 examples of 3 classes decide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    return model, [(x, y)]


@pytest.fixture(params=[Dense(), Implicit(), Kronecker(), EigenvalueCorrected()])
def fisher(request):
    model, data = network()
    return fisher_information(model, data, structure=request.param)


def test_the_density_is_that_of_the_dense_matrix(fisher):
    size = fisher.num_parameters
    values = torch.linalg.eigvalsh(fisher.to_dense())
    # From all steps of every vector, the points are the eigenvalues themselves.
    density = spectral_density(fisher, num_steps=size, num_samples=40)
    assert float(density.weights.sum()) == pytest.approx(1)
    assert bool((density.values.diff() >= 0).all())
    for point, weight in zip(density.values, density.weights, strict=True):
        if float(weight) > 1e-6:
            assert float((values - point).abs().min()) < 1e-7 * float(values[-1])
    # Shares and moments are means over 40 vectors: five standard errors of such.
    for order in (1, 2, 3):
        power = torch.linalg.matrix_power(fisher.to_dense(), order)
        spread = (2 * (power.square().sum() - power.diagonal().square().sum())).sqrt() / 40**0.5
        assert abs(density.moment(order) * size - float(power.trace())) <= 5 * float(spread) + 1e-9
    middle = float(values[-5:-3].mean())
    assert density.share_above(middle) == pytest.approx(4 / size, abs=0.03)
    assert density.share_above(float(values[-1]) * 1.01) == 0


def test_rank_is_bounded_by_the_examples():
    model, data = network()
    fisher = fisher_information(model, data, structure=Dense())
    # Twelve examples with three classes say something of 24 directions out of 111.
    density = spectral_density(fisher, num_steps=111, num_samples=60)
    threshold = 1e-9 * largest_eigenvalue(fisher)
    assert int((fisher.eigenvalues() > threshold).sum()) == 24
    assert density.share_above(threshold) * 111 == pytest.approx(24, abs=2)


def test_few_steps_keep_the_moments():
    model, data = network()
    fisher = fisher_information(model, data, structure=Dense())
    few = spectral_density(fisher, num_steps=5, num_samples=3)
    many = spectral_density(fisher, num_steps=111, num_samples=3)
    assert len(few.values) == 15
    for order in range(10):  # 2 k - 1 moments from k steps of the same vectors
        assert few.moment(order) == pytest.approx(many.moment(order), rel=1e-6)
    assert few.moment(10) != pytest.approx(many.moment(10), rel=1e-9)


def test_the_largest_eigenvalue(fisher):
    expected = float(torch.linalg.eigvalsh(fisher.to_dense())[-1])
    assert largest_eigenvalue(fisher, tolerance=1e-12) == pytest.approx(expected, rel=1e-9)
    rough = largest_eigenvalue(fisher, max_steps=2)
    assert 0.2 * expected < rough <= expected * (1 + 1e-12)


def test_the_leading_eigenvector(fisher):
    values, vectors = torch.linalg.eigh(fisher.to_dense())
    value, vector = leading_eigenvector(fisher)
    assert value == pytest.approx(float(values[-1]), rel=1e-9)
    assert {name: tensor.shape for name, tensor in vector.items()} == fisher.shapes
    flat = torch.cat([tensor.flatten() for tensor in vector.values()])
    assert float(flat.norm()) == pytest.approx(1, rel=1e-12)
    assert abs(float(flat @ vectors[:, -1])) == pytest.approx(1, abs=1e-9)
    one_step, _ = leading_eigenvector(fisher, max_steps=1)
    assert one_step < value


def test_the_effective_dimension_of_ridge_regression_is_its_degrees_of_freedom():
    torch.manual_seed(0)
    x = torch.randn(30, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    model = nn.Linear(8, 1, bias=False).double()
    data = [(x, torch.randn(30, 1, dtype=torch.float64))]
    noise, penalty = 0.5, 3.0
    # The hat matrix X (X'X + noise * delta I)^-1 X' of the fit with this prior.
    gram = x.T @ x + noise * penalty * torch.eye(8, dtype=torch.float64)
    expected = float((x @ torch.linalg.solve(gram, x.T)).trace())
    for structure in (Dense(), Kronecker()):
        fisher = fisher_information(model, data, Gaussian(noise), structure=structure)
        assert effective_dimension(fisher, penalty) == pytest.approx(expected, rel=1e-10)
    assert expected < 7.9


def test_the_estimate_lies_within_its_error(fisher):
    expected = effective_dimension(fisher, 0.05)
    values = torch.linalg.eigvalsh(fisher.to_dense()).clamp_min(0)
    assert expected == pytest.approx(float((values / (values + 0.05 / 12)).sum()), rel=1e-9)
    found = effective_dimension_estimate(fisher, 0.05, num_samples=40)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.1 * expected


def test_mistakes_are_named():
    model, data = network()
    fisher = fisher_information(model, data)
    for function, message in [
        (lambda: spectral_density(fisher, num_steps=0), "num_steps must .*, got 0"),
        (lambda: spectral_density(fisher, num_samples=0), "num_samples must .*, got 0"),
        (lambda: largest_eigenvalue(fisher, max_steps=0), "max_steps must .*, got 0"),
        (lambda: largest_eigenvalue(fisher, tolerance=-1), "tolerance must .*, got -1"),
        (lambda: effective_dimension(fisher, 0.0), "prior_precision must .*, got 0"),
        (lambda: effective_dimension_estimate(fisher, -1.0), "prior_precision must .*, got -1"),
        (
            lambda: effective_dimension_estimate(fisher, 1.0, num_samples=0),
            "num_samples must .*, got 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            function()
