"""Classes at every position of an example: tokens and pixels, some of which do not count."""

import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from conftest import EXACT, batches
from torch import nn

from ewc import (
    BlockDiagonal,
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Exact,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
    fisher_information,
)
from ewc.fisher.data_pass import DataPass
from ewc.parameters import flatten, trainable_parameters
from ewc.pullback.arguments import Arguments
from ewc.pullback.batches import Examples

N, T, WORDS = 5, 4, 6


class LanguageModel(nn.Module):
    """A causal transformer: logits ``[n, t, words]``."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.places = nn.Parameter(0.3 * torch.randn(T, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, WORDS)
        self.register_buffer("mask", torch.triu(torch.full((T, T), -torch.inf), 1))

    def forward(self, ids):
        hidden = self.words(ids) + self.places
        return self.head(self.layer(hidden, src_mask=self.mask))


def text():
    """Ids and their labels: one sentence is short, one is nothing but padding."""
    ids = torch.randint(WORDS, (N, T))
    labels = ids.clone()
    labels[1, 2:] = -100
    labels[3] = -100
    return ids, labels


def predicted(labels):
    """By position of the logits, the label that counts there, or None."""
    return [[None if y == -100 else y for y in [*row[1:], -100]] for row in labels.tolist()]


def by_position(model, x, counted, weights=None):
    """Mean over examples of sum_t w_t sum_k p_tk grad log p_tk (grad log p_tk)', [p, p].

    ``model`` gives logits ``[n, t, c]``; ``counted`` has by example and position a label or None.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for n in range(len(x)):
        logits = model(x[n : n + 1])[0]
        for t, label in enumerate(counted[n]):
            if label is None:
                continue
            log_p = logits[t] - logits[t].logsumexp(0)
            for k in range(len(log_p)):
                g = reference._gradient(log_p[k], parameters)
                weight = 1 if weights is None else weights[n][t]
                total = total + weight * log_p[k].exp().detach() * torch.outer(g, g)
    return total / len(x)


