r"""The Kronecker-factored Fisher information (K-FAC)."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ewc.fisher.accumulator import Accumulator
from ewc.fisher.block_diagonal import BlockDiagonalFisher, by_layer, disjoint
from ewc.fisher.dense import BlockSums
from ewc.fisher.diagonal import DiagonalFisher
from ewc.fisher.gram import Block, GramSum, RowBlock
from ewc.fisher.kronecker_product import KroneckerProduct
from ewc.fisher.layer_matrix import LayerWeights
from ewc.fisher.lookups import Lookups
from ewc.fisher.matrix import FisherMatrix
from ewc.fisher.outer import OuterProducts, WeightLayout
from ewc.fisher.per_example import PerExample
from ewc.fisher.pullback import DEFAULT_MEMORY, Chunk, Pullback
from ewc.parameters import Parameters, accumulation_dtype, shapes_of

LARGEST_BLOCK = DEFAULT_MEMORY
"""Bytes of the largest dense block of a layer without a Kronecker form (512 MiB).

Whatever memory the pass may take: the form of the matrix does not depend on it.
"""


class KroneckerFisher(BlockDiagonalFisher):
    r"""K-FAC: :math:`F_l \approx G_l \otimes A_l` for every layer (Martens & Grosse 2015).

    :math:`G = \frac1N \sum_{n,k,t} g g^\top` are the second moments of the gradients with
    respect to the layer's outputs, :math:`A = \frac1{N T} \sum_{n,t} a a^\top` those of its
    inputs with a 1 appended for the bias (arXiv:1503.05671, equation 1).  A weight that is
    used at ``T`` positions (convolutions, sequences, repeated calls) takes all of them as
    examples of their own: K-FAC-expand (Eschenhagen et al. 2023, arXiv:2311.00636,
    equation 22).  With ``KroneckerFisher.configured(reduce=True)`` the inputs are averaged
    and the gradients summed over positions first: K-FAC-reduce (equation 23), exact where
    a linear network averages over positions.

    The matrix is exact for a deep linear network with a Gaussian likelihood, and for a
    single example; the layers' inputs and gradients are otherwise taken to be independent.
    A layer that is not of this form (a normalisation, a weight tied to an embedding, what
    no rule covers) has its exact dense block instead, and printing says so.  Where that
    block is above 512 MiB (11,585 parameters in single precision) the layer has its exact
    diagonal, with a warning.

    ``T`` is the example's own number of positions, so that the matrix does not depend on
    how the data are cut into batches.  Where only some examples use a layer (experts, heads)
    :math:`G` is the mean over these, and the block has their share.

    Memory :math:`o^2 + i^2` a layer; ``matvec`` :math:`o i (o + i)` operations; ``solve``,
    ``logdet`` and ``eigenvalues`` once :math:`o^3 + i^3`.  A sum of two is exact and lazy;
    :func:`~ewc.fisher.nearest_kronecker.nearest_kronecker` makes one product of it.
    """

    form = KroneckerProduct

    @classmethod
    def accumulator(cls, parameters: Parameters, reduce: bool = False) -> Accumulator:
        """Empty factors.

        Args:
            parameters: over which the matrix is.
            reduce: whether to reduce over positions before taking second moments.
        """
        return KroneckerSum(parameters, reduce)


class KroneckerSum(Accumulator):
    """The running second moments of every layer's inputs and output gradients.

    What form a layer has, and at how many positions an example uses it, is the example's
    own: the sums are the same however the data are cut.  A layer that has several forms (a
    weight that some examples use transposed as well) has the sum of all of them.

    Args:
        parameters: over which the matrix is.
        reduce: whether to reduce over positions first.
    """

    def __init__(self, parameters: Parameters, reduce: bool = False) -> None:
        self.parameters = parameters
        self.reduce = reduce
        self.layers: dict[str, LayerSums] = {}
        self.rest = BlockSums({}, next(iter(parameters.values())))

    def add(self, chunk: Chunk) -> None:
        """Add one chunk of pulled-back vectors."""
        for number, pullbacks in numbered_parts(chunk):
            rest: list[Pullback] = []
            for pullback in pullbacks:
                # The inputs are the same for every part of the vectors.
                if isinstance(pullback, OuterProducts):
                    self._add_outer(pullback, with_inputs=number == 0)
                elif isinstance(pullback, Lookups):
                    self._add_lookups(pullback, with_inputs=number == 0)
                else:
                    rest.append(pullback)
            if rest:
                self._add_rest(rest)

    def _add_outer(self, pullback: OuterProducts, *, with_inputs: bool) -> None:
        if pullback.positions == 0:
            return
        layer = self._layer(weights_of(pullback), pullback.memory)
        assert isinstance(layer.inputs, GramSum)
        if with_inputs:
            layer.examples += pullback.num_examples
        for part in pullback.slices():
            inputs: list[Block]
            outputs: list[Block]
            if self.reduce:
                a, g = pullback.factors(part)
                mean = RowBlock(a.detach().mean(2).transpose(0, 1))
                inputs = [mean] if with_inputs else []
                outputs = [RowBlock(g.sum(3).flatten(0, 1).transpose(0, 1))]
                share = 1.0
            else:
                inputs = [use.input_rows(part) for use in pullback.uses] if with_inputs else []
                outputs = [use.gradient_rows(part) for use in pullback.uses]
                share = 1 / pullback.positions
            for block in outputs:
                layer.outputs.add(block)
            for block in inputs:
                layer.inputs.add(block, share)
                if pullback.bias is not None:
                    layer.sums += share * block.sum()
                    layer.count += share * block.count

    def _add_lookups(self, pullback: Lookups, *, with_inputs: bool) -> None:
        """An embedding is linear in one-hot inputs, whose second moments are diagonal."""
        positions = pullback.indices.shape[1]
        if positions == 0:
            return
        layer = self._layer(weights_of(pullback), pullback.memory, lookups=True)
        layer.outputs.add(RowBlock(pullback.gradient.flatten(0, 2)[None]))
        if with_inputs:
            layer.examples += pullback.num_examples
            rows = pullback.shapes[pullback.name][0]
            counts = torch.bincount(pullback.indices.flatten(), minlength=rows)
            if pullback.padding is not None:
                counts[pullback.padding] = 0
            layer.sums[0] += counts.to(layer.sums) / positions

    def _layer(self, weights: LayerWeights, memory: int, *, lookups: bool = False) -> "LayerSums":
        key = layer_key(weights, lookups=lookups)
        if key not in self.layers:
            like = self.parameters[weights.weight].detach()
            like = like.new_empty(0, dtype=accumulation_dtype(like.dtype))
            self.layers[key] = LayerSums(weights, like, memory, lookups=lookups)
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
        """Begin the sums that other processes have."""
        mine = (
            [(layer.weights, layer.inputs is None) for layer in self.layers.values()],
            [
                (key, shapes, self.rest.totals[key].dim())
                for key, shapes in self.rest.blocks.items()
            ],
        )
        everybody: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everybody, mine, group=group)
        for layers, exact in everybody:
            for weights, lookups in layers:
                self._layer(weights, 0, lookups=lookups)
            for key, shapes, dims in exact:
                self.rest.include(key, shapes, diagonal=dims == 1)

    def sums(self) -> dict[str, Tensor]:
        """The factors by weight, and the exact blocks."""
        found = {f"block {key}": total for key, total in self.rest.totals.items()}
        for key, layer in self.layers.items():
            found |= layer.tensors(key)
        return found

    def terms(self, num_examples: int) -> list[FisherMatrix]:
        """The mean of every sum; parameters that took no part have zeros.

        Warns:
            UserWarning: of layers without a Kronecker form only the diagonal was summed.
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
                "Kronecker form, and a dense block of this size is above "
                f"{LARGEST_BLOCK / 1e9:.1f} GB.",
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
        """The mean factors and blocks."""
        blocks = disjoint(self.terms(num_examples), num_examples)
        return KroneckerFisher(blocks, shapes_of(self.parameters), num_examples)


