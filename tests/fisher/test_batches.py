"""Inputs and outputs as people have them: what a model returns, and what a batch is."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import reference
import torch
from networks import slow_way
from torch import nn

from ewc import (
    Dense,
    Diagonal,
    Empirical,
    Gaussian,
    Implicit,
    LowRank,
    MonteCarlo,
    fisher_information,
)
from ewc.parameters import flatten
from ewc.statistics import influence, loss_gradient

pytestmark = slow_way

X = torch.linspace(-1, 1, 42, dtype=torch.float64).reshape(7, 6).sin()
LABELS = torch.arange(7) % 3


class Returning(nn.Module):
    """A network that returns its outputs in some form."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.form = nn.Linear(6, 4), nn.Linear(4, 3), form
        self.slopes = nn.Parameter(torch.rand(4))  # no rule: examples one at a time
        self.double()

    def forward(self, x):
        hidden = torch.nn.functional.prelu(self.inner(x), self.slopes)
        return self.form(self.head(hidden.tanh()))


Pair = namedtuple("Pair", "logits hidden")
FORMS = {
    "object": lambda f: SimpleNamespace(loss=None, logits=f),
    "dict": lambda f: {"hidden": f[:, :1], "logits": f},
    "tuple": lambda f: (f, None),
    "list": lambda f: [f, f.sum()],
    "named_tuple": lambda f: Pair(hidden=f[:, :1], logits=f),
}


@pytest.mark.parametrize("structure", [Diagonal(), LowRank(rank=3), Implicit()], ids=repr)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_found_in_what_a_model_returns(form, structure):
    model = Returning(FORMS[form])
    plain = Returning(lambda f: f)
    expected = reference.categorical_fisher(plain, [(x,) for x in X])
    found = fisher_information(
        model, [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])], structure=structure
    )
    torch.testing.assert_close(flatten(found.diagonal()), expected.diagonal())
    if isinstance(structure, Implicit):
        v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in found.shapes.items()}
        torch.testing.assert_close(flatten(found.matvec(v)), expected @ flatten(v))


def test_statistics_find_the_outputs_too():
    data = [(X, LABELS)]
    results = []
    for form in (lambda f: f, FORMS["object"]):
        model = Returning(form)
        fisher = fisher_information(model, data, structure=Dense())
        gradient = loss_gradient(model, data, fisher)
        results.append(influence(model, data, gradient, fisher, damping=0.1, leverage=True))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("memory", [10, 2**30])
@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda f: {"scores": f, "hidden": f}, "type dict with the keys 'scores', 'hidden': it"),
        (lambda _: {"logits": None}, "type dict with the keys 'logits': it must return a tensor, "),
        (lambda f: ([f], f), "type tuple with entries of type list, Tensor: it must return"),
        (lambda _: (), "type tuple that is empty: it must return"),
        (
            lambda f: SimpleNamespace(last=f),
            "type SimpleNamespace: it must .* an object with .logits",
        ),
        (lambda _: None, "a result of type NoneType: it must return a tensor"),
    ],
)
def test_results_without_outputs_are_named(form, message, memory):
    with pytest.raises(ValueError, match=f"^The model returned .*{message}") as raised:
        fisher_information(Returning(form), [(X, LABELS)], memory=memory)
    assert raised.value.__notes__ == ["The model was called with batch 0: x of shape [7, 6]."]


class Encoder(nn.Module):
    """A classifier with the signature of Hugging Face's models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, input_ids=None, attention_mask=None, scale=None, labels=None):
        assert labels is None
        hidden = torch.tanh(self.embedding(input_ids))
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.head(hidden.sum(1))
        return SimpleNamespace(logits=logits if scale is None else logits * scale[:, None])


IDS = torch.arange(35).reshape(7, 5) * 5 % 9
MASK = (IDS % 4 > 0).double()
ENCODED = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
WEIGHTS = torch.tensor([1.0, 0.5, 0, 3, 2, 1, 0.25], dtype=torch.float64)


def cut(batch, size, kind=dict):
    rows = [slice(start, start + size) for start in range(0, 7, size)]
    return [kind({key: tensor[r] for key, tensor in batch.items()}) for r in rows]


def gradients(model, log_probs):
    """The gradient of every entry, ``[n, p]``, by a loop."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in log_probs]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def observed(model, x, y, *others):
    """Every example's log-likelihood of its label, by a loop."""
    for i in range(len(y)):
        result = model(x[i : i + 1], *(t[i : i + 1] for t in others))
        logits = result if isinstance(result, torch.Tensor) else result.logits
        yield logits[0, y[i]] - logits[0].logsumexp(0)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_dicts_have_their_targets_under_labels(kind, size):
    model = Encoder()
    g = gradients(model, observed(model, IDS, LABELS, MASK))
    for structure in (Diagonal(), Dense()):
        fisher = fisher_information(
            model, cut(ENCODED, size, kind), estimator=Empirical(), structure=structure
        )
        expected = g.T @ g / 7
        if isinstance(structure, Diagonal):
            expected = expected.diagonal().diag()
        torch.testing.assert_close(fisher.to_dense(), expected)
        assert fisher.num_examples == 7


