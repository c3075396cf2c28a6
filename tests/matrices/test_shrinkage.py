"""Shrinkage over the units of a layer, against the partial trace of dense matrices."""

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    Diagonal,
    EigenvalueCorrected,
    EWCPenalty,
    Kronecker,
    LowRank,
    Online,
    fisher_information,
)
from ewc.consolidation.update import InLoss
from ewc.parameters import flatten
from ewc.plugin import EWCPlugin
from experiments.strategies.ewc import OnlineEWC
from experiments.strategies.fisher import Fisher

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SIZES = ((4, 5), (5, 3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def data():
    torch.manual_seed(1)
    return [(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))]


def spread(dense, amount):
    """The definition, layer by layer, with the bias as one more input."""
    result, start = dense.clone(), 0
    for inputs, outputs in SIZES:
        size = outputs * (inputs + 1)
        weight = start + torch.arange(outputs * inputs).view(outputs, inputs)
        bias = start + outputs * inputs + torch.arange(outputs)[:, None]
        places = torch.cat([weight, bias], 1).flatten()
        block = dense[places[:, None], places].view(outputs, inputs + 1, outputs, inputs + 1)
        average = torch.einsum("oiok->ik", block) / outputs
        everywhere = torch.einsum("op,ik->oipk", torch.eye(outputs).double(), average)
        mixed = (1 - amount) * block + amount * everywhere
        result[places[:, None], places] = mixed.reshape(size, size)
        start += size
    return result


@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_shrinkage_is_a_partial_trace(structure, amount):
    fisher = fisher_information(network(), data(), structure=structure)
    found = fisher.shrunk(amount)
    assert type(found) is type(fisher)
    torch.testing.assert_close(found.to_dense(), spread(fisher.to_dense(), amount), **EXACT)
    torch.testing.assert_close(found.trace(), fisher.trace(), **EXACT)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_shrinkage_of_a_diagonal_is_the_diagonal_of_the_shrunk_matrix(amount):
    full = fisher_information(network(), data(), structure=Dense()).to_dense()
    diagonal = fisher_information(network(), data(), structure=Diagonal())
    found = flatten(diagonal.shrunk(amount).diagonal())
    torch.testing.assert_close(found, spread(full, amount).diagonal(), **EXACT)


def test_blocks_without_units_stay_as_they_are():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    fisher = fisher_information(model, data(), structure=Kronecker())
    found = fisher.shrunk(0.5)
    for before, after in zip(fisher.blocks, found.blocks, strict=True):
        same = torch.equal(before.to_dense(), after.to_dense())
        assert same == isinstance(before, DenseFisher)
    assert any(isinstance(block, DenseFisher) for block in fisher.blocks)


def test_a_unit_that_nothing_excites_is_free_no_longer():
    model = network()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = []
    for shrinkage in (0.0, 0.5):
        penalty = EWCPenalty(1.0, Online(), shrinkage=shrinkage)
        penalty.consolidate(fisher_information(model, data(), structure=Kronecker()), model)
        with torch.no_grad():
            model[0].weight[2] += 1.0
            values.append(penalty(model).item())
        model.load_state_dict(anchor)
        again = EWCPenalty()
        again.load_state_dict(penalty.state_dict())
        assert again.shrinkage == shrinkage
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values[1] > 1e-3


@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
def test_the_terms_of_a_sum_are_shrunk(structure):
    fisher = fisher_information(network(), data(), structure=structure)
    found = (fisher + 2 * fisher).shrunk(0.3).to_dense()
    torch.testing.assert_close(found, 3 * spread(fisher.to_dense(), 0.3), **EXACT)


def test_the_plugin_hands_the_options_on_and_refuses_what_cannot_be_shrunk():
    plugin = EWCPlugin(structure=Kronecker(), shrinkage=0.2, update=InLoss(0.05))
    assert plugin.penalty.shrinkage == 0.2
    assert plugin.penalty.eigenvector_share == 0.05
    strategy = OnlineEWC(shrinkage=0.3, update=InLoss(0.4))
    (plugin,) = strategy.plugins(Fisher())
    assert (plugin.penalty.shrinkage, plugin.penalty.eigenvector_share) == (0.3, 0.4)
    with pytest.raises(ValueError, match=r"must be 0 with LowRank\(.*\), got 0\.2"):
        EWCPlugin(structure=LowRank(), shrinkage=0.2)


def test_options_that_are_set_later_are_checked_too():
    penalty = EWCPenalty()
    with pytest.raises(ValueError, match=r"shrinkage must .*, got -3"):
        penalty.shrinkage = -3
    with pytest.raises(ValueError, match=r"eigenvector_share must .*, got 0"):
        penalty.eigenvector_share = 0
    assert "shrinkage=0.0, eigenvector_share=1.0" in repr(penalty)


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(amount):
    with pytest.raises(ValueError, match=r"shrinkage must lie in \[0, 1\], got"):
        EWCPenalty(shrinkage=amount)


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(), LowRank()])
def test_other_structures_are_refused_and_nothing_is_kept(structure):
    model, penalty = network(), EWCPenalty(shrinkage=0.1)
    fisher = fisher_information(model, data(), structure=structure)
    with pytest.raises(TypeError, match=f"not a {type(fisher).__name__}"):
        penalty.consolidate(fisher, model)
    assert penalty.terms == []
