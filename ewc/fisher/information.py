"""The Fisher information of a network over a data set."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ewc.checks import check_model, is_whole
from ewc.fisher.data_pass import DataPass
from ewc.fisher.distributed import anywhere, rank_in, summed_over
from ewc.fisher.estimators import Estimator, Exact, check_estimator
from ewc.fisher.faults import check_finite
from ewc.fisher.network_state import plain_operations, undisturbed
from ewc.fisher.structures.diagonal import Diagonal
from ewc.fisher.structures.structure import (
    Accumulator,
    Matrix,
    Structure,
    check_structure,
)
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.linalg.devices import default_memory, out_of_memory
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
    memory: int | None = ...,
    group: ProcessGroup | None = ...,
    full_precision: bool = ...,
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
    memory: int | None = ...,
    group: ProcessGroup | None = ...,
    full_precision: bool = ...,
) -> Matrix: ...


def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Estimator = Exact(),
    structure: Structure[Any] = Diagonal(),
    parameters: Sequence[Selection] | None = None,
    memory: int | None = None,
    group: ProcessGroup | None = None,
    full_precision: bool = False,
) -> FisherMatrix:
    r"""The Fisher information of ``model`` at its present parameters, a mean over examples.

    :math:`F = \frac1N \sum_n J_n^\top \big(\sum_k s_{kn} s_{kn}^\top\big) J_n` with the
    Jacobian :math:`J_n = \partial f(x_n) / \partial \theta` and the estimator's score
    vectors :math:`s_{kn}`.  The ``structure`` chooses the part of it to keep.

    The network is in evaluation mode during the pass.  Afterwards ``model.training``, every
    ``.grad``, every buffer and the global random number generators are as before, also after
    an error.

    Args:
        model: maps a batch ``x`` (or ``x`` and task labels) to outputs ``[n, ...]``, such as
            ``[n, c]``, tokens ``[n, t, c]`` or pixels ``[n, c, h, w]``.  It may return them as
            ``.logits``, under ``"logits"`` or first in a tuple.  The outputs of an example must
            depend on that example alone.
        data: batches ``(x, y)`` or ``(x, y, ..., task)``; fields in between are ignored.  The
            task labels are passed to a model whose ``forward`` takes another argument, as
            Avalanche's multi-head models do.  ``x`` may be a list of tensors, the model's
            arguments.  It may be a dict of tensors, which is passed by name if the model has
            arguments of these names, else as one argument.  ``x`` may also be
            :class:`~ewc.pullback.arguments.Arguments`, the arguments of the model's call.
            A batch may also be a dict.  Its ``"labels"`` are the targets, its ``"weights"``
            multiply the information of every example or position, and all else is passed by
            name.  :class:`Exact` and :class:`MonteCarlo` use the observed targets only to see
            which observations count (:meth:`Likelihood.weights`).  With them ``y`` may be any
            tensor with one row per example, unless classes have positions or weights.
            With ``Empirical(loss=...)`` batches are what the loss takes.
        likelihood: the meaning of the outputs.
        estimator: the estimator of the expectation over targets.
        structure: the part of the matrix to keep, such as ``Kronecker()`` or
            ``LowRank(rank=50)``.
        parameters: the parameters of the matrix: names, patterns such as ``"head.*"``,
            modules, or the parameters themselves.  ``None`` means all that require a gradient.
        memory: bytes that intermediate results (activations, gradients, products) may
            take.  The batches are cut accordingly, down to one example.  ``None`` means
            512 MiB on a CPU, and a quarter of the free memory on a CUDA device.
        group: processes of ``torch.distributed`` with one shard of the data each; all of
            them get the matrix of all data.  :class:`MonteCarlo` draws different targets in
            every process.
        full_precision: whether products and convolutions of single-precision numbers may not
            be rounded to TF32 (or to bfloat16 on a CPU) during the pass.  ``False`` leaves
            torch's settings as they are.  Autocast in the network's own ``forward`` remains.

    Returns:
        The matrix over the chosen parameters with ``requires_grad``, on their device.

    Warns:
        UserWarning: parameters are differentiated one example at a time, which is slow.  The
            warning names them, with the reason, once.  Or memory was exhausted, and the pass began
            again with smaller chunks; the warning names the ``memory`` to begin with.

    Raises:
        ValueError: ``data`` is empty, or an iterator where the structure needs two passes.  A
            batch, its outputs or a target that the estimator uses do not fit.  Examples depend
            on each other, as through a BatchNorm without running statistics.  No parameter is
            trainable or chosen, or the outputs depend on none of them.  The score vectors of
            one example do not fit into memory.
        FloatingPointError: the outputs, their scores or the sums are not finite.
        MemoryError: the matrix, or the derivatives of one example, do not fit into memory.
        TypeError: the model, the likelihood, the estimator or the structure is of another type.
    """
    check_model(model)
    check_likelihood(likelihood)
    check_estimator(estimator)
    check_structure(structure)
    if memory is not None and (not is_whole(memory) or memory < 1):
        raise ValueError(
            f"memory must be a whole number of bytes above 0, or None, got {memory!r}."
        )
    chosen = selected_parameters(model, parameters)
    with (
        unwrapped(model) as bare,
        undisturbed(bare),
        plain_operations(bare, full_precision=full_precision),
    ):
        with _fits_into_memory(structure):
            total: Accumulator[Any] = structure.accumulator(chosen)
        if memory is None:
            memory = default_memory(next(iter(chosen.values())).device)
        if total.passes > 1 and iter(data) is data:
            raise ValueError(
                f"data is a {type(data).__name__}, which can be read once: this structure needs "
                f"{total.passes} passes, so data must be a list of batches or a DataLoader."
            )
        data_pass = DataPass(bare, chosen, likelihood, estimator, memory)
        while True:
            with torch.enable_grad():
                num_examples = data_pass.summed_up(data, total, rank_in(group))
            if group is not None:
                num_examples = summed_over(total, num_examples, group)
            if num_examples == 0:
                raise ValueError("data is empty: it must have at least one example.")
            if not anywhere(data_pass.outputs_use_parameters, group):
                what = f"outputs of {type(model).__name__}", "its forward"
                if estimator.loss is not None:
                    what = "values of the loss", "the loss"
                raise ValueError(
                    f"The {what[0]} depend on none of the parameters "
                    f"({', '.join(list(chosen)[:3])}{', ...' if len(chosen) > 3 else ''}): "
                    f"{what[1]} must use a chosen parameter, without torch.no_grad(), "
                    "inference_mode(), item() or detach()."
                )
            with torch.no_grad(), _fits_into_memory(structure):
                check_finite(total.sums())
                mean = total.mean(num_examples)
            if isinstance(mean, FisherMatrix):
                break
            total = mean
    if data_pass.is_reduced:
        warnings.warn(
            "Memory was exhausted in the pass for the Fisher information, so it began again with "
            f"smaller chunks: memory={data_pass.memory} begins with these.",
            stacklevel=2,
        )
    return mean


@contextmanager
def _fits_into_memory(structure: Structure[Any]) -> Iterator[None]:
    """Say which structure is too large where memory is exhausted.

    Raises:
        MemoryError: memory is exhausted.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise MemoryError(
            f"{structure} of these parameters does not fit into memory ({reason}): take a smaller "
            "structure, such as Diagonal(), or fewer parameters."
        ) from None
