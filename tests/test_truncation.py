"""Kronecker matrices of low rank: the oracle is the dense factor, cut by its own eigenvectors."""

import pytest
import torch
from torch import nn

from ewc import (
    DenseFisher,
    EWCPenalty,
    FisherMatrix,
    KroneckerFisher,
    Online,
    Separate,
    fisher_information,
)
from ewc.fisher.kronecker_product import KroneckerProduct
from ewc.fisher.truncated_product import TruncatedProduct
from ewc.fisher.truncation import truncated
from ewc.plugin import EWCPlugin
from experiments.strategies.ewc import OnlineEWC
from experiments.strategies.fisher import Fisher as FisherOptions

EXACT = {"rtol": 1e-9, "atol": 1e-11}
RANK = 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3)).double()


def information(model, seed=0, structure=KroneckerFisher):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    return fisher_information(model, [(x, y)], structure=structure)


def cut(inputs, rank):
    """The nearest matrix of this rank, by singular values."""
    left, values, right = torch.linalg.svd(inputs)
    return left[:, :rank] * values[:rank] @ right[:rank]


def by_hand(fisher, rank=RANK):
    """The Kronecker matrix with every input factor cut, written with whole factors."""
    blocks = [
        KroneckerProduct(b.weights, b.outputs, cut(b.inputs[0], rank)[None], b.num_examples)
        if isinstance(b, KroneckerProduct)
        else b
        for b in fisher.blocks
    ]
    return KroneckerFisher(blocks, fisher.shapes, fisher.num_examples)


def test_the_leading_eigenvectors_are_left():
    fisher = information(network())
    found, expected = truncated(fisher, RANK), by_hand(fisher)
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), **EXACT)
    assert [type(block).__name__ for block in found.blocks] == [
        "TruncatedProduct", "TruncatedProduct", "DenseFisher",
    ]  # fmt: skip
    assert "exact blocks: 3.weight, 3.bias)" in repr(found)
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in fisher.shapes.items()}
    for name, product in expected.matvec(v).items():
        torch.testing.assert_close(found.matvec(v)[name], product, **EXACT)
    for name, product in expected.solve(v, 0.1).items():
        torch.testing.assert_close(found.solve(v, 0.1)[name], product, **EXACT)
    for name, entries in expected.diagonal().items():
        torch.testing.assert_close(found.diagonal()[name], entries, **EXACT)
        inverse = found.inverse_diagonal(0.1)[name]
        torch.testing.assert_close(inverse, expected.inverse_diagonal(0.1)[name], **EXACT)
    rows = {name: torch.stack([tensor, 2 * tensor.sin()]) for name, tensor in v.items()}
    forms = expected.inverse_quadratic_forms(rows, 0.1)
    torch.testing.assert_close(found.inverse_quadratic_forms(rows, 0.1), forms, **EXACT)
    torch.testing.assert_close(found.trace(), expected.trace(), **EXACT)
    torch.testing.assert_close(found.logdet(0.1), expected.logdet(0.1), **EXACT)
    torch.testing.assert_close(found.eigenvalues(), expected.eigenvalues(), **EXACT)


def test_small_factors_and_other_structures_stay_as_they_are():
    model = network()
    dense = information(model, structure=DenseFisher)
    assert truncated(dense, RANK) is dense
    fisher = information(model)
    torch.testing.assert_close(truncated(fisher, 10).to_dense(), fisher.to_dense(), rtol=0, atol=0)
    assert not any(isinstance(b, TruncatedProduct) for b in truncated(fisher, 10).blocks)


def test_terms_of_a_sum_are_truncated():
    model = network()
    first, second = information(model, 0), information(model, 1)
    found = truncated(first + 2 * second, RANK).to_dense()
    expected = by_hand(first).to_dense() + 2 * by_hand(second).to_dense()
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("consolidation", [Separate(), Online(), Online(exact=True)])
def test_the_penalty_remembers_so_many_eigenvectors(consolidation):
    """The same tasks by hand: cut after every task, before the next is added."""
    model = network()
    penalty = EWCPenalty(1.0, consolidation, rank=RANK)
    whole = EWCPenalty(1.0, consolidation)
    for seed in range(3):
        fisher = information(model, seed)
        penalty.consolidate(fisher, model)
        whole.consolidate(by_hand(fisher) if isinstance(consolidation, Separate) else fisher, model)
        if consolidation == Online():
            (term,) = whole.terms
            whole.terms = [type(term)(by_hand(term.precision), term.anchor)]
        if consolidation == Online(exact=True):
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert penalty(model).item() == pytest.approx(whole(model).item(), rel=1e-9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = [b for term in penalty.terms for b in term.precision.blocks]
    products = [b for block in blocks for b in getattr(block, "terms", [block])]
    kinds = {type(product) for product in products}
    assert TruncatedProduct in kinds
    assert KroneckerProduct not in kinds
    assert all(len(p.values) == RANK for p in products if isinstance(p, TruncatedProduct))
    if consolidation == Online(exact=True):
        # The network stood still: three terms around one anchor, each cut by itself.
        away = {n: p.detach() - penalty.terms[0].anchor[n] for n, p in model.named_parameters()}
        expected = 0.0
        for seed in range(3):
            term = by_hand(information(anchored(penalty), seed)).precision
            expected += 0.5 * sum(float((away[n] * t).sum()) for n, t in term.matvec(away).items())
        assert penalty(model).item() == pytest.approx(expected / 40, rel=1e-9)


def anchored(penalty):
    model = network()
    model.load_state_dict(penalty.terms[0].anchor)
    return model


def test_an_implicit_step_takes_the_low_rank():
    model = network()
    penalty = EWCPenalty(1.0, Online(), rank=RANK)
    whole = EWCPenalty(1.0, Online())
    fisher = information(model)
    penalty.consolidate(fisher, model)
    whole.consolidate(by_hand(fisher), model)
    moved = {}
    for which in (penalty, whole):
        copy = network()
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.add_(0.3)
        which.implicit_step(copy, torch.optim.SGD(copy.parameters(), lr=0.5), 2)
        moved[which] = dict(copy.named_parameters())
    for name, tensor in moved[penalty].items():
        torch.testing.assert_close(tensor, moved[whole][name], **EXACT)


def test_the_rank_is_handed_on_kept_and_checked(tmp_path):
    plugin = EWCPlugin(structure=KroneckerFisher, rank=6)
    (from_options,) = OnlineEWC(rank=7).plugins(FisherOptions())
    assert (plugin.penalty.rank, from_options.penalty.rank) == (6, 7)
    model, penalty = network(), EWCPenalty(2.0, Online(), rank=RANK)
    fisher = information(model)
    penalty.consolidate(fisher, model)
    loaded = EWCPenalty()
    loaded.load_state_dict(penalty.state_dict())
    assert loaded.rank == RANK
    with torch.no_grad():
        model[0].weight.add_(0.1)
    assert loaded(model).item() == penalty(model).item() > 0
    truncated(fisher, RANK).save(tmp_path / "few.safetensors")
    again = FisherMatrix.load(tmp_path / "few.safetensors")
    torch.testing.assert_close(again.to_dense(), by_hand(fisher).to_dense(), **EXACT)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank is {rank}: it must be 1 or more, or None"):
            EWCPenalty(rank=rank)
        with pytest.raises(ValueError, match=f"rank is {rank}: it must be 1 or more"):
            truncated(fisher, rank)
