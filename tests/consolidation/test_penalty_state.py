"""What the penalty holds: anchors, entries it refuses, and states it loads."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    EWCPenalty,
    Implicit,
    Kronecker,
    KroneckerFisher,
    LowRank,
    Online,
    Separate,
    fisher_information,
)
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices import BlockDiagonalFisher, LowRankFisher
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerWeights
from ewc.tensor_file import separated, write

CONSOLIDATIONS = pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
HALF = [torch.bfloat16, torch.float16]


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data_for(size=20):
    return [(torch.randn(size, 6), torch.randint(3, (size,)))]


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def value(penalty, model):
    return float(penalty(model).detach())


# --- anchors ----------------------------------------------------------------------------------


@CONSOLIDATIONS
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_the_penalty_is_zero_at_the_anchor(consolidation, structure, dtype):
    """Whatever the type of the matrix, and of whatever was done to the penalty."""
    model, penalty = network(), EWCPenalty(100.0, consolidation)
    fisher = fisher_information(model, data_for(), structure=structure).to(dtype=dtype)
    for _ in range(2):  # two tasks that end at one place
        penalty.consolidate(fisher, model)
        assert value(penalty, model) == 0.0
    loaded = EWCPenalty()
    loaded.load_state_dict(copy.deepcopy(penalty.state_dict()))
    assert value(loaded, model) == 0.0
    for kind in HALF:
        assert value(copy.deepcopy(penalty).to(kind), model) == 0.0
    before = copy.deepcopy(model.state_dict())
    penalty.implicit_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@CONSOLIDATIONS
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()])
def test_anchors_of_mixed_types_are_exact(consolidation, structure):
    """A model whose parameters have several types: none of its anchors is rounded."""
    model, penalty = network(), EWCPenalty(100.0, consolidation)
    fisher = fisher_information(model, data_for(), structure=structure)
    model[0].half()
    model[2].double()
    with torch.no_grad():
        model[2].weight.add_(torch.randn_like(model[2].weight))
    penalty.consolidate(fisher, model)
    penalty.consolidate(fisher, model)
    assert value(penalty, model) == 0.0
    move(model)
    assert penalty.terms[-1].anchor["2.weight"].dtype == torch.float64
    names = ("0.weight", "2.weight")
    gradients = torch.autograd.grad(penalty(model), [model.get_parameter(n) for n in names])
    assert [g.dtype for g in gradients] == [torch.float16, torch.float64]
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_a_single_precision_copy_leaves_the_anchors_of_the_model():
    model, penalty = network().double(), EWCPenalty(100.0)
    move(model)
    data = [(x.double(), y) for x, y in data_for()]
    penalty.consolidate(fisher_information(model, data), model)
    penalty(copy.deepcopy(model).float())
    assert value(penalty, model) == 0.0


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_the_anchor_between_two_tasks_is_not_rounded_to_half_precision(kind):
    """Diagonal tasks are one quadratic around a point that a half-precision model cannot reach."""
    model, penalty = nn.Linear(6, 5).to(kind), EWCPenalty()
    tasks = []
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        entries = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
        penalty.consolidate(DiagonalFisher(entries, 20), model)
        anchor = {n: p.detach().double() for n, p in model.named_parameters()}
        tasks.append((entries, anchor))
    expected = sum(
        0.5 * float((entries[n].double() * (p.detach().double() - anchor[n]).square()).sum())
        for entries, anchor in tasks
        for n, p in model.named_parameters()
    )
    assert value(penalty, model) == pytest.approx(expected, rel=1e-5)
    assert {t.dtype for t in penalty.terms[0].anchor.values()} == {torch.float32}


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_a_penalty_in_half_precision_does_not_overflow(kind):
    """N F is beyond half precision: the matrix stays in single precision."""
    model, penalty = network(), EWCPenalty()
    entries = {n: torch.full(p.shape, 10.0) for n, p in model.named_parameters()}
    penalty.consolidate(DiagonalFisher(entries, 60_000), model)
    move(model)
    expected = penalty(model).detach()
    torch.testing.assert_close(penalty.to(kind)(model).detach(), expected)


def test_a_matrix_in_half_precision_does_not_overflow():
    model, penalty = network(), EWCPenalty()
    entries = {n: torch.full(p.shape, 10.0).half() for n, p in model.named_parameters()}
    penalty.consolidate(DiagonalFisher(entries, 60_000), model)
    move(model)
    away = [p.detach() - penalty.terms[0].anchor[n] for n, p in model.named_parameters()]
    expected = 5.0 * sum(float(a.square().sum()) for a in away)
    assert value(penalty, model) == pytest.approx(expected, rel=1e-5)


def test_growth_keeps_the_types_of_the_anchors():
    model, penalty = network(), EWCPenalty()
    model[2].double()
    entries = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    penalty.consolidate(DiagonalFisher(entries, 10), model)
    old = model[2]
    model[2] = nn.Linear(5, 4).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    assert value(penalty, model) == 0.0


def test_matrix_free_penalties_follow_the_models_type_with_whole_numbers_as_inputs():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3))
    data = [(torch.randint(4, (9, 2)), torch.randint(3, (9,)))]
    fisher = fisher_information(model, data, structure=Implicit())
    penalty = EWCPenalty(1.0, Online(0.5))
    for _ in range(2):
        penalty.consolidate(fisher, model)
    move(model)
    expected = penalty(model).detach().double()
    torch.testing.assert_close(penalty(model.double()).detach(), expected, rtol=1e-5, atol=0)
    again = penalty.float()(model.float()).detach().double()
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=0)


# --- what is refused --------------------------------------------------------------------------


def kronecker(outputs, inputs):
    weights = LayerWeights("weight", None, WeightLayout(torch.Size([2, 2])))
    product = KroneckerProduct(weights, torch.tensor([outputs]), torch.tensor([inputs]), 9)
    return KroneckerFisher([product], product.shapes, 9)


ONE, INDEFINITE = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]
NEGATIVE, NAN = [[1.0, 0.0], [0.0, -1.0]], [[1.0, math.nan], [math.nan, 1.0]]
SHAPES = {"weight": torch.Size([2, 2])}


def dense(small):
    return DenseFisher(torch.block_diag(torch.tensor(small), torch.eye(2)), SHAPES, 9)


def low_rank(vector, number, rest):
    vectors = torch.tensor([[vector], [0.0], [0.0], [0.0]])
    return LowRankFisher(vectors, torch.tensor([number]), {"weight": torch.full((2, 2), rest)}, 9)


def diagonal(entry):
    return DiagonalFisher({"weight": torch.tensor([[1.0, 0.0], [entry, 1.0]])}, 9)


IMPOSSIBLE = {
    "diagonal": lambda: diagonal(-1e-9),
    "dense_diagonal": lambda: dense(NEGATIVE),
    "dense_eigenvalue": lambda: dense(INDEFINITE),
    "kronecker_diagonal": lambda: kronecker(NEGATIVE, ONE),
    "kronecker_outputs": lambda: kronecker(INDEFINITE, ONE),
    "kronecker_inputs": lambda: kronecker(ONE, INDEFINITE),
    "corrected": lambda: KroneckerFisher([kronecker(ONE, ONE).blocks[0].eigen], SHAPES, 9),
    "low_rank_value": lambda: low_rank(1.0, -0.5, 1.0),
    "low_rank_rest": lambda: low_rank(1.0, 2.0, -0.5),
    "sum": lambda: diagonal(5.0) + dense(INDEFINITE),
    "blocks": lambda: BlockDiagonalFisher([dense(INDEFINITE)], SHAPES, 9),
}
NOT_FINITE = {
    "diagonal": lambda: diagonal(math.inf),
    "dense": lambda: dense(NAN),
    "kronecker_outputs": lambda: kronecker(NAN, ONE),
    "kronecker_inputs": lambda: kronecker(ONE, NAN),
    "corrected_basis": lambda: KroneckerFisher([kronecker(ONE, ONE).blocks[0].eigen], SHAPES, 9),
    "low_rank": lambda: low_rank(math.nan, 1.0, 1.0),
    "sum": lambda: dense(ONE) + kronecker(ONE, NAN),
    "blocks": lambda: BlockDiagonalFisher([dense(NAN)], SHAPES, 9),
}


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_matrices_with_negative_squares_are_refused(name, shrinkage):
    fisher = IMPOSSIBLE[name]()
    if name == "corrected":
        fisher.blocks[0].spectrum[0, 1, 0] = -0.5
    model, penalty = nn.Linear(2, 2, bias=False), EWCPenalty(shrinkage=shrinkage)
    with pytest.raises(ValueError, match=r"of '?weight'? has a negative .*: a Fisher matrix has"):
        penalty.consolidate(fisher, model)
    assert penalty.terms == []


ONE_SIDED = {
    "dense": dense,
    "kronecker_outputs": lambda skewed: kronecker(skewed, ONE),
    "kronecker_inputs": lambda skewed: kronecker(ONE, skewed),
    "sum": lambda skewed: diagonal(5.0) + dense(skewed),
    "blocks": lambda skewed: BlockDiagonalFisher([dense(skewed)], SHAPES, 9),
}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_a_matrix_does_not_excuse_it(scale):
    """Nor another group whose entries are larger."""
    model, penalty = nn.Linear(2, 2, bias=False), EWCPenalty()
    with pytest.raises(ValueError, match="of weight has a negative eigenvalue"):
        penalty.consolidate(scale * dense(INDEFINITE), model)
    skewed = DenseFisher(torch.block_diag(torch.tensor(INDEFINITE).triu(), torch.eye(2)), SHAPES, 9)
    with pytest.raises(ValueError, match="of weight is not symmetric"):
        penalty.consolidate(scale * skewed, model)
    weights = LayerWeights("weight", None, WeightLayout(torch.Size([6, 2, 1]), 3))
    factors = torch.tensor([ONE, ONE, ONE])
    groups = KroneckerProduct(
        weights, factors, factors * torch.tensor([1, scale, 1 / scale])[:, None, None], 9
    )
    groups.check_entries()
    for group in range(3):
        damaged = groups.inputs.clone()
        damaged[group, 0, 1] = damaged[group, 1, 0] = 2 * damaged[group, 0, 0]
        with pytest.raises(ValueError, match="of weight has a negative eigenvalue"):
            KroneckerProduct(weights, factors, damaged, 9).check_entries()


@pytest.mark.parametrize("skewed", [[[1.0, 9.0], [0.0, 1.0]], [[1.0, 0.0], [9.0, 1.0]]])
@pytest.mark.parametrize("name", ONE_SIDED)
def test_matrices_damaged_on_one_side_are_refused(name, skewed, tmp_path):
    """A Cholesky factor reads one triangle, but the penalty would be negative along (1, -1)."""
    fisher, model, penalty = ONE_SIDED[name](skewed), nn.Linear(2, 2, bias=False), EWCPenalty()
    with pytest.raises(ValueError, match=r"of weight is not symmetric: a Fisher matrix is\.$"):
        penalty.consolidate(fisher, model)
    assert penalty.terms == []
    penalty.consolidate(diagonal(1.0), model)
    state = penalty.state_dict()
    tensors, about = fisher.description()
    state["_extra_state"]["terms"][0] |= {"precision": tensors, "about": about}
    tensors, outline = separated(state["_extra_state"])
    write(tmp_path / "penalty", tensors, {"penalty": outline})
    for load in (penalty.load_state_dict, lambda _: EWCPenalty.load(tmp_path / "penalty")):
        with pytest.raises(ValueError, match="of weight is not symmetric"):
            load(state)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_entries_that_are_not_finite_are_refused(name):
    fisher = NOT_FINITE[name]()
    if name == "corrected_basis":
        fisher.blocks[0].outputs[0, 1, 0] = math.nan
    penalty = EWCPenalty()
    with pytest.raises(FloatingPointError, match=r"of '?weight'? is not finite"):
        penalty.consolidate(fisher, nn.Linear(2, 2, bias=False))
    assert penalty.terms == []


def test_entries_that_overflow_times_the_number_of_examples_are_refused():
    fisher = diagonal(1e37)
    EWCPenalty().consolidate(fisher, nn.Linear(2, 2, bias=False))
    with pytest.raises(FloatingPointError, match="of 'weight' is not finite"):
        EWCPenalty().consolidate(fisher, nn.Linear(2, 2, bias=False), num_examples=10**6)


@pytest.mark.parametrize(
    "structure",
    [
        Diagonal(),
        BlockDiagonal(),
        Kronecker(),
        EigenvalueCorrected(),
        LowRank(),
        Dense(),
        Implicit(),
    ],
)
@pytest.mark.parametrize("size", [1, 40])
def test_rounding_is_no_negative_square(structure, size):
    """Singular matrices in half precision, and with products rounded as TF32 rounds them."""
    model = network()
    with torch.no_grad():
        model[0].weight[2] = 0.0  # inputs of the next layer that are always the same
    fisher = fisher_information(model, data_for(size), structure=structure)

    def rounded(tensor):
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + 5e-4 * torch.randn_like(tensor).clamp(-2, 2))

    fisher.check_entries()
    if structure != Implicit():
        fisher.to(dtype=torch.bfloat16).check_entries()
        fisher.to(dtype=torch.bfloat16).to(dtype=torch.float32).check_entries()
        fisher.mapped(rounded).check_entries()
        (0.0 * fisher).check_entries()
        (1e-30 * fisher).check_entries()
        (1e30 * fisher).check_entries()


def test_infinite_buffers_of_networks_are_let_pass():
    """An attention mask is no entry of the matrix."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]))

        def forward(self, x):
            return self.inner(x) * (self.inner(x) + self.mask).softmax(1)

    model, penalty = Masked(), EWCPenalty()
    fisher = fisher_information(model, data_for(), structure=Implicit())
    penalty.consolidate(fisher, model)
    assert value(penalty, model) == 0.0


