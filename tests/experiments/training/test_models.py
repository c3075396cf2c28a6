"""Networks of the experiments, and those of a user."""

import pytest
import torch
from torch import nn

from experiments.training.models import MultiHead, Network


class Own(Network):
    """A network whose body is what a test gives."""

    def __init__(self, made):
        self.made = made

    def body(self, num_inputs):
        return self.made


def layers():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def test_a_network_of_ones_own_gets_one_head_or_one_for_each_task():
    body = layers()
    alone = Own((body, 3)).build(4, 2, None)
    assert [type(layer) for layer in alone] == [nn.Linear, nn.ReLU, nn.Linear]
    assert alone[0] is body[0]
    assert alone(torch.ones(5, 4)).shape == (5, 2)
    several = Own((body, 3)).build(4, 2, 6)
    assert isinstance(several, MultiHead)
    assert len(several.heads) == 6
    assert several(torch.ones(5, 4), torch.full((5,), 4)).shape == (5, 2)


@pytest.mark.parametrize("made", [layers(), (layers(), "3"), (nn.Linear(4, 3), 3), None])
def test_a_body_that_returns_something_else_is_named(made):
    with pytest.raises(TypeError, match=r"Own\.body\(\) must return an nn\.Sequential and"):
        Own(made).build(4, 2, None)
