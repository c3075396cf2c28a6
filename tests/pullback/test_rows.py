"""Which rows are which example's: in any order, in any batch, by arithmetic that is not exact."""

import itertools

import pytest
import reference
import torch
from networks import slow_way
from torch import nn
from torch.nn import functional

from ewc import (
    Dense,
    Diagonal,
    Implicit,
    Kronecker,
    MonteCarlo,
    fisher_information,
)
from ewc.pullback import tape

pytestmark = slow_way

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Noise(torch.autograd.Function):
    """Gradients as an accelerator gives them: another rounding every time."""

    @staticmethod
    def forward(x, amount):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.amount = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g + ctx.amount * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape), None


class Noisy(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, x):
        return Noise.apply(x, self.amount)


def noisy_network(amount):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 4, 3, padding=1), Noisy(amount), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), Noisy(amount), nn.GroupNorm(2, 6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 16), Noisy(amount), nn.ReLU(), nn.Linear(16, 10)),
    )


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=repr)
@pytest.mark.parametrize("amount", [1e-7, 1e-3])
def test_no_layer_needs_reproducible_gradients(structure, amount, monkeypatch):
    torch.manual_seed(1)
    x, y = torch.rand(24, 64), torch.randint(10, (24,))
    options = {"estimator": MonteCarlo(1, 0), "structure": structure}
    exact = fisher_information(noisy_network(0.0), [(x, y)], **options)

    def slow(*_, **__):
        raise AssertionError("a layer went the slow way")

    monkeypatch.setattr(tape, "PerExample", slow)
    found = fisher_information(noisy_network(amount), [(x, y)], **options)
    for name, diagonal in exact.diagonal().items():
        gap = (found.diagonal()[name] - diagonal).norm()
        assert gap <= 10 * amount * diagonal.norm() + 1e-6 * diagonal.norm(), name


