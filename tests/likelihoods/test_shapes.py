"""Likelihoods at many positions: the sum over the positions, each as if it were alone."""

import math

import pytest
import torch

from ewc import Bernoulli, Categorical, Gaussian, Poisson, SmoothedCategorical
from ewc.likelihoods import GaussianWithVariance

N, C = 3, 4
SHAPES = {"row": (), "tokens": (5,), "pixels": (2, 3)}
VARIANCES = (0.4, 1.0, 2.5, 0.1)
LIKELIHOODS = [
    Categorical(),
    SmoothedCategorical(0.2),
    Gaussian(VARIANCES),
    GaussianWithVariance(),
    Bernoulli(),
    Poisson(),
]


def as_torch_has_them(rows, positions):
    """Rows ``[n t, c]`` as outputs ``[n, c]``, ``[n, t, c]`` or ``[n, c, h, w]``."""
    shaped = rows.reshape(N, *positions, -1)
    return shaped.movedim(-1, 1) if len(positions) > 1 else shaped


def rows_and_targets(likelihood, positions):
    count = N * math.prod(positions)
    rows = torch.randn(count, C, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        targets = torch.randint(C, (count,))
        return rows, targets, targets.reshape(N, *positions)
    width = C // 2 if isinstance(likelihood, GaussianWithVariance) else C
    targets = torch.randint(2, (count, width)).double()
    return rows, targets, as_torch_has_them(targets, positions)


def by_position(values):
    """Values of the positions ``[n t]`` summed over those of an example."""
    return values.reshape(N, -1).sum(1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda like: type(like).__name__)
@pytest.mark.parametrize("positions", SHAPES.values(), ids=SHAPES)
def test_positions_are_independent_observations(likelihood, positions):
    rows, y, targets = rows_and_targets(likelihood, positions)
    f = as_torch_has_them(rows, positions)
    likelihood.check_outputs(f)
    likelihood.check_targets(f, targets)
    torch.testing.assert_close(
        likelihood.log_prob(f, targets), by_position(likelihood.log_prob(rows, y))
    )
    score = as_torch_has_them(likelihood.score(rows, y), positions)
    torch.testing.assert_close(likelihood.score(f, targets), score)
    kl = by_position(likelihood.kl(rows, rows.flip(0)))
    other = as_torch_has_them(rows.flip(0), positions)
    torch.testing.assert_close(likelihood.kl(f, other), kl)
    weights = torch.rand(N, *positions).double()
    spread = likelihood.combined_weights(f, targets, weights)
    kl = by_position(weights.flatten() * likelihood.kl(rows, rows.flip(0)))
    torch.testing.assert_close(likelihood.kl(f, other, spread), kl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda like: type(like).__name__)
@pytest.mark.parametrize("positions", SHAPES.values(), ids=SHAPES)
def test_the_factor_of_positions_is_block_diagonal(likelihood, positions):
    rows, _, _ = rows_and_targets(likelihood, positions)
    t = math.prod(positions)
    f = as_torch_has_them(rows, positions)
    factor = likelihood.fisher_factor(f)
    assert factor.shape[1:] == f.shape
    assert factor.shape[0] == t * likelihood.fisher_factor(rows).shape[0]
    if len(positions) > 1:
        factor = factor.movedim(2, -1)
    factor = factor.reshape(-1, N, t * C)
    found = torch.einsum("kna,knb->nab", factor, factor)
    alone = likelihood.fisher_factor(rows)
    blocks = torch.einsum("kna,knb->nab", alone, alone).reshape(N, t, C, C)
    expected = torch.stack([torch.block_diag(*blocks[n]) for n in range(N)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda like: type(like).__name__)
@pytest.mark.parametrize("positions", SHAPES.values(), ids=SHAPES)
def test_draws_at_positions_have_the_information_as_covariance(likelihood, positions):
    rows, _, _ = rows_and_targets(likelihood, positions)
    f, count = as_torch_has_them(rows, positions), 4000
    draws = likelihood.sample(f, count, torch.Generator().manual_seed(0))
    parts, generator = [], torch.Generator().manual_seed(0)
    for part in f.split(2):
        parts.append(likelihood.sample(part, count, generator))
    torch.testing.assert_close(torch.cat(parts, 1), draws)
    likelihood.check_targets(f, draws[0])
    scores = torch.stack([likelihood.score(f, draw) for draw in draws]).flatten(1)
    z = scores.mean(0) / (scores.std(0) / count**0.5)
    assert float(z.abs().max()) < 5
    factor = likelihood.fisher_factor(f).flatten(1)
    squares = scores.square()
    z = (squares.mean(0) - factor.square().sum(0)) / (squares.std(0) / count**0.5)
    assert float(z.abs().max()) < 5
    # Neighbouring entries of different positions are independent.
    if positions:
        a, b = scores[:, 0], scores[:, scores.shape[1] // 2]
        assert abs(float((a * b).mean() / (a.std() * b.std()))) < 5 / count**0.5


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_a_variance_keeps_the_type_of_the_outputs(half):
    f = torch.randn(N, C).to(half)
    for likelihood in (Gaussian(0.4), Gaussian(VARIANCES), GaussianWithVariance()):
        assert likelihood.fisher_factor(f).dtype == half
        assert likelihood.sample(f, 2, torch.Generator()).dtype == half


def test_learned_variance_matches_the_loss_of_torch():
    f = torch.randn(N, C, dtype=torch.float64)
    y = torch.randn(N, C // 2, dtype=torch.float64)
    loss = torch.nn.GaussianNLLLoss(full=True, reduction="none")
    expected = -loss(f[:, :2], y, f[:, 2:].exp()).sum(1)
    torch.testing.assert_close(GaussianWithVariance().log_prob(f, y), expected)


def test_the_information_of_a_learned_variance_by_integration():
    """The integral of s s' p(y) over y, on a fine grid."""
    likelihood = GaussianWithVariance()
    mean, log_variance = 0.7, -0.9
    deviation = math.exp(log_variance / 2)
    y = torch.linspace(mean - 12 * deviation, mean + 12 * deviation, 20001, dtype=torch.float64)
    f = torch.tensor([[mean, log_variance]], dtype=torch.float64).expand(len(y), 2)
    p = likelihood.log_prob(f, y[:, None]).exp()
    scores = likelihood.score(f, y[:, None])
    found = torch.trapezoid(p[:, None, None] * scores[:, :, None] * scores[:, None, :], y, dim=0)
    factor = likelihood.fisher_factor(f[:1])[:, 0]
    torch.testing.assert_close(found, factor.T @ factor)
    expected = torch.tensor([1 / deviation**2, 0.5], dtype=torch.float64).diag()
    torch.testing.assert_close(factor.T @ factor, expected)


@pytest.mark.parametrize(
    ("likelihood", "f", "message"),
    [
        (Gaussian((1.0, 2.0)), torch.zeros(N, C), "one for each of the 4 outputs, got 2"),
        (Gaussian((1.0, 2.0)), torch.zeros(N), "one for each of the 1 outputs, got 2"),
        (GaussianWithVariance(), torch.zeros(N, 3), r"even number of channels.* \[3, 3\]"),
        (GaussianWithVariance(), torch.zeros(N), r"even number of channels.* \[3\]"),
    ],
)
def test_outputs_without_a_meaning_are_refused(likelihood, f, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check_outputs(f)


def test_impossible_targets_are_refused_with_the_way_out():
    f = torch.zeros(N, C)
    with pytest.raises(ValueError, match=r"the means' shape \[3, 2\], got \[3, 4\]"):
        GaussianWithVariance().check_targets(f, f)
    with pytest.raises(ValueError, match="must be finite"):
        GaussianWithVariance().check_targets(f, f[:, :2] * math.nan)
    with pytest.raises(ValueError, match=r"got \[3, 1\]; give y\[..., 0\]"):
        Gaussian().check_targets(f[:, 0], f[:, :1])
    with pytest.raises(ValueError, match="a variance must be a finite number above 0, got -1"):
        Gaussian((1.0, -1.0))
