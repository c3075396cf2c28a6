"""What a run keeps of a task's Fisher information, from the dense matrix."""

import pytest
import torch
from conftest import EXACT, batches
from torch import nn

from ewc import (
    BlockDiagonal,
    Diagonal,
    EigenvalueCorrected,
    Implicit,
    Kronecker,
    LowRank,
    fisher_information,
)
from experiments.training.information import MOST_RANKS, described

STRUCTURES = [Diagonal(), Kronecker(), EigenvalueCorrected()]
WITHOUT_SPECTRUM = [BlockDiagonal(), LowRank(rank=2), Implicit()]


def information(structure):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    return fisher_information(model, batches(x, y, 7), structure=structure)


@pytest.mark.parametrize("structure", STRUCTURES + WITHOUT_SPECTRUM, ids=repr)
def test_a_layer_has_the_trace_and_the_largest_eigenvalues_of_its_block(structure):
    fisher = information(structure)
    kept = described(fisher, 1.23456)
    dense = fisher.to_dense()
    assert kept["seconds"] == 1.235
    assert kept["trace"] == pytest.approx(float(dense.trace()))
    assert list(kept["layers"]) == ["0", "2"]
    for layer, block in zip(
        kept["layers"].values(), (dense[:56, :56], dense[56:, 56:]), strict=True
    ):
        assert layer["trace"] == pytest.approx(float(block.trace()))
        if structure in WITHOUT_SPECTRUM:
            assert layer["ranks"] == layer["eigenvalues"] == []
            continue
        values = torch.linalg.eigvalsh(block).flip(0)
        ranks = layer["ranks"]
        assert (ranks[0], ranks[-1]) == (1, len(block))
        assert ranks == sorted(set(ranks))
        assert len(ranks) <= MOST_RANKS
        expected = values[torch.tensor(ranks) - 1]
        torch.testing.assert_close(
            torch.tensor(layer["eigenvalues"], dtype=torch.float64), expected, **EXACT
        )
