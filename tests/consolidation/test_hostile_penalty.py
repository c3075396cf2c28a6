"""Any matrix, model, state or file: the penalty of the definition, or one clear error."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hostile import CLEAR, assert_unchanged, check_clear, outcome, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    EWCPenalty,
    FisherMatrix,
    Implicit,
    Kronecker,
    LowRank,
    Online,
    Separate,
    fisher_information,
)

EXACT = [Diagonal(), BlockDiagonal(), Dense(), LowRank(rank=40), Implicit()]
STRUCTURES = [*EXACT, Kronecker(), EigenvalueCorrected()]
SLOW = pytest.mark.slow


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def data_for(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, generator=generator).to(next(model.parameters()).dtype)
    return [(x, torch.randint(2, (4,), generator=generator))]


def printed(penalty):
    """All of a penalty that an error must leave as it was."""
    return repr(penalty), [id(t) for t in penalty.terms], penalty.num_examples, penalty._step


# --- states ---------------------------------------------------------------------------------

VALUES = [
    *(None, -1, 0, 1, 7, True, 1.5, math.nan, math.inf, -math.inf, 2**63, 10**400, 10**5000),
    *("", "x", "1", "Dense", "x" * 10_000, [], [1], {}, {"a": 1}, (), [[]], b"x", object(), len),
    *(torch.tensor(1.0), torch.tensor([1.0, math.nan]), torch.ones(2, 2), torch.zeros(0)),
    *(-torch.ones(2, 3), torch.ones(2, 3).long(), torch.ones(2, 3).to("meta"), nn.Linear(2, 2)),
    *(torch.ones(2, 3).half(), torch.full((2, 3), math.nan), torch.full((2,), math.inf)),
    *(torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3).to_sparse(), Diagonal()),
]


def places(value, path=()):
    """Where the values of nested dicts and lists are."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def damaged(draw, state):
    """The state with one or two entries replaced, removed, added or exchanged."""
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from(list(places(state))))
        holder, kind = state, draw(st.sampled_from(["put", "put", "remove", "add", "exchange"]))
        for part in path:
            holder = holder[part]
        if kind == "put":
            holder[key] = draw(st.sampled_from(VALUES))
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict) and kind == "add":
            holder[draw(st.sampled_from(["extra", 1, None]))] = draw(st.sampled_from(VALUES))
        elif isinstance(holder, dict):
            other = draw(st.sampled_from(list(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        if not state:
            break
    return state


@st.composite
def damaged_states(draw):
    torch.manual_seed(0)
    model = Network()
    structure = draw(st.sampled_from(STRUCTURES))
    fisher = fisher_information(model, data_for(model), structure=structure)
    penalty = EWCPenalty(2.0, draw(st.sampled_from([Separate(), Online(0.5)])))
    for _ in range(draw(st.integers(1, 2))):
        penalty.consolidate(fisher, model)
    state = damaged(draw, copy.deepcopy(penalty.state_dict()["_extra_state"]))
    return SimpleNamespace(model=model, structure=structure, fisher=fisher, state=state)


def check_state(case):
    model, penalty = case.model, EWCPenalty(3.0)
    penalty.consolidate(fisher_information(model, data_for(model)), model)
    before, value = printed(penalty), penalty(model).detach()
    _, error = outcome(lambda: penalty.load_state_dict({"_extra_state": case.state}))
    if error is not None:
        assert type(error) is ValueError
        assert printed(penalty) == before
        assert torch.equal(penalty(model).detach(), value)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    # What is loaded is a penalty: 0 or above, or it says why not.
    for use in (
        lambda: float(penalty(model).detach()),
        lambda: penalty.precision_trace,
        lambda: penalty.predicted_rise(model),
        lambda: penalty.consolidate(case.fisher, model),
    ):
        number, _ = outcome(use)
        assert number is None or 0 <= number < math.inf


# A list in the place of a shape, where torch means to change what it does.
CHANGES = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")


@CHANGES
@given(damaged_states())
@settings(max_examples=80)
def test_any_state_is_loaded_or_refused_whole(case):
    check_state(case)


@SLOW
@CHANGES
@given(damaged_states())
@settings(max_examples=500)
def test_any_of_many_states_is_loaded_or_refused_whole(case):
    check_state(case)


@pytest.mark.parametrize("state", [None, [], {}, "x", {"terms": []}, 3, torch.ones(2)], ids=repr)
def test_what_is_no_state_is_refused(state):
    penalty = EWCPenalty(3.0)
    with pytest.raises(ValueError, match="state is not that of an EWCPenalty") as raised:
        penalty.load_state_dict({"_extra_state": state})
    check_clear(raised.value)


# --- matrices -------------------------------------------------------------------------------


ONES = {name: torch.ones(p.shape) for name, p in Network().named_parameters()}


def entries(fill):
    return {name: torch.full_like(ones, fill) for name, ones in ONES.items()}


def changed(tensors, **changes):
    return {n: t for n, t in {**tensors, **changes}.items() if t is not None}


MATRICES = {
    "negative": lambda: DiagonalFisher(entries(-1.0), 4),
    "nan": lambda: DiagonalFisher(entries(math.nan), 4),
    "infinite": lambda: DiagonalFisher(entries(math.inf), 4),
    "overflowing": lambda: DiagonalFisher(entries(1e38), 10**6),
    "no examples": lambda: DiagonalFisher(ONES, 0),
    "infinitely many": lambda: DiagonalFisher(ONES, math.inf),
    "fractions": lambda: DiagonalFisher(ONES, 2.5),
    "negative examples": lambda: DiagonalFisher(ONES, -3),
    "without a name": lambda: DiagonalFisher(changed(ONES, **{"head.bias": None}), 4),
    "another name": lambda: DiagonalFisher(changed(ONES, more=torch.ones(2)), 4),
    "another shape": lambda: DiagonalFisher(changed(ONES, **{"head.bias": torch.ones(3)}), 4),
    "a rank": lambda: DiagonalFisher(changed(ONES, **{"head.bias": torch.ones(2, 1)}), 4),
    "whole": lambda: DiagonalFisher({n: t.long() for n, t in ONES.items()}, 4),
    "complex": lambda: DiagonalFisher({n: t.to(torch.complex64) for n, t in ONES.items()}, 4),
    "half": lambda: DiagonalFisher({n: t.half() for n, t in ONES.items()}, 4),
    "double": lambda: DiagonalFisher({n: t.double() for n, t in ONES.items()}, 4),
    "on meta": lambda: DiagonalFisher({n: t.to("meta") for n, t in ONES.items()}, 4),
    "nothing": lambda: DiagonalFisher({}, 4),
    "not symmetric": lambda: DenseFisher(
        torch.triu(torch.ones(14, 14)), {n: t.shape for n, t in ONES.items()}, 4
    ),
    "too small": lambda: DenseFisher(torch.eye(3), {n: t.shape for n, t in ONES.items()}, 4),
    "indefinite": lambda: DenseFisher(
        torch.eye(14) - torch.ones(14, 14), {n: t.shape for n, t in ONES.items()}, 4
    ),
    "none": lambda: None,
    "a dict": lambda: ONES,
}
GOOD = ("half", "double", "without a name")
COUNTED = ("no examples", "infinitely many", "fractions", "negative examples")
"""Good matrices of a wrong number of examples, which another number replaces."""


@pytest.mark.parametrize("number", [None, 0, -1, 2.5, math.inf, math.nan, "4", True, 7], ids=repr)
@pytest.mark.parametrize("name", MATRICES)
def test_any_matrix_is_consolidated_or_refused(name, number):
    model, penalty = Network(), EWCPenalty(1.0, Online(0.5))
    penalty.consolidate(DiagonalFisher(ONES, 5), model)
    before, state = printed(penalty), snapshot(model)
    # The constructor may see it, or the penalty.
    _, error = outcome(lambda: penalty.consolidate(MATRICES[name](), model, num_examples=number))
    assert_unchanged(model, state)
    if error is not None:
        assert printed(penalty) == before
    is_good = name in GOOD if number is None else name in (*GOOD, *COUNTED) and number == 7
    assert (error is None) == is_good
    move(model)
    assert 0 < float(penalty(model).detach()) < math.inf


# --- models that change ---------------------------------------------------------------------


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


def bare(model):
    return getattr(getattr(model, "module", model), "_orig_mod", getattr(model, "module", model))


def renamed(model):
    inner = bare(model)
    if hasattr(inner, "body"):
        inner.trunk = inner.body
        del inner.body
    return model


def resized(model, rows):
    inner = bare(model)
    old = inner.head.bias
    inner.head = nn.Linear(2, max(1, len(old) + rows)).to(old)
    return model


def normalised(model):
    nn.utils.parametrizations.weight_norm(bare(model).head)
    return model


def parallel(model):
    kind = "torch.nn.parallel.data_parallel._get_available_device_type"
    with mock.patch(kind, return_value=None):
        return nn.DataParallel(model)


def with_type(model, dtype):
    inner = bare(model)
    inner.head.bias = nn.Parameter(inner.head.bias.detach().to(dtype), requires_grad=False)
    return model


def pickled(value):
    return pickle.loads(pickle.dumps(value))


MODELS = {
    "moved": lambda m: move(m) or m,
    "renamed": renamed,
    "grown": lambda m: resized(m, 1),
    "shrunk": lambda m: resized(m, -1),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "on meta": lambda m: copy.deepcopy(m).to("meta"),
    "frozen": lambda m: m.requires_grad_(False),
    "unfrozen": lambda m: m.requires_grad_(True),
    "copied": copy.deepcopy,
    "in parallel": parallel,
    # torch makes a function of what is compiled twice.
    "compiled": lambda m: torch.compile(bare(m), backend="eager"),
    "normalised": normalised,
    "complex": lambda m: with_type(m, torch.complex64),
    "nan": lambda m: with_type(m, torch.float32) and m.apply(lost),
    "evaluated": lambda m: m.eval(),
}


def lost(module):
    if isinstance(module, nn.Linear):
        module.bias.data = torch.full_like(module.bias, math.nan)


def reloaded(penalty, _):
    other = EWCPenalty()
    other.load_state_dict(copy.deepcopy(penalty.state_dict()))
    return other


def saved(penalty, folder):
    penalty.save(folder / "penalty")
    return EWCPenalty.load(folder / "penalty")


PENALTIES = {
    "kept": lambda p, _: p,
    "double": lambda p, _: copy.deepcopy(p).double(),
    "half": lambda p, _: copy.deepcopy(p).half(),
    "on meta": lambda p, _: copy.deepcopy(p).to("meta"),
    "copied": lambda p, _: copy.deepcopy(p),
    "pickled": lambda p, _: pickled(p),
    "reloaded": reloaded,
    "saved": saved,
}


def value_of(terms, parameters, num_examples):
    """From the definition, in double precision; ``None`` where a parameter has no place."""
    total = 0.0
    for dense, anchor, size in terms:
        steps = []
        for name, tensor in anchor.items():
            now = parameters.get(name)
            if now is None or now.shape[1:] != tensor.shape[1:] or len(now) < len(tensor):
                return None
            steps.append((now[: len(tensor)].double() - tensor.double()).reshape(-1))
        step = torch.cat(steps)
        total += 0.5 * size / num_examples * float(step @ dense.double() @ step)
    return total


@st.composite
def histories(draw):
    return SimpleNamespace(
        seed=draw(st.integers(0, 3)),
        structure=draw(st.sampled_from(STRUCTURES)),
        changes=draw(st.lists(st.sampled_from(list(MODELS)), min_size=1, max_size=4)),
        penalty=draw(st.sampled_from(list(PENALTIES))),
        consolidates=draw(st.booleans()),
    )


def check_history(case, folder):
    torch.manual_seed(case.seed)
    model, penalty = Network(), EWCPenalty()
    fisher = fisher_information(model, data_for(model), structure=case.structure)
    penalty.consolidate(fisher, model)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    terms = [(fisher.to_dense(), anchor, 4)]
    for change in case.changes:
        before = printed(penalty)
        try:
            model = MODELS[change](model)
        except Exception:
            return  # torch cannot do it, such as copy a normalised layer
        if case.consolidates:
            clean = snapshot(model)
            _, error = outcome(partial(taken, penalty, model, case.structure, terms))
            if not any(p.is_meta for p in model.parameters()):
                assert_unchanged(model, clean)
            if error is not None:
                assert printed(penalty) == before
        check_value(penalty, model, terms)
    if case.penalty == "pickled" and "normalised" in case.changes:
        return  # torch pickles no parametrised module, and a matrix-free matrix holds one
    other, error = outcome(lambda: PENALTIES[case.penalty](penalty, folder))
    assert error is None, error
    # A matrix-free matrix that was loaded needs the network of its task.
    loaded = isinstance(case.structure, Implicit) and case.penalty in ("reloaded", "saved")
    check_value(other, model, None if case.penalty == "on meta" else terms, may_refuse=loaded)
    check_value(penalty, model, terms)


@pytest.mark.parametrize("made", [reloaded, saved])
def test_whole_numbers_in_a_model_are_refused_where_derivatives_are_needed(made, tmp_path):
    model, penalty = Network(), EWCPenalty()
    penalty.consolidate(fisher_information(model, data_for(model), structure=Implicit()), model)
    loaded = made(penalty, tmp_path)
    with pytest.raises(ValueError, match=r"Parameter 'head\.bias' is torch\.int64: a matri"):
        loaded(with_type(model, torch.long))


def taken(penalty, model, structure, terms):
    """Consolidate a task, and note its matrix for the oracle."""
    fisher = fisher_information(model, data_for(model), structure=structure)
    penalty.consolidate(fisher, model)
    names = {n.replace("module.", "").replace("_orig_mod.", ""): p for n, p in named(model)}
    anchor = {n: names[n].detach().clone() for n in fisher.shapes}
    terms.append((fisher.to_dense(), anchor, 4))


def named(model):
    return model.named_parameters()


def check_value(penalty, model, terms, *, may_refuse=False):
    """The value is that of the definition, or there is none and an error says why."""
    before = printed(penalty)[0]
    value, error = outcome(lambda: penalty(model))
    assert printed(penalty)[0] == before
    if terms is None:
        assert error is not None
    if terms is None or (may_refuse and error is not None):
        return
    parameters = {
        n.replace("module.", "").replace("_orig_mod.", ""): p.detach() for n, p in named(model)
    }
    unusual = any(p.is_meta or p.is_complex() for p in parameters.values())
    expected = None if unusual else value_of(terms, parameters, 4)
    assert (error is not None) == (expected is None), (error, expected)
    if error is None:
        assert float(value.detach()) == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)


WARNED = pytest.mark.filterwarnings(
    "ignore:Outputs of shape",
    "ignore:The Fisher pass differentiates",
    "ignore:The Fisher information is zero everywhere",
)


@WARNED
@given(histories())
@settings(max_examples=40)
def test_any_change_of_the_model_gives_the_value_or_an_error(tmp_path, case):
    check_history(case, tmp_path)


@SLOW
@WARNED
@given(histories())
@settings(max_examples=300)
def test_many_changes_of_the_model_give_the_value_or_an_error(tmp_path, case):
    check_history(case, tmp_path)


# --- options --------------------------------------------------------------------------------

WRONG = [-1, math.nan, math.inf, -math.inf, "1", None, True, [], 1j, 10**400, object(), b"1"]


@pytest.mark.parametrize("value", [*WRONG, torch.ones(40, 40)], ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", ["strength", "shrinkage", "eigenvector_share", "num_examples"])
def test_wrong_options_are_refused_and_change_nothing(name, value):
    penalty = EWCPenalty(2.0)
    before = printed(penalty)
    if name == "num_examples" and value is None:
        return
    with pytest.raises(ValueError, match=f"{name} must .*, got") as raised:
        setattr(penalty, name, value)
    check_clear(raised.value)
    assert printed(penalty) == before


# --- files ----------------------------------------------------------------------------------


def file_of(folder, structure):
    model, path = Network(), folder / "penalty"
    penalty = EWCPenalty()
    penalty.consolidate(fisher_information(model, data_for(model), structure=structure), model)
    penalty.save(path)
    return path


def is_refused(path, load):
    """Whether loading ends in a clear ValueError that names the file."""
    _, error = outcome(lambda: load(path))
    return type(error) is ValueError and repr(str(path)) in str(error)


@pytest.mark.parametrize("structure", [Diagonal(), pytest.param(Implicit(), marks=SLOW)], ids=repr)
def test_a_penalty_file_with_a_flipped_byte_or_cut_is_refused(tmp_path, structure):
    path = file_of(tmp_path, structure)
    content = path.read_bytes()
    for place in range(len(content)):
        wrong = bytearray(content)
        wrong[place] ^= 0xFF
        path.write_bytes(wrong)
        assert is_refused(path, EWCPenalty.load)
        path.write_bytes(content[:place])
        assert is_refused(path, EWCPenalty.load)


def test_files_of_another_kind_are_refused(tmp_path):
    path = file_of(tmp_path, Diagonal())
    assert is_refused(path, FisherMatrix.load)
    fisher_information(Network(), data_for(Network())).save(path)
    assert is_refused(path, EWCPenalty.load)
    torch.save({"a": torch.ones(2)}, path)
    assert is_refused(path, EWCPenalty.load)
    assert is_refused(path, FisherMatrix.load)
    path.write_bytes(b"")
    assert is_refused(path, EWCPenalty.load)


def test_clear_errors_are_those_of_one_class():
    """The check of these tests by itself: it sees the errors of torch and of Python."""
    for call in (
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: {}["x"],
        lambda: torch.ones(1).to("meta").item(),
        lambda: int("x"),
    ):
        with pytest.raises(AssertionError):
            outcome(call)
    assert KeyError not in CLEAR
