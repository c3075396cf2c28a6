"""Gradients of several score vectors with respect to results inside a network."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ewc.linalg.devices import out_of_memory


def all_together(
    outputs: Tensor, edges: Sequence[GradientEdge], scores: Tensor
) -> list[Tensor] | None:
    """Gradients of all score vectors in one pass, ``[k, ...]`` each; the graph is kept.

    Returns:
        The gradients.  ``None`` if an operation cannot be vectorised, or only by a loop that
        is slower than one pass per vector.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradients = torch.autograd.grad(
                outputs, edges, scores, retain_graph=True, is_grads_batched=True
            )
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return None
    if any("performance drop" in str(warning.message) for warning in caught):
        return None
    return list(gradients)


def one_by_one(
    outputs: Tensor, edges: Sequence[GradientEdge], scores: Tensor, *, retain_graph: bool
) -> list[Tensor]:
    """Gradients of all score vectors, ``[k, ...]`` each, by one backward pass per vector."""
    rows = [
        torch.autograd.grad(
            outputs, edges, score, retain_graph=retain_graph or index + 1 < scores.shape[0]
        )
        for index, score in enumerate(scores)
    ]
    if len(rows) == 1:
        return [gradient[None] for gradient in rows[0]]
    # Examples first in memory, the order in which products over vectors read them.
    return [torch.stack(column, 1).transpose(0, 1) for column in zip(*rows, strict=True)]
