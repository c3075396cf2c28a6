"""Influence functions, against refits without the examples and second derivatives by hand."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Gaussian,
    Implicit,
    Kronecker,
    fisher_information,
)
from ewc.statistics import influence, loss_gradient, parameters_without, self_influence

DECAY = 1e-3


def digits(*classes):
    """Real digits of some classes, the labels their number in the list."""
    x, y = load_digits(return_X_y=True)
    chosen = np.isin(y, classes)
    labels = np.searchsorted(np.asarray(classes), y[chosen])
    return torch.from_numpy(x[chosen] / 16), torch.from_numpy(labels)


def fit(x, y, num_examples, start=None):
    """The minimum of summed logistic losses and the decay of all examples, by Newton's method."""
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    theta = torch.zeros(design.shape[1], dtype=torch.float64) if start is None else start.clone()
    for _ in range(30):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (p - y[:, 0]) / num_examples + DECAY * theta
        hessian = (design.T * (p * (1 - p))) @ design / num_examples
        step = torch.linalg.solve(hessian + DECAY * torch.eye(len(theta)), gradient)
        theta = theta - step
        if float(step.abs().max()) < 1e-12:
            return theta
    raise AssertionError("Newton's method has not converged.")


def model_of(theta):
    model = nn.Linear(len(theta) - 1, 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :-1])
        model.bias.copy_(theta[-1:])
    return model


@pytest.fixture(scope="module")
def logistic():
    """Fours and nines, with a test part, and the parameters refitted without some examples."""
    x, y = digits(4, 9)
    y = y.double()[:, None]
    train, test = (x[:260], y[:260]), (x[260:], y[260:])
    theta = fit(*train, 260)
    generator = torch.Generator().manual_seed(0)
    left_out = torch.randperm(260, generator=generator)[:80].tolist()
    refits = []
    for i in left_out:
        kept = [j for j in range(260) if j != i]
        refits.append(fit(train[0][kept], train[1][kept], 260, theta))
    return train, test, model_of(theta), left_out, refits


def information(model, batch, structure=Dense()):
    return fisher_information(model, [batch], Bernoulli(), structure=structure)


def loss(theta, batch):
    x, y = batch
    outputs = x @ theta[:-1, None] + theta[-1]
    return float(functional.binary_cross_entropy_with_logits(outputs, y))


@pytest.mark.parametrize("structure", [Dense(), Implicit(), Kronecker()])
def test_test_losses_change_as_in_refits(logistic, structure):
    train, test, model, left_out, refits = logistic
    fisher = information(model, train, structure=structure)
    batches = [(train[0][i : i + 100], train[1][i : i + 100]) for i in range(0, 260, 100)]
    gradient = loss_gradient(model, [test], fisher, Bernoulli())
    found = influence(model, batches, gradient, fisher, Bernoulli(), damping=DECAY)
    assert found.shape == (260,)
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    before = loss(theta, test)
    actual = np.array([loss(refit, test) - before for refit in refits])
    assert np.corrcoef(found[left_out], actual)[0, 1] > 0.95
    if structure == Kronecker():  # which is not the Hessian
        return
    # In size too: of a quadratic loss the change is 1 / (1 - leverage) times the first order.
    design = torch.cat([train[0], torch.ones(260, 1, dtype=torch.float64)], 1)
    p = torch.sigmoid(design @ theta)
    solved = torch.linalg.solve(
        (design.T * (p * (1 - p))) @ design / 260 + DECAY * torch.eye(65, dtype=torch.float64),
        design.T,
    )
    leverage = p * (1 - p) * (design * solved.T).sum(1) / 260
    sized = (found / (1 - leverage))[left_out]
    slope = np.polyfit(sized.numpy(), actual, 1)[0]
    assert np.corrcoef(sized, actual)[0, 1] > 0.99
    assert slope == pytest.approx(1, abs=0.1)


def test_predictions_and_parameters_change_as_in_refits(logistic):
    train, test, model, left_out, refits = logistic
    fisher = information(model, train)
    output = model(test[0][:1])[0, 0]
    gradient = dict(
        zip(("weight", "bias"), torch.autograd.grad(output, model.parameters()), strict=True)
    )
    found = influence(model, [train], gradient, fisher, Bernoulli(), damping=DECAY)
    design = torch.cat([test[0][0], torch.ones(1, dtype=torch.float64)])
    actual = np.array([float(design @ refit) - float(output.detach()) for refit in refits])
    assert np.corrcoef(found[left_out], actual)[0, 1] > 0.95
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    i = left_out[int(np.argmin(np.abs(actual)))]
    part = [(train[0][i : i + 1], train[1][i : i + 1])]
    moved = parameters_without(model, part, fisher, Bernoulli(), damping=DECAY)
    move = torch.cat([moved["weight"].flatten(), moved["bias"]]) - theta
    refitted = refits[left_out.index(i)] - theta
    assert float(functional.cosine_similarity(move, refitted, dim=0)) > 0.95
    # The change of the prediction is that of the parameters, along its gradient.
    assert float(design @ move) == pytest.approx(float(found[i]), rel=1e-9)


