"""Natural gradient descent against its definition, with dense matrices."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ewc import (
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    FisherMatrix,
    Gaussian,
    Implicit,
    Kronecker,
    KroneckerFisher,
    LowRank,
    fisher_information,
)
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.natural_gradient import NaturalGradient
from ewc.parameters import flatten


@pytest.fixture
def classified() -> list[tuple[Tensor, Tensor]]:
    """Forty examples of three classes, in two batches."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    return [(x[:25], y[:25]), (x[25:], y[25:])]


@pytest.fixture
def network() -> nn.Module:
    """A small network in double precision."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean negative log-likelihood."""
    return cross_entropy(model(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data]))


def parameters_of(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return flatten({name: p.detach().clone() for name, p in model.named_parameters()})


def stepped(optimizer: NaturalGradient, data: list[tuple[Tensor, Tensor]]) -> float:
    """One step on the whole data with fresh curvature; returns the loss before it."""
    optimizer.update_fisher(data)
    optimizer.zero_grad()
    loss = mean_loss(optimizer.model, data)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("structure", [Dense(), Kronecker(), EigenvalueCorrected()])
def test_one_step_solves_linear_regression(structure: type) -> None:
    """Of a linear model with normal errors the loss is the quadratic that F is of."""
    torch.manual_seed(2)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    variance = 0.7
    optimizer = NaturalGradient(
        model, Gaussian(variance=variance), lr=1.0, damping=0.0, structure=structure
    )
    optimizer.update_fisher([(x, y)])
    (0.5 * (model(x) - y).square().sum(1).mean() / variance).backward()
    optimizer.step()

    augmented = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(augmented, y).solution.T
    torch.testing.assert_close(model.weight.detach(), solution[:, :-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.bias.detach(), solution[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", [Dense(), Diagonal(), Kronecker(), EigenvalueCorrected()])
def test_steps_are_those_of_the_definition(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]], structure: type
) -> None:
    """Three steps with damping, momentum and weight decay, against dense algebra."""
    reference = copy.deepcopy(network)
    lr, momentum, weight_decay, damping = 0.3, 0.8, 0.01, 0.05
    optimizer = NaturalGradient(
        network,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        damping=damping,
        structure=structure,
    )
    velocity = torch.zeros_like(parameters_of(reference))
    for _ in range(3):
        fisher = fisher_information(reference, classified, structure=structure).to_dense()
        gradients = torch.autograd.grad(
            mean_loss(reference, classified), list(reference.parameters())
        )
        here = parameters_of(reference)
        gradient = torch.cat([g.flatten() for g in gradients]) + weight_decay * here
        damped = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
        velocity = momentum * velocity - torch.linalg.solve(damped, gradient)
        nn.utils.vector_to_parameters(here + lr * velocity, reference.parameters())
        stepped(optimizer, classified)
    torch.testing.assert_close(
        parameters_of(network), parameters_of(reference), rtol=1e-9, atol=1e-10
    )


class Reparametrised(nn.Module):
    """Logistic regression with weights ``B C`` in place of ``W``."""

    def __init__(self, weight: Tensor, change: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight @ torch.linalg.inv(change))
        self.register_buffer("change", change)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of two classes, of which the first is the reference."""
        logit = x @ (self.weight @ self.change).T
        return torch.cat([torch.zeros_like(logit), logit], 1)


def test_the_path_does_not_depend_on_the_parametrisation() -> None:
    """Linear changes of parameters: the same models step by step, where SGD's differ."""
    torch.manual_seed(3)
    x = torch.randn(60, 4, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(60, dtype=torch.float64) > 0).long()
    start, change = torch.randn(1, 4).double(), torch.randn(4, 4).double()
    plain = Reparametrised(start, torch.eye(4, dtype=torch.float64))
    changed = Reparametrised(start, change)
    descent = copy.deepcopy(plain), copy.deepcopy(changed)
    pairs = [
        (model, NaturalGradient(model, lr=0.5, damping=0.0, structure=Dense()))
        for model in (plain, changed)
    ]
    for _ in range(5):
        for _, optimizer in pairs:
            stepped(optimizer, [(x, y)])
        torch.testing.assert_close(plain(x), changed(x), rtol=1e-8, atol=1e-9)

    for model in descent:
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        mean_loss(model, [(x, y)]).backward()
        sgd.step()
    assert float((descent[0](x) - descent[1](x)).detach().abs().max()) > 0.01


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_trust_region_bounds_the_divergence(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]], momentum: float
) -> None:
    """A step that would go too far goes as far as it may, and in the same direction."""
    max_kl = 1e-6
    free = copy.deepcopy(network)
    dense = {"momentum": momentum, "structure": Dense()}
    stepped(NaturalGradient(free, lr=1.0, **dense), classified)
    optimizer = NaturalGradient(network, lr=1.0, max_kl=max_kl, **dense)
    before = parameters_of(network)
    x = torch.cat([x for x, _ in classified])
    old = network(x).detach().log_softmax(1)
    stepped(optimizer, classified)
    move, whole = parameters_of(network) - before, parameters_of(free) - before
    torch.testing.assert_close(move / move.norm(), whole / whole.norm())
    assert optimizer.fisher is not None
    named = dict(zip(optimizer.fisher.shapes, network.parameters(), strict=True))
    sizes = [p.numel() for p in named.values()]
    parts = {
        n: part.reshape(named[n].shape) for n, part in zip(named, move.split(sizes), strict=True)
    }
    assert 0.5 * float(optimizer.fisher.quadratic_form(parts)) == pytest.approx(max_kl, rel=1e-9)
    divergence = (old.exp() * (old - network(x).detach().log_softmax(1))).sum(1).mean()
    assert float(divergence) == pytest.approx(max_kl, rel=0.02)  # of order |step|^3 beside it


