"""The Avalanche plugin in real strategies, against a loop written by hand."""

import copy

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP, as_multitask
from avalanche.training import Cumulative, Naive, Replay
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ewc import (
    DenseFisher,
    Empirical,
    EWCPenalty,
    KroneckerFisher,
    MonteCarlo,
    Online,
    Separate,
    fisher_information,
)
from ewc.eigenbasis_adam import EigenbasisAdam
from ewc.plugin import EWCPlugin


def blobs(n=48, features=5, classes=4):
    """Noisy class means: a quick task that can be learnt."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % classes
    means = torch.randn(classes, features, generator=generator)
    return means[y] + 0.3 * torch.randn(n, features, generator=generator), y


def class_incremental(task_labels=False):
    x, y = blobs()
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return nc_benchmark(
        data,
        data,
        n_experiences=2,
        task_labels=task_labels,
        fixed_class_order=[0, 1, 2, 3],
        class_ids_from_zero_in_each_exp=task_labels,
    )


def domain_incremental(shifts=(0.0, 1.5)):
    """Tasks (x, y) without task labels: the new benchmark classes of Avalanche."""
    tasks = []
    for shift in shifts:
        x, y = blobs()
        data = TensorDataset(x + shift, y)
        tasks.append(
            AvalancheDataset([data], data_attributes=[DataAttribute(y.tolist(), "targets")])
        )
    return benchmark_from_datasets(train=tasks, test=tasks)


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def strategy_of(template, model, plugins, lr=0.1, optimizer=torch.optim.SGD, **options):
    return template(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=2,
        eval_mb_size=10,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
        **options,
    )


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_the_plugin_does_what_a_plain_loop_does():
    torch.manual_seed(1)
    model, benchmark = mlp(), domain_incremental()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plugin = EWCPlugin(30.0)
    strategy = strategy_of(Naive, model, [plugin])
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)

    other, penalty = mlp(), EWCPenalty(30.0)
    other.load_state_dict(start)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for experience in benchmark.train_stream:
        x, y = torch.stack([item[0] for item in experience.dataset]), blobs()[1]
        penalty.num_examples = len(x)
        for _ in range(2):
            for part in range(0, len(x), 16):
                outputs = other(x[part : part + 16])
                loss = functional.cross_entropy(outputs, y[part : part + 16]) + penalty(other)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        penalty.consolidate(fisher_information(other, [(x, y)]), other)

    torch.testing.assert_close(weights(model), weights(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plugin.penalty(model), penalty(other), rtol=1e-4, atol=1e-7)
    assert plugin.last_penalty.item() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": Empirical()},
        {"estimator": MonteCarlo(2), "consolidation": Online(0.5)},
        {"structure": DenseFisher},
    ],
    ids=["empirical", "monte_carlo_online", "dense"],
)
def test_every_choice_runs_in_a_strategy(options):
    plugin = EWCPlugin(1.0, **options)
    strategy = strategy_of(Naive, mlp(), [plugin])
    for experience in domain_incremental().train_stream:
        strategy.train(experience)
    assert isinstance(plugin.fisher, plugin.structure)
    assert plugin.fisher.num_examples == 48
    assert plugin.last_penalty.item() > 0


def test_single_head_of_avalanche_with_replay_and_batches_with_tasks():
    model, plugin = SimpleMLP(num_classes=4, input_size=5, hidden_size=8), EWCPlugin(1.0)
    strategy = strategy_of(Naive, model, [ReplayPlugin(mem_size=10), plugin])
    for experience in class_incremental().train_stream:
        strategy.train(experience)
    assert plugin.fisher.num_examples == 24  # the task's own examples, not the memory's
    assert plugin.penalty.num_examples == 24
    assert plugin.last_penalty.item() > 0


@pytest.mark.parametrize("template", [Cumulative, Replay])
def test_other_templates(template):
    options = {"mem_size": 10} if template is Replay else {}
    plugin = EWCPlugin(1.0)
    strategy = strategy_of(template, mlp(), [plugin], **options)
    for experience in class_incremental().train_stream:
        strategy.train(experience)
    assert plugin.fisher.num_examples == 24
    assert plugin.last_penalty.item() > 0


@pytest.mark.parametrize("build", ["own", "wrapped"])
def test_multi_head_models_get_their_task_labels(build):
    if build == "own":
        model = MTSimpleMLP(input_size=5, hidden_size=8)
    else:
        model = as_multitask(SimpleMLP(input_size=5, hidden_size=8), "classifier")
    plugin, benchmark = EWCPlugin(1.0), class_incremental(task_labels=True)
    strategy = strategy_of(Naive, model, [plugin])
    strategy.train(benchmark.train_stream[0])
    diagonal = plugin.fisher.diagonal()
    heads = {name for name in diagonal if "classifiers.0" in name}
    assert heads
    assert all(float(diagonal[name].max()) > 0 for name in heads if name.endswith("weight"))
    strategy.train(benchmark.train_stream[1])
    diagonal = plugin.fisher.diagonal()
    assert any("classifiers.1" in name for name in diagonal)
    # The second task says nothing about the first head; the penalty remembers it all the same.
    assert all(float(diagonal[name].abs().max()) == 0 for name in heads)
    summed = plugin.penalty.terms[0].precision.diagonal()
    assert all(float(summed[name].max()) > 0 for name in heads if name.endswith("weight"))


@pytest.mark.parametrize("options", [{}, {"consolidation": Online()}])
def test_heads_that_grow(options):
    plugin = EWCPlugin(1.0, **options)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), IncrementalClassifier(8, 2))
    strategy = strategy_of(Naive, model, [plugin])
    for experience in class_incremental().train_stream:
        strategy.train(experience)
    assert plugin.fisher.shapes["2.classifier.weight"] == (4, 8)
    assert plugin.last_penalty.item() > 0


def test_the_fisher_pass_leaves_batchnorm_dropout_and_strategy_alone():
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)
    )
    plugin, seen = EWCPlugin(1.0), {}
    strategy = strategy_of(Naive, model, [plugin])
    after = plugin.after_training_exp

    def watched(strategy, **kwargs):
        seen["before"] = {k: v.clone() for k, v in model.state_dict().items()}
        seen["dataloader"] = strategy.dataloader
        after(strategy, **kwargs)
        seen["after"] = {k: v.clone() for k, v in model.state_dict().items()}
        assert strategy.dataloader is seen["dataloader"]
        assert model.training
        assert model[1].training

    plugin.after_training_exp = watched
    strategy.train(domain_incremental().train_stream[0])
    torch.testing.assert_close(seen["after"], seen["before"], rtol=0, atol=0)
    assert seen["after"]["1.num_batches_tracked"] == 6


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({}, torch.optim.SGD),
        ({"consolidation": Online(0.9)}, torch.optim.SGD),
        ({"structure": KroneckerFisher, "consolidation": Online()}, EigenbasisAdam),
    ],
    ids=["separate", "online", "kronecker"],
)
def test_checkpoints_of_avalanche_resume_to_the_same_weights(tmp_path, options, optimizer):
    benchmark, path = domain_incremental(), tmp_path / "checkpoint.pkl"

    def fresh():
        RNGManager.set_random_seeds(7)
        return strategy_of(Naive, mlp(), [EWCPlugin(30.0, **options)], optimizer=optimizer)

    whole = fresh()
    whole.train(benchmark.train_stream[0])
    save_checkpoint(whole, path)
    whole.train(benchmark.train_stream[1])

    resumed, done = maybe_load_checkpoint(fresh(), path)
    assert done == 1
    resumed.train(benchmark.train_stream[1])
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    kept = next(p for p in resumed.plugins if isinstance(p, EWCPlugin))
    torch.testing.assert_close(
        kept.penalty(resumed.model), whole.plugins[0].penalty(whole.model), rtol=0, atol=0
    )


def test_a_diverging_run_stops_and_says_where():
    strategy = strategy_of(Naive, mlp(), [EWCPlugin(1e12)], lr=100.0)
    stream = domain_incremental().train_stream
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) in task 2, step \d+:"):
        strategy.train(stream)


def test_an_eigenbasis_adam_is_turned_to_the_penalty_at_every_task():
    torch.manual_seed(1)
    model, benchmark = mlp(), domain_incremental()
    other, penalty = copy.deepcopy(model), EWCPenalty(30.0, Online())
    plugin = EWCPlugin(30.0, structure=KroneckerFisher, consolidation=Online())
    strategy = strategy_of(Naive, model, [plugin], lr=0.01, optimizer=EigenbasisAdam)
    optimizer = EigenbasisAdam(other.parameters(), lr=0.01)
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
        x, y = torch.stack([item[0] for item in experience.dataset]), blobs()[1]
        if penalty.terms:
            optimizer.rotate(penalty.terms[-1].precision, other)
        for part in [*range(0, len(x), 16)] * 2:
            loss = functional.cross_entropy(other(x[part : part + 16]), y[part : part + 16])
            optimizer.zero_grad()
            (loss + penalty(other)).backward()
            optimizer.step()
        # Adam makes much of rounding: the same batches as the strategy evaluates.
        batches = list(zip(x.split(10), y.split(10), strict=True))
        fisher = fisher_information(other, batches, structure=KroneckerFisher)
        penalty.consolidate(fisher, other)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)

    plugin = EWCPlugin(30.0, structure=KroneckerFisher, implicit_every=2)
    strategy = strategy_of(Naive, mlp(), [plugin], optimizer=EigenbasisAdam)
    with pytest.raises(ValueError, match="implicit_every is 2: with EigenbasisAdam it must be"):
        strategy.train(benchmark.train_stream[0])


def test_impossible_arguments_are_refused():
    for options in ({"strength": 0.0}, {"implicit_every": 2}):
        with pytest.raises(ValueError, match=r"budget is 0\.1: it must be None with implicit"):
            EWCPlugin(**options, budget=0.1)
    with pytest.raises(ValueError, match="budget is -1: it must be a finite number above 0"):
        EWCPlugin(budget=-1)
    with pytest.raises(ValueError, match="strength is -2"):
        EWCPlugin(-2.0)


class Watch(SupervisedPlugin):
    """The forecast of forgetting at the start and at the end of every task."""

    def __init__(self, penalty):
        super().__init__()
        self.penalty, self.starts, self.ends = penalty, [], []

    def before_training_exp(self, strategy, **_):
        self.starts.append(self.penalty.predicted_rise(strategy.model))

    def after_training_exp(self, strategy, **_):
        self.ends.append(self.penalty.predicted_rise(strategy.model))


@pytest.mark.parametrize("consolidation", [Separate(), Online()])
def test_a_budget_is_kept(consolidation):
    """Three tasks of many steps, from a large strength and from a small one."""
    stream = domain_incremental(shifts=(0.0, 1.5, -1.0)).train_stream
    found = []
    for strength in (20.0, 0.1):
        torch.manual_seed(1)
        plugin = EWCPlugin(strength, consolidation=consolidation, budget=0.004)
        watch = Watch(plugin.penalty)
        strategy = strategy_of(Naive, mlp(), [watch, plugin], lr=0.003, optimizer=torch.optim.Adam)
        strategy.train_epochs = 250
        strategy.train(stream)
        rises = [end - start for start, end in zip(watch.starts, watch.ends, strict=True)]
        assert rises[0] == 0.0
        assert rises[1:] == pytest.approx([0.004, 0.004], rel=0.1)
        found.append(plugin.penalty.strength)
    assert found[0] == pytest.approx(found[1], rel=0.2)
