"""The forecast of forgetting, against the definition and against what happens."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ewc import Dense, Diagonal, EWCPenalty, Kronecker, Online, Separate, fisher_information
from ewc.matrices import nearest_kronecker


def task(seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def moved(model, size, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=size)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
@pytest.mark.parametrize("consolidation", [Separate(), Online()])
def test_the_forecast_is_the_mean_of_the_quadratics(structure, consolidation):
    """Two tasks of unequal size, with a strength that must not matter."""
    model, penalty = network(), EWCPenalty(17.0, consolidation)
    assert penalty.predicted_rise(model) == 0.0
    anchors, matrices = [], []
    for seed, n in ((1, 30), (2, 50)):
        moved(model, 0.3, seed)
        fisher = fisher_information(model, [task(seed, n)], structure=structure)
        penalty.consolidate(fisher, model)
        anchors.append(flat(model))
        matrices.append(fisher.precision)
    if isinstance(consolidation, Online):
        total = matrices[0] + matrices[1]
        if structure == Kronecker():
            total, _ = nearest_kronecker(total)
        anchors, matrices = anchors[1:], [total]
    moved(model, 0.1, 3)
    here = flat(model)
    expected = sum(
        0.5 * (here - a) @ m.to_dense() @ (here - a) for a, m in zip(anchors, matrices, strict=True)
    )
    assert penalty.predicted_rise(model) == pytest.approx(float(expected) / 80, rel=1e-9)
    assert penalty.remembered_examples == 80


def test_the_forecast_is_what_happens_to_small_moves():
    """At a minimum of the old loss, where its Hessian is the Fisher information: to 3rd order."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, _ = task(1, 200)
    y = torch.distributions.Categorical(logits=model(x).detach()).probs  # the model is right

    def loss():
        return cross_entropy(model(x), y)

    penalty = EWCPenalty(1.0)
    labels = torch.zeros(200, dtype=torch.int64)
    penalty.consolidate(fisher_information(model, [(x, labels)], structure=Dense()), model)
    start, errors = float(loss().detach()), []
    origin = flat(model)
    direction = torch.randn(len(origin), dtype=torch.float64)
    for size in (0.02, 0.01):
        nn.utils.vector_to_parameters(origin + size * direction, model.parameters())
        rise = float(loss().detach()) - start
        errors.append(abs(penalty.predicted_rise(model) - rise) / rise)
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)
