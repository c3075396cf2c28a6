"""Monte Carlo Fisher matrices with a standard error."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ewc.checks import check_count
from ewc.fisher.estimators import MonteCarlo
from ewc.fisher.information import fisher_information
from ewc.fisher.structures.diagonal import Diagonal
from ewc.fisher.structures.structure import Structure
from ewc.likelihoods import Categorical, Likelihood
from ewc.linalg.krylov import Estimate
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Selection


def sampled_fisher(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    num_samples: int = 10,
    seed: int = 0,
    structure: Structure[Any] = Diagonal(),
    parameters: Sequence[Selection] | None = None,
    memory: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[FisherMatrix, Estimate]:
    r"""A Monte Carlo Fisher matrix, and its trace with a standard error.

    The mean of ``num_samples`` independent one-sample matrices :math:`F^{(s)}`.  The
    standard error of its trace is :math:`\mathrm{std}_s(\mathrm{tr} F^{(s)}) / \sqrt S`.  It
    measures the randomness of the draws for these data.  Meant for many outputs, where the
    exact matrix needs one backward pass per output.

    Args:
        model: see :func:`~ewc.fisher.information.fisher_information`.
        data: batches, read ``num_samples`` times.
        likelihood: the meaning of the outputs.
        num_samples: ``S``, two or more.
        seed: the seed of the draws; different seeds give independent draws.
        structure: the part of the matrix to keep.
        parameters: see :func:`~ewc.fisher.information.fisher_information`.
        memory: see :func:`~ewc.fisher.information.fisher_information`.
        group: see :func:`~ewc.fisher.information.fisher_information`.

    Returns:
        The matrix, and the estimate of its trace in nats per squared unit.

    Raises:
        ValueError: ``num_samples`` is below 2, or ``data`` can be read only once.
    """
    check_count(num_samples, "num_samples", least=2)
    if iter(data) is data:
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once: every sample needs one "
            "pass, so data must be a list of batches or a DataLoader."
        )
    total: FisherMatrix | None = None
    traces = []
    generator = torch.Generator().manual_seed(seed)
    for draws in torch.randint(2**40, (num_samples,), generator=generator).tolist():
        fisher = fisher_information(
            model,
            data,
            likelihood,
            estimator=MonteCarlo(1, draws),
            structure=structure,
            parameters=parameters,
            memory=memory,
            group=group,
        )
        traces.append(float(fisher.trace()))
        total = fisher if total is None else total + fisher
    assert total is not None
    mean = total * (1 / num_samples)
    mean.num_examples //= num_samples
    return mean, Estimate.of(traces)
