"""Kronecker penalties by paced eigenvectors: exact over a period, cheap and reproducible."""

import copy

import pytest
import torch
from torch import nn

from ewc import EWCPenalty, Kronecker, Online, Separate, fisher_information
from ewc.consolidation.pacing import PERIOD, paces, turns

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.Flatten(),
        nn.Linear(108, 70, bias=False),
        nn.Tanh(),
        nn.Linear(70, 3),
    ).double()


def information(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 1, 7, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    return fisher_information(model, [(x, y)], structure=Kronecker())


def sum_of_two(model, seed):
    """A sum of Kronecker matrices, which is none itself."""
    return information(model, seed) + information(model, seed + 100)


def remembered(share, consolidation, tasks=2, of=information):
    """A penalty over some tasks, and the model away from the anchors."""
    model = network()
    penalty = EWCPenalty(3.0, consolidation, eigenvector_share=share)
    for seed in range(tasks):
        penalty.consolidate(of(model, seed), model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return penalty, model


def gradients(penalty, model, steps):
    """Value and gradient of some steps, one after the other."""
    found = []
    for _ in range(steps):
        value = penalty(model)
        gradient = torch.autograd.grad(value, list(model.parameters()))
        found.append((value.item(), torch.cat([g.flatten() for g in gradient])))
    return found


@pytest.mark.parametrize(
    ("consolidation", "of"),
    [(Online(), information), (Separate(), information), (Separate(), sum_of_two)],
)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_over_a_period_value_and_gradient_are_exact(share, consolidation, of):
    penalty, model = remembered(share, consolidation, of=of)
    whole, _ = remembered(1.0, consolidation, of=of)
    steps = gradients(penalty, model, PERIOD)
    ((value, gradient),) = gradients(whole, model, 1)
    assert sum(v for v, _ in steps) / PERIOD == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(sum(g for _, g in steps) / PERIOD, gradient, **EXACT)
    # Each step by itself is something else: that is what makes it cheap.
    assert max(float((g - gradient).norm()) for _, g in steps) > 0.02 * float(gradient.norm())


def test_without_gradients_the_value_is_exact():
    penalty, model = remembered(0.1, Online())
    whole, _ = remembered(1.0, Online())
    with torch.no_grad():
        for _ in range(2):
            assert penalty(model).item() == pytest.approx(whole(model).item(), rel=1e-12)


def test_the_gradient_is_that_of_the_value():
    penalty, model = remembered(0.2, Online())
    parameter = next(model.parameters())
    direction = torch.randn_like(parameter)
    (_, gradient), *_ = gradients(penalty, model, 1)
    penalty._step = 0
    here = penalty(model)
    with torch.no_grad():
        parameter.add_(1e-6 * direction)
    penalty._step = 0
    slope = (penalty(model).item() - here.item()) / 1e-6
    expected = float((gradient[: parameter.numel()] * direction.flatten()).sum())
    assert slope == pytest.approx(expected, rel=1e-4)


def test_in_single_precision_no_direction_is_lost():
    """Inputs with a large mean: one eigenvalue stands far above all others."""
    torch.manual_seed(0)
    model = nn.Linear(400, 4)
    x = 1 + 0.1 * torch.randn(2000, 400)
    fisher = fisher_information(
        model, [(x, torch.zeros(2000, dtype=torch.long))], structure=Kronecker()
    )
    penalty = EWCPenalty(1.0, Online(), eigenvector_share=0.2)
    penalty.consolidate(fisher, model)
    with torch.no_grad():
        step = torch.randn_like(model.weight)
        model.weight.add_(step - step.mean(1, keepdim=True))
        whole = penalty(model).item()
    values = [v for v, _ in gradients(penalty, model, PERIOD)]
    assert sum(values) / PERIOD == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 8])