def observed(model, x, counted, weights=None):
    """Mean over examples of g g' with g = sum_t sqrt(w_t) grad log p(y_t)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for n in range(len(x)):
        logits = model(x[n : n + 1])[0]
        g = 0
        for t, label in enumerate(counted[n]):
            if label is not None:
                weight = 1 if weights is None else weights[n][t] ** 0.5
                log_p = logits[t] - logits[t].logsumexp(0)
                g = g + weight * reference._gradient(log_p[label], parameters)
        if torch.is_tensor(g):
            total = total + torch.outer(g, g)
    return total / len(x)


@pytest.fixture
def language():
    model = LanguageModel().double()
    ids, labels = text()
    return model, ids, labels


NEXT = Categorical(next_token=True)


@pytest.mark.parametrize("size", [1, 3, N])
def test_a_language_model_equals_brute_force(language, size):
    model, ids, labels = language
    expected = by_position(model, ids, predicted(labels))
    data = batches(ids, labels, size)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for structure in (
        Dense(),
        Diagonal(),
        LowRank(rank=len(expected)),
        Implicit(),
        EigenvalueCorrected(),
        BlockDiagonal(),
    ):
        found = fisher_information(model, data, NEXT, structure=structure)
        assert found.num_examples == N
        torch.testing.assert_close(found.trace(), expected.trace(), **EXACT)
        if structure != EigenvalueCorrected():
            torch.testing.assert_close(flatten(found.diagonal()), expected.diagonal(), **EXACT)
        if isinstance(structure, Dense | LowRank | Implicit):
            product = flatten(found.matvec(v))
            torch.testing.assert_close(product, expected @ flatten(v), rtol=1e-7, atol=1e-8)


def test_observed_words_equal_brute_force(language):
    model, ids, labels = language
    expected = observed(model, ids, predicted(labels))
    for size in (1, 3, N):
        found = fisher_information(
            model, batches(ids, labels, size), NEXT, estimator=Empirical(), structure=Dense()
        )
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


@pytest.mark.slow
def test_drawn_words_are_unbiased(language):
    model, ids, labels = language
    expected = by_position(model, ids, predicted(labels)).diagonal()
    draws = torch.stack(
        [
            flatten(
                fisher_information(
                    model, [(ids, labels)], NEXT, estimator=MonteCarlo(5, seed)
                ).diagonal()
            )
            for seed in range(150)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    moved = error > 1e-12  # the keys' biases move nothing, but for rounding
    assert float(expected[~moved].max()) < 1e-12
    z = (draws.mean(0) - expected)[moved] / error[moved]
    assert float(z.abs().max()) < 5
    assert 0.3 < float(z.square().mean()) < 3


def test_drawn_words_do_not_depend_on_the_batches(language):
    model, ids, labels = language
    one, some, whole = (
        fisher_information(model, batches(ids, labels, size), NEXT, estimator=MonteCarlo(3, 5))
        for size in (1, 3, N)
    )
    torch.testing.assert_close(some.diagonal(), one.diagonal(), **EXACT)
    torch.testing.assert_close(whole.diagonal(), one.diagonal(), **EXACT)


def test_kronecker_factors_are_exact_where_only_the_head_is_linear(language):
    """One counted token of a linear head: a Kronecker product of one term."""
    model, ids, labels = language
    labels = labels.clone()
    labels[:, 2:] = -100
    ids, labels = ids[:1], labels[:1]
    chosen = ["head.weight", "head.bias"]
    dense = fisher_information(model, [(ids, labels)], NEXT, structure=Dense(), parameters=chosen)
    found = fisher_information(
        model, [(ids, labels)], NEXT, structure=EigenvalueCorrected(), parameters=chosen
    )
    torch.testing.assert_close(found.trace(), dense.trace(), **EXACT)
    # K-FAC takes the mean of the inputs over all T positions, the gradients from one of them.
    hidden = []
    model.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    logits = model(ids)[0, 0].detach()
    rows = torch.cat([hidden[0][0], torch.ones(T, 1, dtype=torch.float64)], 1)
    p = logits.softmax(0)
    expected = rows.square().sum(1).mean() * (1 - p.square().sum())
    kronecker = fisher_information(
        model, [(ids, labels)], NEXT, structure=Kronecker(), parameters=chosen
    )
    torch.testing.assert_close(kronecker.trace(), expected, **EXACT)


def pixels():
    """The network of a segmentation: logits ``[n, 3, 5, 5]``."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()


