"""Kronecker factors do not depend on how the data are cut, nor on the memory cap."""

import warnings

import pytest
import torch
from conftest import EXACT
from networks import TwoHeads, slow_way
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    DiagonalFisher,
    EigenvalueCorrected,
    FisherMatrix,
    Kronecker,
    fisher_information,
)
from ewc.fisher.structures import kronecker
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import SumFisher

NUM_EXAMPLES = 9


pytestmark = slow_way


class Packed(nn.Module):
    """A recurrence over sequences of unequal lengths."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x, n):
        packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class Unpadded(nn.Module):
    """Attention within each sequence, its layers over the rows of all sequences at once."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 12)
        self.slope, self.head = nn.PReLU(4), nn.Linear(4, 3)

    def forward(self, x, n):
        words = torch.arange(x.shape[1]) < n[:, None]
        q, k, v = self.inner(self.norm(x[words])).chunk(3, 1)
        of = words.nonzero()[:, 0]
        scores = (q @ k.T).masked_fill(of[:, None] != of, -torch.inf)
        seen = self.slope(scores.softmax(1) @ v)
        return self.head(x.new_zeros(len(x), 4).index_add(0, of, seen) / n[:, None])


class Repeated(nn.Module):
    """A layer that an example uses once or twice, and another that it may skip."""

    def __init__(self):
        super().__init__()
        self.twice, self.skipped, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, n):
        hidden = self.twice(x[:, 0]).tanh()
        again, also = torch.where(n > 2)[0], torch.where(n > 3)[0]
        hidden = hidden.index_copy(0, again, self.twice(hidden[again]).tanh())
        if len(also):
            hidden = hidden.index_add(0, also, self.skipped(hidden[also]).tanh())
        return self.head(hidden)


class Heads(TwoHeads):
    """A head that the data choose."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x, n):
        return super().forward(x[:, 0], n % 2)


class Transposed(nn.Module):
    """A weight that some examples use as it is, some transposed and without the bias."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, n):
        hidden = [
            self.inner(x_n[:1]) if n_n > 2 else x_n[:1] @ self.inner.weight
            for x_n, n_n in zip(x, n, strict=True)
        ]
        return self.head(torch.cat(hidden).tanh())


NETWORKS = {
    "lstm": lambda: Packed(nn.LSTM),
    "gru": lambda: Packed(nn.GRU),
    "attention": Unpadded,
    "repeated": Repeated,
    "heads": Heads,
    "transposed": Transposed,
}


def case(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x = torch.randn(NUM_EXAMPLES, 5, 4, dtype=torch.float64)
    return model, x, torch.tensor([5, 1, 3, 4, 2, 5, 1, 2, 3]), torch.arange(NUM_EXAMPLES) % 3


def cut(x, n, y, size):
    parts = zip(x.split(size), n.split(size), y.split(size), strict=True)
    return [({"x": x, "n": n}, y) for x, n, y in parts]


def product(fisher):
    """With a vector that is the same for every matrix of a network, and by name."""
    torch.manual_seed(1)
    v = {name: torch.randn(s, dtype=torch.float64) for name, s in fisher.shapes.items()}
    return fisher.matvec(v)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "structure",
    [
        Kronecker(),
        Kronecker(reduce=True),
        EigenvalueCorrected(),
    ],
    ids=str,
)
def test_the_matrix_is_the_same_however_the_data_are_cut(structure, name):
    model, x, n, y = case(name)
    # An example alone leaves nothing to be decided: one matrix an example, and their factors' mean.
    expected = product(fisher_information(model, cut(x, n, y, 1), structure=structure))
    for size in range(2, NUM_EXAMPLES + 1):
        found = fisher_information(model, cut(x, n, y, size), structure=structure)
        torch.testing.assert_close(product(found), expected, rtol=1e-8, atol=1e-10)
    for memory in (1, 20_000):
        found = fisher_information(model, cut(x, n, y, 6), structure=structure, memory=memory)
        torch.testing.assert_close(product(found), expected, rtol=1e-8, atol=1e-10)
    order = torch.randperm(NUM_EXAMPLES)
    found = fisher_information(model, cut(x[order], n[order], y[order], 4), structure=structure)
    torch.testing.assert_close(product(found), expected, rtol=1e-8, atol=1e-10)


