"""The second moments of any loss: CTC, language models, detection, preferences."""

from types import SimpleNamespace

import pytest
import torch
from networks import slow_way
from torch import nn
from torch.nn import functional

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    FisherMatrix,
    Implicit,
    Kronecker,
    LowRank,
    fisher_information,
)
from ewc.natural_gradient import NaturalGradient
from ewc.parameters import flatten
from ewc.statistics.curvature import network_formulations

pytestmark = slow_way

N = 7


class Recogniser(nn.Module):
    """Speech: a recurrence over frames; the results have the frames first."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 5)
        self.slope = nn.PReLU()

    def forward(self, frames):
        hidden, _ = self.recurrent(frames)
        return self.head(self.slope(hidden)).transpose(0, 1).log_softmax(2)


def ctc(model, batch):
    frames, targets, lengths, target_lengths = batch
    log_probs = model(frames)
    return functional.ctc_loss(log_probs, targets, lengths, target_lengths, reduction="none")


def speech():
    lengths, target_lengths = torch.randint(5, 9, (N,)), torch.randint(1, 3, (N,))
    frames, targets = torch.randn(N, 8, 3), torch.randint(1, 5, (N, 2))
    return Recogniser(), ctc, (frames, targets, lengths, target_lengths)


class Decoder(nn.Module):
    """A small causal Transformer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 6)

    def forward(self, ids, mask=None):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(x)
        return SimpleNamespace(logits=self.head(self.block(x, src_mask=causal, is_causal=True)))


def causal(model, batch):
    logits = model(batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)


def language():
    ids = torch.randint(0, 6, (N, 5))
    labels = ids.clone()
    labels[1, 3:] = labels[4, 1:] = labels[6, 4:] = -100
    return Decoder(), causal, {"input_ids": ids, "labels": labels, "name": "corpus", "step": 3}


class Detector(nn.Module):
    """A convolution, and a box and a class from every position."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.slopes = nn.PReLU(3)  # no rule: examples one at a time

    def forward(self, images):
        return self.head(self.slopes(self.features(images))).flatten(2)


def boxes(model, batch):
    """Every target is compared with all positions; images may have any number of targets."""
    outputs, losses = model(batch["images"]), []
    for output, target in zip(outputs, batch["targets"], strict=True):
        gap = (output[None, :4] - target["boxes"][:, :, None]).square().sum(1)
        score = output[4:].log_softmax(0)[target["labels"]]
        losses.append(-(score - gap).logsumexp(1).sum())
    return torch.stack(losses)


def detection():
    targets = [
        {"boxes": torch.randn(k, 4), "labels": torch.randint(0, 2, (k,)), "file": str(k)}
        for k in (1, 3, 2, 4, 0, 1, 2)
    ]
    return Detector(), boxes, {"images": torch.randn(N, 2, 4, 4), "targets": targets}


def preference(model, batch):
    """Direct preference optimisation (Rafailov et al. 2023): two calls of the policy."""

    def log_prob(ids):
        log_probs = model(ids).logits[:, :-1].log_softmax(2)
        return log_probs.gather(2, ids[:, 1:, None])[:, :, 0].sum(1)

    (chosen, rejected), reference = batch["pair"], batch["reference"]
    margin = log_prob(chosen) - log_prob(rejected) - reference[:, 0] + reference[:, 1]
    return -functional.logsigmoid(0.5 * margin)


def preferences():
    pair = [torch.randint(0, 6, (N, 5)), torch.randint(0, 6, (N, 4))]
    return Decoder(), preference, {"pair": pair, "reference": torch.randn(N, 2)}


CASES = {"ctc": speech, "language": language, "detection": detection, "preferences": preferences}


def cut(value, rows):
    """A slice of a batch, item by item and by hand."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {k: v[rows] if k == "targets" else cut(v, rows) for k, v in value.items()}
    return type(value)(cut(v, rows) for v in value) if isinstance(value, list | tuple) else value