class ClassesLast(nn.Module):
    """A network of pixels with its logits as rows ``[n, t, c]``, as the oracles take them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).flatten(2).transpose(1, 2)


def images(n=3):
    x = torch.randn(n, 2, 5, 5, dtype=torch.float64)
    y = torch.randint(3, (n, 5, 5))
    y[:, 0] = 255
    y[0, 1:3] = 255
    counted = [[None if k == 255 else k for k in row.flatten().tolist()] for row in y]
    return x, y, counted


@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
def test_ignored_pixels_do_not_count(estimator):
    model, (x, y, counted) = pixels(), images()
    oracle = by_position if estimator == Exact() else observed
    expected = oracle(ClassesLast(model), x, counted)
    for size in (1, 3):
        found = fisher_information(
            model,
            batches(x, y, size),
            Categorical(ignore_index=255),
            estimator=estimator,
            structure=Dense(),
        )
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


def test_a_label_that_is_not_named_is_not_ignored():
    model, (x, y, _) = pixels(), images()
    for estimator in (Exact(), MonteCarlo(), Empirical()):
        with pytest.raises(ValueError, match=r"^Batch 0: Label 255 .* ignore_index=-100"):
            fisher_information(model, [(x, y)], estimator=estimator)


def test_other_places_of_the_classes_give_the_same():
    x, y, _ = images()
    model = pixels()
    expected = fisher_information(model, [(x, y)], Categorical(ignore_index=255)).diagonal()
    last = nn.Sequential(model, nn.Flatten(2), Transposed())
    rows = fisher_information(last, [(x, y.flatten(1))], Categorical(ignore_index=255))
    first = nn.Sequential(model, nn.Flatten(2))
    columns = fisher_information(
        first, [(x, y.flatten(1))], Categorical(ignore_index=255, class_dim=1)
    )
    torch.testing.assert_close(flatten(rows.diagonal()), flatten(expected), **EXACT)
    torch.testing.assert_close(flatten(columns.diagonal()), flatten(expected), **EXACT)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
def test_classes_have_weights(estimator):
    model, (x, y, counted) = pixels(), images()
    of_class = (0.3, 2.0, 5.0)
    weights = [[0 if k is None else of_class[k] for k in row] for row in counted]
    oracle = by_position if estimator == Exact() else observed
    expected = oracle(ClassesLast(model), x, counted, weights)
    found = fisher_information(
        model,
        batches(x, y, 2),
        Categorical(ignore_index=255, class_weights=of_class),
        estimator=estimator,
        structure=Dense(),
    )
    torch.testing.assert_close(found.to_dense(), expected, **EXACT)


def weighted_fisher(model, x, y, likelihood, estimator, weights):
    """The dense matrix of a batch with sample weights, cut into two."""
    cuts = slice(0, 2), slice(2, None)
    data = [{"ids": x[cut], "labels": y[cut], "weights": weights[cut]} for cut in cuts]
    return fisher_information(
        model, data, likelihood, estimator=estimator, structure=Dense()
    ).to_dense()


@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
@pytest.mark.parametrize("of_examples", [True, False])
def test_observations_have_weights(language, estimator, of_examples):
    model, ids, labels = language
    weights = torch.rand(N) if of_examples else torch.rand(N, T)
    # Weights belong to labels: with next_token a position has that of the next one.
    spread = weights[:, None].expand(N, T) if of_examples else weights.roll(-1, 1)
    oracle = by_position if estimator == Exact() else observed
    expected = oracle(model, ids, predicted(labels), spread.double())
    found = weighted_fisher(model, ids, labels, NEXT, estimator, weights)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_tolerance_is_of_the_weighted_information():
    """Of the long vectors of a position that hardly counts, all are dropped."""
    f = torch.zeros(2, 2, 3, dtype=torch.float64)
    f[:, 1, 0] = 3
    y, weights = torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1e-4, 1.0], [1.0, 1.0]])
    spread = Categorical().combined_weights(f, y, weights.double())
    whole, most = (
        estimator.score_vectors(Categorical(), f, y, torch.Generator(), spread).square()
        for estimator in (Exact(), Exact(0.3))
    )
    kept = most.sum((0, 2, 3)) / whole.sum((0, 2, 3))
    assert float(kept.min()) >= 0.7
    assert float(kept.max()) < 1
    assert float(most[:, 0, 0].max()) == 0


def test_positions_that_do_not_count_take_no_pass(language):
    """On a CPU; sentences of one batch may count at different positions."""
    model, ids, labels = language
    labels = torch.full_like(labels, -100)
    labels[0, 1], labels[2, 3] = 1, 2
    data_pass = DataPass(model, trainable_parameters(model), NEXT, Exact(), 2**29)
    data = Examples(Arguments((ids,)), labels), torch.Generator(), 0
    assert [len(chunk.scores) for chunk in data_pass.chunks(*data)] == [2 * (WORDS - 1)]


def test_weights_that_do_not_fit_are_refused(language):
    model, ids, labels = language
    for weights, message in (
        (torch.ones(N, T + 1), r"Weights .*shape \[\d\] or \[\d, 4\], .* got \[\d, 5\]"),
        (-torch.ones(N), "weights must be finite numbers, 0 or above"),
    ):
        with pytest.raises(ValueError, match=f"^Batch 0: {message}"):
            weighted_fisher(model, ids, labels, NEXT, Exact(), weights)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_label_that_is_ignored_takes_its_example_out(size):
    """Outputs ``[n, c]``: the example still counts in N."""
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))
    y[2:4] = -100
    kept = y != -100
    for estimator in (Exact(), Exact(1e-12), Empirical()):
        found = fisher_information(model, batches(x, y, size), estimator=estimator)
        rest = fisher_information(model, [(x[kept], y[kept])], estimator=estimator)
        assert found.num_examples == 7
        torch.testing.assert_close(found.precision.trace(), rest.precision.trace(), **EXACT)


def test_data_without_any_observation_have_no_information(language):
    model, ids, labels = language
    for estimator in (Exact(), MonteCarlo(), Empirical()):
        data = [(ids, torch.full_like(labels, -100))]
        fisher = fisher_information(model, data, NEXT, estimator=estimator)
        assert float(fisher.trace()) == 0


@pytest.mark.parametrize("memory", [1, 20_000, 100_000])
@pytest.mark.parametrize("estimator", [Exact(), Exact(0.05), MonteCarlo(2)], ids=repr)
def test_the_memory_cap_changes_no_number(language, memory, estimator):
    model, ids, labels = language
    whole = fisher_information(model, [(ids, labels)], NEXT, estimator=estimator)
    capped = fisher_information(model, [(ids, labels)], NEXT, estimator=estimator, memory=memory)
    torch.testing.assert_close(capped.diagonal(), whole.diagonal(), **EXACT)


def test_the_exact_matrix_of_too_many_positions_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(2, 3 * 400), nn.Unflatten(1, (3, 400)))
    data = [(torch.randn(2, 2), torch.zeros(2, 3, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"Exact.* of 3 x 400 outputs .* 44 MiB .* MonteCarlo"):
        fisher_information(model, data, memory=2**20)
    fisher_information(model, data, estimator=MonteCarlo(1), memory=2**20)


@pytest.mark.slow
def test_the_exact_matrix_of_pixels_stays_within_memory():
    """Measured in a process of its own: one image has 384 vectors of 576 numbers."""
    script = textwrap.dedent("""
        import resource
        import torch
        from torch import nn
        from ewc import fisher_information
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        x, y = torch.randn(8, 1, 14, 14), torch.randint(3, (8, 14, 14))
        y[0] = -100  # the example from which the sizes are extrapolated has nothing that counts
        fisher_information(model, [(x[:1, :, :2, :2], y[:1, :2, :2])])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fisher_information(model, [(x, y)], memory=20_000_000)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 1.5 * 20_000_000


