"""The EWC penalty against its definition, and against joint training where it is exact."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    EWCPenalty,
    Implicit,
    Kronecker,
    LowRank,
    Online,
    Separate,
    fisher_information,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def small_model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def random_fisher(model, num_examples):
    entries = {n: torch.rand_like(p).detach() for n, p in model.named_parameters()}
    entries["0.bias"] = torch.zeros_like(entries["0.bias"])  # directions without information
    return DiagonalFisher(entries, num_examples)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def by_definition(model, tasks, strength, size):
    """1/2 strength sum_t N_t / N (theta - anchor_t)' F_t (theta - anchor_t), term by term."""
    total = 0.0
    for fisher, anchor, weight in tasks:
        for name, parameter in model.named_parameters():
            gap = parameter - anchor[name]
            ratio = weight * fisher.num_examples / size
            total = total + 0.5 * strength * ratio * (fisher.diagonal()[name] * gap**2).sum()
    return total


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()))


def consolidated(penalty, model, count, decay=1.0):
    """Consolidate ``count`` random tasks of unequal sizes; the list for the definition."""
    tasks = []
    for t in range(count):
        move(model)
        fisher = random_fisher(model, 10 + 7 * t)
        penalty.consolidate(fisher, model)
        anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
        tasks = [(f, a, w * decay) for f, a, w in tasks] + [(fisher, anchor, 1.0)]
    return tasks


@pytest.mark.parametrize("count", [1, 2, 100])
@pytest.mark.parametrize("num_examples", [None, 23])
def test_separate_equals_the_sum_over_tasks(count, num_examples):
    model, penalty = small_model(), EWCPenalty(2.5)
    penalty.num_examples = num_examples
    tasks = consolidated(penalty, model, count)
    move(model)
    expected = by_definition(model, tasks, 2.5, num_examples or tasks[-1][0].num_examples)
    found = penalty(model)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(gradients(found, model), gradients(expected, model), **TIGHT)
    assert len(penalty.terms) == 1


STRUCTURES = {
    "diagonal": Diagonal(),
    "block_diagonal": BlockDiagonal(),
    "kronecker": Kronecker(),
    "eigenvalue_corrected": EigenvalueCorrected(),
    "low_rank": LowRank(rank=3),
    "dense": Dense(),
    "implicit": Implicit(),
}


def in_one(tasks, decay):
    """Two precisions as one around the second anchor, the nearest of their kind."""
    (first, _), (second, anchor) = tasks
    return [((decay * first + second).nearest(), anchor)]


@pytest.mark.parametrize("name", [*STRUCTURES, "sum"])
@pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
@pytest.mark.parametrize("size", [None, 50])
def test_a_sample_stands_for_its_task(name, consolidation, size):
    model, penalty = small_model(), EWCPenalty(2.0, consolidation)
    penalty.num_examples = size
    tasks = []
    for sample, num_examples in ((4, 30), (6, 70)):
        move(model)
        data = [(torch.randn(sample, 3, dtype=torch.float64), torch.randint(2, (sample,)))]
        if name == "sum":
            one = fisher_information(model, data, structure=Kronecker())
            fisher = one + fisher_information(model, data, structure=Implicit())
        else:
            fisher = fisher_information(model, data, structure=STRUCTURES[name])
        penalty.consolidate(fisher, model, num_examples=num_examples)
        anchor = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        tasks.append((num_examples * fisher, anchor))
    move(model)
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    if consolidation == Online(0.5):
        tasks = in_one(tasks, 0.5)
    dense = [(precision.to_dense(), anchor) for precision, anchor in tasks]
    nats = sum(0.5 * (theta - anchor) @ matrix @ (theta - anchor) for matrix, anchor in dense)
    torch.testing.assert_close(penalty(model).detach(), 2.0 * nats / (size or 70), **TIGHT)
    assert penalty.predicted_rise(model) == pytest.approx(float(nats) / 100, rel=1e-12)
    assert penalty.remembered_examples == 100
    trace = float(sum(matrix.trace() for matrix, _ in dense))
    assert penalty.precision_trace == pytest.approx(trace, rel=1e-12)


@pytest.mark.parametrize("size", [0, -5, 2.5, 30.0, math.inf, math.nan, True, "30"])
def test_task_sizes_that_are_no_counts_are_refused(size):
    model, penalty = small_model(), EWCPenalty()
    with pytest.raises(ValueError, match=r"num_examples must be .*1 or more, got"):
        penalty.consolidate(random_fisher(model, 10), model, num_examples=size)
    assert penalty.terms == []
    with pytest.raises(ValueError, match=r"num_examples must be .*1 or more, or None, got"):
        penalty.num_examples = size
    assert penalty.num_examples is None