@pytest.mark.parametrize("memory", [10, None])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_sample_weights_multiply_the_information_of_an_example(size, memory):
    model = Encoder()
    rows = gradients(model, observed(model, IDS, LABELS, MASK))
    data = cut(ENCODED | {"weights": WEIGHTS}, size)
    fisher = fisher_information(
        model, data, estimator=Empirical(), structure=Dense(), memory=memory
    )
    torch.testing.assert_close(fisher.to_dense(), rows.T @ (WEIGHTS[:, None] * rows) / 7)
    alone = [reference.categorical_fisher(lambda_of(model), [(IDS[i], MASK[i])]) for i in range(7)]
    expected = sum(w * f for w, f in zip(WEIGHTS, alone, strict=True)) / 7
    exact = fisher_information(model, data, structure=Dense(), memory=memory)
    torch.testing.assert_close(exact.to_dense(), expected)
    assert exact.num_examples == 7


def lambda_of(model):
    """The model as a function to plain outputs."""
    plain = nn.Module()
    plain.model = model
    plain.forward = lambda *x: model(*x).logits
    return plain


def test_exact_and_sampled_matrices_need_no_targets():
    model = Encoder()
    data = [{key: t for key, t in ENCODED.items() if key != "labels"}]
    torch.testing.assert_close(
        fisher_information(model, data).diagonal(), fisher_information(model, [ENCODED]).diagonal()
    )
    assert fisher_information(model, data, estimator=MonteCarlo(2)).num_examples == 7
    message = r"^Batch 1 has no targets, which Empirical\(.*\) needs: .* under 'labels'\.$"
    with pytest.raises(ValueError, match=message):
        fisher_information(model, [ENCODED, *data], estimator=Empirical())


class Weighted(Encoder):
    def forward(self, input_ids, weights):
        return super().forward(input_ids, scale=weights)


def test_weights_that_the_model_takes_are_inputs():
    model = Weighted()
    expected = fisher_information(Encoder(), [{"input_ids": IDS, "scale": WEIGHTS}])
    found = fisher_information(model, [{"input_ids": IDS, "weights": WEIGHTS}])
    torch.testing.assert_close(found.diagonal(), expected.diagonal())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"ids": IDS, "labels": LABELS},
            "has the unknown input 'ids': Encoder.forward takes 'input_ids', "
            r"'attention_mask', 'scale'\.$",
        ),
        ({"labels": LABELS}, "has no inputs: Encoder.forward takes 'input_ids'"),
        (ENCODED | {"scale": None}, "is a dict whose 'scale' is a NoneType: every entry must be"),
        (ENCODED | {"scale": IDS[:3]}, r"has .*, scale of shape \[3, 5\]: the first dimensions"),
        (ENCODED | {"weights": -WEIGHTS}, r": weights must be finite .* or above, got -1\.0\.$"),
        (ENCODED | {"weights": WEIGHTS / 0}, ": weights must be finite .* got inf"),
        ((IDS,), r"is a tuple \(Tensor\): data must be batches of tensors \(x, y\) or"),
    ],
)
def test_batches_that_do_not_fit_are_named(batch, message):
    with pytest.raises(ValueError, match=f"^Batch 1:? ?{message}"):
        fisher_information(Encoder(), [ENCODED, batch])


def test_a_dict_lacks_an_argument():
    with pytest.raises(ValueError, match=r"^Batch 0 lacks 'weights': Weighted.forward takes 'inp"):
        fisher_information(Weighted(), [{"input_ids": IDS, "labels": LABELS}])


