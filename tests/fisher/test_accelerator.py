"""What an accelerator does, without one: its sizes of work, forced on the CPU."""

import pytest
import reference
import torch
from conftest import EXACT
from counting import HOST_READS, Operations
from networks import LAYERS, slow_way
from torch import nn

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Exact,
    Kronecker,
    MonteCarlo,
    fisher_information,
)
from ewc.linalg import devices
from ewc.linalg.gram import StoredColumns, StoredRows
from ewc.linalg.squares import add_outer_squares

pytestmark = slow_way


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)


@pytest.mark.parametrize("memory", [None, 20_000])
@pytest.mark.parametrize("structure", [Diagonal(), Dense()])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_sizes_of_an_accelerator_do_not_change_the_matrix(
    layer, structure, memory, accelerator
):
    torch.manual_seed(0)
    model = LAYERS[layer]().double().eval()
    x, y = torch.randn(9, 12, dtype=torch.float64), torch.randint(3, (9,))
    dense = reference.categorical_fisher(model, [(example,) for example in x])
    found = fisher_information(model, [(x, y)], structure=structure, memory=memory)
    diagonal = torch.cat([entries.flatten() for entries in found.diagonal().values()])
    torch.testing.assert_close(diagonal, dense.diagonal(), **EXACT)


@pytest.mark.parametrize("structure", [Kronecker(), Kronecker(reduce=True), EigenvalueCorrected()])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_sizes_of_an_accelerator_do_not_change_the_factors(layer, structure, monkeypatch):
    torch.manual_seed(0)
    model = LAYERS[layer]().double().eval()
    data = [(torch.randn(n, 12, dtype=torch.float64), torch.randint(3, (n,))) for n in (6, 5)]
    expected = fisher_information(model, data, structure=structure).to_dense()
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    found = fisher_information(model, data, structure=structure).to_dense()
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("memory", [500, 2**20])
@pytest.mark.parametrize(("k", "t"), [(1, 1), (3, 1), (1, 5), (4, 5), (1, 60), (2, 70)])
def test_squares_of_outer_products(k, t, memory, accelerator):
    a = torch.randn(4, 2, t, 3, dtype=torch.float64)
    g = torch.randn(k, 4, 2, t, 5, dtype=torch.float64)
    total = torch.ones(2, 5, 3, dtype=torch.float64)
    expected = 1 + torch.einsum("kngto,ngti->kngoi", g, a).square().sum((0, 1))
    add_outer_squares(a, g, total, memory)
    torch.testing.assert_close(total, expected, **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
def test_second_moments_of_wide_rows(groups, accelerator):
    columns = torch.randn(3, groups, 2050, 2, dtype=torch.float64)
    rows = columns.permute(1, 0, 3, 2).flatten(1, 2)
    expected = 1 + 0.5 * rows.transpose(1, 2) @ rows
    for block in (StoredColumns(columns), StoredRows(rows)):
        total = torch.ones(groups, 2050, 2050, dtype=torch.float64)
        block.add_gram(total, 0.5)
        torch.testing.assert_close(total, expected, **EXACT)


class Residual(nn.Module):
    """A residual block as in ResNet-18."""

    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()

        def convolution(i, o, k, s):
            return nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o)

        self.path = nn.Sequential(
            *convolution(inputs, outputs, kernel, stride),
            nn.ReLU(),
            *convolution(outputs, outputs, kernel, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        )

    def forward(self, x):
        return (self.path(x) + self.shortcut(x)).relu()


def residual_network(kernel):
    """ResNet-18 for 32 x 32 pixels, an eighth as wide."""
    layers = [nn.Conv2d(3, 8, kernel, 1, kernel // 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for inputs, outputs in ((8, 8), (8, 16), (16, 32), (32, 64)):
        layers += [Residual(inputs, outputs, kernel, outputs // inputs)]
        layers += [Residual(outputs, outputs, kernel, 1)]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)).eval()


class Transformer(nn.Module):
    """A causal transformer over tokens, as GPT-2, with one output a class."""

    def __init__(self, layers):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.places = nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(tokens) + self.places(torch.arange(length))
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.head(x[:, -1])


class VisionTransformer(nn.Module):
    """A transformer over patches and a first token of its own, from which the classes come."""

    def __init__(self, layers):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), patches], 1) + self.places
        return self.head(self.blocks(tokens)[:, 0])