def test_influence_is_the_bilinear_form_of_its_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    fisher = fisher_information(model, [(x, y)], structure=Dense())
    model.train()
    found = self_influence(model, [(x[:20], y[:20]), (x[20:], y[20:])], fisher, damping=0.1)
    damped = fisher.to_dense() + 0.1 * torch.eye(fisher.num_parameters, dtype=torch.float64)
    rows = []
    model.eval()
    for i in range(30):
        value = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, model.parameters())
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows)
    expected = rows @ torch.linalg.solve(damped, rows.T) / 30
    torch.testing.assert_close(found, expected.diagonal(), rtol=1e-9, atol=1e-12)
    model.train()
    gradient = loss_gradient(model, [(x[:7], y[:7]), (x[7:10], y[7:10])], fisher)
    on_loss = influence(model, [(x, y)], gradient, fisher, damping=0.1)
    torch.testing.assert_close(on_loss, expected[:10].mean(0), rtol=1e-9, atol=1e-12)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "structure",
    [Kronecker(), *(pytest.param(s, marks=pytest.mark.slow) for s in (Implicit(), Dense()))],
)
def test_planted_label_errors_are_found(structure):
    x, y = digits(*range(10))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)[:600]
    x, y = x[order].float(), y[order].clone()
    wrong = torch.randperm(600, generator=generator)[:60]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (60,), generator=generator)) % 10
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure():
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        value = functional.cross_entropy(model(x), y) + 0.5 * 0.01 * decay
        value.backward()
        return value

    optimizer.step(closure)
    fisher = fisher_information(model, [(x, y)], Categorical(), structure=structure)
    if structure == Implicit():  # a solve an example takes long: of the suspicious part
        suspects = torch.arange(600)[::10]
        found = self_influence(model, [(x[suspects], y[suspects])], fisher, damping=0.01)
        dense = fisher_information(model, [(x, y)], structure=Dense())
        expected = self_influence(model, [(x[suspects], y[suspects])], dense, damping=0.01)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        return
    found = self_influence(model, [(x, y)], fisher, damping=0.01)
    assert bool((found >= 0).all())
    first = set(found.topk(120).indices.tolist())
    assert len(first & set(wrong.tolist())) >= 48


def test_mistakes_are_named():
    model = nn.Linear(2, 1)
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    fisher = fisher_information(model, [(x, y)], Gaussian(), structure=Dense())
    with pytest.raises(ValueError, match="at least one example, got none"):
        loss_gradient(model, [], fisher, Gaussian())
    with pytest.raises(ValueError, match="weight"):
        influence(model, [(x, y)], {"bias": torch.zeros(1)}, fisher, Gaussian())
    with pytest.raises(ValueError, match="Batch 0 is a Tensor"):
        self_influence(model, [x], fisher, Gaussian(), damping=1.0)


def derivatives(likelihood, outputs, y):
    """The first two derivatives of the losses in the outputs, ``[n, c]`` and ``[n, c, c]``."""
    if isinstance(likelihood, Gaussian):
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype) / likelihood.variance
        return (outputs - y) / likelihood.variance, eye.expand(len(outputs), -1, -1)
    if isinstance(likelihood, Bernoulli):
        p = outputs.sigmoid()
        return p - y, (p * (1 - p))[:, :, None]
    p = outputs.softmax(1)
    return p - functional.one_hot(y, 3), torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def steps_without(model, likelihood, x, y, groups):
    """Gradients, and steps by Newton's method without groups of examples, ``[g, p]``."""
    first, second = derivatives(likelihood, x @ model.weight.detach().T, y)
    gradients = torch.einsum("nc,ni->nci", first, x).flatten(1)
    found = []
    for group in groups:
        kept = [j for j in range(len(x)) if j not in group]
        hessian = sum(torch.kron(second[j], torch.outer(x[j], x[j])) for j in kept) / len(x)
        damped = hessian + DECAY * torch.eye(len(hessian), dtype=x.dtype)
        found.append(torch.linalg.solve(damped, gradients[group].sum(0)) / len(x))
    return gradients, torch.stack(found)