def test_a_short_step_is_left_alone(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """Within the trust region nothing changes."""
    free = copy.deepcopy(network)
    stepped(NaturalGradient(free, lr=1e-3), classified)
    stepped(NaturalGradient(network, lr=1e-3, max_kl=10.0), classified)
    assert torch.equal(parameters_of(network), parameters_of(free))


def test_the_damping_follows_its_schedule(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """The damping of step k is what the schedule says of k, also after a reload."""
    optimizer = NaturalGradient(network, damping=lambda step: 0.1 / (1 + step))
    seen = []
    for _ in range(3):
        stepped(optimizer, classified)
        seen.append(optimizer.param_groups[0]["damping"])
    assert seen == [0.1, 0.05, 0.1 / 3]
    other = NaturalGradient(network, damping=lambda step: 0.1 / (1 + step))
    other.load_state_dict(optimizer.state_dict())
    stepped(other, classified)
    assert other.param_groups[0]["damping"] == 0.025
    with pytest.raises(RuntimeError, match="follows a schedule"):
        other.adapt_damping(-0.1)


def test_the_forecast_is_right_where_the_model_is() -> None:
    """Linear regression is its own quadratic model: without damping the ratio is 1."""
    torch.manual_seed(2)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    optimizer = NaturalGradient(
        model, Gaussian(), lr=0.4, momentum=0.5, damping=0.0, structure=Dense()
    )
    for _ in range(3):
        optimizer.update_fisher([(x, y)])
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        after = 0.5 * (model(x) - y).square().sum(1).mean()
        assert optimizer.adapt_damping(float((after - loss).detach())) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("share", "damping"), [(0.1, 0.15), (0.5, 0.1), (0.9, 0.1 / 1.5)])
def test_the_damping_follows_what_happened(
    network: nn.Module,
    classified: list[tuple[Tensor, Tensor]],
    share: float,
    damping: float,
) -> None:
    """Martens and Grosse's rule, by shares of the forecast written from its equation."""
    optimizer = NaturalGradient(network, lr=0.7, damping=0.1, structure=Dense())
    fisher = fisher_information(network, classified, structure=Dense()).to_dense()
    loss = mean_loss(network, classified)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]
    )
    damped = fisher + 0.1 * torch.eye(len(fisher), dtype=torch.float64)
    move = -0.7 * torch.linalg.solve(damped, gradient)
    forecast = float(gradient @ move + 0.5 * move @ damped @ move)
    stepped(optimizer, classified)
    assert optimizer.adapt_damping(share * forecast) == pytest.approx(share, rel=1e-9)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(damping)


@pytest.mark.parametrize("structure", [Diagonal(), Dense()])
def test_the_running_mean(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]], structure: type
) -> None:
    """Each update keeps a share of what was before."""
    first, second = ([batch] for batch in classified)
    optimizer = NaturalGradient(network, decay=0.8, structure=structure)
    optimizer.update_fisher(first)
    optimizer.update_fisher(second)
    one, two = (fisher_information(network, part, structure=structure) for part in (first, second))
    assert optimizer.fisher is not None
    torch.testing.assert_close(
        optimizer.fisher.to_dense(), 0.8 * one.to_dense() + 0.2 * two.to_dense()
    )