@pytest.fixture(params=CASES)
def case(request):
    """A network, a loss, its batches of a size, and every example's gradient by a loop."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, loss, whole = CASES[request.param]()
    finally:
        torch.set_default_dtype(torch.float32)
    rows = []
    for i in range(N):
        (value,) = loss(model, cut(whole, slice(i, i + 1)))
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        pairs = zip(model.parameters(), grads, strict=True)
        rows.append(torch.cat([(p * 0 if g is None else g).reshape(-1) for p, g in pairs]))

    def data(size):
        return [cut(whole, slice(start, start + size)) for start in range(0, N, size)]

    return SimpleNamespace(
        name=request.param, model=model, loss=loss, data=data, gradients=torch.stack(rows).detach()
    )


@pytest.mark.parametrize("size", [1, 3, N])
def test_dense_and_diagonal_equal_a_loop_over_examples(case, size):
    expected = case.gradients.T @ case.gradients / N
    estimator = Empirical(loss=case.loss)
    for structure in (Dense(), Diagonal()):
        fisher = fisher_information(
            case.model, case.data(size), estimator=estimator, structure=structure
        )
        torch.testing.assert_close(flatten(fisher.diagonal()), expected.diagonal())
        assert fisher.num_examples == N
        if isinstance(structure, Dense):
            torch.testing.assert_close(fisher.to_dense(), expected)


@pytest.mark.parametrize("memory", [10, 2**14])
def test_little_memory_gives_the_same_matrix(case, memory):
    fisher = fisher_information(
        case.model, case.data(N), estimator=Empirical(loss=case.loss), memory=memory
    )
    torch.testing.assert_close(flatten(fisher.diagonal()), case.gradients.square().mean(0))


@pytest.mark.parametrize(
    "structure",
    [Kronecker(), EigenvalueCorrected(), BlockDiagonal(), LowRank(rank=N)],
    ids=lambda structure: type(structure).__name__,
)
def test_structures_do_not_depend_on_the_batches(case, structure):
    estimator = Empirical(loss=case.loss)
    matrices = [
        fisher_information(case.model, case.data(size), estimator=estimator, structure=structure)
        for size in (1, 3, N)
    ]
    exact = case.gradients.T @ case.gradients / N
    for matrix in matrices:
        torch.testing.assert_close(matrix.to_dense(), matrices[0].to_dense())
        if isinstance(structure, LowRank):
            torch.testing.assert_close(matrix.to_dense(), exact)
        elif not isinstance(structure, Kronecker):
            torch.testing.assert_close(matrix.trace(), exact.trace())


def test_kronecker_factors_are_exact_on_one_example():
    """One row of one layer: its gradient is one outer product."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = {"x": torch.randn(1, 4).double(), "y": torch.tensor([2])}

    def loss(network, batch):
        return functional.cross_entropy(network(batch["x"]), batch["y"], reduction="none")

    value = functional.cross_entropy(model(batch["x"]), batch["y"])
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(value, list(model.parameters()))])
    fisher = fisher_information(
        model, [batch], estimator=Empirical(loss=loss), structure=Kronecker()
    )
    torch.testing.assert_close(fisher.to_dense(), torch.outer(g, g))


def test_implicit_matrices_multiply_and_move_but_are_not_saved(case, tmp_path):
    fisher = fisher_information(
        case.model, case.data(3), estimator=Empirical(loss=case.loss), structure=Implicit()
    )
    g = case.gradients
    v = {name: torch.randn(shape).double() for name, shape in fisher.shapes.items()}
    for matrix in (fisher, fisher.to("cpu")):
        torch.testing.assert_close(flatten(matrix.matvec(v)), g.T @ (g @ flatten(v)) / N)
        torch.testing.assert_close(matrix.quadratic_form(v), (g @ flatten(v)).square().mean())
        torch.testing.assert_close(flatten(matrix.diagonal()), g.square().mean(0))
    with pytest.raises(TypeError, match="cannot be saved, because a file cannot hold the func"):
        fisher.save(tmp_path / "fisher")
    assert isinstance(fisher, FisherMatrix)


def test_the_likelihood_of_labels_is_one_of_the_losses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3))
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    expected = fisher_information(model, [(x, y)], estimator=Empirical()).diagonal()

    def loss(network, batch):
        inputs, labels = batch
        return functional.cross_entropy(network(inputs), labels, reduction="none")

    found = fisher_information(model, [(x, y)], estimator=Empirical(loss=loss)).diagonal()
    torch.testing.assert_close(found, expected)


def of_losses(reduce):
    return lambda model, batch: reduce((model(batch[0])[:, 0] - batch[1]).square())


