"""Statistics of networks whose examples have positions, some of which do not count."""

import pytest
import torch
from torch import nn

from ewc import Categorical, Dense, Empirical, Exact, Implicit, fisher_information
from ewc.parameters import flatten
from ewc.statistics import (
    divergence_profile,
    influence,
    loss_gradient,
    network_formulations,
    self_influence,
)
from ewc.statistics.leverage import example_vectors
from ewc.statistics.network import NetworkFunction

NEXT = Categorical(next_token=True, class_weights=(1.0, 0.5, 3.0, 1.0))
N, T, WORDS = 4, 3, 4


@pytest.fixture
def tokens():
    model = nn.Sequential(
        nn.Embedding(WORDS, 2), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, WORDS)
    ).double()
    ids = torch.randint(WORDS, (N, T))
    labels = ids.clone()
    labels[1, 1:] = -100
    labels[2, 2] = -100
    return model, ids, labels


def losses(model, ids, labels):
    """The weighted sums of the losses of an example's words, by loops."""
    sums = []
    for n in range(len(ids)):
        log_p = model(ids[n : n + 1])[0].log_softmax(1)
        total = log_p.sum() * 0
        for t in range(T - 1):
            if (label := int(labels[n, t + 1])) != -100:
                total = total - NEXT.class_weights[label] * log_p[t, label]
        sums.append(total)
    return torch.stack(sums)


def test_both_formulations_agree_on_tokens(tokens):
    """The second derivatives of the divergence are the products of the scores."""
    model, ids, labels = tokens
    both = network_formulations(model, [(ids, labels)], NEXT, estimator=Exact())
    torch.testing.assert_close(both.score, both.curvature, rtol=1e-8, atol=1e-10)
    observed = network_formulations(model, [(ids, labels)], NEXT, estimator=Empirical())
    parameters = list(model.parameters())
    value = losses(model, ids, labels).mean()
    first = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(g_k, parameters, retain_graph=True)])
        for g_k in flat
    ]
    torch.testing.assert_close(observed.curvature, torch.stack(rows), rtol=1e-8, atol=1e-10)


def test_the_divergence_of_small_steps_is_the_quadratic_form(tokens):
    model, ids, labels = tokens
    fisher = fisher_information(model, [(ids, labels)], NEXT, structure=Implicit())
    along = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    profile = divergence_profile(
        model, [(ids, labels)], fisher, NEXT, direction=along, steps=[1e-4]
    )
    torch.testing.assert_close(profile.divergence, profile.quadratic, rtol=1e-3, atol=0)


def test_influences_take_the_words_that_count(tokens):
    model, ids, labels = tokens
    data = [(ids, labels)]
    fisher = fisher_information(model, data, NEXT, structure=Dense())
    parameters = list(model.parameters())
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
            for loss in (losses(model, ids[n : n + 1], labels[n : n + 1])[0] for n in range(N))
        ]
    )
    gradient = loss_gradient(model, data, fisher, NEXT)
    torch.testing.assert_close(flatten(gradient), rows.mean(0))
    damped = fisher.to_dense() + 0.1 * torch.eye(rows.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(damped, rows.T)
    expected = (rows.T * solved).sum(0) / N
    torch.testing.assert_close(self_influence(model, data, fisher, NEXT, damping=0.1), expected)
    expected = rows.mean(0) @ solved / N
    found = influence(model, data, gradient, fisher, NEXT, damping=0.1)
    torch.testing.assert_close(found, expected)


def test_leverages_take_the_words_that_count(tokens):
    model, ids, labels = tokens
    fisher = fisher_information(model, [(ids, labels)], NEXT, structure=Dense())
    network = NetworkFunction(model, fisher.shapes, NEXT)
    (vectors,) = example_vectors(network, [(ids, labels)], fisher)
    information = vectors.vectors.mT @ vectors.vectors
    torch.testing.assert_close(information.mean(0), fisher.to_dense())
    value = losses(model, ids, labels).sum()
    expected = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))]
    )
    torch.testing.assert_close(vectors.gradients.sum(0), expected)


def test_targets_that_say_what_counts_must_fit(tokens):
    model, ids, labels = tokens
    fisher = fisher_information(model, [(ids, labels)], NEXT)
    along = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^Batch 0: .* integers of shape \[4, 3\]"):
        divergence_profile(model, [(ids, labels[:, 0])], fisher, NEXT, direction=along, steps=[1.0])