class Reordering(nn.Module):
    """Puts the rows of a layer into an order that every batch decides anew."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(12, 4), nn.Linear(4, 3)

    def hidden(self, x):
        return self.inner(x).tanh()

    @staticmethod
    def order(x):
        order = sorted(range(len(x)), key=lambda i: -float(x[i, 0]))
        return order, [order.index(i) for i in range(len(x))]


class ByStack(Reordering):
    def forward(self, x):
        order, back = self.order(x)
        h = self.hidden(torch.stack([x[i] for i in order]))
        return self.head(torch.stack([h[j] for j in back]))


class ByUnbind(Reordering):
    def forward(self, x):
        order, back = self.order(x)
        h = self.hidden(torch.stack([x[i] for i in order])).unbind(0)
        return self.head(torch.stack([h[j] for j in back]))


class BySplit(Reordering):
    def forward(self, x):
        order, back = self.order(x)
        h = self.hidden(torch.cat([x[i : i + 1] for i in order])).split(1)
        return self.head(torch.cat([h[j] for j in back]))


class ByRoll(Reordering):
    def forward(self, x):
        shift = int(x[:, 0].argmax())
        return self.head(self.hidden(x.roll(shift, 0)).roll(-shift, 0))


class BySlices(Reordering):
    def forward(self, x):
        start = int(x[:, 0].argmax())
        h = self.hidden(torch.cat([x[start:], x[:start]]))
        return self.head(torch.cat([h[len(x) - start :], h[: len(x) - start]]))


class ByWriting(Reordering):
    def forward(self, x):
        order, _ = self.order(x)
        h = self.hidden(torch.stack([x[i] for i in order]))
        out = x.new_zeros(len(x), 4)
        for row, i in enumerate(order):
            out[i] = h[row]
        return self.head(out)


class ByBranch(Reordering):
    def forward(self, x):
        dims = [0] if x[0, 0] > x[-1, 0] else []
        return self.head(self.hidden(x.flip(dims)).flip(dims))


class ByWhere(Reordering):
    def forward(self, x):
        swap = (x[:1, :1] > x[-1:, :1]).expand(len(x), 1)
        h = self.hidden(torch.where(swap, x.flip(0), x))
        return self.head(torch.where(swap, h.flip(0), h))


class ByMatrix(Reordering):
    def forward(self, x):
        order, _ = self.order(x)
        swap = torch.eye(len(x), dtype=x.dtype)[order]
        return self.head(swap.T @ self.hidden(swap @ x))


class BySparseMatrix(Reordering):
    def forward(self, x):
        order, _ = self.order(x)
        swap = torch.eye(len(x), dtype=x.dtype)[order]
        return self.head(torch.sparse.mm(swap.T.to_sparse(), self.hidden(swap @ x)))


class ByIndex(Reordering):
    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(self.hidden(x[order])[order.argsort()])


class ByMatrixBehind(ByMatrix):
    def forward(self, x):
        order, _ = self.order(x)
        swap = torch.eye(len(x), dtype=x.dtype)[order]
        return self.head((self.hidden(swap @ x).T @ swap).T)


class ByPairs(ByMatrix):
    def forward(self, x):
        order, _ = self.order(x)
        swap = torch.eye(len(x), dtype=x.dtype)[order]
        return self.head((swap.T[:, :, None] * self.hidden(swap @ x)[None]).sum(1))


class ByMask(ByMatrix):
    def forward(self, x):
        swap = (x[:1, :1] > x[-1:, :1]).to(x.dtype).expand(len(x), 1)
        h = self.hidden(swap * x.flip(0) + (1 - swap) * x)
        return self.head(swap * h.flip(0) + (1 - swap) * h)


@pytest.mark.parametrize(
    "build",
    [
        *(ByIndex, ByMatrixBehind, ByPairs, ByMask),
        *(ByStack, ByUnbind, BySplit, ByRoll, BySlices, ByWriting),
        *(ByBranch, ByWhere, ByMatrix, BySparseMatrix),
    ],
)
def test_rows_may_lie_in_another_order_in_every_batch(build):
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(12, 12).double()
    x[:4, 0] = torch.tensor([4.0, 3, 2, 1])
    x[4:8, 0] = torch.tensor([1.0, 2, 3, 4])
    expected = reference.categorical_fisher(model, [(row,) for row in x])
    y = torch.zeros(4, dtype=torch.long)
    batches = [(x[i : i + 4], y) for i in (0, 4, 8)]
    for order in (batches, [batches[1], batches[0], batches[2]]):
        found = fisher_information(model, order, structure=Dense())
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


@pytest.mark.parametrize("n", [4, 5])
def test_no_order_of_rows_looks_like_another(n):
    torch.manual_seed(0)
    model, x = ByIndex().double(), torch.randn(n, 12).double()
    gaps = []
    for order in itertools.permutations(range(n)):
        x[:, 0] = torch.tensor(order, dtype=torch.float64)
        expected = reference.categorical_fisher(model, [(row,) for row in x])
        data = [(x, torch.zeros(n, dtype=torch.long))]
        found = fisher_information(model, data, structure=Dense()).to_dense()
        gaps.append(float((found - expected).norm() / expected.norm()))
    assert max(gaps) < 1e-12


def test_swaps_in_large_batches_are_seen():
    torch.manual_seed(0)
    model, x = ByIndex().double(), torch.randn(300, 12).double()
    for i, j in ((0, 2), (17, 19), (40, 296), (3, 243)):
        x[:, 0] = torch.arange(300)
        x[[i, j], 0] = x[[j, i], 0]
        data = [(x, torch.zeros(300, dtype=torch.long))]
        found = fisher_information(model, data, structure=Dense()).to_dense()
        alone = [(row[None], torch.zeros(1, dtype=torch.long)) for row in x]
        expected = fisher_information(model, alone, structure=Dense()).to_dense()
        torch.testing.assert_close(found, expected, **EXACT)


class Shifted(Reordering):
    """All rows four further, which leaves four examples where they are."""

    def forward(self, x):
        return self.head(self.hidden(x.roll(4, 0)).roll(-4, 0))


class Cut(Reordering):
    def forward(self, x):
        h = self.hidden(torch.cat([x[4:], x[:4]]))
        return self.head(torch.cat([h[-4:], h[:-4]]))


@pytest.mark.parametrize("build", [Shifted, Cut])
def test_a_layout_seen_on_few_examples_is_not_taken_for_that_of_many(build):
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(16, 12).double()
    expected = reference.categorical_fisher(model, [(row,) for row in x])
    data = [(x, torch.zeros(16, dtype=torch.long))]
    found = fisher_information(model, data, structure=Dense())
    torch.testing.assert_close(found.to_dense(), expected, **EXACT)


class SolveEachTime(nn.Module):
    """torch's rule for several solutions at once is wrong where n = 1 mod d."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Parameter(torch.randn(2, 2)), nn.Linear(2, 3)

    def forward(self, x):
        matrix = self.a @ self.a.T + torch.eye(2).to(x)
        return self.head(torch.linalg.solve(matrix, x[:, :, None])[..., 0])