def test_separate_keeps_single_precision_over_many_tasks():
    model, penalty = small_model().float(), EWCPenalty(2.5)
    tasks = consolidated(penalty, model, 100)
    expected = by_definition(model, tasks, 2.5, tasks[-1][0].num_examples)
    found = penalty(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for g, h in zip(gradients(found, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5 * float(h.abs().max()))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_online_decays_the_sum_and_moves_the_anchor(decay):
    model, penalty = small_model(), EWCPenalty(2.5, Online(decay))
    tasks = consolidated(penalty, model, 4, decay)
    last = tasks[-1][1]
    move(model)
    expected = by_definition(
        model, [(f, last, w) for f, _, w in tasks], 2.5, tasks[-1][0].num_examples
    )
    found = penalty(model)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(gradients(found, model), gradients(expected, model), **TIGHT)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_the_online_penalty_of_van_de_ven_is_ours_times_its_decay(gamma):
    """His loop: the decay multiplies the old sum when it is stored, and the sum when it is used."""
    model, penalty = small_model(), EWCPenalty(3.0, Online(gamma))
    stored = {name: 0.0 for name, _ in model.named_parameters()}
    for _ in range(3):
        move(model)
        fisher = random_fisher(model, 10)
        penalty.consolidate(fisher, model)
        stored = {name: f + gamma * stored[name] for name, f in fisher.diagonal().items()}
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    theirs = 3.0 * sum(
        (gamma * stored[name] * (p - anchor[name]) ** 2).sum() / 2
        for name, p in model.named_parameters()
    )
    torch.testing.assert_close(theirs, gamma * penalty(model))


def test_dense_separate_keeps_every_cross_term():
    model, penalty = small_model(), EWCPenalty(1.5)
    tasks = []
    for size in (5, 9):
        move(model)
        x = torch.randn(size, 3, dtype=torch.float64)
        fisher = fisher_information(
            model, [(x, torch.zeros(size, dtype=torch.long))], structure=Dense()
        )
        penalty.consolidate(fisher, model)
        tasks.append((fisher, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
    move(model)
    theta = torch.nn.utils.parameters_to_vector(model.parameters())
    expected = sum(
        0.5 * 1.5 * f.num_examples / 9 * (theta - a) @ f.to_dense() @ (theta - a) for f, a in tasks
    )
    torch.testing.assert_close(penalty(model), expected, **TIGHT)


# --- growth, saving, derivatives ------------------------------------------------------------


def grow(model, rows):
    old = model[2]
    model[2] = nn.Linear(4, rows).double()
    with torch.no_grad():
        model[2].weight[: old.out_features] = old.weight
        model[2].bias[: old.out_features] = old.bias


@pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
def test_rows_of_a_grown_head_are_free_for_the_old_tasks(consolidation):
    model, penalty = small_model(), EWCPenalty(1.0, consolidation)
    penalty.consolidate(random_fisher(model, 10), model)
    grow(model, 5)
    assert penalty(model).item() == 0.0
    with torch.no_grad():
        model[2].weight[2:] += 1.0
    assert penalty(model).item() == 0.0
    with torch.no_grad():
        model[2].weight[:2] += 1.0
    assert penalty(model).item() > 0.0
    model.add_module("late", nn.Linear(1, 1).double())
    penalty.consolidate(random_fisher(model, 10), model)
    (gradient,) = torch.autograd.grad(penalty(model), model[2].weight)
    assert gradient.shape == (5, 4)


@pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
def test_parameters_that_were_frozen_meanwhile_keep_their_anchor(consolidation):
    model, penalty = small_model(), EWCPenalty(1.0, consolidation)
    penalty.consolidate(random_fisher(model, 10), model)
    entries = random_fisher(model, 10).diagonal()
    later = {name: tensor for name, tensor in entries.items() if not name.startswith("0.")}
    penalty.consolidate(DiagonalFisher(later, 10), model)
    assert penalty(model).item() == 0.0
    with torch.no_grad():
        model[0].weight += 1.0
    assert penalty(model).item() > 0.0


def test_half_precision_models_keep_single_precision_terms():
    model, penalty = small_model().half(), EWCPenalty(1.0)
    entries = {n: 10 * torch.ones(p.shape) for n, p in model.named_parameters()}
    penalty.consolidate(DiagonalFisher(entries, 60_000), model)  # N F overflows half precision
    with torch.no_grad():
        model[0].weight += 0.5
    value = penalty(model)
    torch.testing.assert_close(value, torch.tensor(0.5 * 10 * 12 * 0.25), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(value, model[0].weight)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient, torch.full_like(gradient, 5.0), rtol=1e-2, atol=0)


def test_separate_terms_may_go_on_as_online():
    model, penalty = small_model(), EWCPenalty()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    fisher = fisher_information(model, [(x, y)], structure=Dense())
    penalty.consolidate(fisher, model)
    penalty.consolidate(fisher, model)
    penalty.consolidation = Online(0.5)
    penalty.consolidate(fisher, model)
    (term,) = penalty.terms
    torch.testing.assert_close(term.precision.to_dense(), 2 * fisher.precision.to_dense())


def test_dense_fisher_follows_growth_in_the_middle():
    model, penalty = small_model(), EWCPenalty()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    penalty.consolidate(fisher_information(model, [(x, y)], structure=Dense()), model)
    move(model)
    before = penalty(model)
    grow(model, 4)
    torch.testing.assert_close(penalty(model), before, **TIGHT)
    assert before.item() > 0


def test_models_that_do_not_fit_are_named():
    model, penalty = small_model(), EWCPenalty()
    fisher = random_fisher(model, 10)
    penalty.consolidate(fisher, model)
    with pytest.raises(ValueError, match=r"no parameter '2.weight'"):
        penalty(nn.Sequential(model[0]))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[3, 3\] in the model"):
        penalty(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(4, 2)).double())
    with pytest.raises(ValueError, match=r"lacks parameter '2.bias'"):
        penalty.consolidate(fisher, nn.Sequential(model[0]))
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"has shape \[1, 4\] for parameter '2.weight'"):
        penalty.consolidate(fisher, other)


def test_a_fisher_that_is_not_finite_changes_nothing():
    model, penalty = small_model(), EWCPenalty()
    penalty.consolidate(random_fisher(model, 10), model)
    before = penalty.terms
    broken = random_fisher(model, 10).diagonal()
    broken["0.bias"][1] = math.nan
    with pytest.raises(FloatingPointError, match=r"'0.bias' is not finite"):
        penalty.consolidate(DiagonalFisher(broken, 10), model)
    assert penalty.terms is before


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be a finite number, 0 or above, got"):
        EWCPenalty(strength)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got"):
        Online(decay)


def test_before_any_task_the_penalty_is_zero():
    model = small_model()
    assert float(EWCPenalty()(model)) == 0.0
    assert EWCPenalty().precision_trace == 0.0


SAVED = [Diagonal(), Kronecker(), EigenvalueCorrected(), LowRank(3), Dense(), Implicit()]


@pytest.mark.parametrize("structure", SAVED, ids=repr)
@pytest.mark.parametrize("consolidation", [Separate(), Online(0.25)], ids=repr)
def test_a_file_carries_everything_bit_by_bit(tmp_path, consolidation, structure):
    model, penalty = small_model(), EWCPenalty(3.0, consolidation, eigenvector_share=0.5)
    penalty.num_examples = 5
    for _ in range(2):
        x, y = torch.randn(6, 3, dtype=torch.double), torch.randint(2, (6,))
        fisher = fisher_information(model, [(x, y)], structure=structure)
        penalty.consolidate(fisher, model)
        move(model)
    penalty(model)
    penalty.save(tmp_path / "penalty")
    other = EWCPenalty.load(tmp_path / "penalty")
    assert repr(other) == repr(penalty)
    for _ in range(2):
        here, there = other(model), penalty(model)
        torch.testing.assert_close(here, there, rtol=0, atol=0)
        torch.testing.assert_close(gradients(here, model), gradients(there, model), rtol=0, atol=0)


def test_a_file_that_holds_no_penalty_is_refused(tmp_path):
    path, model = tmp_path / "file", small_model()
    random_fisher(model, 5).save(path)
    with pytest.raises(ValueError, match="holds no EWC penalty"):
        EWCPenalty.load(path)
    penalty = EWCPenalty()
    consolidated(penalty, model, 1)
    penalty.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        EWCPenalty.load(path)
    with pytest.raises(FileNotFoundError):
        EWCPenalty.load(tmp_path / "missing")


@pytest.mark.parametrize("consolidation", [Separate(), Online(0.25)], ids=repr)
def test_state_dict_carries_everything(consolidation):
    model, penalty = small_model(), EWCPenalty(3.0, consolidation)
    penalty.num_examples = 5
    consolidated(penalty, model, 3, 1.0)
    move(model)
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    other = EWCPenalty()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.consolidation == consolidation
    torch.testing.assert_close(other(model), penalty(model), rtol=0, atol=0)
    copied = copy.deepcopy(penalty)
    consolidated(penalty, model, 1)
    torch.testing.assert_close(other(model), copied(model), rtol=0, atol=0)


def test_the_penalty_follows_the_models_type():
    model, penalty = small_model(), EWCPenalty()
    consolidated(penalty, model, 2)
    move(model)
    expected = penalty(model)
    assert penalty(model.float()).dtype == torch.float32
    torch.testing.assert_close(penalty(model).double(), expected, rtol=1e-5, atol=0)
    penalty.double()
    assert penalty.terms[0].anchor["0.weight"].dtype == torch.float64


def test_derivatives_of_every_order_and_repeated_backward_passes():
    model, penalty = nn.Linear(2, 2).double(), EWCPenalty(1.7)
    for _ in range(2):
        move(model)
        entries = {n: torch.rand_like(p).detach() for n, p in model.named_parameters()}
        penalty.consolidate(DiagonalFisher(entries, 10), model)
    move(model)
    value = penalty(model)
    first = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(3 * value, list(model.parameters()))
    torch.testing.assert_close([3 * g for g in first], list(again), **TIGHT)
    (gradient,) = torch.autograd.grad(penalty(model), model.weight, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), model.weight)
    expected = 1.7 * penalty.terms[0].precision.diagonal()["weight"] / 10
    torch.testing.assert_close(curvature, expected, **TIGHT)


def test_frozen_parameters_get_no_gradient():
    model, penalty = small_model(), EWCPenalty()
    consolidated(penalty, model, 1)
    move(model)
    model[0].requires_grad_(False)
    penalty(model).backward()
    assert model[0].weight.grad is None
    assert float(model[2].weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    "structure",
    [
        BlockDiagonal(),
        Kronecker(),
        EigenvalueCorrected(),
        LowRank(rank=3),
        Dense(),
        Implicit(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("consolidation", [Separate(), Online(0.5)], ids=repr)
def test_every_structure_may_weigh_the_parameters(structure, consolidation):
    model, penalty = small_model(), EWCPenalty(3.0, consolidation)
    tasks = []
    for size in (9, 14):
        move(model)
        x, y = torch.randn(size, 3, dtype=torch.float64), torch.randint(2, (size,))
        fisher = fisher_information(model, [(x, y)], structure=structure)
        penalty.consolidate(fisher, model)
        anchor = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        tasks.append((fisher.precision, anchor))
        if len(tasks) == 1:
            copied = EWCPenalty()
            copied.load_state_dict(copy.deepcopy(penalty.state_dict()))
    move(model)
    flat = torch.cat([p.flatten() for p in model.parameters()])
    first, at_first = tasks[0]
    if isinstance(consolidation, Online):
        tasks = in_one(tasks, 0.5)
    expected = sum(1.5 / 14 * (flat - a) @ m.to_dense() @ (flat - a) for m, a in tasks)
    value = penalty(model)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(gradients(value, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    # Saved after the first task, with the network it now meets.
    value = copied(model)
    alone = 1.5 / 9 * (flat - at_first) @ first.to_dense() @ (flat - at_first)
    torch.testing.assert_close(value, alone, rtol=1e-10, atol=1e-12)
    grow(model, 5)
    copied(model).backward()
    assert float(model[2].weight.grad[2:].abs().max()) == 0.0


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
def test_under_autocast_value_and_gradient_keep_their_precision(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(20, 6), torch.randint(3, (20,)))]
    penalty = EWCPenalty(1.0)
    penalty.consolidate(fisher_information(model, data, structure=structure), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(penalty(model), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(penalty(model), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_printing_a_penalty_shows_its_options():
    penalty = EWCPenalty(2.0, Online(0.5), shrinkage=0.25)
    assert repr(penalty) == (
        "EWCPenalty(strength=2.0, consolidation=Online(decay=0.5), shrinkage=0.25, "
        "eigenvector_share=1.0)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_before_any_task_the_penalty_is_a_zero_of_the_models_type(dtype):
    value = EWCPenalty()(nn.Linear(2, 2, dtype=dtype))
    torch.testing.assert_close(value, torch.zeros((), dtype=dtype), rtol=0, atol=0)


def test_before_any_task_the_penalty_of_a_network_without_parameters_is_0():
    torch.testing.assert_close(EWCPenalty()(nn.ReLU()), torch.zeros(()), rtol=0, atol=0)
