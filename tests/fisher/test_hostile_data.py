"""Any data: the Fisher information from the definition, or one clear error and no trace of it."""

import copy
from types import SimpleNamespace

import pytest
import reference
import torch
from hostile import assert_unchanged, outcome, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ewc import (
    Bernoulli,
    BlockDiagonal,
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Exact,
    Gaussian,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
    Poisson,
    fisher_information,
)

C = 3


class Tokens(nn.Module):
    """Whole numbers as inputs, by name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 2), nn.Linear(2, C)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh().mean(1))


def normalised():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, C))
    model[1].running_mean.normal_()
    return model


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, C)
    )


MODELS = {
    "linear": lambda: nn.Linear(4, C),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, C)),
    "normalised": normalised,
    "convolutional": convolutional,
    "tokens": Tokens,
}
LIKELIHOODS = [Categorical(), Gaussian(0.5), Bernoulli(), Poisson()]
ESTIMATORS = [Exact(), Empirical(), MonteCarlo(2)]
STRUCTURES = [
    Diagonal(),
    BlockDiagonal(),
    Dense(),
    LowRank(rank=60),
    Implicit(),
    Kronecker(),
    EigenvalueCorrected(),
]


def batch_for(name, likelihood, size):
    x = torch.randint(5, (size, 2)) if name == "tokens" else torch.randn(size, 4).double()
    if isinstance(likelihood, Categorical):
        return x, torch.randint(C, (size,))
    if isinstance(likelihood, Gaussian):
        return x, torch.randn(size, C).double()
    return x, torch.randint(2, (size, C)).double()


def filled(tensor, value):
    """The tensor with one entry replaced, where its type can hold the value."""
    tensor = tensor.clone()
    if tensor.numel() and (tensor.is_floating_point() or abs(value) < 1e9):
        tensor.view(-1)[-1] = value
    return tensor


HARMLESS = {
    "plain": lambda x, y: (x, y),
    "as a list": lambda x, y: [x, y],
    "not contiguous": lambda x, y: (x.t().contiguous().t(), y),
    "every second row": lambda x, y: (x.repeat_interleave(2, 0)[::2], y),
    "with gradients": lambda x, y: (x.requires_grad_() if x.is_floating_point() else x, y),
    "results of a network": lambda x, y: (
        (x * torch.ones(1, requires_grad=True), y) if x.is_floating_point() else (x, y)
    ),
    "another field": lambda x, y: (x, y, torch.zeros(len(x))),
    "narrow labels": lambda x, y: (x, y if y.is_floating_point() else y.to(torch.uint8)),
    "inference": lambda x, y: (inference(x), y),
}


def inference(x):
    with torch.inference_mode():
        return x.clone()


HOSTILE = {
    "nan": lambda x, y: (filled(x, torch.nan), y),
    "inf": lambda x, y: (filled(x, torch.inf), y),
    "huge": lambda x, y: (filled(x, 1e300), y),
    "token outside": lambda x, y: (filled(x, 99), y),
    "nan target": lambda x, y: (x, filled(y, torch.nan)),
    "inf target": lambda x, y: (x, filled(y, -torch.inf)),
    "large target": lambda x, y: (x, filled(y, C)),
    "negative target": lambda x, y: (x, filled(y, -1)),
    "half": lambda x, y: (x.half(), y),
    "single": lambda x, y: (x.float(), y),
    "whole": lambda x, y: (x.long(), y),
    "bool": lambda x, y: (x.bool(), y),
    "complex": lambda x, y: (x.to(torch.complex128), y),
    "float labels": lambda x, y: (x, y.float()),
    "whole targets": lambda x, y: (x, y.long()),
    "bool targets": lambda x, y: (x, y.bool()),
    "complex targets": lambda x, y: (x, y.to(torch.complex64)),
    "column": lambda x, y: (x, y[:, None]),
    "flat targets": lambda x, y: (x, y.flatten()),
    "one target": lambda x, y: (x, y[:1]),
    "no dimension": lambda x, _: (x, torch.tensor(1)),
    "no dimensions": lambda *_: (torch.tensor(1.0), torch.tensor(1)),
    "vector": lambda x, y: (x[:, 0], y),
    "narrow": lambda x, y: (x[:, :1], y),
    "no columns": lambda x, y: (x[:, :0], y),
    "rank": lambda x, y: (x[:, None, None], y),
    "turned": lambda x, y: (x.t(), y),
    "one row less": lambda x, y: (x[1:], y),
    "empty": lambda x, y: (x[:0], y[:0]),
    "no targets": lambda x, _: (x, None),
    "no inputs": lambda _, y: (None, y),
    "alone": lambda x, _: x,
    "single field": lambda x, _: (x,),
    "nothing": lambda *_: (),
    "none": lambda *_: None,
    "text": lambda *_: "xy",
    "numbers": lambda *_: (1, 2),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "dict": lambda x, y: {"input": x, "labels": y},
    "dict of tokens": lambda x, y: {"tokens": x, "labels": y},
    "dict without labels": lambda x, _: {"input": x},
    "dict without inputs": lambda _, y: {"labels": y},
    "dict with more": lambda x, y: {"input": x, "labels": y, "mask": x},
    "dict of nothing": lambda _, y: {"input": None, "labels": y},
    "dict with a number as key": lambda x, y: {1: x, "labels": y},
    "weights": lambda x, y: {"input": x, "tokens": x, "labels": y, "weights": -torch.ones(len(x))},
    "nan weights": lambda x, y: {
        "input": x,
        "labels": y,
        "weights": torch.ones(len(x)) * torch.nan,
    },
    "wide weights": lambda x, y: {"input": x, "labels": y, "weights": torch.ones(len(x), 7)},
    "sparse": lambda x, y: (x.to_sparse(), y),
    "meta": lambda x, y: (x.to("meta"), y),
    "meta targets": lambda x, y: (x, y.to("meta")),
    "quantised": lambda x, y: (
        torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        y,
    ),
    "nested": lambda x, y: (torch.nested.nested_tensor(list(x.double()), layout=torch.jagged), y),
    "object": lambda x, y: (SimpleNamespace(x=x), y),
    "a thousand dimensions": lambda x, y: (x.reshape(x.shape + (1,) * 40), y),
}


def expected(model, batches, likelihood, estimator):
    """From the definition: all but what is drawn at random."""
    x, y = torch.cat([b[0] for b in batches]).detach(), torch.cat([b[1] for b in batches])
    model = model.eval()
    examples = [(row,) for row in x]
    if isinstance(estimator, Empirical):
        if isinstance(likelihood, Bernoulli | Poisson):
            log_prob = LOG_PROBS[type(likelihood)]
            return reference.empirical_by(model, examples, y, log_prob)
        variance = likelihood.variance if isinstance(likelihood, Gaussian) else None
        return reference.empirical_fisher(model, examples, y, variance)
    if isinstance(likelihood, Categorical):
        return reference.categorical_fisher(model, examples)
    if isinstance(likelihood, Gaussian):
        return reference.gaussian_fisher(model, examples, likelihood.variance)
    if isinstance(likelihood, Poisson):
        return poisson_fisher(model, examples)
    return reference.fisher_by_moments(model, examples, reference.log_bernoulli, [0, 1])


def poisson_fisher(model, examples):
    """The mean of J' diag(rates) J: no sum over counts reaches the rates of hostile data."""
    parameters, total = list(model.parameters()), 0
    for arguments in examples:
        output = model(*(argument[None] for argument in arguments))[0]
        for entry in output:
            grads = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            row = torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(grads, parameters, strict=True)
                ]
            )
            total = total + entry.exp() * torch.outer(row, row)
    return total.detach() / len(examples)


