r"""Gradients of single examples for parameters that no layer rule covers.

Slow and general: the whole network is differentiated for every example on its own, so
any parameter used in any way gets its right answer.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ewc.fisher.layers import Pullback
from ewc.parameters import Parameters

_log = logging.getLogger(__name__)


@contextmanager
def quiet_about_speed() -> Iterator[None]:
    """Without torch's note that an operation is vectorised by a loop: it is still right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class PerExamplePullback(Pullback):
    """The vectors of the parameters ``names``, from the network one example at a time.

    Args:
        model: the network.
        names: the parameters.
        inputs: the arguments of ``model``, each ``[n, ...]``.
        scores: the score vectors, ``[k, n, c]``.
    """

    def __init__(
        self, model: nn.Module, names: list[str], inputs: tuple[Tensor, ...], scores: Tensor
    ) -> None:
        self.model = model
        self.names = names
        self.inputs = inputs
        self.scores = scores
        self.num_vectors, self.num_examples = scores.shape[:2]

    def bytes_per_example(self) -> int:
        """The vectors, and as much again for what the network computes on the way."""
        size = sum(self.model.get_parameter(name).numel() for name in self.names)
        size += sum(argument[0].numel() for argument in self.inputs)
        return 2 * self.num_vectors * size * self.scores.element_size()

    def per_example(self, examples: slice) -> Parameters:
        """All examples at once where the network allows it, else one after the other."""
        # Copies: a network may write into its input.
        inputs = tuple(argument[examples].clone() for argument in self.inputs)
        scores = self.scores[:, examples]
        try:
            with quiet_about_speed():
                return self._vectorised(tuple(a.clone() for a in inputs), scores)
        except RuntimeError as error:
            # Operations that vmap cannot take: branches on data, in-place writes, custom
            # autograd functions.  A fault of the network itself shows again below.
            _log.info("examples one at a time for %s: %s", self.names, error)
            return self._one_by_one(inputs, scores)

    def _vectorised(self, inputs: tuple[Tensor, ...], scores: Tensor) -> Parameters:
        parameters = {name: self.model.get_parameter(name).detach() for name in self.names}

        def vectors(scores_n: Tensor, *inputs_n: Tensor) -> Parameters:
            batch = tuple(argument[None] for argument in inputs_n)
            _, pull, *_ = vjp(lambda p: functional_call(self.model, p, batch)[0], parameters)
            (gradients,) = vmap(pull)(scores_n)
            result: Parameters = gradients
            return result

        out_dims: Any = dict.fromkeys(self.names, 1)
        in_dims = (1,) + (0,) * len(inputs)
        result: Parameters = vmap(vectors, in_dims=in_dims, out_dims=out_dims)(scores, *inputs)
        return result

    @torch.enable_grad()
    def _one_by_one(self, inputs: tuple[Tensor, ...], scores: Tensor) -> Parameters:
        parameters = [self.model.get_parameter(name) for name in self.names]
        k, n = scores.shape[:2]
        result = [parameter.new_zeros(k, n, *parameter.shape) for parameter in parameters]
        for i in range(n):
            outputs = self.model(*(argument[i : i + 1] for argument in inputs))
            for j in range(k):
                gradients = torch.autograd.grad(
                    outputs,
                    parameters,
                    scores[j, i : i + 1],
                    retain_graph=j + 1 < k,
                    allow_unused=True,
                )
                for row, gradient in zip(result, gradients, strict=True):
                    if gradient is not None:
                        row[j, i] = gradient.to_dense() if gradient.is_sparse else gradient
        return dict(zip(self.names, result, strict=True))
