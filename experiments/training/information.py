"""What a run keeps of a task's Fisher information: traces and spectra by layer."""

from typing import Any

import torch
from torch import Tensor

from ewc import DiagonalFisher, FisherMatrix
from ewc.fisher.structures.block_diagonal import by_layer
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct

MOST_RANKS = 48
"""The largest number of eigenvalues that are kept of a layer."""


def described(fisher: FisherMatrix, seconds: float) -> dict[str, Any]:
    """Trace, time, and by layer the trace and some eigenvalues, for ``results.json``.

    A layer is a module that holds parameters itself.  Its eigenvalues are those of its block, where
    the structure has them in closed form; of a diagonal matrix they are the entries.

    Args:
        fisher: the Fisher information of a task.
        seconds: how long its computation took.

    Returns:
        ``trace``, ``seconds`` and ``layers``.  A layer has its ``trace``, and ``eigenvalues`` in
        descending order at ``ranks`` from 1 with about equal ratios.  Both are empty where the
        structure has no spectrum of the layer.
    """
    blocks = fisher.blocks if isinstance(fisher, BlockDiagonalFisher) else []
    block_of = {tuple(block.shapes): block for block in blocks}
    layers: dict[str, dict[str, Any]] = {}
    # Matrix-free matrices take a pass over the data for a diagonal, so there is one.
    diagonal = fisher.diagonal()
    for layer, shapes in by_layer(fisher.shapes).items():
        entries = torch.cat([diagonal[name].flatten() for name in shapes])
        block = fisher if isinstance(fisher, DiagonalFisher) else block_of.get(tuple(shapes))
        spectrum = entries if isinstance(block, DiagonalFisher) else _spectrum(block)
        ranks = _ranks(len(spectrum))
        values = spectrum.sort(descending=True).values[[rank - 1 for rank in ranks]]
        layers[layer] = {
            "trace": float(entries.sum()),
            "ranks": ranks,
            "eigenvalues": values.tolist(),
        }
    trace = sum(layer["trace"] for layer in layers.values())
    return {"trace": trace, "seconds": round(seconds, 3), "layers": layers}


def _spectrum(block: FisherMatrix | None) -> Tensor:
    """All eigenvalues of a layer's block; none where they would need its dense matrix."""
    if isinstance(block, EigenvalueCorrectedProduct):
        spectrum: Tensor = block.spectrum.flatten()
        return spectrum
    if not isinstance(block, KroneckerProduct):
        return torch.zeros(0)
    # Without the eigenvectors, which take longer and would stay in memory.
    outputs, inputs = torch.linalg.eigvalsh(block.outputs), block.inputs
    if inputs.dim() == 3:
        inputs = torch.linalg.eigvalsh(inputs)
    # Rounding can leave an eigenvalue of 0 slightly negative.
    return torch.einsum("go,gi->goi", outputs.clamp_min(0.0), inputs.clamp_min(0.0)).flatten()


def _ranks(count: int) -> list[int]:
    """Ranks from 1 to ``count`` with about equal ratios."""
    if count == 0:
        return []
    points = torch.logspace(0, 1, MOST_RANKS, base=count, dtype=torch.float64).round()
    return sorted({int(point) for point in points.tolist()})
