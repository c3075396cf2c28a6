"""Synaptic Intelligence, Memory Aware Synapses and L2 against their definitions."""

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import MASPlugin, SupervisedPlugin
from avalanche.training.plugins import SynapticIntelligencePlugin as AvalanchePath
from test_plugin import domain_incremental, mlp, strategy_of
from torch import nn

from ewc import Empirical, fisher_information
from ewc.parameters import flatten
from experiments.strategies.batch_means import BatchMeanGradients
from experiments.strategies.fisher import Fisher
from experiments.strategies.l2 import L2Plugin
from experiments.strategies.memory_aware_synapses import MAS, AbsoluteGradients, OutputNorm
from experiments.strategies.synaptic_intelligence import SynapticIntelligencePlugin


class Watcher(SupervisedPlugin):
    """The gradients and the parameters before and after every step."""

    def __init__(self):
        super().__init__()
        self.path = [[]]

    def before_update(self, strategy, **_):
        self.before = weights(strategy.model)
        self.gradient = torch.cat([p.grad.flatten() for p in strategy.model.parameters()])

    def after_update(self, strategy, **_):
        self.path[-1].append((self.gradient, self.before, weights(strategy.model)))

    def after_training_exp(self, strategy, **_):
        self.path.append([])


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trained(*plugins):
    torch.manual_seed(1)
    model = mlp()
    strategy = strategy_of(Naive, model, list(plugins), lr=0.05)
    stream = domain_incremental().train_stream
    for experience in stream:
        strategy.train(experience)
    return model, stream


def test_synaptic_intelligence_is_the_gain_along_the_path():
    watcher, plugin = Watcher(), SynapticIntelligencePlugin(0.7, damping=0.2)
    model, _ = trained(plugin, watcher)
    total = 0
    for path in watcher.path[:2]:
        gain = -sum(g * (after - before) for g, before, after in path)
        moved = path[-1][2] - path[0][1]
        total = total + gain.clamp(min=0) / (moved**2 + 0.2)
    (term,) = plugin.penalty.terms
    torch.testing.assert_close(flatten(term.precision.diagonal()), total)
    assert float(total.max()) > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    plugin.penalty.num_examples = 1
    assert float(plugin.penalty(model).detach()) == pytest.approx(
        0.35 * 0.01 * float(total.sum()), rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # Avalanche gives tensors to NumPy
def test_avalanche_cuts_importance_which_is_why_we_do_not_use_it():
    theirs, ours, watcher = AvalanchePath(0.0, eps=0.1), SynapticIntelligencePlugin(0.0), Watcher()
    trained(theirs, ours, watcher)
    found = torch.cat([data.data.flatten() for data in theirs.ewc_data[1].values()])
    expected = flatten(ours.penalty.terms[0].precision.diagonal())
    assert float(found.max()) <= 0.001 < 0.1 * float(expected.max())


def test_memory_aware_synapses_take_single_examples():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    )
    x = torch.randn(9, 6)
    total = 0
    for example in x:
        gradient = torch.autograd.grad(model(example[None]).square().sum(), model.parameters())
        total = total + torch.cat([g.abs().flatten() for g in gradient]) / 9
    data = [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(5))]
    found = fisher_information(model, data, estimator=OutputNorm(), structure=AbsoluteGradients())
    torch.testing.assert_close(flatten(found.diagonal()), total)


def test_avalanches_own_is_the_same_for_batches_of_one_only():
    model, stream = trained(*MAS(0.0).plugins(Fisher()))
    found = {}
    for size in (1, 16):
        strategy = strategy_of(Naive, model, [])
        strategy.train_mb_size, strategy.experience = size, stream[1]
        importance = MASPlugin()._get_importance(strategy)
        found[size] = torch.cat([data.data.flatten() for data in importance.values()])
    x, y = next(iter(torch.utils.data.DataLoader(stream[1].dataset, batch_size=100)))[:2]
    ours = fisher_information(
        model, [(x, y)], estimator=OutputNorm(), structure=AbsoluteGradients()
    )
    expected = flatten(ours.diagonal())
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)
    assert float((found[16] - expected).norm() / expected.norm()) > 0.05


def test_l2_holds_all_parameters_alike():
    plugin = L2Plugin(3.0)
    model, _ = trained(plugin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    count = sum(p.numel() for p in model.parameters())
    assert float(plugin.penalty(model).detach()) == pytest.approx(1.5 * 0.01 * count, rel=1e-4)


def test_an_importance_that_is_not_finite_ends_the_run_and_names_the_task():
    class Infinite(L2Plugin):
        def importance(self, strategy):
            return {n: v / 0 for n, v in super().importance(strategy).items()}

    plugin = Infinite(1.0)
    with pytest.raises(FloatingPointError, match="in task 1, as its importance shows: "):
        trained(plugin)
    assert plugin.fisher is None
    assert plugin.penalty.terms == []


def test_batch_mean_gradients_are_squared_after_the_mean():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.randint(4, (11,))
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    found = fisher_information(
        model, batches, estimator=Empirical(), structure=BatchMeanGradients()
    ).diagonal()
    expected = 0
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        expected = expected + len(targets) / 11 * gradient**2
    torch.testing.assert_close(flatten(found), expected)
    single = fisher_information(model, batches, estimator=Empirical()).trace()
    assert float(expected.sum()) < 0.9 * float(single)
