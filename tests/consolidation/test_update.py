"""How the penalty moves the parameters: what may be asked for."""

import math

import pytest

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