@pytest.mark.parametrize("sizes", [(5,), (4, 5), (33, 32)])
def test_wrong_rules_for_many_examples_are_found_out(sizes):
    torch.manual_seed(0)
    model = SolveEachTime().double()
    batches = [(torch.randn(n, 2).double(), torch.zeros(n, dtype=torch.long)) for n in sizes]
    examples = [(row,) for x, _ in batches for row in x]
    expected = reference.categorical_fisher(model, examples, torch.square)
    found = fisher_information(model, batches)
    torch.testing.assert_close(found.to_dense().diagonal(), expected, **EXACT)


# --- examples that depend on each other -------------------------------------------------


class Standardised(nn.Module):
    """Normalises over the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.relu((h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-5)))


class CentredInputs(Standardised):
    """Only inputs depend on each other: gradients of weights do not show it."""

    def forward(self, x):
        return self.last(self.first(x - x.mean(0)).tanh())


class BatchFirstForgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.recurrent(torch.stack([x, x.sin()], 1))[0][:, 0])


class OnAGraph(Standardised):
    """The rows are the nodes of one graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.eye(9).roll(1, 0) + torch.eye(9))

    def forward(self, x):
        return self.last(self.edges @ self.first(x).tanh())


class Similarities(nn.Module):
    """Outputs [n, n], as in contrastive learning."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        h = self.inner(x)
        return h @ h.T


@pytest.mark.parametrize(
    "build", [Standardised, CentredInputs, BatchFirstForgotten, OnAGraph, Similarities]
)
@pytest.mark.parametrize("structure", [Diagonal(), Implicit()], ids=repr)
def test_examples_that_depend_on_each_other_are_refused(build, structure):
    torch.manual_seed(0)
    data = [(torch.randn(9, 4), torch.randint(3, (9,)))]
    with pytest.raises(ValueError, match=r"Batch 0.*must depend on that example alone"):
        fisher_information(build(), data, structure=structure)


class DrawsWeights(Standardised):
    """Random in evaluation mode: its examples give something else every time, alone or not."""

    def forward(self, x):
        return self.last(torch.dropout(self.first(x).tanh(), 0.5, train=True))


class ShiftedLogits(Standardised):
    """Logits less the largest of the batch: the same probabilities."""

    def forward(self, x):
        logits = self.last(self.first(x).tanh())
        return logits - logits.detach().max()


@pytest.mark.parametrize("build", [DrawsWeights, ShiftedLogits])
def test_what_only_seems_to_depend_is_not_refused(build):
    torch.manual_seed(0)
    data = [(torch.randn(9, 4), torch.randint(3, (9,)))]
    assert float(fisher_information(build(), data).trace()) > 0.1


# --- chunks of weights and biases -------------------------------------------------------


class Attention(nn.Module):
    """Keys and values of other widths: one weight each, and chunks of one bias."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        key, value = x[..., :3].sin(), torch.cat([x, x[..., :1]], 2).cos()
        return self.head(self.attention(x, key, value)[0].mean(1))


class Chunks(nn.Module):
    """Rows of a weight beside other rows of a bias."""

    def __init__(self, weight, bias, transposed=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.rows, self.transposed = (weight, bias), transposed
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        weight, bias = self.weight.split(4)[self.rows[0]], self.bias.split(4)[self.rows[1]]
        x = x.flatten(1)[:, :4]
        if self.transposed:
            return self.head((x @ weight + bias).tanh())
        return self.head(functional.linear(x, weight, bias).tanh())


@pytest.mark.parametrize(
    "build",
    [
        Attention,
        lambda: Chunks(0, 0),
        lambda: Chunks(0, 1),
        lambda: Chunks(1, 0),
        lambda: Chunks(0, 1, transposed=True),
        lambda: Chunks(1, 1, transposed=True),
    ],
)
@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 1, 4), (3, 5, 4)], ids=str)
def test_chunks_of_weight_and_bias_need_not_be_parallel(build, shape):
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(shape).double()
    expected = reference.categorical_fisher(model, [(row,) for row in x])
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    found = fisher_information(model, data, structure=Dense())
    torch.testing.assert_close(found.to_dense(), expected, **EXACT)
    diagonal = fisher_information(model, data).to_dense().diagonal()
    torch.testing.assert_close(diagonal, expected.diagonal(), **EXACT)