class Heads(nn.Module):
    """Takes task labels, as Avalanche's multi-head models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()

    def forward(self, x, task_labels):
        both = torch.stack([head(x) for head in self.heads], 1)
        return both[torch.arange(len(x)), task_labels]


def test_the_last_field_of_a_batch_is_the_task():
    task = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    expected = fisher_information(Heads(), [(X, LABELS, task)]).diagonal()
    found = fisher_information(Heads(), [(X, LABELS, ["a", "note"], 1 - task, task)]).diagonal()
    torch.testing.assert_close(found, expected)
    plain = nn.Linear(6, 3).double()
    expected = fisher_information(plain, [(X, LABELS)]).diagonal()
    for others in ([task], ["paths"], [task, None]):
        found = fisher_information(plain, [(X, LABELS, *others)]).diagonal()
        torch.testing.assert_close(found, expected)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 3).double(), nn.Linear(2, 3, bias=False).double()

    def forward(self, image, attributes, task_labels=None):
        outputs = self.first(image) + self.second(attributes)
        return outputs if task_labels is None else outputs * (1 + task_labels[:, None])


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_inputs_is_the_arguments(kind):
    model, z = TwoInputs(), X[:, :2].exp()
    expected = reference.categorical_fisher(model, list(zip(X, z, strict=True)))
    data = [(kind([X[:3], z[:3]]), LABELS[:3]), (kind([X[3:], z[3:]]), LABELS[3:])]
    found = fisher_information(model, data, structure=Dense()).to_dense()
    torch.testing.assert_close(found, expected)
    task = torch.arange(7)
    expected = reference.categorical_fisher(model, list(zip(X, z, task, strict=True)))
    found = fisher_information(model, [(kind([X, z]), LABELS, task)], structure=Dense())
    torch.testing.assert_close(found.to_dense(), expected)
    one = fisher_information(nn.Linear(6, 3).double(), [(kind([X]), LABELS)])
    assert one.num_examples == 7


def test_statistics_take_dicts_and_refuse_weights():
    model = Encoder()
    fisher = fisher_information(model, [ENCODED])
    found = loss_gradient(model, cut(ENCODED, 3), fisher)
    expected = -gradients(model, observed(model, IDS, LABELS, MASK)).mean(0)
    torch.testing.assert_close(flatten(found), expected)
    with pytest.raises(ValueError, match=r"^Batch 0 has sample weights, which only fisher_inf"):
        loss_gradient(model, [ENCODED | {"weights": WEIGHTS}], fisher)
    with pytest.raises(ValueError, match=r"^Batch 0 has no targets: the loss needs them"):
        loss_gradient(model, [{"input_ids": IDS}], fisher)


def test_weights_of_regression_scale_the_normal_equations():
    model = nn.Linear(6, 1, bias=False).double()
    data = [{"input": X, "weights": WEIGHTS}]
    found = fisher_information(model, data, Gaussian(0.5), structure=Dense()).to_dense()
    torch.testing.assert_close(found, X.T @ (WEIGHTS[:, None] * X) / 7 / 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Bert"])
def test_models_of_hugging_face_with_their_batches(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=100, num_labels=3, pad_token_id=0
        )
    else:
        config = transformers.BertConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=37,
            vocab_size=100,
            num_labels=3,
        )
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).double().eval()
    ids = torch.randint(1, 100, (7, 6))
    ids[2, 4:] = ids[5, 3:] = 0
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": LABELS}
    )
    data = [{key: t[rows] for key, t in batch.items()} for rows in (slice(4), slice(4, 7))]
    fisher = fisher_information(model, [batch], estimator=Empirical())
    found = fisher_information(model, data, estimator=Empirical())
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(7):
        model.zero_grad()
        one = {key: t[i : i + 1] for key, t in batch.items()}
        model(**one).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] += p.grad.square() / 7
    for matrix in (fisher, found):
        torch.testing.assert_close(matrix.diagonal(), total)


class WithRest(nn.Module):
    """Takes names that it does not know, as the models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, **kwargs):
        return {"out": self.layer(x)}


def test_inputs_without_an_argument_are_named():
    batch = {"x": torch.randn(5, 4), "sample_weights": torch.rand(5)}
    message = r"forward has no argument 'sample_weights', which goes to its \*\*kwargs"
    with pytest.warns(UserWarning, match=message):
        fisher_information(WithRest(), [batch])


def test_outputs_may_be_under_out():
    model, x = WithRest(), torch.randn(5, 4)
    found = fisher_information(model, [{"x": x}])
    expected = fisher_information(model.layer, [(x, torch.zeros(5))])
    torch.testing.assert_close(found.trace(), expected.trace())