class Recurrent(nn.Module):
    """An LSTM over a sequence, and classes from its last state."""

    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(6, width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def networks(name, count):
    """A network and a batch for it."""
    torch.manual_seed(0)
    if name == "transformer":
        return Transformer(4).eval(), torch.randint(50, (count, 12)), torch.randint(5, (count,))
    if name == "vit":
        x = torch.randn(count, 3, 32, 32)
        return VisionTransformer(4).eval(), x, torch.randint(5, (count,))
    if name == "lstm":  # the width is a multiple of the examples
        return Recurrent(16).eval(), torch.randn(count, 6, 6), torch.randint(5, (count,))
    kernel = {"resnet": 3, "resnet_5x5": 5}[name]
    return residual_network(kernel), torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def training_operations(name, count):
    """The operations of a forward and a backward pass."""
    model, x, y = networks(name, count)
    with Operations() as operations:
        nn.functional.cross_entropy(model(x), y).backward()
    return operations.counts.total()


def operations_a_batch(name, count, estimator, structure):
    """The operations that one further batch takes, by kind."""
    model, x, y = networks(name, count)
    counts = []
    for batches in (2, 3):
        with Operations() as operations:
            fisher_information(
                model, [(x, y)] * batches, estimator=estimator, structure=structure, memory=2**32
            )
        counts.append(operations.counts)
    counts[1].subtract(counts[0])
    return counts[1]


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
@pytest.mark.parametrize("estimator", [MonteCarlo(1), Empirical()])
@pytest.mark.parametrize("name", ["resnet", "transformer", "vit"])
def test_a_batch_takes_at_most_four_times_the_operations_of_training(
    name, estimator, structure, accelerator
):
    counts = operations_a_batch(name, 8, estimator, structure)
    assert not {name: n for name, n in counts.items() if n and name.startswith(HOST_READS)}
    assert counts.total() <= 4 * training_operations(name, 8)


def test_a_width_that_is_a_multiple_of_the_examples_takes_no_test_in_every_batch(accelerator):
    counts = operations_a_batch("lstm", 8, MonteCarlo(1), Diagonal())
    assert not {name: n for name, n in counts.items() if n and name.startswith(HOST_READS)}


@pytest.mark.slow
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
@pytest.mark.parametrize("name", ["resnet", "transformer", "vit"])
def test_an_exact_batch_takes_at_most_four_times_a_pass_a_vector(name, structure, accelerator):
    counts = operations_a_batch(name, 4, Exact(), structure)
    assert not {name: n for name, n in counts.items() if n and name.startswith(HOST_READS)}
    vectors = {"resnet": 9, "transformer": 4, "vit": 4}[name]
    assert counts.total() <= 4 * vectors * training_operations(name, 4)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
@pytest.mark.parametrize(
    "estimator", [MonteCarlo(1), pytest.param(Exact(), marks=pytest.mark.slow)]
)
def test_operations_do_not_grow_with_examples_and_kernels(estimator, structure, accelerator):
    few, many, wide = (
        operations_a_batch(name, count, estimator, structure).total()
        for name, count in (("resnet", 2), ("resnet", 16), ("resnet_5x5", 2))
    )
    # The factors collect rows until there are as many as columns.
    assert many <= 1.02 * few
    # The 1x1 shortcuts become no larger, and the algorithms follow the sizes of the maps.
    assert wide <= 1.05 * few


@pytest.mark.parametrize(
    ("likelihood", "impossible", "message"),
    [
        (Categorical(), torch.tensor([0, 7, 1]), "Batch 1: a target does not fit Categorical"),
        (Bernoulli(), torch.full((3, 3), 0.5), "Batch 1: a target does not fit Bernoulli"),
    ],
)
def test_impossible_targets_are_found_at_the_end(likelihood, impossible, message, accelerator):
    model, x = nn.Linear(4, 3), torch.randn(3, 4)
    possible = torch.ones_like(impossible)
    read = []

    def batches():
        for y in (possible, impossible, possible):
            read.append(y)
            yield x, y

    with pytest.raises(ValueError, match=message):
        fisher_information(model, batches(), likelihood, estimator=Empirical())
    assert len(read) == 3


def test_scores_that_are_not_finite_are_found_at_the_end(accelerator):
    x, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    model, data = nn.Linear(4, 3), [(x, y), (x * torch.nan, y), (x / 0, y)]
    said = "Batch 1: the scores .* are not finite, although the parameters are finite: check the in"
    with pytest.raises(FloatingPointError, match=said):
        fisher_information(model, data)
    nn.init.constant_(model.bias, torch.nan)
    with pytest.raises(FloatingPointError, match=r"Batch 0: .* the parameter 'bias' is not finite"):
        fisher_information(model, data)
