"""Numbers and choices that cannot be meant are refused when they are given."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ewc import (
    Categorical,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    EWCPenalty,
    Exact,
    Gaussian,
    Kronecker,
    LowRank,
    MonteCarlo,
    SmoothedCategorical,
    fisher_information,
)
from ewc.checks import check_count, check_not_negative, check_positive, check_share
from ewc.consolidation.combination import Online, Separate, check_consolidation
from ewc.consolidation.update import ImplicitSteps, InLoss, check_update
from ewc.fisher import sampled_fisher
from ewc.fisher.estimators import check_estimator
from ewc.fisher.structures.structure import check_structure
from ewc.likelihoods import check_likelihood

NO_NUMBERS = [True, "1", None, [1.0], math.nan, math.inf, -math.inf, 1j, torch.ones(2)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("check", [check_share, check_not_negative, check_positive])
def test_what_is_no_finite_number_is_refused(check, value):
    with pytest.raises(ValueError, match=r"it must .*, got"):
        check(value, "it")


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, 2.0, 0, -3, np.float64(2.0)], ids=repr)
def test_what_counts_nothing_is_refused(value):
    with pytest.raises(ValueError, match=r"it must be a whole number, 1 or more, got"):
        check_count(value, "it")
    if value is not None:
        with pytest.raises(ValueError, match="1 or more, or None, got"):
            check_count(value, "it", optional=True)


def test_numbers_of_other_libraries_are_numbers():
    check_count(np.int64(3), "it")
    check_count(None, "it", optional=True)
    check_positive(None, "it", optional=True)
    for value in (np.float32(0.5), np.int64(1), torch.tensor(0.5), 1, 0.5):
        check_share(value, "it")
        check_not_negative(value, "it")
        check_positive(value, "it")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exact(True),
        lambda: Exact(math.nan),
        lambda: MonteCarlo(True),
        lambda: MonteCarlo(2.0),
        lambda: MonteCarlo(1, 0.5),
        lambda: MonteCarlo(1, True),
        lambda: Gaussian(True),
        lambda: Gaussian("1"),
        lambda: SmoothedCategorical(True),
        lambda: InLoss(0.0),
        lambda: InLoss(1.5),
        lambda: ImplicitSteps(0),
        lambda: ImplicitSteps(1.5),
        lambda: LowRank(rank=True),
        lambda: LowRank(oversampling=1.0),
        lambda: sampled_fisher(nn.Linear(2, 2), [], num_samples=2.5),
        lambda: fisher_information(nn.Linear(2, 2), [], memory=True),
        lambda: math.inf * DiagonalFisher({"a": torch.ones(2)}, 1),
        lambda: DiagonalFisher({"a": torch.ones(2)}, 1).solve({"a": torch.ones(2)}, True),
    ],
)
def test_options_that_are_no_such_numbers_are_refused(make):
    with pytest.raises(ValueError, match=r" must .*, got"):
        make()


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (
            check_structure,
            [Diagonal(), Kronecker(), LowRank(rank=2)],
            [
                "diagonal",
                None,
                int,
                Exact(),
                Diagonal,
                DiagonalFisher,
                DiagonalFisher({"a": torch.ones(2)}, 1),
            ],
            r"structure must be a Structure instance such as Diagonal\(\), got",
        ),
        (
            check_estimator,
            [Exact(), MonteCarlo(2)],
            ["exact", None, Exact, Categorical()],
            r"estimator must be an Estimator instance such as Exact\(\), got",
        ),
        (
            check_likelihood,
            [Categorical(), Gaussian(2.0)],
            ["gaussian", None, Gaussian, Exact()],
            r"likelihood must be a Likelihood instance such as Categorical\(\), got",
        ),
        (
            check_consolidation,
            [Online(0.5), Separate()],
            ["online", None, Online, 0.5],
            r"consolidation must be an instance of Separate or Online such as Separate\(\), got",
        ),
        (
            check_update,
            [InLoss(0.5), ImplicitSteps()],
            ["implicit", None, ImplicitSteps, 10],
            r"update must be an instance of InLoss or ImplicitSteps such as InLoss\(\), got",
        ),
    ],
    ids=["structure", "estimator", "likelihood", "consolidation", "update"],
)
def test_choices_of_another_kind_are_refused(check, right, wrong, message):
    for value in right:
        check(value)
    for value in wrong:
        with pytest.raises(TypeError, match=message):
            check(value)


@pytest.mark.parametrize(
    ("check", "choice"),
    [
        (check_structure, Kronecker),
        (check_estimator, MonteCarlo),
        (check_likelihood, SmoothedCategorical),
        (check_consolidation, Online),
        (check_update, ImplicitSteps),
    ],
)
def test_a_choice_without_brackets_is_named(check, choice):
    said = f"got the class {choice.__name__}: write {choice.__name__}()."
    with pytest.raises(TypeError, match=f"{re.escape(said)}$"):
        check(choice)


def test_an_instance_of_another_choice_is_not_asked_for():
    with pytest.raises(TypeError, match=r"got <class '.*Exact'>\.$"):
        check_structure(Exact)


def test_what_is_no_network_is_refused():
    layer, penalty = nn.Linear(2, 2), EWCPenalty()
    parameters = list(layer.parameters())
    fisher = fisher_information(layer, [(torch.ones(1, 2), torch.zeros(1).long())])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # before a task and after one
        for call in (
            penalty,
            penalty.predicted_rise,
            penalty.pull,
            partial(penalty.stiffness, optimizer=optimizer),
            partial(penalty.implicit_step, optimizer=optimizer),
            partial(penalty.consolidate, fisher),
            partial(fisher_information, data=[]),
        ):
            with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got a list\.$"):
                call(parameters)
        penalty.consolidate(fisher, layer)


def test_next_token_is_a_truth_value():
    with pytest.raises(TypeError, match="next_token must be True or False, got 'no'"):
        Categorical(next_token="no")


@pytest.mark.parametrize("structure", [Kronecker, EigenvalueCorrected])
def test_numbers_are_no_truth_values(structure):
    with pytest.raises(TypeError, match="reduce must be True or False, got 1"):
        structure(reduce=1)