def test_whoever_uses_one_value_of_several_is_not_misled_for_long(every):
    """Records of every second step, or a second call in every step."""
    penalty, model = remembered(0.1, Online())
    periods = 200
    steps = gradients(penalty, model, PERIOD * periods)[::every]
    penalty.eigenvector_share = 1.0
    ((_, gradient),) = gradients(penalty, model, 1)
    error = sum(g for _, g in steps) / len(steps) - gradient
    single = sum(float((g - gradient).norm()) for _, g in steps) / len(steps)
    # A mean over fixed turns would keep an error of the size of a single step's.
    assert float(error.norm()) < 0.15 * single


def test_gradient_descent_is_stable_where_it_is_with_the_whole_matrix():
    torch.manual_seed(0)
    model = nn.Linear(100, 2).double()
    x = torch.randn(300, 100, dtype=torch.float64) * torch.logspace(0, -1, 100).double()
    data = [(x, torch.zeros(300, dtype=torch.long))]
    penalty = EWCPenalty(1.0, Online(), eigenvector_share=0.02)
    fisher = fisher_information(model, data, structure=Kronecker())
    penalty.consolidate(fisher, model)
    with torch.no_grad():
        model.weight.add_(torch.randn_like(model.weight))
        start = penalty(model).item()
    rate = 1.9 / float(fisher.eigenvalues()[-1])
    for _ in range(10 * PERIOD):
        model.zero_grad()
        penalty(model).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rate * parameter.grad)
    with torch.no_grad():
        assert penalty(model).item() < 1e-3 * start


@pytest.mark.parametrize("budget", [1.0, 20.0, 80.0])
def test_stiff_eigenvectors_come_more_often_within_the_budget(budget):
    values = torch.logspace(-4, 2, 100, dtype=torch.float64)
    pace = paces(values, budget)
    assert int(pace[-1]) == 0  # the stiffest is never late, whatever the budget
    taken = float((2.0**-pace).sum())
    assert 0.7 * budget < taken <= budget if budget > 1 else 5 < taken < 20
    assert bool((pace[1:] <= pace[:-1]).all())
    slow = (pace > pace.min()) & (pace < pace.max())
    # One step of two for every factor of four in the eigenvalue.
    expected = 0.5 * (values.max().log2() - values[slow].log2())
    assert float((pace[slow] - expected).max() - (pace[slow] - expected).min()) <= 1.0


