r"""The pass over the data that makes a Fisher matrix."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ewc.checks import is_whole
from ewc.fisher.data_pass import DataPass
from ewc.fisher.distributed import anywhere, rank_in, summed_over
from ewc.fisher.estimators import Estimator, Exact, check_estimator
from ewc.fisher.evaluation import plain_operations, undisturbed
from ewc.fisher.structures.diagonal import Diagonal
from ewc.fisher.structures.structure import (
    Accumulator,
    Matrix,
    Structure,
    check_structure,
)
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.linalg.tiles import DEFAULT_MEMORY
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Selection, selected_parameters
from ewc.wrappers import unwrapped


@overload
def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = ...,
    *,
    estimator: Estimator = ...,
    structure: Diagonal = ...,
    parameters: Sequence[Selection] | None = ...,
    memory: int = ...,
    group: ProcessGroup | None = ...,
) -> DiagonalFisher: ...


@overload
def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = ...,
    *,
    estimator: Estimator = ...,
    structure: Structure[Matrix],
    parameters: Sequence[Selection] | None = ...,
    memory: int = ...,
    group: ProcessGroup | None = ...,
) -> Matrix: ...


def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Estimator = Exact(),
    structure: Structure[Any] = Diagonal(),
    parameters: Sequence[Selection] | None = None,
    memory: int = DEFAULT_MEMORY,
    group: ProcessGroup | None = None,
) -> FisherMatrix:
    r"""The Fisher information of ``model`` at its present parameters, a mean over examples.

    :math:`F = \frac1N \sum_n J_n^\top \big(\sum_k s_{kn} s_{kn}^\top\big) J_n` with the
    Jacobian :math:`J_n = \partial f(x_n) / \partial \theta` and the estimator's score
    vectors :math:`s_{kn}`; of it, what ``structure`` keeps.

    The network is in evaluation mode meanwhile.  ``model.training``, every ``.grad``,
    every buffer and the global random number generators are afterwards as they were, also
    when an error ends the pass.

    Args:
        model: maps a batch ``x`` (or ``x`` and task labels) to outputs ``[n, c]``, each
            example's outputs depending on that example alone.
        data: batches ``(x, y)`` or ``(x, y, task)``.  The task labels go to a model whose
            ``forward`` takes a second argument, as Avalanche's multi-head models do.
            ``x`` may be a dict of tensors: it goes by name to a model that has arguments
            of these names, else as one argument.  It may also be
            :class:`~ewc.pullback.arguments.Arguments`, which the model is called with as
            they are.  :class:`Exact` and :class:`MonteCarlo` take targets of their own: there
            ``y`` may be any tensor with a row an example.
        likelihood: what the outputs mean.
        estimator: how the expectation over targets is taken.
        structure: what of the matrix to keep, such as ``Kronecker()`` or ``LowRank(rank=50)``.
        parameters: restricts the matrix to some parameters: their names, patterns such as
            ``"head.*"``, modules, or the parameters themselves; all that require a
            gradient if ``None``.
        memory: bytes that intermediate results (activations, gradients, products) may
            take, as long as one example fits; the batches are cut accordingly.
        group: processes of ``torch.distributed`` that hold a shard of the data each; all
            of them get the matrix of the whole data.  A :class:`MonteCarlo` draws other
            targets in every process.

    Returns:
        The matrix over the chosen parameters with ``requires_grad``, on their device.

    Raises:
        ValueError: the data are empty or no batches, a target that the estimator uses does
            not fit the outputs, the outputs are not ``[n, c]``, a BatchNorm has no running
            statistics (its examples are not independent), or no parameter is trainable or
            chosen, or none of them has a part in the outputs; the score vectors of one example
            do not fit into memory; the data are an iterator where the structure needs two passes.
        FloatingPointError: the outputs, or the scores they give, are not finite.
        TypeError: the likelihood, the estimator or the structure is none.
    """
    check_likelihood(likelihood)
    check_estimator(estimator)
    check_structure(structure)
    if not is_whole(memory) or memory < 1:
        raise ValueError(f"memory must be a whole number of bytes above 0, got {memory!r}.")
    chosen = selected_parameters(model, parameters)
    with unwrapped(model) as bare, undisturbed(bare), plain_operations(bare):
        total: Accumulator[Any] = structure.accumulator(chosen)
        if total.passes > 1 and iter(data) is data:
            raise ValueError(
                f"The data are a {type(data).__name__}, which can be read once: this structure "
                f"needs {total.passes} passes, so give a list of batches or a DataLoader."
            )
        while True:
            with torch.enable_grad():
                network = DataPass(bare, chosen, likelihood, estimator, memory)
                num_examples = network.summed_up(data, total, rank_in(group))
            if group is not None:
                num_examples = summed_over(total, num_examples, group)
            if num_examples == 0:
                raise ValueError("The data are empty: the Fisher information needs an example.")
            if not anywhere(network.depends, group):
                raise ValueError(
                    f"The outputs of {type(model).__name__} depend on none of the parameters "
                    f"({', '.join(list(chosen)[:3])}{', ...' if len(chosen) > 3 else ''}): its "
                    "forward must not run under torch.no_grad() or inference_mode() nor detach "
                    "its results, and a chosen parameter must take part in them."
                )
            with torch.no_grad():
                check_finite(total.sums())
                mean = total.mean(num_examples)
            if isinstance(mean, FisherMatrix):
                return mean
            total = mean


def check_finite(sums: dict[str, Tensor]) -> None:
    """Check that every sum is a finite number.

    Raises:
        FloatingPointError: one is not: a derivative of the network does not exist there.
    """
    for name, total in sums.items():
        # The extremes are NaN where an entry is, and take no memory of the sum's size.
        if total.numel() and not bool(torch.stack(torch.aminmax(total)).isfinite().all()):
            raise FloatingPointError(
                f"The Fisher information of {name} is not finite: a derivative of the network "
                "is infinite or undefined for some example, or too large for its type."
            )
