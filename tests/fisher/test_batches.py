"""Inputs and outputs as people have them: what a model returns, and what a batch is."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn

from ewc import Dense, Diagonal, Implicit, LowRank, fisher_information
from ewc.parameters import flatten
from ewc.statistics import influence, loss_gradient

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
            "type SimpleNamespace: it must .* with a tensor .logits",
        ),
        (lambda _: None, "a result of type NoneType: it must return a tensor"),
    ],
)
def test_results_without_outputs_are_named(form, message, memory):
    with pytest.raises(ValueError, match=f"^The model returned .*{message}") as raised:
        fisher_information(Returning(form), [(X, LABELS)], memory=memory)
    assert raised.value.__notes__ == ["The model was called with batch 0: x of shape [7, 6]."]
