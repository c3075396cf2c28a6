"""Learning without Forgetting against its definition (Li & Hoiem 2016, arXiv:1606.09282)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.strategies.distillation import Distillation
from experiments.tasks.benchmarks import Split
from experiments.tasks.images import Digits
from experiments.training.models import MLP


def divergence(new, old, temperature):
    """The mean over examples of KL(old || new), by loops."""
    total = 0.0
    for n, o in zip(new.detach().double(), old.detach().double(), strict=True):
        q, p = ((v / temperature).exp() / (v / temperature).exp().sum() for v in (o, n))
        total += sum(float(a * (a / b).log()) for a, b in zip(q, p, strict=True))
    return total / len(new)


def learnt(lwf, model, task, classes):
    """Tell ``lwf`` of a task that ``model`` has learnt."""
    experience = SimpleNamespace(
        data=SimpleNamespace(task=task), classes_in_this_experience=classes
    )
    lwf.post_adapt(SimpleNamespace(model=model), experience)


def test_one_head_is_held_at_the_outputs_it_has_learnt():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 5), torch.randn(7, 4)
    lwf = Distillation(3.0, 2.0)
    assert lwf(x, model(x), model) == 0
    learnt(lwf, model, None, [1])
    learnt(lwf, model, None, [3])
    old = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # the teacher must be a copy
    expected = 3 * divergence(model(x)[:, [1, 3]], old(x)[:, [1, 3]], 2.0)
    assert expected > 0.1
    assert lwf(x, model(x), model).item() == pytest.approx(expected, rel=1e-5)


def test_every_head_of_an_old_task_is_held():
    torch.manual_seed(0)
    model, x = MLP(hidden=[6]).build(4, 2, 3), torch.randn(7, 4)
    lwf = Distillation(1.0, 2.0)
    for task in (0, 1):
        learnt(lwf, model, task, [0, 1])
    old = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    heads = [torch.full((7,), task) for task in (0, 1)]
    expected = sum(divergence(model(x, head), old(x, head), 2.0) for head in heads)
    assert expected > 0.1
    assert lwf(x, None, model).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_our_experiences_name_the_outputs_that_they_train(scenario, tmp_path):
    benchmark = Split(images=Digits(), num_tasks=5, scenario=scenario)
    tasks = benchmark.build(tmp_path, 0, torch.device("cpu"))
    for experience in tasks.scenario.streams["train"]:
        _, labels, *_ = experience.data.batch(torch.arange(len(experience.data)))
        assert set(experience.classes_in_this_experience) == set(labels.tolist())
        assert len(experience.classes_in_this_experience) == 2
        assert int(labels.max()) < tasks.num_outputs