X, Y = torch.linspace(-1, 1, 20).reshape(5, 4), torch.arange(5.0)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    ("reduce", "shown"),
    [
        (torch.mean, r"shape \[\] for n ="),
        (torch.sum, r"shape \[\] for n ="),
        (lambda losses: losses[:, None], r"shape \[\d, 1\] for n ="),
        (lambda losses: losses.tolist(), "a list for n ="),
    ],
)
def test_losses_of_another_shape_are_refused(reduce, shown, size):
    data = [(X[:size], Y[:size])]
    with pytest.raises(ValueError, match=rf"returned {shown} .* \[n\], one per example, as w"):
        fisher_information(nn.Linear(4, 1), data, estimator=Empirical(loss=of_losses(reduce)))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda losses: losses.mean().expand(len(losses)),
        lambda losses: losses / len(losses),
        lambda losses: losses.cumsum(0),
        lambda losses: losses - losses.mean(),
    ],
)
def test_losses_that_depend_on_other_examples_are_refused(reduce):
    message = r"example \d has other outputs alone .* must return shape \[n\], .* reduction='none'"
    with pytest.raises(ValueError, match=message):
        fisher_information(nn.Linear(4, 1), [(X, Y)], estimator=Empirical(loss=of_losses(reduce)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(6, 5, 4), Y), r"batch\[1\] has shape \[5\] beside 6 examples: every tensor"),
        ({"x": X, "y": {"z": Y[:3]}}, r"batch\['y'\]\['z'\] has shape \[3\] beside 5 examples"),
        ((X, ["a", "b"]), r"batch\[1\] has 2 items beside 5 examples"),
        (
            (X[:4], [*X[:4, :, None]]),
            r"batch\[1\] holds 4 tensors of 4 rows, .*another batch",
        ),
        (([X, X, X], [Y, Y[:4]]), "its tensors and lists have no common length: every"),
        (([X[:2], X[:2], X[:2]], [Y[:2], Y[2:4], Y[:2]]), "it may have 2 or 3 examples: every"),
        ("abc", "its tensors and lists have no common length"),
    ],
)
def test_batches_that_cannot_be_cut_are_named(batch, message):
    loss = of_losses(torch.clone)
    with pytest.raises(ValueError, match=f"^Batch 1 cannot be cut into examples, .* {message}"):
        fisher_information(nn.Linear(4, 1), [(X, Y), batch], estimator=Empirical(loss=loss))


def numbers(labels):
    return torch.tensor([v if isinstance(v, int) else ord(v) % 3 for v in labels])


@pytest.mark.parametrize("labels", [[0, 1, 2, 1, 0], ["a", "b", "c", "d", "e"]])
def test_images_of_different_sizes_are_items(labels):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    images = [torch.randn(3, 4 + i, 4) for i in range(5)]

    def loss(network, batch):
        pixels, wanted = batch
        means = torch.stack([image.mean((1, 2)) for image in pixels])
        return functional.cross_entropy(network(means), numbers(wanted), reduction="none")

    found = fisher_information(model, [(images, labels)], estimator=Empirical(loss=loss))
    means = torch.stack([image.mean((1, 2)) for image in images])
    expected = fisher_information(model, [(means, numbers(labels))], estimator=Empirical())
    torch.testing.assert_close(found.diagonal(), expected.diagonal())


def test_a_loss_has_its_places():
    with pytest.raises(TypeError, match=r"loss must be a function \(model, batch\) -> .* 'mse'"):
        Empirical(loss="mse")
    estimator = Empirical(loss=of_losses(torch.clone))
    assert repr(Empirical()) == "Empirical()"
    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="network_formulations needs a likelihood"):
        network_formulations(model, [(X, Y)], estimator=estimator)
    optimizer = NaturalGradient(model, estimator=estimator)
    optimizer.update_fisher([(X, Y)])
    optimizer.step()
    with pytest.raises(ValueError, match=r"step\(batch=...\) needs a likelihood: estimator must"):
        optimizer.step(batch=(X, Y))


@pytest.mark.slow
def test_a_language_model_of_hugging_face_with_its_batches():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 50, (N, 6))
    labels = ids.clone()
    labels[2, 4:] = labels[5, 2:] = -100
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": labels})

    def loss(network, batch):
        assert isinstance(batch, transformers.BatchEncoding)
        return causal(lambda ids: network(input_ids=ids), batch)

    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(N):
        counted = int((labels[i, 1:] != -100).sum())
        model.zero_grad()  # Hugging Face's loss is the mean over the positions that count
        (counted * model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / N
    found = fisher_information(model, [batch], estimator=Empirical(loss=loss))
    torch.testing.assert_close(found.diagonal(), total)


def rows(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda m, b: rows(m, b).detach(), ValueError, "values of the loss depend on none"),
        (lambda m, b: rows(m, b) / 0, FloatingPointError, "Batch 0: the loss of an example is not"),
    ],
)
def test_faults_of_a_loss_name_the_loss(loss, error, message):
    data = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    with pytest.raises(error, match=message):
        fisher_information(nn.Linear(4, 3), data, estimator=Empirical(loss=loss))


def test_a_module_is_no_loss_of_a_model():
    with pytest.raises(TypeError, match=r"loss must be a function \(model, batch\)"):
        Empirical(loss=nn.CrossEntropyLoss(reduction="none"))
