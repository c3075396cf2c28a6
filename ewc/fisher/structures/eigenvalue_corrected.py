"""The request for EKFAC, and its sums over two passes of the data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ewc.fisher.structures.kronecker import (
    KroneckerAccumulator,
    KroneckerForm,
    layer_key,
    numbered_parts,
    weights_of,
)
from ewc.fisher.structures.structure import Accumulator
from ewc.linalg.squares import add_outer_squares
from ewc.matrices.block_diagonal import disjoint
from ewc.matrices.eigenvalue_corrected import EigenvalueCorrectedFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, Shapes, shapes_of
from ewc.pullback.lookups import Lookups
from ewc.pullback.outer import OuterProducts
from ewc.pullback.pullback import Chunk


@dataclass(frozen=True)
class EigenvalueCorrected(KroneckerForm[EigenvalueCorrectedFisher]):
    """EKFAC: the eigenvectors of K-FAC with the exact second moments along them.

    It needs two passes over the data; see :class:`~ewc.matrices.EigenvalueCorrectedFisher`.

    Its option is that of :class:`~ewc.fisher.structures.kronecker.KroneckerForm`, with the same
    errors.
    """

    def accumulator(self, parameters: Parameters) -> "EigenvectorAccumulator":
        return EigenvectorAccumulator(KroneckerAccumulator(parameters, self.reduce))


class EigenvectorAccumulator(Accumulator[EigenvalueCorrectedFisher]):
    """The sums of the first pass: Kronecker factors, for their eigenvectors."""

    passes = 2

    def __init__(self, kronecker: KroneckerAccumulator) -> None:
        self.kronecker = kronecker

    def add(self, chunk: Chunk) -> None:
        self.kronecker.add(chunk)

    def clear(self) -> None:
        self.kronecker.clear()

    def join(self, group: ProcessGroup) -> None:
        self.kronecker.join(group)

    def sums(self) -> dict[str, Tensor]:
        return self.kronecker.sums()

    def mean(self, num_examples: int) -> "SpectrumAccumulator":
        shapes = shapes_of(self.kronecker.parameters)
        return SpectrumAccumulator(self.kronecker.terms(num_examples), shapes)


class SpectrumAccumulator(Accumulator[EigenvalueCorrectedFisher]):
    r"""The running :math:`\sum_{n,k} (Q_G^\top V_{kn} Q_A)^2` of every Kronecker layer.

    Args:
        terms: the Kronecker products that give the eigenvectors, and all other blocks.
        shapes: the shapes of all parameters.
    """

    def __init__(self, terms: Sequence[FisherMatrix], shapes: Shapes) -> None:
        self.rest: list[FisherMatrix] = []
        self.bases: dict[str, EigenvalueCorrectedProduct] = {}
        for block in terms:
            if isinstance(block, KroneckerProduct):
                eigen = block.eigen
                zero = torch.zeros_like(eigen.spectrum)
                key = layer_key(eigen.weights, lookups=eigen.inputs is None)
                self.bases[key] = EigenvalueCorrectedProduct(
                    eigen.weights, eigen.outputs, eigen.inputs, zero, block.num_examples
                )
            else:
                self.rest.append(block)
        self.shapes = shapes

    def add(self, chunk: Chunk) -> None:
        for _, pullbacks, _ in numbered_parts(chunk):
            for pullback in pullbacks:
                if isinstance(pullback, OuterProducts):
                    self._add_outer(pullback)
                elif isinstance(pullback, Lookups):
                    self._add_lookups(pullback)

    def _add_outer(self, pullback: OuterProducts) -> None:
        if pullback.positions == 0:
            return
        basis = self.bases[layer_key(weights_of(pullback))]
        assert basis.inputs is not None
        for examples in pullback.slices():
            a, g = pullback.factors(examples)
            if pullback.bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
            rotated = a @ basis.inputs, g @ basis.outputs
            add_outer_squares(*rotated, basis.spectrum, pullback.memory)

    def _add_lookups(self, pullback: Lookups) -> None:
        if pullback.indices.shape[1] == 0:
            return
        basis = self.bases[layer_key(weights_of(pullback), lookups=True)]
        g = pullback.gradient @ basis.outputs[0]
        shape = pullback.shapes[pullback.name]
        total = basis.spectrum.new_zeros(shape)
        rotated = Lookups(pullback.name, shape, pullback.indices, g, memory=pullback.memory)
        rotated.add_squares({pullback.name: total})
        basis.spectrum += total.T

    def sums(self) -> dict[str, Tensor]:
        return {name: basis.spectrum for name, basis in self.bases.items()}

    def mean(self, num_examples: int) -> EigenvalueCorrectedFisher:
        corrected: Sequence[FisherMatrix] = [
            basis.scaled(1 / num_examples) for basis in self.bases.values()
        ]
        blocks = disjoint([*corrected, *self.rest], num_examples)
        return EigenvalueCorrectedFisher(blocks, self.shapes, num_examples)