def numbered_parts(chunk: Chunk) -> Iterator[tuple[int, Sequence[Pullback]]]:
    """The pullbacks of a chunk, with the number of the part of the vectors that they are of.

    Where rows of a layer are not the examples in order (packed sequences, experts, several
    heads), every example goes alone: all its rows are then its own.
    """
    for number, pullbacks in enumerate(chunk.pullbacks()):
        if any(isinstance(pullback, PerExample) and pullback.misplaced for pullback in pullbacks):
            for one in chunk.alone():
                yield from enumerate(one.pullbacks())
            return
        yield number, pullbacks


def weights_of(pullback: OuterProducts | Lookups) -> LayerWeights:
    """The parameters of a layer that has a Kronecker form."""
    if isinstance(pullback, OuterProducts):
        return LayerWeights(pullback.weight, pullback.bias, pullback.layout)
    shape = pullback.shapes[pullback.name]
    return LayerWeights(pullback.name, None, WeightLayout(shape, transposed=True))


def layer_key(weights: LayerWeights, *, lookups: bool = False) -> str:
    """A name for one form of a layer, the same in every process."""
    return f"{weights} looked up" if lookups else str(weights)


class LayerSums:
    """The running second moments of one layer.

    Args:
        weights: the layer's parameters.
        like: a tensor whose device and type the sums have.
        memory: bytes that collected rows may take.
        lookups: whether the inputs are one-hot, with diagonal second moments.
    """

    def __init__(
        self, weights: LayerWeights, like: Tensor, memory: int, *, lookups: bool = False
    ) -> None:
        groups, outputs, inputs = weights.layout.matrix_shape
        self.weights = weights
        self.outputs = GramSum(groups, outputs, like, memory)
        self.inputs = None if lookups else GramSum(groups, inputs, like, memory)
        self.sums = like.new_zeros(groups, inputs)
        """The sums of the inputs; of one-hot inputs they are the second moments."""
        self.count = like.new_zeros(())
        self.examples = like.new_zeros(())
        """Those that use the layer."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All sums, by names with the layer's in them."""
        found = {f"outputs {name}": self.outputs.flush(), f"sums {name}": self.sums}
        found[f"count {name}"] = self.count
        found[f"examples {name}"] = self.examples
        if self.inputs is not None:
            found[f"inputs {name}"] = self.inputs.flush()
        return found

    def mean(self, num_examples: int) -> KroneckerProduct:
        """The mean factors; the bias's input is always 1.

        The share of the examples that use the layer is one of the block, so of one factor.
        """
        outputs = self.outputs.flush().div_(self.examples.clamp_min(1))
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
