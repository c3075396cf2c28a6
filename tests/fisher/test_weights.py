"""Examples that count several times, or not at all."""

import pytest
import torch
from conftest import EXACT
from torch import nn

from ewc import (
    BlockDiagonal,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Exact,
    Kronecker,
    LowRank,
    MonteCarlo,
    fisher_information,
)
from ewc.linalg import devices

STRUCTURES = (
    *(Diagonal(), BlockDiagonal(), LowRank(rank=60)),
    *(Kronecker(), Kronecker(reduce=True), EigenvalueCorrected()),
)


class Network(nn.Module):
    """Embeddings with padding, a convolution without and a linear layer with a bias."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 3, padding_idx=0)
        self.mix = nn.Conv1d(3, 2, 2, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, ids):
        return self.head(self.mix(self.words(ids).mT).tanh().mean(2))


@pytest.fixture(params=["host", "accelerator"])
def machine(request, monkeypatch):
    if request.param == "accelerator":
        monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)


@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.usefixtures("machine")
def test_an_example_counts_as_often_as_its_weight_says(structure, estimator):
    model = Network().double()
    ids, labels = torch.randint(6, (5, 4)), torch.randint(3, (5,))
    weights = torch.tensor([3, 0, 1, 2, 1])
    data = [{"ids": ids, "labels": labels, "weights": weights.double()}]
    repeated = [(ids.repeat_interleave(weights, 0), labels.repeat_interleave(weights))]
    found, expected = (
        fisher_information(model, batches, estimator=estimator, structure=structure)
        for batches in (data, repeated)
    )
    share = int(weights.sum()) / len(ids)
    torch.testing.assert_close(found.to_dense(), share * expected.to_dense(), **EXACT)


@pytest.mark.parametrize("estimator", [Exact(), Exact(0.01), MonteCarlo(1), Empirical()], ids=repr)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_examples_that_do_not_count_change_nothing_but_their_number(structure, estimator):
    model = Network().double()
    ids, labels = torch.randint(6, (6, 4)), torch.tensor([-100, 1, 0, -100, 2, -100])
    whole = fisher_information(model, [(ids, labels)], estimator=estimator, structure=structure)
    for size in (1, 2):
        data = list(zip(ids.split(size), labels.split(size), strict=True))
        cut = fisher_information(model, data, estimator=estimator, structure=structure)
        torch.testing.assert_close(cut.to_dense(), whole.to_dense(), **EXACT)
    if estimator != MonteCarlo(1):  # which draws for all examples
        kept = labels != -100
        data = [(ids[kept], labels[kept])]
        alone = fisher_information(model, data, estimator=estimator, structure=structure)
        torch.testing.assert_close(whole.to_dense(), 0.5 * alone.to_dense(), **EXACT)