def test_turns_share_the_vectors_out_evenly():
    pace = torch.tensor([0] * 3 + [1] * 10 + [3] * 16 + [6] * 64)
    steps = turns(pace)
    counts = torch.bincount(torch.cat(steps), minlength=len(pace))
    assert counts.tolist() == (PERIOD // 2**pace).tolist()
    sizes = [len(step) for step in steps]
    assert set(sizes) == {3 + 5 + 2 + 1}


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_takes_the_eigenvectors_of_its_turn(bias):
    r"""The gradient :math:`\sum_j 2^l a_j (G D u_j) u_j^\top`, and half its product with D."""
    torch.manual_seed(0)
    model = nn.Linear(80, 3, bias=bias).double()
    data = [(torch.randn(40, 80, dtype=torch.float64), torch.randint(3, (40,)))]
    fisher = fisher_information(model, data, structure=Kronecker())
    penalty = EWCPenalty(1.0, eigenvector_share=0.2)
    penalty.consolidate(fisher, model)
    d = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(d[name])
    matrix = torch.cat([d["weight"], d["bias"][:, None]], 1) if bias else d["weight"]
    (block,) = fisher.blocks
    values, vectors = torch.linalg.eigh(block.inputs[0])
    first = len(values) - int((values > 1e-12 * values[-1]).sum())  # 40 examples: a null space
    values, vectors = values[first:], vectors[:, first:]
    pace = paces(values, 0.2 * block.inputs.shape[1])
    generator = torch.Generator().manual_seed(0)
    turn = int(torch.randint(PERIOD, (), generator=generator))
    for step, (value, gradient) in enumerate(gradients(penalty, model, 3)):
        expected = torch.zeros_like(matrix)
        for j in turns(pace)[step ^ turn]:
            u = vectors[:, j]
            expected += 2.0 ** pace[j] * values[j] * torch.outer(block.outputs[0] @ matrix @ u, u)
        pieces = [expected[:, :80].flatten(), *([expected[:, 80]] if bias else [])]
        torch.testing.assert_close(gradient, torch.cat(pieces), **EXACT)
        assert value == pytest.approx(float(0.5 * (matrix * expected).sum()), rel=1e-9)


def test_a_head_that_grows_is_paced_as_well():
    penalty, model = remembered(0.2, Online(), tasks=1)
    head = model[-1]
    larger = nn.Linear(70, 5).double()
    with torch.no_grad():
        larger.weight[:3], larger.bias[:3] = head.weight, head.bias
    model[-1] = larger
    steps = gradients(penalty, model, PERIOD)
    penalty.eigenvector_share = 1.0
    ((_, gradient),) = gradients(penalty, model, 1)
    torch.testing.assert_close(sum(g for _, g in steps) / PERIOD, gradient, **EXACT)
    assert max(float((g - gradient).norm()) for _, g in steps) > 0.02 * float(gradient.norm())


def test_a_layer_without_information_is_no_obstacle():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 70, bias=False), nn.ReLU(), nn.Linear(70, 3)).double()
    data = [(torch.zeros(5, 80, dtype=torch.float64), torch.randint(3, (5,)))]
    penalty = EWCPenalty(1.0, Online(), eigenvector_share=0.1)
    penalty.consolidate(fisher_information(model, data, structure=Kronecker()), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        whole = penalty(model).item()
    assert whole > 0.01  # the last bias
    steps = gradients(penalty, model, PERIOD)
    assert sum(v for v, _ in steps) / PERIOD == pytest.approx(whole)
    assert all(not g[:5600].any() for _, g in steps)


def test_eigenvectors_are_made_once_a_task(monkeypatch):
    penalty, model = remembered(0.1, Separate())
    made = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: made.append(a) or eigh(a))
    for strength in (1.0, 2.0, 3.0):  # annealed
        penalty.strength = strength
        gradients(penalty, model, 2)
    assert len(made) == 4  # two tasks, two layers of more than PERIOD inputs
    penalty.consolidate(information(model, 2), model)
    gradients(penalty, model, 2)
    assert len(made) == 6


def test_another_share_counts_from_the_next_step_on():
    """And the same share does not plan its turns again in every step."""
    penalty, model = remembered(0.05, Online())
    gradients(penalty, model, 3)
    terms = penalty._scaled_terms()
    assert terms.paced(0.05) is terms.paced(0.05)
    penalty.eigenvector_share = 0.6
    fresh, _ = remembered(0.6, Online())
    fresh._step = 3
    ((value, gradient),) = gradients(penalty, model, 1)
    ((expected, of_fresh),) = gradients(fresh, model, 1)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, of_fresh, **EXACT)


class Wide(nn.Module):
    """Many inputs in every layer, but two groups in one and one-hot inputs in the other."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(PERIOD + 6, 3)
        self.grouped = nn.Conv1d(2 * (PERIOD + 6), 4, 1, groups=2)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        words = self.words((3 * x[:, 0, 0]).long().abs())
        return self.head(torch.cat([words, self.grouped(x)[..., 0]], 1))


def test_layers_in_groups_and_one_hot_inputs_are_whole_in_every_step():
    torch.manual_seed(0)
    model = Wide().double()
    x = torch.randn(30, 2 * (PERIOD + 6), 1, dtype=torch.float64)
    data = [(x, torch.randint(3, (30,)))]
    fisher = fisher_information(model, data, structure=Kronecker())
    values = []
    for share in (0.05, 1.0):
        penalty = EWCPenalty(1.0, eigenvector_share=share)
        penalty.consolidate(fisher, model)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(1.0)
        values.append([v for v, _ in gradients(penalty, moved, 3)])
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_the_share_is_kept_and_checked():
    penalty, _ = remembered(0.2, Online())
    loaded = EWCPenalty()
    loaded.load_state_dict(penalty.state_dict())
    assert loaded.eigenvector_share == 0.2
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eigenvector_share must be above 0 and at most 1"):
            EWCPenalty(eigenvector_share=share)