def labels_of(*shape):
    return torch.zeros(3, *shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("likelihood", "shape", "targets", "message"),
    [
        (Categorical(), (4, 6), labels_of(), r"integers of shape \[3, 4\], got .* shape \[3\]"),
        (Categorical(), (4, 6), labels_of(6), r"take Categorical\(class_dim=1\)"),
        (Categorical(), (4, 2, 2), labels_of(4, 2), r"take Categorical\(class_dim=-1\)"),
        (Categorical(), (4, 2, 2), labels_of(1, 2, 2), r"give y\[:, 0\].long\(\)"),
        (Categorical(), (4, 6), labels_of(4).float(), r"give y.long\(\)"),
        (Categorical(), (4, 6), labels_of(4, 6), r"for one-hot rows, give y.argmax\(2\)"),
        (Categorical(), (4, 6), labels_of(4, 6).float(), "0 or above with a sum of 1"),
        (Categorical(class_dim=4), (4, 6), labels_of(4), "class_dim=4 is no dimension"),
        (NEXT, (6,), labels_of(), r"next_token=True .* \[n, t, c\]"),
        (Categorical(class_weights=(1.0, 2.0)), (6,), labels_of(), "of the 6 classes, got 2"),
    ],
)
def test_targets_that_do_not_fit_are_refused_with_the_way_out(likelihood, shape, targets, message):
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Linear(2, size), nn.Unflatten(1, shape))
    data = [(torch.randn(3, 2), targets)]
    for estimator in (Exact(), MonteCarlo(), Empirical()):
        with pytest.raises(ValueError, match=f"^Batch 0: .*{message}"):
            fisher_information(model, data, likelihood, estimator=estimator)
