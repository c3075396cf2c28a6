r"""Rules that turn output gradients of a layer into gradients of its parameters.

A *pullback* holds, for one chunk of ``n`` examples and ``k`` score vectors, what is
needed to know :math:`v_{kn} = J_n^\top s_{kn}` in some of the parameters.  A rule knows
for its layer how to get the sum of squares without ever storing the ``k n`` vectors, or
the vectors themselves where a structure needs them.

The rules hold for layers whose first dimension is the example and whose parameters are
used in the layer alone; :mod:`ewc.fisher.tape` sees to it that nothing else gets here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ewc.parameters import Parameters

CHUNK_BYTES = 2**28
"""Bytes that one chunk of intermediate results may take (256 MiB)."""


def slices(length: int, bytes_each: int) -> Iterator[slice]:
    """Cuts ``range(length)`` into slices whose items fit into :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class Pullback(ABC):
    r"""The vectors :math:`v_{kn}` of one chunk, in some of the parameters.

    Attributes:
        num_vectors: ``k``.
        num_examples: ``n``.
    """

    num_vectors: int
    num_examples: int

    @abstractmethod
    def per_example(self, examples: slice) -> Parameters:
        """The vectors of some examples: ``[k, n, *parameter.shape]`` by name."""

    @abstractmethod
    def bytes_per_example(self) -> int:
        """What :meth:`per_example` and its intermediate results need for one example."""

    def add_squares(self, total: Parameters) -> None:
        r"""Add :math:`\sum_{k,n} v_{kn}^2` to ``total``, in place."""
        for part in slices(self.num_examples, self.bytes_per_example()):
            for name, vectors in self.per_example(part).items():
                total[name] += vectors.flatten(0, 1).to(total[name].dtype).square().sum(0)


@dataclass(frozen=True)
class Call:
    """One use of a layer in the forward pass.

    Attributes:
        input: what went in, ``[n, ...]``.
        gradient: gradients with respect to what came out, ``[k, n, ...]``.
    """

    input: Tensor
    gradient: Tensor


class LayerPullback(Pullback):
    """The vectors of one layer, which may have been called more than once.

    Args:
        layer: the module.
        names: the full names of its trainable parameters, by their names in the module.
        calls: its uses, at least one.
    """

    def __init__(self, layer: nn.Module, names: dict[str, str], calls: Sequence[Call]) -> None:
        self.layer = layer
        self.names = names
        self.calls = calls
        self.num_vectors, self.num_examples = calls[0].gradient.shape[:2]

    @abstractmethod
    def call_per_example(self, call: Call) -> dict[str, Tensor]:
        """The vectors from one use, ``[k, n, *parameter.shape]``, by name in the module."""

    def per_example(self, examples: slice) -> Parameters:
        """The vectors of some examples, summed over the layer's uses."""
        total: Parameters = {}
        for call in self.calls:
            part = Call(call.input[examples], call.gradient[:, examples])
            for local, vectors in self.call_per_example(part).items():
                if local in self.names:
                    name = self.names[local]
                    total[name] = total[name] + vectors if name in total else vectors
        return total

    def bytes_per_example(self) -> int:
        """The vectors themselves, once more for their squares, and the gradients."""
        size = sum(p.numel() for p in self.layer.parameters(recurse=False))
        size += max(call.gradient[0, 0].numel() for call in self.calls)
        return 2 * self.num_vectors * size * self.calls[0].gradient.element_size()


class LinearPullback(LayerPullback):
    r"""``nn.Linear`` on inputs ``[n, ..., in]``: :math:`v = \sum_t g_t a_t^\top`."""

    def call_per_example(self, call: Call) -> dict[str, Tensor]:
        """Outer products of output gradients and inputs, summed over positions."""
        inputs, gradient = call.input, call.gradient
        if inputs.dim() > 2:
            inputs, gradient = inputs.flatten(1, -2), gradient.flatten(2, -2)
        else:  # one position
            inputs, gradient = inputs[:, None], gradient[:, :, None]
        weight = torch.einsum("knto,nti->knoi", gradient, inputs)
        return {"weight": weight, "bias": gradient.sum(2)}

    def add_squares(self, total: Parameters) -> None:
        r"""For one use at one position: :math:`(\sum_k g_k^2)^\top (a^2)`, one product."""
        if len(self.calls) > 1 or self.calls[0].input.dim() > 2:
            super().add_squares(total)
            return
        (call,) = self.calls
        squares = sum_of_squares(call.gradient)
        if "weight" in self.names:
            total[self.names["weight"]].addmm_(squares.T, call.input.square())
        if "bias" in self.names:
            total[self.names["bias"]] += squares.sum(0)


class Conv2dPullback(LayerPullback):
    """``nn.Conv2d`` with any stride, dilation, groups and padding mode."""

    layer: nn.Conv2d

    def call_per_example(self, call: Call) -> dict[str, Tensor]:
        """Output gradients times unfolded inputs, summed over positions."""
        layer, groups = self.layer, self.layer.groups
        n, k = call.input.shape[0], call.gradient.shape[0]
        patches = self._patches(call.input).reshape(n * groups, -1, self._positions(call))
        gradient = call.gradient.reshape(k, n, groups, layer.out_channels // groups, -1)
        rows = gradient.permute(1, 2, 0, 3, 4).reshape(n * groups, -1, patches.shape[-1])
        weight = torch.bmm(rows, patches.transpose(1, 2))
        weight = weight.reshape(n, groups, k, layer.out_channels // groups, -1)
        weight = weight.permute(2, 0, 1, 3, 4).reshape(k, n, *layer.weight.shape)
        return {"weight": weight, "bias": gradient.sum(-1).flatten(2)}

    def bytes_per_example(self) -> int:
        """The vectors and the unfolded input."""
        positions = max(self._positions(call) for call in self.calls)
        patch = self.layer.in_channels * self.layer.weight[0, 0].numel()
        return super().bytes_per_example() + patch * positions * self.layer.weight.element_size()

    def _positions(self, call: Call) -> int:
        return call.gradient.shape[-2] * call.gradient.shape[-1]

    def _patches(self, inputs: Tensor) -> Tensor:
        """The inputs under the kernel at every position, ``[n, in * kernel, positions]``."""
        layer = self.layer
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        # The module's own list of pads covers numbers, 'same' and 'valid' alike.
        padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        return functional.unfold(
            padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
        )


def sum_of_squares(gradient: Tensor) -> Tensor:
    r""":math:`\sum_k g_k^2` of ``[k, n, out]``, shape ``[n, out]``."""
    # Vector by vector: the squares of all at once would be a tensor as large as the
    # gradient, and fetching fresh memory for it costs more than the arithmetic.
    total = gradient[0].square()
    for vector in gradient[1:]:
        total.addcmul_(vector, vector)
    return total


RULES: dict[type[nn.Module], type[LayerPullback]] = {
    nn.Linear: LinearPullback,
    nn.Conv2d: Conv2dPullback,
}
"""The rule of each layer type; a subclass is another type, for it may compute otherwise."""