LOG_PROBS = {Bernoulli: reference.log_bernoulli, Poisson: reference.log_poisson}


def assert_right(fisher, model, batches, likelihood, estimator, structure):
    """The parts of the matrix that the structure keeps exactly.

    The oracle takes no care of rounding: where it overflows, any finite matrix will do.
    """
    assert fisher.num_examples == sum(len(b[0]) for b in batches)
    if isinstance(estimator, MonteCarlo):
        return
    dense, exact = fisher.to_dense(), expected(model, batches, likelihood, estimator)
    if not bool(exact.isfinite().all()):
        return
    close = {"rtol": 1e-7, "atol": 1e-10}
    if isinstance(structure, Dense | LowRank | Implicit):
        torch.testing.assert_close(dense, exact, **close)
    elif isinstance(structure, Diagonal | BlockDiagonal):
        torch.testing.assert_close(dense.diagonal(), exact.diagonal(), **close)
    elif isinstance(structure, EigenvalueCorrected):
        torch.testing.assert_close(dense.trace(), exact.trace(), **close)


@st.composite
def cases(draw, kinds):
    torch.manual_seed(draw(st.integers(0, 5)))
    name = draw(st.sampled_from(list(MODELS)))
    model = MODELS[name]().double().train(draw(st.booleans()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if draw(st.booleans()) else None
    likelihood = draw(st.sampled_from(LIKELIHOODS))
    batches = [
        batch_for(name, likelihood, size) for size in draw(st.lists(st.integers(0, 3), max_size=3))
    ]
    return SimpleNamespace(
        model=model,
        likelihood=likelihood,
        estimator=draw(st.sampled_from(ESTIMATORS)),
        structure=draw(st.sampled_from(STRUCTURES)),
        batches=batches,
        odd=batch_for(name, likelihood, 2),
        place=draw(st.integers(0, len(batches))),
        kind=draw(st.sampled_from(list(kinds))),
        memory=draw(st.sampled_from([None, 1, 2000])),
    )


def information(case, data):
    """The matrix, whose entries a matrix-free one computes now."""
    fisher = fisher_information(
        case.model,
        data,
        case.likelihood,
        estimator=case.estimator,
        structure=case.structure,
        memory=case.memory,
    )
    assert bool(fisher.to_dense().isfinite().all())
    assert all(bool(entries.isfinite().all()) for entries in fisher.diagonal().values())
    return fisher


def right_for(case, fisher, batches):
    pair = case.likelihood, case.estimator
    assert_right(fisher, copy.deepcopy(case.model), batches, *pair, case.structure)


@given(cases(HARMLESS))
@settings(max_examples=60)
def test_data_of_every_form_give_the_matrix_of_the_definition(case):
    before = snapshot(case.model)
    data = [HARMLESS[case.kind](*batch) for batch in case.batches]
    fisher, error = outcome(lambda: information(case, data))
    assert_unchanged(case.model, before)
    if not sum(len(x) for x, _ in case.batches):
        assert "data is empty" in str(error)
        return
    assert error is None, error
    right_for(case, fisher, case.batches)


def check_hostile(case):
    try:
        odd = HOSTILE[case.kind](*case.odd)
    except (RuntimeError, TypeError, IndexError):
        return  # torch has no such tensor
    data = [*case.batches[: case.place], odd, *case.batches[case.place :]]
    before = snapshot(case.model)
    fisher, _ = outcome(lambda: information(case, data))
    assert_unchanged(case.model, before)
    if fisher is not None and is_pair(odd, case.odd):
        right_for(case, fisher, data)


def is_pair(batch, of):
    """Whether a batch is one of the shapes that the oracle takes."""
    return (
        isinstance(batch, tuple)
        and len(batch) == 2
        and all(isinstance(t, torch.Tensor) for t in batch)
        and [t.shape[1:] for t in batch] == [t.shape[1:] for t in of]
        and not batch[1].is_complex()
    )


# Outputs of many dimensions may have one class, of which users are warned.
WARNED = pytest.mark.filterwarnings("ignore:Outputs of shape", "ignore:torch.quantize_per_tensor")


@WARNED
@given(cases(HOSTILE))
@settings(max_examples=150)
def test_hostile_data_end_in_the_matrix_or_one_error(case):
    check_hostile(case)


@pytest.mark.slow
@WARNED
@given(cases(HOSTILE))
@settings(max_examples=800)
def test_more_hostile_data_end_in_the_matrix_or_one_error(case):
    check_hostile(case)


class DiskError(Exception):
    """An error of the user's own."""


@given(cases(["plain"]), st.booleans())
@settings(max_examples=25)
def test_a_loader_that_raises_half_way_leaves_no_trace(case, inside):
    """Its error is passed on as it is, also if it comes from the network."""
    error = DiskError("the disk is gone")

    def broken():
        yield from case.batches
        raise error

    def refuse(*_):
        raise error

    before = snapshot(case.model)
    if inside:
        handle = case.model.register_forward_pre_hook(refuse)
    passes = 2 if isinstance(case.structure, LowRank | EigenvalueCorrected) else 1
    data = Restarted(broken) if passes > 1 else broken()
    with pytest.raises(DiskError) as raised:
        information(case, [case.odd] if inside else data)
    assert raised.value is error
    if inside:
        handle.remove()
        assert raised.value.__notes__ == [
            f"The model was called with batch 0: x of shape {list(case.odd[0].shape)}."
        ]
    assert_unchanged(case.model, before)


class Restarted:
    """Data that can be read again, as those of a DataLoader."""

    def __init__(self, begin):
        self.begin = begin

    def __iter__(self):
        return self.begin()
