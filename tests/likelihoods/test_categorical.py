"""Classes against torch's cross entropy, many of them, and labels that do not count."""

import math

import pytest
import torch
from counting import Operations
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ewc import Categorical, Empirical, Exact, MonteCarlo
from ewc.likelihoods import categorical
from ewc.linalg import devices

N, C = 3, 4


def test_log_prob_is_the_loss_of_torch():
    """Classes with weights, ignored labels and soft labels, summed over positions."""
    f = torch.randn(N, C, 2, 3, dtype=torch.float64)
    y = torch.randint(C, (N, 2, 3))
    y[:, 0, 1] = 255
    weights = (0.5, 1.0, 2.0, 0.0)
    likelihood = Categorical(ignore_index=255, class_weights=weights)
    loss = functional.cross_entropy(
        f, y, torch.tensor(weights).double(), ignore_index=255, reduction="none"
    )
    torch.testing.assert_close(likelihood.log_prob(f, y), -loss.flatten(1).sum(1))
    soft = torch.rand_like(f).softmax(1)
    loss = functional.cross_entropy(f, soft, reduction="none").flatten(1).sum(1)
    Categorical().check_targets(f, soft)
    torch.testing.assert_close(Categorical().log_prob(f, soft), -loss)


@pytest.mark.parametrize("soft", [False, True])
def test_weighted_scores_are_the_gradient_of_log_prob(soft):
    f = torch.randn(N, 5, C, dtype=torch.float64, requires_grad=True)
    y = torch.randint(C, (N, 5))
    y[0, 1] = -100
    likelihood = Categorical(class_weights=(0.5, 1.0, 2.0, 3.0))
    if soft:
        y, likelihood = torch.rand(N, 5, C).double().softmax(2), Categorical()
    (expected,) = torch.autograd.grad(likelihood.log_prob(f, y).sum(), f)
    weights = likelihood.combined_weights(f.detach(), y)
    score = likelihood.score(f.detach(), y)
    torch.testing.assert_close(score if weights is None else score * weights, expected)


def test_one_hot_rows_are_the_labels():
    f, y = torch.randn(N, C, dtype=torch.float64), torch.randint(C, (N,))
    rows = functional.one_hot(y, C).double()
    likelihood = Categorical()
    likelihood.check_targets(f, rows)
    torch.testing.assert_close(likelihood.score(f, rows), likelihood.score(f, y))
    torch.testing.assert_close(likelihood.log_prob(f, rows), likelihood.log_prob(f, y))
    impossible = f.clone()
    impossible[:, 0] = -math.inf
    rows = functional.one_hot(y.clamp_min(1), C).double()
    assert bool(likelihood.log_prob(impossible, rows).isfinite().all())


def test_the_next_token_is_the_label_of_the_token_before():
    f, labels = torch.randn(N, 5, C, dtype=torch.float64), torch.randint(C, (N, 5))
    labels[1, 3:] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((N, 1), -100)], 1)
    causal, plain = Categorical(next_token=True), Categorical()
    torch.testing.assert_close(causal.log_prob(f, labels), plain.log_prob(f, shifted))
    torch.testing.assert_close(causal.weights(f, labels), plain.weights(f, shifted))
    torch.testing.assert_close(causal.score(f, labels), plain.score(f, shifted))
    draws = causal.sample(f, 3, torch.Generator().manual_seed(1))
    same = plain.sample(f, 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws[..., 1:], same[..., :-1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_integers_of_any_type(dtype):
    f, y = torch.randn(N, 5, C, dtype=torch.float64), torch.randint(C, (N, 5))
    y[0, 1] = 156  # as a byte, this is -100
    for likelihood in (
        Categorical(ignore_index=156),
        Categorical(ignore_index=156, next_token=True),
    ):
        likelihood.check_targets(f, y.to(dtype))
        for method in (likelihood.log_prob, likelihood.score, likelihood.weights):
            torch.testing.assert_close(method(f, y.to(dtype)), method(f, y))
    with pytest.raises(ValueError, match="Label 156 is outside"):
        Categorical().check_targets(f, y.to(dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(ignore_index=0.5), "ignore_index must be a whole number"),
        (lambda: Categorical(class_dim=0), "class_dim must not be 0"),
        (lambda: Categorical(class_weights=[1.0]), "class_weights must be a tuple"),
        (lambda: Categorical(class_weights=(1.0, -1.0)), "a class weight must be"),
    ],
)
def test_impossible_attributes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_soft_labels_have_no_observed_class():
    f = torch.zeros(N, 5, C)
    for likelihood in (Categorical(class_weights=(1.0,) * C), Categorical(next_token=True)):
        with pytest.raises(ValueError, match=r"needs class indices .* soft labels \[3, 5, 4\]"):
            likelihood.check_targets(f, f.softmax(2))


MANY = 3000


def test_many_classes_are_drawn_as_few_are(monkeypatch):
    """The same uniform numbers, by blocks and from the whole distribution."""
    f = 3 * torch.randn(N, 5, MANY, dtype=torch.float64)
    f[..., 1000:2000] = -math.inf
    blocks = Categorical().sample(f, 400, torch.Generator().manual_seed(0))
    monkeypatch.setattr(categorical, "CLASSES_AT_ONCE", MANY)
    whole = Categorical().sample(f, 400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0)
    assert not bool(((blocks >= 1000) & (blocks < 2000)).any())


@pytest.mark.parametrize("classes", [513, 530, 576])
def test_draws_of_many_classes_follow_their_probabilities(classes):
    f = 2 * torch.randn(1, classes)
    count = 200_000
    drawn = Categorical().sample(f, count, torch.Generator().manual_seed(0))[:, 0]
    p = f.double().softmax(1)[0]
    counts = torch.bincount(drawn, minlength=classes)
    z = (counts - count * p) / (count * p * (1 - p)).sqrt()
    assert float(z[count * p > 20].abs().max()) < 5
    assert 0.8 < float(z[count * p > 20].square().mean()) < 1.2


class Watched(TorchDispatchMode):
    """The largest tensor in double precision."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


def test_draws_of_many_classes_make_no_copy_in_double_precision():
    f = torch.randn(N, 5, MANY)
    with Watched() as watched:
        Categorical(next_token=True).sample(f, 2, torch.Generator())
    assert watched.largest < f.numel() / 10


@pytest.mark.parametrize("classes", [C, 600])
def test_scores_of_positions_are_made_without_waiting(classes, monkeypatch):
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    f = torch.randn(N, 5, classes)
    y = torch.randint(classes, (N, 5))
    y[0, 2] = -100
    likelihood = Categorical(next_token=True)
    weights = likelihood.combined_weights(f, y)
    with Operations() as operations:
        likelihood.weights(f, y)
        for estimator in (MonteCarlo(2), Empirical()):
            estimator.score_vectors(likelihood, f, y, torch.Generator(), weights)
        if classes == C:
            Exact().score_vectors(likelihood, f, y, torch.Generator(), weights)
    assert operations.host_reads == 0


def test_one_class_is_pointed_out():
    with pytest.warns(UserWarning, match="one class, which is certain"):
        Categorical().check_outputs(torch.zeros(4, 1))


def test_class_weights_in_a_tensor_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"give tuple\(w.tolist\(\)\)"):
        Categorical(class_weights=torch.ones(3))
