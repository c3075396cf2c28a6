"""Optimizers in turns: the same start and order for all, and honest counts."""

import copy
import math

import torch
from torch import nn

from experiments.tasks.images import Images
from studies.natural_gradient.race import Runner, plain, race


def images(count=60):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 4, generator=generator)
    return Images(pixels, (pixels[:, 0] > 0).long())


def watching(seen, rate=0.0):
    def start(model):
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        step = plain(model, torch.optim.SGD(model.parameters(), lr=rate))

        def watched(number, x, y):
            seen.append((number, x.clone(), y.clone()))
            step(number, x, y)

        return watched

    return start


def test_all_start_alike_and_see_the_same_images_in_the_same_order():
    one, other, train = [], [], images()
    runners = [
        Runner("one", 20, watching(one), limit=7, every=2),
        Runner("other", 20, watching(other, 0.1), limit=7, every=5),
    ]
    courses = race(runners, lambda: nn.Linear(4, 2), train, train, target=2.0, seed=3)
    for first, second in zip(one, other, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert [entry[0] for entry in one[1:]] == list(range(7))
    first_pass = torch.cat([x for _, x, _ in one[1:4]])
    assert torch.equal(first_pass.sort(0).values, train.pixels.sort(0).values)
    again = torch.cat([x for _, x, _ in one[4:7]])
    assert not torch.equal(first_pass, again)  # shuffled anew
    assert [look[0] for look in courses["one"].accuracies] == [2, 4, 6, 7]
    assert [look[0] for look in courses["other"].accuracies] == [5, 7]
    assert not courses["one"].arrived


def test_who_arrives_stops_and_the_others_go_on():
    train = images()
    runners = [
        Runner("fast", 60, watching([], 5.0), limit=40, every=1),
        Runner("idle", 60, watching([], 0.0), limit=40, every=1),
    ]
    courses = race(runners, lambda: nn.Linear(4, 2), train, train, target=0.95)
    fast, idle = courses["fast"], courses["idle"]
    assert fast.arrived
    assert fast.steps < 40
    assert fast.accuracies[-1][2] >= 0.95 > fast.accuracies[-2][2]
    assert (idle.arrived, idle.steps) == (False, 40)
    assert len({accuracy for _, _, accuracy in idle.accuracies}) == 1
    seconds = [look[1] for look in idle.accuracies]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] == idle.seconds


def test_only_training_is_timed(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("studies.natural_gradient.race.time.process_time", lambda: next(ticks))
    train = images()
    runner = Runner("one", 60, watching([]), limit=6, every=3)
    courses = race([runner], lambda: nn.Linear(4, 2), train, train, target=2.0)
    assert courses["one"].seconds == 6.0


def test_the_mean_of_the_parameters_is_what_is_looked_at():
    """With its decay by images, from the parameters after the first step on."""
    train, seen, decay = images(), [], math.exp(-20 / 50)

    def start(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        step = plain(model, optimizer)

        def watched(number, x, y):
            step(number, x, y)
            seen.append(copy.deepcopy(model))

        return watched

    runner = Runner("mean", 20, start, limit=6, every=1, horizon=50.0)
    courses = race([runner], lambda: nn.Linear(4, 2), train, train, target=2.0)
    mean = copy.deepcopy(seen[0])
    for model, (_, _, accuracy) in zip(seen, courses["mean"].accuracies, strict=True):
        with torch.no_grad():
            for kept, now in zip(mean.parameters(), model.parameters(), strict=True):
                kept.copy_(decay * kept + (1 - decay) * now)
            right = (mean(train.pixels).argmax(1) == train.labels).double().mean()
        assert accuracy == float(right)
    last = [float((m(train.pixels).argmax(1) == train.labels).double().mean()) for m in seen]
    assert last != [accuracy for _, _, accuracy in courses["mean"].accuracies]