def test_the_running_mean_of_kronecker_matrices_stays_one(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """The mean of a matrix with itself is the matrix, in one term."""
    optimizer = NaturalGradient(network, decay=0.8)
    for _ in range(2):
        optimizer.update_fisher(classified)
    assert isinstance(optimizer.fisher, KroneckerFisher)
    fisher = fisher_information(network, classified, structure=Kronecker())
    torch.testing.assert_close(optimizer.fisher.to_dense(), fisher.to_dense())


def test_the_running_mean_of_corrected_matrices_is_seen_in_the_last_eigenvectors(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """By layer the diagonal of the mean along these eigenvectors, which are the last's."""
    first, second = ([batch] for batch in classified)
    optimizer = NaturalGradient(network, decay=0.8, structure=EigenvalueCorrected())
    optimizer.update_fisher(first)
    optimizer.update_fisher(second)
    one, two = (
        fisher_information(network, part, structure=EigenvalueCorrected())
        for part in (first, second)
    )
    mean = 0.8 * one.to_dense() + 0.2 * two.to_dense()
    assert optimizer.fisher is not None
    found = optimizer.fisher.to_dense()
    torch.testing.assert_close(found.trace(), mean.trace())
    for block, places in zip(two.blocks, (slice(0, 25), slice(25, 43)), strict=True):
        assert isinstance(block, EigenvalueCorrectedProduct)
        pairs = torch.kron(block.outputs[0], block.inputs[0])
        order = block.weights.places(pairs.device)[0].flatten()
        vectors = torch.zeros_like(pairs).index_copy(0, order, pairs)
        along = (vectors.T @ mean[places, places] @ vectors).diagonal()
        torch.testing.assert_close(found[places, places], vectors * along @ vectors.T)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_a_batch_a_step_ends_at_the_minimum_of_the_exact_model(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]], momentum: float
) -> None:
    """The slope of the quadratic model is 0 there, with F by its definition."""
    optimizer = NaturalGradient(
        network, lr=50.0, momentum=momentum, damping=0.05, structure=Diagonal()
    )
    optimizer.update_fisher(classified)
    for _ in range(2):
        fisher = fisher_information(network, classified[:1], structure=Dense()).to_dense()
        damped = fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64)
        before = parameters_of(network)
        optimizer.zero_grad()
        mean_loss(network, classified).backward()
        gradient = flatten({n: p.grad.clone() for n, p in network.named_parameters()})
        optimizer.step(batch=classified[0])
        step = parameters_of(network) - before
        assert float(step @ (gradient + damped @ step)) == pytest.approx(0, abs=1e-9)
        assert float(step @ gradient) < 0
    longest = optimizer.param_groups[0]["longest"]
    optimizer.step()  # the bound holds on
    assert optimizer._last is not None
    assert optimizer._last.length == longest < optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.5 * longest
    optimizer.step(batch=classified[0])
    assert optimizer._last.length == min(0.5 * longest, optimizer.param_groups[0]["longest"])


def test_the_tolerance_is_of_eigenvalues_below_a_share_of_the_damping(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """Along the matrix's own eigenvectors: those below count as 0, others are exact."""
    fisher = fisher_information(network, classified, structure=EigenvalueCorrected())
    damping, tolerance = 0.3, 0.1
    used = 0
    for block in fisher.blocks:
        v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in block.shapes.items()}
        exact, found = (
            block.rotated(block.weights.to_matrix(solution))
            for solution in (block.solve(v, damping), block.damped_inverse(damping, tolerance)(v))
        )
        ratio = found / exact
        small = block.spectrum <= tolerance * damping
        rows, columns = (~small[0]).any(1), (~small[0]).any(0)
        if int(columns.sum()) <= block.spectrum.shape[2] // 2:
            used += 1
            inside = rows[:, None] & columns
            torch.testing.assert_close(ratio[0][inside], torch.ones_like(ratio[0][inside]))
            outside = 1 + block.spectrum[0][~inside] / damping
            torch.testing.assert_close(ratio[0][~inside], outside)
            assert 1 + 1e-4 < float(ratio.max()) <= 1 + tolerance
        else:
            torch.testing.assert_close(found, exact)
    assert used