def test_convolutions_of_several_lengths_are_the_same_however_the_data_are_cut():
    torch.manual_seed(0)
    conv, head = nn.Conv1d(8, 4, 3, padding=1).double(), nn.Linear(4, 3).double()
    model = nn.Sequential(conv, head)
    model.forward = lambda x: head(conv(x).tanh().mean(2))
    data = [
        (torch.randn(6, 8, t, dtype=torch.float64), torch.zeros(6, dtype=torch.long))
        for t in (1, 2, 7)
    ]
    found = []
    for size, memory in ((6, 2**29), (4, 2**29), (1, 2**29), (6, 1), (6, 5_000)):
        parts = [pair for x, y in data for pair in zip(x.split(size), y.split(size), strict=True)]
        found.append(fisher_information(model, parts, structure=Kronecker(), memory=memory))
    for other in found[1:]:
        torch.testing.assert_close(product(other), product(found[0]), **EXACT)
    # Every length has a third of the weight, whatever its number of positions.
    inputs = torch.stack(
        [fisher_information(model, [pair], structure=Kronecker()).blocks[0].inputs for pair in data]
    )
    torch.testing.assert_close(found[0].blocks[0].inputs, inputs.mean(0), **EXACT)


def lstm_factors(model, x, n):
    """The factors of the LSTM's two maps, step by step from its equations."""
    w, u = model.rnn.weight_ih_l0, model.rnn.weight_hh_l0
    b, c = model.rnn.bias_ih_l0, model.rnn.bias_hh_l0
    factors = [torch.zeros(s, s, dtype=torch.float64) for s in (5, 12, 4, 12)]
    for x_n, n_n in zip(x, n, strict=True):
        state, cell = x.new_zeros(3), x.new_zeros(3)
        gates, seen, before = [], [], []
        for t in range(int(n_n)):
            seen.append(torch.cat([x_n[t], torch.ones(1)]))
            before.append(torch.cat([state.detach(), torch.ones(1)]))
            gates.append(w @ x_n[t] + b + u @ state + c)
            i, f, g, o = gates[-1].chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        log_p = model.head(state).log_softmax(0)
        for k in range(3):
            for g in torch.autograd.grad(log_p[k], gates, retain_graph=True):
                moment = log_p[k].detach().exp() * torch.outer(g, g) / len(x)
                factors[1] += moment
                factors[3] += moment
        for a, h in zip(seen, before, strict=True):
            factors[0] += torch.outer(a, a) / (n_n * len(x))
            factors[2] += torch.outer(h, h) / (n_n * len(x))
    return factors


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_packed_lstm_weighs_every_position_by_its_own_length(size):
    model, x, n, y = case("lstm")
    fisher = fisher_information(model, cut(x, n, y, size), structure=Kronecker())
    blocks = {block.weights.weight: block for block in fisher.blocks}
    seen, before = blocks["rnn.weight_ih_l0"], blocks["rnn.weight_hh_l0"]
    found = [seen.inputs[0], seen.outputs[0], before.inputs[0], before.outputs[0]]
    torch.testing.assert_close(found, lstm_factors(model, x, n), **EXACT)


def test_a_layer_of_two_forms_is_the_sum_of_them():
    model, x, n, y = case("transposed")
    fisher = fisher_information(model, cut(x, n, y, 9), structure=Kronecker())
    (block,) = (block for block in fisher.blocks if "inner.weight" in block.shapes)
    assert isinstance(block, SumFisher)
    assert set(block.shapes) == {"inner.weight", "inner.bias"}
    # Either form is the mean over its examples, and has their share.
    usual = n > 2
    parts = [
        (float(some.sum()) / NUM_EXAMPLES)
        * fisher_information(model, cut(x[some], n[some], y[some], 9), structure=Kronecker())
        for some in (usual, ~usual)
    ]
    expected = [part.to_dense()[:20, :20] for part in parts]
    torch.testing.assert_close(block.to_dense(), expected[0] + expected[1], **EXACT)


def test_a_layer_that_some_examples_skip_has_its_share():
    """Exact where every example has a head of its own: one example a layer."""
    model, x, _, y = case("heads")
    data = cut(x[:2], torch.tensor([1, 2]), y[:2], 2)
    exact, found = (
        fisher_information(model, data, structure=structure, parameters=["heads.*"]).to_dense()
        for structure in (BlockDiagonal(), Kronecker())
    )
    torch.testing.assert_close(found, exact, **EXACT)


# --- layers without a Kronecker form -------------------------------------------------------


