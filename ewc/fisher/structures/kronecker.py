"""The request for K-FAC, and its sums over the data."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ewc.checks import check_instance
from ewc.fisher.structures.block_diagonal import by_layer
from ewc.fisher.structures.blocks import OuterProductSums
from ewc.fisher.structures.structure import Accumulator, Matrix, Structure
from ewc.linalg.gram import RowBatch, RunningGram, StoredRows
from ewc.linalg.tiles import DEFAULT_MEMORY, part
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices.block_diagonal import disjoint
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.kronecker import KroneckerFisher
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, accumulation_dtype, shapes_of
from ewc.pullback.lookups import Lookups
from ewc.pullback.outer import OuterProducts, scaled_rows
from ewc.pullback.per_example import PerExample
from ewc.pullback.pullback import Chunk, Pullback

LARGEST_BLOCK = DEFAULT_MEMORY
"""Bytes of the largest dense block of a layer without a Kronecker form: 512 MiB.

It does not depend on the memory of the pass, so neither does the form of the matrix.
"""


@dataclass(frozen=True)
class KroneckerForm(Structure[Matrix]):
    """A request that begins with the Kronecker factors of every layer.

    Attributes:
        reduce: whether to reduce over positions before taking second moments (K-FAC-reduce),
            or to treat positions as separate examples (K-FAC-expand).

    Raises:
        TypeError: ``reduce`` is not True or False.
    """

    reduce: bool = False
    has_units = True

    def __post_init__(self) -> None:
        """Check the option."""
        check_instance(self.reduce, bool, "reduce", "True or False")


@dataclass(frozen=True)
class Kronecker(KroneckerForm[KroneckerFisher]):
    """K-FAC: two small factors per layer; see :class:`~ewc.KroneckerFisher`.

    Its option is that of :class:`KroneckerForm`, with the same errors.
    """

    def accumulator(self, parameters: Parameters) -> "KroneckerAccumulator":
        return KroneckerAccumulator(parameters, self.reduce)


class KroneckerAccumulator(Accumulator[KroneckerFisher]):
    """The running second moments of every layer's inputs and output gradients.

    The form of a layer and its number of positions are determined per example, so the sums
    do not depend on how the data are cut.  A layer with several forms (a weight that is also
    used transposed) has the sum of all of them.

    Args:
        parameters: the parameters of the matrix.
        reduce: whether to reduce over positions first.
    """

    def __init__(self, parameters: Parameters, reduce: bool = False) -> None:
        self.parameters = parameters
        self.reduce = reduce
        self.layers: dict[str, LayerMoments] = {}
        self.rest = OuterProductSums({}, next(iter(parameters.values())))

    def add(self, chunk: Chunk) -> None:
        counted: Counted | None = None
        for number, pullbacks, weights in numbered_parts(chunk):
            if weights is None:
                counted = None
            elif counted is None or counted.weights is not weights:
                counted = Counted(weights, weights.sqrt(), weights.sum())
            rest: list[Pullback] = []
            for pullback in pullbacks:
                # The inputs are the same for every block of score vectors.
                if isinstance(pullback, OuterProducts):
                    self._add_outer(pullback, counted, with_inputs=number == 0)
                elif isinstance(pullback, Lookups):
                    self._add_lookups(pullback, counted, with_inputs=number == 0)
                else:
                    rest.append(pullback)
            if rest:
                self._add_rest(rest)

    def clear(self) -> None:
        self.layers = {}
        self.rest = OuterProductSums({}, next(iter(self.parameters.values())))

    def _add_outer(
        self, pullback: OuterProducts, counted: "Counted | None", *, with_inputs: bool
    ) -> None:
        if pullback.positions == 0:
            return
        layer = self._layer(weights_of(pullback), pullback.memory)
        assert isinstance(layer.inputs, RunningGram)
        if with_inputs:
            layer.examples += pullback.num_examples if counted is None else counted.total
        share = 1.0 if self.reduce else 1 / pullback.positions
        for examples in pullback.slices():
            for block in self._output_rows(pullback, examples):
                layer.outputs.add(block)
            if not with_inputs:
                continue
            # An example of weight w counts w times in the second moments, and so in the sums.
            weights = None if counted is None else part(counted.weights, examples)
            roots = None if counted is None else part(counted.roots, examples)
            inputs = self._input_rows(pullback, examples, roots)
            for block in inputs:
                layer.inputs.add(block, share)
            if pullback.bias is not None:
                if weights is not None:
                    inputs = self._input_rows(pullback, examples, weights)
                for block in inputs:
                    layer.sums += share * block.sum()
                    times = 1.0 if weights is None else weights.mean()
                    layer.count += share * block.count * times

    def _output_rows(self, pullback: OuterProducts, examples: slice) -> list[RowBatch]:
        if not self.reduce:
            return [use.gradient_rows(examples) for use in pullback.uses]
        g = pullback.factors(examples)[1]
        return [StoredRows(g.sum(3).flatten(0, 1).transpose(0, 1))]

    def _input_rows(
        self, pullback: OuterProducts, examples: slice, scale: Tensor | None
    ) -> list[RowBatch]:
        """The inputs of a layer, times one number ``[n]`` an example if there is one."""
        if not self.reduce:
            return [use.input_rows(examples, scale) for use in pullback.uses]
        mean = pullback.factors(examples)[0].detach().mean(2)
        return [StoredRows(scaled_rows(mean, scale).transpose(0, 1))]

    def _add_lookups(
        self, pullback: Lookups, counted: "Counted | None", *, with_inputs: bool
    ) -> None:
        """Add an embedding: linear in one-hot inputs, whose second moments are diagonal."""
        positions = pullback.indices.shape[1]
        if positions == 0:
            return
        layer = self._layer(weights_of(pullback), pullback.memory, lookups=True)
        layer.outputs.add(StoredRows(pullback.gradient.flatten(0, 2)[None]))
        if with_inputs:
            layer.examples += pullback.num_examples if counted is None else counted.total
            indices = pullback.indices.flatten()
            if counted is not None:
                times = (
                    counted.weights.to(layer.sums)[:, None].expand(pullback.indices.shape).flatten()
                )
                if pullback.padding is not None:
                    times = times * (indices != pullback.padding)
                layer.sums[0].index_add_(0, indices, times, alpha=1 / positions)
                return
            # Whole numbers, because a sum of many equal fractions drifts; and not bincount(),
            # which reads the largest index back.
            counts = indices.new_zeros(pullback.shapes[pullback.name][0])
            counts.index_add_(0, indices, torch.ones_like(indices))
            if pullback.padding is not None:
                counts[pullback.padding] = 0
            layer.sums[0] += counts.to(layer.sums) / positions

    def _layer(
        self, weights: LayerWeights, memory: int, *, lookups: bool = False
    ) -> "LayerMoments":
        key = layer_key(weights, lookups=lookups)
        if key not in self.layers:
            like = self.parameters[weights.weight].detach()
            like = like.new_empty(0, dtype=accumulation_dtype(like.dtype))
            self.layers[key] = LayerMoments(weights, like, memory, lookups=lookups)
        return self.layers[key]

    def _add_rest(self, pullbacks: Sequence[Pullback]) -> None:
        present = {name for pullback in pullbacks for name in pullback.shapes}
        shapes = shapes_of({n: p for n, p in self.parameters.items() if n in present})
        groups = {", ".join(group): group for group in by_layer(shapes).values()}
        for key, group in groups.items():
            large = self.rest.bytes_of(group) > LARGEST_BLOCK
            self.rest.include(key, group, diagonal=large)
        self.rest.add(pullbacks, groups)

    def join(self, group: ProcessGroup) -> None:
        # Adds empty sums for the layers that only other processes have.
        keys = (
            [(layer.weights, layer.inputs is None) for layer in self.layers.values()],
            [
                (key, shapes, self.rest.totals[key].dim())
                for key, shapes in self.rest.blocks.items()
            ],
        )
        gathered: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(gathered, keys, group=group)
        for layers, exact in gathered:
            for weights, lookups in layers:
                self._layer(weights, 0, lookups=lookups)
            for key, shapes, dims in exact:
                self.rest.include(key, shapes, diagonal=dims == 1)

    def sums(self) -> dict[str, Tensor]:
        sums = {f"block {key}": total for key, total in self.rest.totals.items()}
        for key, layer in self.layers.items():
            sums |= layer.tensors(key)
        return sums

    def terms(self, num_examples: int) -> list[FisherMatrix]:
        """The mean of every sum; it is zero for parameters that do not affect the outputs.

        Warns:
            UserWarning: a layer without a Kronecker form has only its diagonal.
        """
        terms: list[FisherMatrix] = [layer.mean(num_examples) for layer in self.layers.values()]
        exact = [self.rest.mean(key, num_examples) for key in self.rest.blocks]
        if large := [block for block in exact if isinstance(block, DiagonalFisher)]:
            sizes = [
                f"{', '.join(block.shapes)} ({self.rest.bytes_of(block.shapes) / 1e9:.1f} GB)"
                for block in large
            ]
            warnings.warn(
                f"Only the exact diagonal is kept of {'; '.join(sizes)}: these parameters have no "
                f"Kronecker form, and a dense block may take at most {LARGEST_BLOCK / 1e9:.1f} GB.",
                stacklevel=2,
            )
        terms += exact
        seen = {name for term in terms for name in term.shapes}
        for name, parameter in self.parameters.items():
            if name not in seen:
                zeros = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
                terms.append(DiagonalFisher({name: zeros.detach()}, num_examples))
        return terms

    def mean(self, num_examples: int) -> KroneckerFisher:
        blocks = disjoint(self.terms(num_examples), num_examples)
        return KroneckerFisher(blocks, shapes_of(self.parameters), num_examples)


def numbered_parts(chunk: Chunk) -> Iterator[tuple[int, Sequence[Pullback], Tensor | None]]:
    """The pullbacks of a chunk, with the number of their block and the examples' weights.

    If the rows of a layer are not the examples in order (packed sequences, experts, several
    heads), every example is processed alone.  All rows then belong to it.
    """
    for number, pullbacks in enumerate(chunk.pullbacks()):
        if any(isinstance(pullback, PerExample) and pullback.misplaced for pullback in pullbacks):
            for one in chunk.alone():
                for place, alone in enumerate(one.pullbacks()):
                    yield place, alone, one.weights
            return
        yield number, pullbacks, chunk.weights


@dataclass(frozen=True)
class Counted:
    """How often the examples of a chunk count.

    Attributes:
        weights: the numbers, ``[n]``.
        roots: their square roots.
        total: their sum.
    """

    weights: Tensor
    roots: Tensor
    total: Tensor


def weights_of(pullback: OuterProducts | Lookups) -> LayerWeights:
    """The parameters of a layer with a Kronecker form."""
    if isinstance(pullback, OuterProducts):
        return LayerWeights(pullback.weight, pullback.bias, pullback.layout)
    shape = pullback.shapes[pullback.name]
    return LayerWeights(pullback.name, None, WeightLayout(shape, transposed=True))


def layer_key(weights: LayerWeights, *, lookups: bool = False) -> str:
    """A name for one form of a layer, equal in all processes."""
    return f"{weights} looked up" if lookups else str(weights)


class LayerMoments:
    """The running second moments of one layer.

    Args:
        weights: the layer's parameters.
        like: a tensor with the device and the type of the sums.
        memory: bytes that collected rows may take.
        lookups: whether the inputs are one-hot, with diagonal second moments.
    """

    def __init__(
        self, weights: LayerWeights, like: Tensor, memory: int, *, lookups: bool = False
    ) -> None:
        groups, outputs, inputs = weights.layout.matrix_shape
        self.weights = weights
        self.outputs = RunningGram(groups, outputs, like, memory)
        self.inputs = None if lookups else RunningGram(groups, inputs, like, memory)
        self.sums = like.new_zeros(groups, inputs)
        """The sums of the inputs; for one-hot inputs these are the second moments."""
        self.count = like.new_zeros(())
        self.examples = like.new_zeros(())
        """The number of examples that use the layer, each as often as it counts."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All sums, by names that contain the layer's name."""
        tensors = {f"outputs {name}": self.outputs.flush(), f"sums {name}": self.sums}
        tensors[f"count {name}"] = self.count
        tensors[f"examples {name}"] = self.examples
        if self.inputs is not None:
            tensors[f"inputs {name}"] = self.inputs.flush()
        return tensors

    def mean(self, num_examples: int) -> KroneckerProduct:
        """The mean factors; the input of the bias is always 1.

        The fraction of examples that use the layer scales the block, so only one factor has it.
        """
        outputs = self.outputs.flush().div_(self.examples.where(self.examples > 0, 1))
        if self.inputs is None:
            inputs = self.sums.div_(num_examples)
        else:
            inputs = self.inputs.flush().div_(num_examples)
            if self.weights.bias is not None:
                sums = self.sums.div_(num_examples)[:, :, None]
                inputs = torch.cat([inputs, sums], 2)
                one = (self.count / num_examples).expand(len(sums), 1, 1)
                last = torch.cat([sums.transpose(1, 2), one], 2)
                inputs = torch.cat([inputs, last], 1)
        return KroneckerProduct(self.weights, outputs, inputs, num_examples)