def test_the_inverse_is_made_once_for_a_matrix_and_a_damping(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """It is kept from step to step, and never outlives its matrix or damping."""
    optimizer = NaturalGradient(network, damping=0.1, tolerance=0.01)
    optimizer.update_fisher(classified)
    kept = optimizer._inverse(0.1)
    assert optimizer._inverse(0.1) is kept
    assert optimizer._inverse(0.2) is not kept
    kept = optimizer._inverse(0.1)
    optimizer.update_fisher(classified)
    assert optimizer._inverse(0.1) is not kept


def test_frozen_parameters_stay(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """What requires no gradient is not moved; the estimator is the one asked for."""
    network[0].weight.requires_grad_(False)
    frozen = network[0].weight.clone()
    empirical = fisher_information(
        network, classified, estimator=Empirical(), structure=Kronecker()
    )
    optimizer = NaturalGradient(network, estimator=Empirical())
    stepped(optimizer, classified)
    assert torch.equal(network[0].weight, frozen)
    assert optimizer.fisher is not None
    assert torch.equal(optimizer.fisher.to_dense(), empirical.to_dense())


def test_momentum_survives_a_reload(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """A checkpoint of model and optimizer goes on as if nothing had been."""
    optimizer = NaturalGradient(network, momentum=0.9)
    stepped(optimizer, classified)
    twin = copy.deepcopy(network)
    other = NaturalGradient(twin, momentum=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        stepped(each, classified)
    assert torch.equal(parameters_of(network), parameters_of(twin))


def test_copies_go_on_as_the_optimizer_would(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    optimizer = NaturalGradient(network, lr=0.1, momentum=0.5, damping=0.1)
    optimizer.update_fisher(classified)
    mean_loss(network, classified).backward()
    optimizer.step()
    other = pickle.loads(pickle.dumps(optimizer))
    other.model.zero_grad()
    optimizer.zero_grad()
    for each in (optimizer, other):
        mean_loss(each.model, classified).backward()
        each.step()
    torch.testing.assert_close(parameters_of(other.model), parameters_of(network))


def test_closure(network: nn.Module, classified: list[tuple[Tensor, Tensor]]) -> None:
    """A closure gives the gradients and its loss is returned."""
    optimizer = NaturalGradient(network)
    optimizer.update_fisher(classified)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean_loss(network, classified)
        loss.backward()
        return loss

    before = float(mean_loss(network, classified).detach())
    assert float(optimizer.step(closure).detach()) == before
    assert float(mean_loss(network, classified).detach()) < before


def test_what_is_refused(network: nn.Module, classified: list[tuple[Tensor, Tensor]]) -> None:
    """Options outside their range, and calls that come too early."""
    for options, message in [
        ({"lr": -1.0}, "lr must be a finite number, 0 or above, got -1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be .*, got nan"),
        ({"damping": -0.1}, "damping must be .*, got -0.1"),
        ({"max_kl": 0.0}, "max_kl must be a finite number above 0, or None, got 0.0"),
        ({"decay": 1.5}, "decay must .*, got 1.5"),
        ({"tolerance": -1.0}, "tolerance must .*, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            NaturalGradient(network, **options)
    optimizer = NaturalGradient(network)
    with pytest.raises(RuntimeError, match="call update_fisher before the first step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no step yet"):
        optimizer.adapt_damping(0.0)
    low_rank = NaturalGradient(
        network, decay=0.5, structure=LowRank(rank=3), likelihood=Categorical()
    )
    low_rank.update_fisher(classified)
    with pytest.raises(TypeError, match="decay must be 0 with LowRankFisher, got"):
        low_rank.update_fisher(classified)


STRUCTURES = {
    "diagonal": Diagonal(),
    "kronecker": Kronecker(),
    "corrected": EigenvalueCorrected(),
    "low_rank": LowRank(rank=3),
    "dense": Dense(),
    "implicit": Implicit(),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_frozen_after_the_matrix_stays(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]], name: str, momentum: float
) -> None:
    """Whatever would move it: its neighbours, an old gradient, momentum, weight decay."""
    optimizer = NaturalGradient(
        network, momentum=momentum, weight_decay=0.1, max_kl=1.0, structure=STRUCTURES[name]
    )
    stepped(optimizer, classified)  # leaves a gradient and momentum
    frozen = [network[0].weight, network[2].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, all_before = [p.clone() for p in frozen], parameters_of(network)
    for batch in (None, classified[0]):
        for parameter in (network[0].bias, network[2].weight):
            parameter.grad = None
        mean_loss(network, classified).backward()
        optimizer.step(batch=batch)
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert not torch.equal(parameters_of(network), all_before)
    for parameter in frozen:
        parameter.requires_grad_(True)
    stepped(optimizer, classified)
    assert not any(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))


def test_what_is_thawed_is_trained_with_its_own_gradient(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    """Gradients of parameters that were frozen at the start are cleared like all others."""
    network[0].requires_grad_(False)
    optimizer = NaturalGradient(network, momentum=0.5)
    network[0].requires_grad_(True)
    optimizer.update_fisher(classified)
    mean_loss(network, classified).backward()
    optimizer.zero_grad()
    assert network[0].weight.grad is None
    before = network[0].weight.detach().clone()
    stepped(optimizer, classified)
    assert not torch.equal(network[0].weight, before)
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_reloaded_optimizer_goes_on_exactly(
    network: nn.Module,
    classified: list[tuple[Tensor, Tensor]],
    name: str,
    dtype: torch.dtype,
) -> None:
    """Through a file without pickled objects: with the matrix, the momentum and the last step."""
    network.to(dtype)
    data = [(x.to(dtype), y) for x, y in classified]
    options = {"momentum": 0.9, "structure": STRUCTURES[name], "decay": 0.0, "tolerance": 0.01}
    optimizer = NaturalGradient(network, lr=0.3, max_kl=0.5, damping=0.3, **options)
    stepped(optimizer, data)
    optimizer.step(batch=data[0])
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(saved["model"])
    other = NaturalGradient(twin, **options)
    other.load_state_dict(saved["optimizer"])
    assert optimizer.adapt_damping(-0.01) == other.adapt_damping(-0.01)
    for each in (optimizer, other):
        for _ in range(2):
            each.zero_grad()
            mean_loss(each.model, data).backward()
            each.step()
    assert torch.equal(parameters_of(network), parameters_of(twin))


def test_loading_does_not_tie_optimizers_together(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    optimizer = NaturalGradient(network, momentum=0.9)
    stepped(optimizer, classified)
    other = NaturalGradient(copy.deepcopy(network), momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.state[network[0].weight]["momentum_buffer"].clone()
    stepped(other, classified)
    assert torch.equal(optimizer.state[network[0].weight]["momentum_buffer"], before)


def test_a_state_that_does_not_load_changes_nothing(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    optimizer = NaturalGradient(network, momentum=0.9)
    stepped(optimizer, classified)
    fisher, groups = optimizer.fisher, copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = copy.deepcopy(NaturalGradient(network, lr=7.0).state_dict())
    state["natural_gradient"]["fisher"] = {"tensors": {}, "about": {"structure": "Unknown"}}
    with pytest.raises(ValueError, match="class of a Fisher matrix must be one of"):
        optimizer.load_state_dict(state)
    small = NaturalGradient(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(small.state_dict())
    assert optimizer.fisher is fisher
    assert optimizer.state_dict()["param_groups"] == groups


def test_new_parameters_of_the_model_join_and_others_are_refused(
    network: nn.Module, classified: list[tuple[Tensor, Tensor]]
) -> None:
    optimizer = NaturalGradient(network, momentum=0.5)
    stepped(optimizer, classified)
    network.append(nn.Linear(3, 3).double())
    late = network[3].weight
    optimizer.add_param_group({"params": list(network.parameters())})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(
        map(id, network.parameters())
    )
    before = late.detach().clone()
    stepped(optimizer, classified)
    assert not torch.equal(late, before)
    network.append(nn.Linear(3, 3).double())
    optimizer.update_fisher(classified)  # finds them by itself
    assert len(optimizer.param_groups[0]["params"]) == 8
    for group in (
        {"params": nn.Parameter(torch.zeros(2))},
        {"params": [late], "lr": 0.1},
        {"params": nn.Linear(2, 2).parameters()},
    ):
        with pytest.raises(ValueError, match="has one group of parameters, those of its model"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_wrong_types_are_refused_when_given(network: nn.Module) -> None:
    parameters = network.parameters()
    with pytest.raises(TypeError, match="model must be the network itself, not its parameters"):
        NaturalGradient(parameters)  # type: ignore[arg-type]
    for name, values, message in [
        ("likelihood", ["categorical", Categorical], "likelihood must be a Likelihood instance"),
        ("estimator", ["exact", Empirical], "estimator must be an Estimator instance"),
        ("structure", ["kronecker", Empirical(), int], "structure must be a Structure instance"),
        ("structure", [FisherMatrix], "structure must be a Structure instance"),
    ]:
        for value in values:
            with pytest.raises(TypeError, match=message):
                NaturalGradient(network, **{name: value})
    for options in (
        {"momentum": True},
        {"momentum": "0.5"},
        {"lr": True},
        {"lr": math.inf},
        {"max_kl": math.inf},
        {"decay": True},
        {"tolerance": math.nan},
        {"damping": lambda _: -1.0},
    ):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must .*, got"):
            NaturalGradient(network, **options)
    with pytest.raises(ValueError, match="change must be a finite number, got nan"):
        NaturalGradient(network).adapt_damping(math.nan)
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        NaturalGradient(network)
