"""How the penalty moves the parameters: what may be asked for, and an update in a plain loop."""

import copy
import math

import pytest
import torch
from torch import nn

from ewc import DiagonalFisher, EWCPenalty
from ewc.consolidation import ImplicitSteps, InLoss
from ewc.consolidation.update import check_update


def test_what_is_allowed_is_kept():
    for update in (InLoss(), InLoss(0.05), ImplicitSteps(), ImplicitSteps(1)):
        check_update(update)
    assert InLoss().eigenvector_share == 1.0
    assert ImplicitSteps(3).every == 3


@pytest.mark.parametrize("every", [0, -1, 1.5, 2.0, math.inf, True, "3", None])
def test_steps_are_counted_in_whole_numbers(every):
    with pytest.raises(ValueError, match="every must be a whole number, 1 or more, got"):
        ImplicitSteps(every)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan, True, "0.5", None])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValueError, match="eigenvector_share must be above 0 and at most 1, got"):
        InLoss(share)


@pytest.mark.parametrize("value", [None, "in_loss", InLoss, ImplicitSteps, 3])
def test_another_kind_of_update_is_refused(value):
    message = r"update must be an instance of InLoss or ImplicitSteps such as InLoss\(\), got"
    with pytest.raises(TypeError, match=message):
        check_update(value)


# --- at work in a loop of no trainer ----------------------------------------------------------

ANCHOR, IMPORTANCE = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0]])


def after_one_task():
    """A layer that moved away from its anchor, and the penalty that remembers it."""
    model, penalty = nn.Linear(2, 1, bias=False), EWCPenalty(3.0)
    with torch.no_grad():
        model.weight.copy_(ANCHOR)
    penalty.consolidate(DiagonalFisher({"weight": IMPORTANCE}, 10), model)
    with torch.no_grad():
        model.weight.add_(0.4)
    return model, penalty


def train(running, model, steps):
    """Steps of gradient descent on the sum of the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, term = model.weight.sum(), running.loss_term(model)
        (loss if term is None else loss + term).backward()
        optimizer.step()
        running.after_step(model, optimizer)
    return optimizer


def test_in_the_loss_the_penalty_is_half_a_quadratic():
    model, penalty = after_one_task()
    running = InLoss(0.5).start(penalty)
    assert penalty.eigenvector_share == 0.5
    gap = model.weight.detach() - ANCHOR
    optimizer = train(running, model, 1)
    torch.testing.assert_close(running.last_penalty, 1.5 * (IMPORTANCE * gap**2).sum())
    expected = ANCHOR + gap - 0.1 * (1 + 3 * IMPORTANCE * gap)
    torch.testing.assert_close(model.weight.detach(), expected)
    running.catch_up(model, optimizer)  # nothing is left to do
    torch.testing.assert_close(model.weight.detach(), expected)


def test_implicit_steps_are_taken_when_due_and_the_rest_at_the_end():
    """``m`` steps of size ``h``: the gap is divided by ``1 + m h`` times the precision."""
    model, penalty = after_one_task()
    running = ImplicitSteps(3).start(penalty)
    gap = model.weight.detach() - ANCHOR
    optimizer = train(running, model, 5)
    gap = (gap - 0.3) / (1 + 3 * 0.1 * 3 * IMPORTANCE)
    torch.testing.assert_close(running.last_penalty, 1.5 * (IMPORTANCE * gap**2).sum())
    torch.testing.assert_close(model.weight.detach(), ANCHOR + gap - 0.2)
    gap = (gap - 0.2) / (1 + 2 * 0.1 * 3 * IMPORTANCE)
    for _ in range(2):  # the second time nothing is left to do
        running.catch_up(model, optimizer)
        torch.testing.assert_close(model.weight.detach(), ANCHOR + gap)


@pytest.mark.parametrize("update", [InLoss(), ImplicitSteps(4)])
def test_an_update_goes_on_from_its_state(update):
    model, penalty = after_one_task()
    running = update.start(penalty)
    train(running, model, 6)
    other, again = copy.deepcopy(model), update.start(copy.deepcopy(penalty))
    again.restore(running.state(), torch.device("cpu"))
    assert again.last_penalty == running.last_penalty > 0
    for loop, network in ((running, model), (again, other)):
        loop.catch_up(network, train(loop, network, 5))
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=0)
    assert again.state() == running.state()


@pytest.mark.parametrize("update", [InLoss(), ImplicitSteps(1)])
def test_before_the_first_task_an_update_does_nothing(update):
    model = nn.Linear(2, 1, bias=False)
    start, running = model.weight.detach().clone(), update.start(EWCPenalty(3.0))
    assert running.loss_term(model) is None
    optimizer = train(running, model, 2)
    running.catch_up(model, optimizer)
    torch.testing.assert_close(model.weight.detach(), start - 0.2)
    assert running.last_penalty == 0
