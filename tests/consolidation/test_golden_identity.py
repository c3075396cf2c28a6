"""Linear-Gaussian regression, where the Laplace approximation is exact: EWC is joint training."""

import pytest
import torch
from torch import nn

from ewc import Dense, EWCPenalty, Gaussian, Online, Separate, fisher_information

VARIANCE = 0.3


def regression_task(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(size, 2, generator=generator, dtype=torch.float64)


def minimise(model, loss):
    """One Newton step: exact, for the loss is quadratic in the parameters."""
    parameters = list(model.parameters())
    shapes = [p.shape for p in parameters]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])

    def function(vector):
        pieces = vector.split([s.numel() for s in shapes])
        values = {
            n: v.reshape(s)
            for (n, _), v, s in zip(model.named_parameters(), pieces, shapes, strict=True)
        }
        return loss(values)

    gradient = torch.autograd.functional.jacobian(function, flat)
    hessian = torch.autograd.functional.hessian(function, flat)
    solution = flat - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
    torch.nn.utils.vector_to_parameters(solution, parameters)


def train(model, penalty, x, y):
    """Minimise the mean loss of a task plus the penalty, as a strategy does."""
    penalty.num_examples = len(x)

    class Copy(nn.Module):
        """A stand-in whose parameters are the tensors that the loss is differentiated by."""

        def __init__(self, values):
            super().__init__()
            self._parameters.update(values)

    def loss(values):
        outputs = torch.func.functional_call(model, values, (x,))
        fit = (y - outputs).square().sum() / (2 * VARIANCE) / len(x)
        return fit + penalty(Copy(values))

    minimise(model, loss)
    fisher = fisher_information(model, [(x, y)], Gaussian(VARIANCE), structure=Dense())
    penalty.consolidate(fisher, model)


def joint(tasks):
    model = nn.Linear(3, 2).double()
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    minimise(
        model,
        lambda values: (y - torch.func.functional_call(model, values, (x,))).square().mean(),
    )
    return torch.nn.utils.parameters_to_vector(model.parameters())


def sequential(tasks, consolidation):
    model, penalty = nn.Linear(3, 2).double(), EWCPenalty(1.0, consolidation)
    for x, y in tasks:
        train(model, penalty, x, y)
    return torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("consolidation", [Separate(), Online()], ids=repr)
def test_strength_one_is_joint_training_on_two_linear_tasks(consolidation):
    tasks = [regression_task(11, 0), regression_task(29, 1)]
    found = sequential(tasks, consolidation)
    torch.testing.assert_close(found, joint(tasks), rtol=0, atol=1e-12)


def test_online_is_joint_training_on_three_linear_tasks_and_separate_is_not():
    tasks = [regression_task(11, 0), regression_task(29, 1), regression_task(17, 2)]
    expected = joint(tasks)
    torch.testing.assert_close(sequential(tasks, Online()), expected, rtol=0, atol=1e-12)
    # The anchor of task 2 already knows task 1: the separate sum counts task 1 twice.
    assert float((sequential(tasks, Separate()) - expected).detach().abs().max()) > 1e-3
