r"""Score vectors pulled back through the network, in the form that suits their layer.

A *pullback* represents :math:`v_{kn} = J_n^\top s_{kn}` in a subset of the parameters, for
one chunk of ``n`` examples and ``k`` score vectors.  Most forms never store the ``k n``
vectors.  Those of an affine layer are outer products of its output gradients and its
inputs, and a structure can work on these factors.

- :class:`Stored`: the vectors themselves, if they are small (biases, norms);
- :class:`~ewc.pullback.outer.OuterProducts`: the weights of linear layers and convolutions;
- :class:`~ewc.pullback.lookups.Lookups`: embeddings;
- :class:`~ewc.pullback.per_example.PerExample`: anything, by differentiating the network
  for each example separately.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewc.linalg.squares import add_squares
from ewc.linalg.tiles import part, slices
from ewc.parameters import Parameters, Shapes
from ewc.pullback.call import Call
from ewc.pullback.recognition import Use


class Pullback(ABC):
    r"""The vectors :math:`v_{kn}` of one chunk, in a subset of the parameters.

    Attributes:
        shapes: the shapes of these parameters, by name.
        num_vectors: ``k``.
        num_examples: ``n``.
        dtype: the floating-point type of the vectors.
        memory: bytes that intermediate results may take.
    """

    shapes: Shapes
    num_vectors: int
    num_examples: int
    dtype: torch.dtype
    memory: int

    @abstractmethod
    def per_example(self, examples: slice) -> Parameters:
        """The vectors of a slice of the examples: ``[k, n, *parameter.shape]`` by name."""

    def bytes_per_example(self) -> int:
        """The bytes per example that :meth:`per_example` and work on its result need."""
        size = sum(shape.numel() for shape in self.shapes.values())
        return 2 * self.num_vectors * size * self.dtype.itemsize

    def add_squares(self, total: Parameters) -> None:
        r"""Add :math:`\sum_{k,n} v_{kn}^2` to ``total``, in place."""
        for examples in slices(self.num_examples, self.bytes_per_example(), self.memory):
            for name, vectors in self.per_example(examples).items():
                add_squares(vectors.to(total[name].dtype), total[name])

    def project(self, directions: Parameters) -> Tensor:
        r"""The products :math:`v_{kn}^\top u_l` with ``l`` directions.

        Args:
            directions: ``[l, *parameter.shape]`` by name.

        Returns:
            Shape ``[k, n, l]``.
        """
        products = []
        for examples in slices(self.num_examples, self.bytes_per_example(), self.memory):
            by_parameter = [
                vectors.reshape(*vectors.shape[:2], -1)
                @ directions[name].reshape(len(directions[name]), -1).to(vectors.dtype).T
                for name, vectors in self.per_example(examples).items()
            ]
            products.append(torch.stack(by_parameter).sum(0))
        return torch.cat(products, 1)

    def add_combinations(self, coefficients: Tensor, total: Parameters) -> None:
        r"""Add :math:`\sum_{k,n} c_{knl} v_{kn}` to ``total``, in place.

        Args:
            coefficients: ``[k, n, l]``.
            total: ``[l, *parameter.shape]`` by name.
        """
        for examples in slices(self.num_examples, self.bytes_per_example(), self.memory):
            weights = coefficients[:, examples].flatten(0, 1).T
            for name, vectors in self.per_example(examples).items():
                rows = vectors.reshape(weights.shape[1], -1)
                combined = weights.to(vectors.dtype) @ rows
                total[name] += combined.reshape(total[name].shape)


class Stored(Pullback):
    """Vectors that are stored explicitly, because they are small.

    Args:
        vectors: ``[k, n, *parameter.shape]`` by name.
        memory: bytes that intermediate results may take.
    """

    def __init__(self, vectors: Parameters, memory: int) -> None:
        self.vectors = vectors
        self.shapes = {name: tensor.shape[2:] for name, tensor in vectors.items()}
        like = next(iter(vectors.values()))
        self.num_vectors, self.num_examples = like.shape[:2]
        self.dtype = like.dtype
        self.memory = memory

    def per_example(self, examples: slice) -> Parameters:
        return {name: part(tensor, examples, 1) for name, tensor in self.vectors.items()}


class Summed(Pullback):
    """The vectors of parameters that are used in several ways: the sum over the uses.

    Args:
        uses: pullbacks of one chunk that share parameters.
    """

    def __init__(self, uses: Sequence[Pullback]) -> None:
        self.uses = uses
        self.shapes = {name: shape for use in uses for name, shape in use.shapes.items()}
        like = uses[0]
        self.num_vectors, self.num_examples = like.num_vectors, like.num_examples
        self.dtype, self.memory = like.dtype, like.memory

    def per_example(self, examples: slice) -> Parameters:
        total: Parameters = {}
        for use in self.uses:
            for name, vectors in use.per_example(examples).items():
                total[name] = total[name] + vectors if name in total else vectors
        return total

    def bytes_per_example(self) -> int:
        return sum(use.bytes_per_example() for use in self.uses)


@dataclass(frozen=True)
class Chunk:
    """A set of examples with their score vectors.

    Attributes:
        model: the network, in evaluation mode.
        arguments: the network's call.
        scores: the score vectors, ``[k, n, ...]``.
        weights: how often each example counts, ``[n]``; once if ``None``.
        pullbacks: pulls the vectors back, a block of score vectors at a time.  The pullbacks
            of a block have every parameter that affects the outputs once.
        alone: the same examples, each in a separate chunk with its own forward pass.
        recognised: lists the uses of the parameters.
    """

    model: nn.Module
    arguments: Call
    scores: Tensor
    weights: Tensor | None
    pullbacks: Callable[[], Iterator[Sequence[Pullback]]]
    alone: Callable[[], Iterator["Chunk"]]
    recognised: Callable[[], list[Use]] = list
