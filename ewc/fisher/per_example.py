r"""Gradients of single examples for parameters that no rule covers.

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

from ewc.fisher.arguments import Arguments
from ewc.fisher.pullback import Pullback
from ewc.parameters import Parameters, Shapes, accumulation_dtype

_log = logging.getLogger(__name__)


@contextmanager
def quiet_about_speed() -> Iterator[None]:
    """Without torch's note that an operation is vectorised by a loop: it is still right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class PerExample(Pullback):
    """The vectors of some parameters, from the network one example at a time.

    Args:
        model: the network.
        shapes: the parameters.
        arguments: of ``model``.
        scores: the score vectors, ``[k, n, c]``.
        memory: bytes that intermediate results may take.
        vectorises: whether the network can be vectorised over examples, as far as known
            from earlier batches, by the parameters' names; kept up to date.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Shapes,
        arguments: Arguments,
        scores: Tensor,
        *,
        memory: int,
        vectorises: dict[tuple[str, ...], bool],
    ) -> None:
        self.model = model
        self.shapes = shapes
        self.arguments = arguments
        self.scores = scores
        self.num_vectors, self.num_examples = scores.shape[:2]
        self.dtype = accumulation_dtype(model.get_parameter(next(iter(shapes))).dtype)
        self.memory = memory
        self.vectorises = vectorises

    def bytes_per_example(self) -> int:
        """The vectors, and as much again for what the network computes on the way."""
        inputs = sum(tensor[0].numel() for tensor in self.arguments.tensors())
        return super().bytes_per_example() + 2 * self.num_vectors * inputs * self.dtype.itemsize

    def per_example(self, examples: slice) -> Parameters:
        """All examples at once where the network allows it, else one after the other."""
        vectors = self._gradients(examples)
        return {name: tensor.to(self.dtype) for name, tensor in vectors.items()}

    def _gradients(self, examples: slice) -> Parameters:
        arguments, scores = self.arguments[examples], self.scores[:, examples]
        key = tuple(self.shapes)
        if self.vectorises.get(key, True):
            try:
                with quiet_about_speed():
                    found = self._vectorised(self.arguments[examples], scores)
                if key in self.vectorises or self._confirmed(found, arguments, scores):
                    return found
            except RuntimeError as error:
                # Operations that vmap cannot take: branches on data, in-place writes, custom
                # autograd functions.  A fault of the network itself shows again below.
                _log.info("examples one at a time for %s: %s", list(self.shapes), error)
        return self._one_by_one(arguments, scores)

    def _confirmed(self, found: Parameters, arguments: Arguments, scores: Tensor) -> bool:
        """Whether plain differentiation gives the same for the first and the last example.

        Some operations have a wrong rule for vmap: torch 2.15 returns another example's
        gradient for a PReLU.
        """
        n = scores.shape[1]
        for i in {0, n - 1}:
            plain = self._one_by_one(arguments[i : i + 1], scores[:, i : i + 1])
            for name, vectors in plain.items():
                gap = (found[name][:, i] - vectors[:, 0]).norm()
                if not gap <= 0.01 * vectors.norm():
                    self.vectorises[tuple(self.shapes)] = False
                    return False
        if n > 1:
            self.vectorises[tuple(self.shapes)] = True
        return True

    def _vectorised(self, arguments: Arguments, scores: Tensor) -> Parameters:
        parameters = {name: self.model.get_parameter(name).detach() for name in self.shapes}

        def vectors(scores_n: Tensor, *tensors: Tensor) -> Parameters:
            one = arguments.with_tensors([tensor[None] for tensor in tensors])

            def outputs(values: Parameters) -> Tensor:
                found: Tensor = functional_call(self.model, values, one.positional, one.named)[0]
                return found

            _, pull, *_ = vjp(outputs, parameters)
            (gradients,) = vmap(pull)(scores_n)
            result: Parameters = gradients
            return result

        # Copies: a network may write into its input.
        tensors = arguments.map(torch.clone).tensors()
        out_dims: Any = dict.fromkeys(self.shapes, 1)
        in_dims = (1,) + (0,) * len(tensors)
        result: Parameters = vmap(vectors, in_dims=in_dims, out_dims=out_dims)(scores, *tensors)
        return result

    @torch.enable_grad()
    def _one_by_one(self, arguments: Arguments, scores: Tensor) -> Parameters:
        parameters = [self.model.get_parameter(name) for name in self.shapes]
        k, n = scores.shape[:2]
        result = [parameter.new_zeros(k, n, *parameter.shape) for parameter in parameters]
        for i in range(n):
            outputs = arguments[i : i + 1](self.model)
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
        return dict(zip(self.shapes, result, strict=True))
