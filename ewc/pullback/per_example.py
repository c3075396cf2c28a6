"""Gradients of single examples for parameters that no rule covers.

Slow and general: the whole network is differentiated once per example.  The result is
right for any use of a parameter.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from ewc.parameters import Parameters, Shapes, accumulation_dtype
from ewc.pullback.agreement import agree, same
from ewc.pullback.call import Call
from ewc.pullback.graph import Graph
from ewc.pullback.pullback import Pullback
from ewc.wrappers import named_parameters

_log = logging.getLogger(__name__)


UNSUPPORTED = (NotImplementedError, RuntimeError, AttributeError)
"""What torch.func raises for operations without support, and for compiled modules."""


def chosen_parameters(model: nn.Module, names: Iterable[str]) -> Parameters:
    """The named parameters of a network; tied ones have several names."""
    parameters = dict(named_parameters(model, remove_duplicate=False))
    return {name: parameters[name] for name in names}


@torch.enable_grad()
def reproducible(model: nn.Module, arguments: Call) -> bool:
    """Whether the network returns the same outputs twice, that is, draws no random numbers."""
    once, again = (arguments(model).detach() for _ in range(2))
    return same(once, again)


@contextmanager
def quiet_about_speed() -> Iterator[None]:
    """Suppress torch's warning that an operation is vectorised by a loop: it is still right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class PerExample(Pullback):
    """The vectors of any parameters, by differentiating the network for each example.

    Args:
        model: the network.
        shapes: the shapes of the parameters, by name.
        arguments: the call of ``model``.
        scores: the score vectors, ``[k, n, ...]``.
        memory: bytes that intermediate results may take.
        vectorises: whether the network can be vectorised over examples, by the names of the
            parameters and the shapes of the inputs.  Shared by all batches, and updated here.
        misplaced: whether a rule covers an operation of the parameters, but its rows are not
            the examples in order.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Shapes,
        arguments: Call,
        scores: Tensor,
        *,
        memory: int,
        vectorises: dict[tuple[Any, ...], bool],
        misplaced: bool = False,
    ) -> None:
        self.model = model
        self.shapes = shapes
        self.arguments = arguments
        self.scores = scores
        self.num_vectors, self.num_examples = scores.shape[:2]
        self.parameters = chosen_parameters(model, shapes)
        self.dtype = accumulation_dtype(next(iter(self.parameters.values())).dtype)
        self.memory = memory
        self.vectorises = vectorises
        self.misplaced = misplaced

    def bytes_per_example(self) -> int:
        # The vectors, and twice the inputs for what the network computes on the way.
        inputs = sum(tensor.numel() for tensor in self.arguments.tensors()) // self.num_examples
        return super().bytes_per_example() + 2 * self.num_vectors * inputs * self.dtype.itemsize

    def per_example(self, examples: slice) -> Parameters:
        vectors = self._gradients(examples)
        return {name: tensor.to(self.dtype) for name, tensor in vectors.items()}

    def _gradients(self, examples: slice) -> Parameters:
        """All examples at once if the network allows it, else one after the other."""
        arguments, scores = self.arguments[examples], self.scores[:, examples]
        shapes = (tensor.shape for tensor in (scores, *arguments.tensors()))
        key = (*self.shapes, *shapes)
        known = self.vectorises.get(key)
        if known is None and self._counts_words(arguments):
            known = self.vectorises[key] = False
        if known is not False and arguments.in_rows:
            try:
                with quiet_about_speed():
                    gradients = self._vectorised(arguments, scores)
                if known or self._confirmed(gradients, arguments, scores):
                    self.vectorises[key] = True
                    return gradients
            except UNSUPPORTED as error:
                # Operations that vmap does not support: branches on data, in-place writes,
                # custom autograd functions.  An error of the network itself is raised below.
                _log.info("examples one at a time for %s: %s", list(self.shapes), error)
        gradients = self._one_by_one(arguments, scores)
        if known is None:
            if not self._confirmed(gradients, arguments, scores) and reproducible(
                self.model, arguments
            ):
                raise ValueError(
                    f"Examples depend on each other through {', '.join(self.shapes)}: the "
                    "gradients of an example alone differ from those in its batch. "
                    + arguments.independence
                )
            self.vectorises[key] = False
        return gradients

    @torch.enable_grad()
    def _counts_words(self, arguments: Call) -> bool:
        """Whether the gradient of the batch is not the sum over its examples."""
        return Graph(arguments(self.model)).counts_words()

    @torch.enable_grad()
    def _confirmed(self, vectors: Parameters, arguments: Call, scores: Tensor) -> bool:
        """Whether one backward pass of the batch gives a random combination of ``vectors``.

        Some operations have a wrong rule for vmap: torch 2.15 returns another example's
        gradient for a PReLU.  No rule is right for examples that depend on each other.
        """
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(scores.shape[:2], generator=generator).to(scores)
        outputs = arguments(self.model)
        parameters = list(self.parameters.values())
        size = scores.transpose(0, 1).reshape(len(outputs), -1).norm(dim=1)
        like = torch.randn(outputs.shape, generator=generator).to(scores)
        plain, typical = (
            torch.autograd.grad(outputs, parameters, score, retain_graph=True, allow_unused=True)
            for score in (
                torch.einsum("kn,kn...->n...", weights, scores),
                torch.einsum("n,n...->n...", size, like),
            )
        )
        for name, gradient, other in zip(self.shapes, plain, typical, strict=True):
            combined = torch.tensordot(weights.to(vectors[name].dtype), vectors[name], 2)
            if gradient is None or other is None:
                gradient = other = torch.zeros_like(combined)  # noqa: PLW2901
            gradient, other = (g.to_dense() if g.is_sparse else g for g in (gradient, other))  # noqa: PLW2901
            # A gradient that cancels between outputs is rounding error, which never agrees.
            # An undefined derivative is reported when the sums are checked.
            rounding = 100 * torch.finfo(other.dtype).eps * other.norm()
            right = agree(combined, gradient) or (combined - gradient).norm() <= rounding
            if not (right or gradient.isnan().any()):
                return False
        return True

    def _vectorised(self, arguments: Call, scores: Tensor) -> Parameters:
        parameters = {name: value.detach() for name, value in self.parameters.items()}

        def vectors(scores_n: Tensor, *tensors: Tensor) -> Parameters:
            one = arguments.with_tensors([tensor[None] for tensor in tensors])

            def outputs(values: Parameters) -> Tensor:
                return one.called(self.model, values)[0]

            _, pull, *_ = vjp(outputs, parameters)
            (gradients,) = vmap(pull)(scores_n)
            result: Parameters = gradients
            return result

        tensors = arguments.tensors()
        out_dims: Any = dict.fromkeys(self.shapes, 1)
        in_dims = (1,) + (0,) * len(tensors)
        result: Parameters = vmap(vectors, in_dims=in_dims, out_dims=out_dims)(scores, *tensors)
        return result

    @torch.enable_grad()
    def _one_by_one(self, arguments: Call, scores: Tensor) -> Parameters:
        parameters = list(self.parameters.values())
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
