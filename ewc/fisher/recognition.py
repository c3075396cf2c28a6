"""A list of what the Fisher pass recognises in a network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ewc.fisher.data_pass import DataPass
from ewc.fisher.estimators import MonteCarlo
from ewc.fisher.network_state import plain_operations, undisturbed
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.linalg.tiles import DEFAULT_MEMORY
from ewc.parameters import Selection, selected_parameters
from ewc.pullback.recognition import Recognised
from ewc.wrappers import unwrapped


def recognised(
    model: nn.Module,
    batch: Any,
    likelihood: Likelihood = Categorical(),
    *,
    parameters: Sequence[Selection] | None = None,
) -> Recognised:
    """The uses of a network's parameters, as the Fisher pass recognises them.

    A use has a kind, such as a matrix product or a convolution.  Parameters without a rule for
    one of their uses are differentiated one example at a time, which is slow.  They have the
    reason.  ``print`` shows a table with one line per use.

    Args:
        model: see :func:`~ewc.fisher.information.fisher_information`.
        batch: one batch of the data, with two or more examples.  With one example the order of
            the rows is not tested.
        likelihood: the meaning of the outputs.
        parameters: see :func:`~ewc.fisher.information.fisher_information`.

    Returns:
        The uses, in the order of the graph, and the slow ones last.

    Raises:
        ValueError: see :func:`~ewc.fisher.information.fisher_information`.
        TypeError: the likelihood or the batch is of another type.
    """
    check_likelihood(likelihood)
    of_batches = isinstance(batch, list) and batch and isinstance(batch[0], list | tuple | dict)
    if isinstance(batch, Tensor) or of_batches:
        raise TypeError(
            "batch must be one batch of the data, such as (x, y) or a dict, got a "
            f"{'list of batches' if of_batches else type(batch).__name__}."
        )
    chosen = selected_parameters(model, parameters)
    estimator = MonteCarlo(1)
    with unwrapped(model) as bare, undisturbed(bare), plain_operations(bare), torch.enable_grad():
        data_pass = DataPass(bare, chosen, likelihood, estimator, DEFAULT_MEMORY)
        examples = data_pass.caller.examples(batch, 0)
        generator = torch.Generator().manual_seed(estimator.seed)
        for chunk in data_pass.chunks(examples, generator, 0):
            with torch.no_grad():
                return Recognised(chunk.recognised())
    return Recognised()