def test_matrices_of_no_examples_are_refused():
    fisher = DiagonalFisher({"weight": torch.ones(2, 2)}, 0)
    with pytest.raises(ValueError, match="num_examples must be a whole number, 1 or more, got 0"):
        EWCPenalty().consolidate(fisher, nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize("value", [None, "online", Online, Separate, 0.5])
def test_wrong_consolidations_are_refused(value):
    message = r"consolidation must be an instance of Separate or Online .*, got"
    with pytest.raises(TypeError, match=message):
        EWCPenalty(1.0, value)
    penalty = EWCPenalty(1.0, Online())
    with pytest.raises(TypeError, match=message):
        penalty.consolidation = value
    assert penalty.consolidation == Online()


@pytest.mark.parametrize("value", [True, "1", None, [1.0], math.nan, math.inf, 1j])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (EWCPenalty, "strength"),
        (lambda value: EWCPenalty(shrinkage=value), "shrinkage"),
        (lambda value: EWCPenalty(eigenvector_share=value), "eigenvector_share"),
        (Online, "decay"),
    ],
    ids=["strength", "shrinkage", "share", "decay"],
)
def test_what_is_no_number_is_refused(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must .*, got"):
        make(value)


def test_what_is_no_matrix_and_no_model_is_refused():
    model, penalty = network(), EWCPenalty()
    fisher = fisher_information(model, data_for())
    with pytest.raises(TypeError, match=r"fisher must be a FisherMatrix, got"):
        penalty.consolidate(fisher.diagonal(), model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        penalty.consolidate(fisher, dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"num_steps must be a whole number, 1 or more, got 1.5"):
        penalty.implicit_step(model, torch.optim.SGD(model.parameters()), 1.5)


# --- states -----------------------------------------------------------------------------------


ENTRIES = {
    "strength": 3.0,
    "shrinkage": 0.5,
    "eigenvector_share": 0.5,
    "step": 0,
    "online": {"decay": 0.25},
    "num_examples": 7,
    "last_num_examples": 20,
}


def test_the_entries_of_a_state():
    """Files hold these names, so other versions must read and write the same ones."""
    penalty = EWCPenalty(3.0, Online(0.25), shrinkage=0.5, eigenvector_share=0.5)
    penalty.num_examples = 7
    model = network()
    penalty.consolidate(fisher_information(model, data_for()), model)
    state = penalty.get_extra_state()
    terms = state.pop("terms")
    assert state == ENTRIES
    assert [sorted(term) for term in terms] == [["about", "anchor", "constant", "precision"]]


def test_a_loaded_penalty_goes_on_with_the_next_eigenvectors():
    model = nn.Linear(100, 3, bias=False)  # small layers are taken whole
    data = [(torch.randn(20, 100), torch.randint(3, (20,)))]
    penalty, loaded = EWCPenalty(eigenvector_share=0.05), EWCPenalty()
    penalty.consolidate(fisher_information(model, data, structure=Kronecker()), model)
    move(model)
    first = value(penalty, model)
    loaded.load_state_dict(penalty.state_dict())
    second = value(penalty, model)
    assert value(loaded, model) == second
    assert first != second


@pytest.mark.parametrize(("tasks", "last"), [(0, -1), (1, 0), (2, 0)])
def test_the_size_of_the_last_task_is_above_0_where_there_is_one(tasks, last):
    model, penalty = network(), EWCPenalty()
    fisher = fisher_information(model, data_for(), structure=Kronecker())
    for _ in range(tasks):
        penalty.consolidate(fisher, model)
    state = penalty.get_extra_state()
    EWCPenalty().set_extra_state(state | {"last_num_examples": last + 1})
    with pytest.raises(ValueError, match=f"last_num_examples must be .*, got {last}"):
        penalty.set_extra_state(state | {"last_num_examples": last})


def remove(state, key):
    del state[key]


def states():
    """States with one thing wrong each."""
    return {
        "structure": lambda state: state["terms"][-1]["about"].update(structure="Unknown"),
        "precision": lambda state: state["terms"][-1].pop("precision"),
        "tensor": lambda state: state["terms"][-1]["precision"].popitem(),
        "anchor": lambda state: state["terms"][-1]["anchor"].popitem(),
        "anchor_type": lambda state: state["terms"][-1].update(anchor=None),
        "terms": lambda state: state.update(terms=[None]),
        "shrinkage": lambda state: state.update(shrinkage=2.0),
        "num_examples": lambda state: state.update(num_examples="9"),
        "last": lambda state: state.update(last_num_examples=0),
        "step": lambda state: state.update(step=None),
        "online": lambda state: state.update(online={"gamma": 1.0}),
        "constant": lambda state: state["terms"][-1].update(constant=math.nan),
    } | {f"no_{key}": partial(remove, key=key) for key in (*ENTRIES, "terms")}


@pytest.mark.parametrize("name", states())
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
def test_a_state_that_does_not_load_changes_nothing(name, structure):
    model, other = network(), EWCPenalty(3.0, Online(0.25), shrinkage=0.5, eigenvector_share=0.5)
    other.num_examples = 7
    penalty = EWCPenalty(2.0)
    for each in (penalty, other):
        each.consolidate(fisher_information(model, data_for(), structure=structure), model)
    move(model)
    before, terms, printed = value(penalty, model), penalty.terms, repr(penalty)
    state = copy.deepcopy(other.state_dict())
    states()[name](state["_extra_state"])
    with pytest.raises(ValueError, match=r"The state is not that of an EWCPenalty .*: nothing was"):
        penalty.load_state_dict(state)
    assert repr(penalty) == printed
    assert all(one is same for one, same in zip(penalty.terms, terms, strict=True))
    assert value(penalty, model) == before
    penalty.load_state_dict(other.state_dict())
    assert repr(penalty) == repr(other)
    assert penalty.num_examples == 7


@pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
def test_matrix_free_penalties_move_and_reload_with_their_networks(consolidation):
    model, penalty = network(), EWCPenalty(1.0, consolidation)
    for _ in range(3):
        fisher = fisher_information(model, data_for(), structure=Implicit())
        penalty.consolidate(fisher, model)
        move(model)
    expected = penalty(model).detach()
    for moved in (copy.deepcopy(penalty).to("cpu"), copy.deepcopy(penalty).double()):
        torch.testing.assert_close(moved(model).detach(), expected)
        loaded = EWCPenalty()
        loaded.load_state_dict(moved.state_dict())
        torch.testing.assert_close(loaded.double()(model).detach(), expected)