@pytest.mark.parametrize("structure", [Dense(), pytest.param(Implicit(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(), Gaussian(0.7)])
def test_with_leverage_it_is_the_newton_step_without_the_example(likelihood, structure):
    """Dense matrices without each example, built and solved one by one; 12 data to 15 weights."""
    outputs = 1 if isinstance(likelihood, Bernoulli) else 3
    torch.manual_seed(0)
    x = torch.randn(12, 5, dtype=torch.float64)
    model = nn.Linear(5, outputs, bias=False).double()
    y = likelihood.sample(model(x).detach(), 1, torch.Generator().manual_seed(1))[0]
    fisher = fisher_information(model, [(x, y)], likelihood, structure=structure)
    data = [(x[:7], y[:7]), (x[7:], y[7:])]
    gradients, expected = steps_without(model, likelihood, x, y, [[i] for i in range(12)])
    close = {"rtol": 1e-10, "atol": 1e-11}
    direction = torch.randn(outputs, 5, dtype=torch.float64)
    options = {"damping": DECAY, "leverage": True}
    found = influence(model, data, {"weight": direction}, fisher, likelihood, **options)
    torch.testing.assert_close(found, expected @ direction.flatten(), **close)
    found = self_influence(model, data, fisher, likelihood, **options)
    torch.testing.assert_close(found, (gradients * expected).sum(1), **close)
    _, (expected,) = steps_without(model, likelihood, x, y, [[0, 2, 9]])
    part = [(x[[0, 2]], y[[0, 2]]), (x[[9]], y[[9]])]
    moved = parameters_without(model, part, fisher, likelihood, **options)
    torch.testing.assert_close((moved["weight"] - model.weight).flatten(), expected, **close)


def test_with_leverage_linear_regressions_are_refitted_exactly():
    """The minimum of half the squares of the others over N and half the decay, in closed form."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)

    def ridge(kept):
        gram = x[kept].T @ x[kept] / 9 + DECAY * torch.eye(6, dtype=torch.float64)
        return torch.linalg.solve(gram, x[kept].T @ y[kept] / 9).T

    model = nn.Linear(6, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(ridge(range(9)))
    fisher = fisher_information(model, [(x, y)], Gaussian(), structure=Dense())
    options = {"damping": DECAY, "leverage": True}
    for i in range(9):
        part = [(x[i : i + 1], y[i : i + 1])]
        moved = parameters_without(model, part, fisher, Gaussian(), **options)["weight"]
        refit = ridge([j for j in range(9) if j != i])
        torch.testing.assert_close(moved, refit, rtol=1e-10, atol=1e-10)
        rise = self_influence(model, part, fisher, Gaussian(), **options)
        slope = (model(x[i]) - y[i]) @ (refit - model.weight) @ x[i]
        torch.testing.assert_close(rise[0], slope.detach(), rtol=1e-9, atol=1e-10)


def test_leverage_of_networks_is_that_of_their_linearisation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    fisher = fisher_information(model, [(x, y)], structure=Dense())
    dense = fisher.to_dense() + 0.1 * torch.eye(fisher.num_parameters, dtype=torch.float64)
    found = self_influence(model, [(x, y)], fisher, damping=0.1, leverage=True)
    model.eval()
    for i in (0, 11, 29):
        alone = fisher_information(model, [(x[i : i + 1], y[i : i + 1])], structure=Dense())
        value = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.cat([t.flatten() for t in torch.autograd.grad(value, model.parameters())])
        expected = g @ torch.linalg.solve(dense - alone.to_dense() / 30, g) / 30
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-12)


def test_leverages_of_1_are_refused():
    """Of a matrix that does not hold the example: here of other data."""
    x, y = torch.ones(1, 2), torch.zeros(1, 1)
    model = nn.Linear(2, 1)
    other = fisher_information(model, [(0.1 * x, y)], Gaussian(), structure=Kronecker())
    with pytest.raises(torch.linalg.LinAlgError, match="a leverage of 1 or more"):
        self_influence(model, [(x, y)], other, Gaussian(), damping=0.1, leverage=True)
    with pytest.raises(ValueError, match="no examples"):
        parameters_without(model, [], other, Gaussian(), damping=0.1, leverage=True)


def test_targets_must_have_the_shape_of_the_outputs():
    """Beside outputs [n, 1], targets [n] would be compared with every output."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(6, 3), torch.randn(6)
    fisher = fisher_information(model, [(x, y)], Gaussian())
    for quantity in (loss_gradient, self_influence):
        with pytest.raises(ValueError, match=r"Batch 0: .*\[6, 1\], got \[6\]"):
            quantity(model, [(x, y)], fisher, Gaussian())
    expected = functional.mse_loss(model(x), y[:, None], reduction="sum") / 12
    (expected,) = torch.autograd.grad(expected, model.bias)
    found = loss_gradient(model, [(x, y[:, None])], fisher, Gaussian())["bias"]
    torch.testing.assert_close(found, expected)