class Tied(nn.Module):
    """Positions, normalised weights and words that are the last layer's as well."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        hidden = self.norm(self.inner(self.words(x) + self.positions).tanh())
        return hidden.mean(1) @ self.words.weight.T


def tied():
    torch.manual_seed(0)
    model = Tied().double()
    return model, torch.randint(7, (6, 5)), torch.randint(7, (6,))


LIMIT = 15**2 * 8  # bytes: above the blocks of the norm and of the bias


@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
@pytest.mark.parametrize(("size", "memory"), [(6, 2**29), (6, 1), (4, 2**29), (1, 2**29)])
def test_large_layers_without_a_kronecker_form_have_their_exact_diagonal(
    structure, size, memory, monkeypatch
):
    model, x, y = tied()
    exact = fisher_information(model, [(x, y)], structure=Dense()).diagonal()
    monkeypatch.setattr(kronecker, "LARGEST_BLOCK", LIMIT)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    with pytest.warns(UserWarning, match="Only the exact diagonal is kept") as caught:
        fisher = fisher_information(model, batches, structure=structure, memory=memory)
    (message,) = (str(warning.message) for warning in caught)
    large = {"words.weight", "positions", "inner.parametrizations.weight.original1"}
    for name in exact:
        assert (name in message) == (name in large or "original0" in name)
    found = fisher.diagonal()
    for block in fisher.blocks:
        if block.shapes.keys() & large:
            assert isinstance(block, DiagonalFisher)
        if not isinstance(block, KroneckerProduct):
            for name in block.shapes:
                torch.testing.assert_close(found[name], exact[name], **EXACT)
    assert isinstance(next(b for b in fisher.blocks if "norm.weight" in b.shapes), DenseFisher)
    assert "exact diagonals: " in repr(fisher)


def test_a_matrix_with_exact_diagonals_has_every_verb(monkeypatch, tmp_path):
    model, x, y = tied()
    monkeypatch.setattr(kronecker, "LARGEST_BLOCK", LIMIT)
    with pytest.warns(UserWarning, match="Only the exact diagonal"):
        fisher = fisher_information(model, [(x, y)], structure=Kronecker())
    fisher.save(tmp_path / "fisher")
    twice = fisher + fisher
    assert isinstance(twice, FisherMatrix)
    for matrix, factor in ((fisher, 1), (FisherMatrix.load(tmp_path / "fisher"), 1), (twice, 2)):
        dense = factor * fisher.to_dense()
        torch.manual_seed(0)
        v = {n: torch.randn(s, dtype=torch.float64) for n, s in fisher.shapes.items()}
        flat = torch.cat([tensor.flatten() for tensor in v.values()])
        damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
        torch.testing.assert_close(matrix.to_dense(), dense, **EXACT)
        torch.testing.assert_close(matrix.quadratic_form(v), flat @ dense @ flat)
        solved = torch.cat([tensor.flatten() for tensor in matrix.solve(v, 0.1).values()])
        torch.testing.assert_close(solved, torch.linalg.solve(damped, flat))
        torch.testing.assert_close(matrix.logdet(0.1), torch.linalg.slogdet(damped).logabsdet)
        torch.testing.assert_close(matrix.trace(), dense.trace())
        torch.testing.assert_close(
            matrix.eigenvalues(), torch.linalg.eigvalsh(dense), rtol=1e-8, atol=1e-10
        )


def test_small_layers_without_a_kronecker_form_have_their_exact_block_for_any_memory():
    model, x, y = tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = fisher_information(model, [(x, y)], structure=Kronecker(), memory=1)
    assert "exact diagonals" not in repr(fisher)


def test_position_embeddings_of_a_large_network_never_take_a_dense_block():
    """150,000 parameters: a dense block of 91 GB."""
    head = nn.Linear(768, 2)
    positions = nn.Parameter(torch.zeros(1, 197, 768))
    model = nn.Sequential(head)
    model.register_parameter("positions", positions)
    model.forward = lambda x: head((x[:, None] + positions).tanh().mean(1))
    data = [(torch.randn(2, 768), torch.tensor([0, 1]))]
    with pytest.warns(UserWarning, match=r"positions \(91\.6 GB\)"):
        fisher = fisher_information(model, data, structure=Kronecker())
    expected = fisher_information(model, data).diagonal()["positions"]
    torch.testing.assert_close(fisher.diagonal()["positions"], expected)
