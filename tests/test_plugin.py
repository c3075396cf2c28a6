"""The Avalanche plugin in real strategies, against a loop written by hand."""

import copy
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP, as_multitask
from avalanche.training import Cumulative, JointTraining, Naive, Replay
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from counting import Operations
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ewc import (
    Bernoulli,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    Empirical,
    EWCPenalty,
    Exact,
    Gaussian,
    Implicit,
    Kronecker,
    MonteCarlo,
    Online,
    consolidation,
    finite_steps,
    fisher_information,
)
from ewc.fisher import ImplicitFisher
from ewc.linalg import devices
from ewc.parameters import flatten
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
        {"structure": Dense()},
    ],
    ids=["empirical", "monte_carlo_online", "dense"],
)
def test_every_choice_runs_in_a_strategy(options):
    plugin = EWCPlugin(1.0, **options)
    strategy = strategy_of(Naive, mlp(), [plugin])
    for experience in domain_incremental().train_stream:
        strategy.train(experience)
    kind = DenseFisher if plugin.structure == Dense() else DiagonalFisher
    assert type(plugin.fisher) is kind
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
        ({"structure": Kronecker(), "consolidation": Online()}, torch.optim.Adam),
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
    with (
        pytest.warns(UserWarning, match="must be below 2"),
        pytest.raises(FloatingPointError, match=r"became (nan|inf) in task 2, step \d+,"),
    ):
        strategy.train(stream)


def step_of_divergence():
    """Where training with far too large a penalty stops, and the network after it."""
    torch.manual_seed(0)
    model = mlp()
    strategy = strategy_of(Naive, model, [EWCPlugin(1e12)], lr=1e-3)
    with (
        pytest.warns(UserWarning, match="must be below 2"),
        pytest.raises(FloatingPointError, match=r"became (nan|inf) in task 2, step") as caught,
    ):
        strategy.train(domain_incremental().train_stream)
    step = int(re.search(r"step (\d+),", str(caught.value)).group(1))
    return step, strategy.clock.train_exp_iterations + 1, model


@pytest.mark.parametrize("every", [1, 3, 100])
def test_on_an_accelerator_a_late_stop_names_the_first_step_all_the_same(monkeypatch, every):
    expected, stopped, model = step_of_divergence()
    assert stopped == expected
    assert weights(model).isfinite().all()
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    monkeypatch.setattr(finite_steps, "LOOK_EVERY", every)
    step, stopped, model = step_of_divergence()
    assert step == expected
    # Looked at after every third step, and at the end of the task.
    assert stopped == {1: step, 3: -(-step // 3) * 3}.get(every, stopped)
    if every == 100:
        assert stopped > step
        assert not weights(model).isfinite().all()


def test_a_task_that_was_broken_off_leaves_no_losses(monkeypatch):
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)

    class BreaksOff(SupervisedPlugin):
        def before_backward(self, strategy, **_):
            if not strategy.loss.isfinite():
                raise KeyboardInterrupt

    model, stream = mlp(), domain_incremental().train_stream
    strategy = strategy_of(Naive, model, [EWCPlugin(1.0), BreaksOff()], lr=math.inf)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[0])
    fresh = mlp()
    strategy.model.load_state_dict(fresh.state_dict())
    strategy.optimizer.param_groups[0]["lr"] = 0.1
    strategy.train(stream[1])
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
def test_on_an_accelerator_a_step_reads_nothing(monkeypatch, structure):
    monkeypatch.setitem(devices.BY_DEVICE, "cpu", devices.ACCELERATOR)
    operations = Operations()

    class Counted(EWCPlugin):
        def before_backward(self, strategy, **options):
            with operations:
                super().before_backward(strategy, **options)

    strategy = strategy_of(Naive, mlp(), [Counted(30.0, structure=structure)])
    strategy.train(domain_incremental().train_stream)
    assert sum(operations.counts.values()) > 0
    assert operations.host_reads == 0


def test_implicit_updates_are_steps_beside_the_loss():
    """Against a loop by hand: a step every four iterations, and at the end of the task."""
    torch.manual_seed(1)
    model, benchmark = mlp(), domain_incremental()
    other, penalty = copy.deepcopy(model), EWCPenalty(30.0, Online())
    plugin = EWCPlugin(30.0, consolidation=Online(), update=consolidation.ImplicitSteps(every=4))
    strategy = strategy_of(Naive, model, [plugin], lr=0.1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
        x, y = torch.stack([item[0] for item in experience.dataset]), blobs()[1]
        due = 0
        for start in [*range(0, len(x), 16)] * 2:
            optimizer.zero_grad()
            functional.cross_entropy(other(x[start : start + 16]), y[start : start + 16]).backward()
            optimizer.step()
            due += 1
            if due == 4:
                penalty.implicit_step(other, optimizer, due)
                due = 0
        if due:
            penalty.implicit_step(other, optimizer, due)
        penalty.consolidate(fisher_information(other, [(x, y)]), other)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)


def test_a_penalty_that_is_assigned_is_the_one_in_the_loss():
    stream, first = domain_incremental().train_stream, EWCPlugin(30.0)
    strategy_of(Naive, mlp(), [first]).train(stream[0])
    plugin = EWCPlugin()
    plugin.penalty = first.penalty
    strategy_of(Naive, mlp(), [plugin]).train(stream[1])
    assert plugin.last_penalty > 0
    assert plugin.penalty.remembered_examples == 96


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"strength must .*, got -2"):
        EWCPlugin(-2.0)


# --- the function that is trained -------------------------------------------------------


def diagonal(plugin):
    return flatten(plugin.fisher.diagonal())


def diagonal_by_definition(model, *inputs):
    """Brute force, an example at a time, in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found = reference.categorical_fisher(model, list(zip(*inputs, strict=True)), torch.square)
    for module, mode in modes.items():
        module.training = mode
    return found


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def benchmark_of(*tasks, collate_fn=None, attributes=()):
    """Tasks of tensors (x, y), with attributes of the first task's examples beside them."""
    sets = []
    for x, y in tasks:
        named = [DataAttribute(y.tolist(), "targets")]
        for name, values in attributes:
            named.append(DataAttribute(values, name, use_in_getitem=True))
        data = TensorDataset(x, y)
        sets.append(AvalancheDataset([data], data_attributes=named, collate_fn=collate_fn))
    return benchmark_from_datasets(train=sets, test=sets)


class OptionalLabels(nn.Module):
    """Not one of Avalanche's multi-task modules: no strategy gives it task labels."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x, task_labels=None):
        return self.shared(x) if task_labels is None else self.own(x)


def test_task_labels_go_where_avalanche_gives_them():
    model, plugin = OptionalLabels(), EWCPlugin()
    experience = class_incremental(task_labels=True).train_stream[0]
    strategy_of(Naive, model, [plugin]).train(experience)
    x = torch.stack([item[0] for item in experience.dataset])
    close(diagonal(plugin), diagonal_by_definition(model, x))
    found = plugin.fisher.diagonal()
    assert found["shared.weight"].sum() > 0
    assert found["own.weight"].sum() == 0


def test_further_attributes_of_a_mini_batch():
    x, y = blobs()
    attributes = [("index", list(range(48))), ("targets_task_labels", [0] * 48)]
    model, plugin = mlp(), EWCPlugin(estimator=Empirical())
    benchmark = benchmark_of((x, y), attributes=attributes)
    strategy_of(Naive, model, [plugin]).train(benchmark.train_stream[0])
    expected = reference.empirical_fisher(model, [(x_n,) for x_n in x], y).diagonal()
    close(diagonal(plugin), expected)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, pytest.param("compile", marks=pytest.mark.slow), "inner"]
)
def test_wrapped_models_have_the_names_of_the_bare_one(wrap):
    model = mlp()
    if wrap == "inner":
        inner, model = model, nn.Sequential(torch.compile(model, backend="aot_eager"))
        names = [f"0.{name}" for name, _ in inner.named_parameters()]
    else:
        inner, names = model, [name for name, _ in model.named_parameters()]
        model = torch.compile(inner, backend="aot_eager") if wrap == "compile" else wrap(inner)
    plugin = EWCPlugin(30.0, structure=Kronecker())
    strategy = strategy_of(Naive, model, [plugin])
    for experience in domain_incremental().train_stream:
        strategy.train(experience)
    assert list(plugin.fisher.shapes) == names
    assert plugin.last_penalty > 0
    x = torch.stack([item[0] for item in experience.dataset])
    expected = fisher_information(inner, [(x, blobs()[1])], structure=Kronecker())
    close(diagonal(plugin), flatten(expected.diagonal()))


class Collated(Naive):
    """Avalanche trains with the data's collate function only where there are task labels."""

    def make_train_dataloader(self, **_):
        data = self.adapted_dataset
        self.dataloader = DataLoader(data, self.train_mb_size, collate_fn=data.collate_fn)


class Turned(Collated):
    """Its mini-batches are (y, shift, x), and its model takes x and shift by name."""

    def _unpack_minibatch(self):
        super()._unpack_minibatch()
        y, self.shift, x = self.mbatch
        self.mbatch = [x, y]

    def forward(self):
        return self.model(x=self.mb_x, shift=self.shift)


class Masked(Naive):
    """Outputs of the task's classes only; half of the inputs' scale."""

    def forward(self):
        outputs = self.model(self.mb_x / 2)
        outputs[:, 2:] = -torch.inf
        return outputs


class Logits(Collated):
    """As for a model of Hugging Face: mini-batches are dicts, and outputs have fields."""

    mb_x = property(lambda self: self.mbatch["inputs"])
    mb_y = property(lambda self: self.mbatch["labels"])

    def _unpack_minibatch(self):
        for key in self.mbatch:
            self.mbatch[key] = self.mbatch[key].to(self.device)

    def forward(self):
        return self.model(inputs=self.mb_x, mask=self.mbatch["mask"], scale=2.0).logits


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x, shift):
        return self.linear(x + shift[:, None])


class Fields(nn.Module):
    """A parameter of its own, dropout by its own flag, and outputs in a field."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.linear = nn.Linear(5, 4, bias=False)

    def forward(self, inputs, mask, scale):
        hidden = functional.dropout(inputs * mask, 0.5, self.training)
        return SimpleNamespace(logits=scale * self.linear(hidden) + self.bias)


def turned(items):
    x, y = (torch.stack([torch.as_tensor(item[i]) for item in items]) for i in (0, 1))
    return [y, torch.tensor([float(item[2]) for item in items]), x]


def as_dict(items):
    x, y = (torch.stack([torch.as_tensor(item[i]) for item in items]) for i in (0, 1))
    return {"inputs": x, "labels": y, "mask": (x > 0).float()}


SHIFTS = [0.1 * n for n in range(48)]


@pytest.mark.parametrize("structure", [Diagonal(), Dense(), Implicit()])
@pytest.mark.parametrize(
    ("template", "model", "collate_fn", "function"),
    [
        (Turned, Shifted, turned, lambda m, x: m(x, x.new_tensor(SHIFTS))),
        (Masked, lambda: nn.Linear(5, 4), None, lambda m, x: m(x / 2)[:, :2]),
        (Logits, Fields, as_dict, lambda m, x: m(x, (x > 0).float(), 2.0).logits),
    ],
    ids=["unpacked", "masked", "fields"],
)
def test_the_strategy_says_how_outputs_are_computed(
    template, model, collate_fn, function, structure
):
    torch.manual_seed(2)
    (x, y), model = blobs(), model()
    y = y % 2 if template is Masked else y
    benchmark = benchmark_of(
        (x, y), (x + 1, y), collate_fn=collate_fn, attributes=[("shift", SHIFTS)]
    )
    plugin = EWCPlugin(structure=structure)
    strategy = strategy_of(template, model, [plugin])
    strategy.train(benchmark.train_stream[0])
    model.eval()
    names = {id(p): name for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    log_p = function(model, x).log_softmax(1)
    for row in log_p:
        for entry in row:
            gradients = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(names.values(), gradients, strict=True):
                total[name] += entry.exp().detach() * gradient.square() / len(x)
    assert list(plugin.fisher.shapes) == list(total)
    close(diagonal(plugin), flatten(total))
    strategy.train(benchmark.train_stream[1])
    assert plugin.last_penalty > 0


def test_a_matrix_free_fisher_of_a_strategy_survives_a_checkpoint(tmp_path):
    def fresh():
        RNGManager.set_random_seeds(7)
        return strategy_of(Masked, nn.Linear(5, 4), [EWCPlugin(structure=Implicit())])

    (x, y), whole = blobs(), fresh()
    stream = benchmark_of((x, y % 2), (x + 1, y % 2)).train_stream
    whole.train(stream[0])
    save_checkpoint(whole, tmp_path / "checkpoint.pkl")
    whole.train(stream[1])
    resumed, _ = maybe_load_checkpoint(fresh(), tmp_path / "checkpoint.pkl")
    resumed.train(stream[1])
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)


def test_mini_batches_that_cannot_be_cut_are_named():
    class Half(Masked):
        def _unpack_minibatch(self):
            self.mbatch = [self.mbatch[0], self.mbatch[1], len(self.mbatch[0])]

    benchmark = benchmark_of(blobs(), collate_fn=captioned)
    strategy = strategy_of(Half, nn.Linear(5, 4), [EWCPlugin()])
    with pytest.raises(ValueError, match=r"batches of Half must be .* \[\d, 5\], .*, a str\."):
        strategy.train(benchmark.train_stream[0])


class Captioned(Collated):
    """Its mini-batches hold a text that no tensor can."""

    def _unpack_minibatch(self):
        self.mbatch = self.mbatch[:2]


def captioned(items):
    x, y = (torch.stack([torch.as_tensor(item[i]) for item in items]) for i in (0, 1))
    return [x, y, "a text"]


def test_a_matrix_free_fisher_keeps_the_calls_of_the_model_alone(tmp_path):
    model, plugin = mlp(), EWCPlugin(structure=Implicit())
    benchmark = benchmark_of(blobs(), collate_fn=captioned)
    strategy_of(Captioned, model, [plugin]).train(benchmark.train_stream[0])
    plugin.fisher.save(tmp_path / "fisher.safetensors")
    loaded = ImplicitFisher.load(tmp_path / "fisher.safetensors", mlp())
    close(flatten(loaded.diagonal()), diagonal_by_definition(model, blobs()[0]))


# --- the data --------------------------------------------------------------------------------


def test_joint_training_is_one_task_of_all_its_examples():
    model, plugin = mlp(), EWCPlugin(5.0)
    stream = domain_incremental((0.0, 1.5, -1.0)).train_stream
    strategy_of(JointTraining, model, [plugin]).train(stream)
    x = torch.cat([torch.stack([item[0] for item in e.dataset]) for e in stream])
    close(diagonal(plugin), diagonal_by_definition(model, x))
    assert plugin.fisher.num_examples == plugin.penalty.num_examples == 144
    other = strategy_of(Naive, model, [plugin])
    other.train(stream[0])
    assert plugin.penalty.num_examples == 48
    assert plugin.last_penalty > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_options_of_the_loader_are_handed_on(workers):
    given = []

    class Loads(Naive):
        def make_eval_dataloader(self, num_workers=0, **options):
            given.append((num_workers, options))
            super().make_eval_dataloader(num_workers=num_workers, **options)

    def ragged(items):
        """Lists of unequal lengths, which the default would not put together."""
        rows = nn.utils.rnn.pad_sequence([x[: 2 + n % 3] for n, (x, _) in enumerate(items)])
        return [functional.pad(rows.T, (0, 5 - len(rows))), torch.stack([y for _, y in items])]

    options = {"num_workers": workers, "persistent_workers": True, "pin_memory": False}
    plugin = EWCPlugin()
    x, y = blobs()
    benchmark = benchmark_of((x, y), collate_fn=ragged if not workers else None)
    strategy = strategy_of(Loads, mlp(), [plugin])
    strategy.train(benchmark.train_stream[0], shuffle=False, drop_last=True, **options)
    assert plugin.fisher.num_examples == 48  # in mini-batches of 10
    asked = [(n, o) for n, o in given if n == workers and o]
    assert asked[-1] == (workers, {"persistent_workers": True, "pin_memory": False})
    if not workers:
        parts = zip(x.split(10), y.split(10), strict=True)
        inputs = [ragged(list(zip(*part, strict=True)))[0] for part in parts]
        close(diagonal(plugin), diagonal_by_definition(strategy.model, torch.cat(inputs)))


def test_a_sample_keeps_the_weight_of_its_task():
    x = torch.cat([blobs()[0] + shift for shift in torch.linspace(0, 0.1, 20)])
    y = blobs()[1].repeat(20)
    stream = benchmark_of((x, y), (x + 1, y)).train_stream
    values, fishers = [], []
    for options in ({}, {"max_examples": 300}, {"max_examples": 300, "seed": 1}):
        torch.manual_seed(1)
        model, plugin = mlp(), EWCPlugin(**options)
        strategy = strategy_of(Naive, model, [plugin])
        strategy.train(stream[0])
        drawn = torch.rand(1)
        trained = weights(model)
        assert plugin.penalty.remembered_examples == 960
        assert plugin.fisher.num_examples == options.get("max_examples", 960)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        values.append(plugin.penalty(model).item())
        fishers.append(diagonal(plugin))
        fishers.append((trained, drawn))
    assert values[1:] == pytest.approx(2 * values[:1], rel=0.2)
    assert values[1] != values[2]
    for other in fishers[3::2]:  # neither the global generator nor the training is touched
        torch.testing.assert_close(other, fishers[1], rtol=0, atol=0)


def test_a_sample_is_the_same_for_the_same_seed_and_has_an_example_once():
    x, y = torch.eye(48), torch.arange(48) % 4
    stream = benchmark_of((x, y), (x, y)).train_stream
    chosen = []
    for global_seed, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(global_seed)
        plugin = EWCPlugin(max_examples=20, seed=seed)
        strategy = strategy_of(Naive, nn.Linear(48, 4), [plugin])
        for experience in stream:
            strategy.train(experience)
            # The weights of an input that no example has, matter to none.
            chosen.append(plugin.fisher.diagonal()["weight"].sum(0) > 0)
            assert chosen[-1].sum() == 20
    first, second, *others = chosen
    assert torch.equal(others[0], first)
    assert torch.equal(others[1], second)
    assert not torch.equal(first, second)
    assert not torch.equal(others[2], first)


# --- what is refused, before the work --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"likelihood": Gaussian}, TypeError, "likelihood must be a Likelihood instance"),
        ({"estimator": "exact"}, TypeError, "estimator must be .* such as Exact.., got 'exact'"),
        ({"estimator": MonteCarlo}, TypeError, "estimator must be an Estimator instance"),
        ({"estimator": Empirical(loss=len)}, ValueError, "EWCPlugin needs a likelihood"),
        ({"structure": "diagonal"}, TypeError, "structure must be a Structure instance"),
        ({"structure": Exact()}, TypeError, "structure must be a Structure instance"),
        ({"consolidation": "online"}, TypeError, "consolidation must be "),
        ({"consolidation": Online}, TypeError, "consolidation must be "),
        (
            {"update": consolidation.ImplicitSteps},
            TypeError,
            "update must be an instance of InLoss or ImplicitSteps",
        ),
        (
            {"max_examples": 0},
            ValueError,
            "max_examples must be .* 1 or more, or None, got 0",
        ),
        ({"max_examples": 0.5}, ValueError, "max_examples must be a whole number"),
        *(
            ({"max_examples": 10, "seed": seed}, ValueError, "seed must be a whole number of")
            for seed in (1.5, "a", None, 2**70)
        ),
    ],
)
def test_wrong_choices_are_refused_when_given(options, error, message):
    with pytest.raises(error, match=message):
        EWCPlugin(**options)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "criterion", "message"),
    [
        (Gaussian(), 1, torch.randn(48), "mse", r".*, got \[\d\]; give y\[:, None\]"),
        (Bernoulli(), 4, torch.rand(48, 4), "bce", "Targets .* must be 0 or 1, got 0"),
    ],
    ids=["gaussian", "bernoulli"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_do_not_fit_are_refused_before_the_first_task(
    likelihood, outputs, targets, criterion, message
):
    attribute = DataAttribute([0] * 48, "targets")
    data = AvalancheDataset([TensorDataset(blobs()[0], targets)], data_attributes=[attribute])
    benchmark = benchmark_from_datasets(train=[data], test=[data])
    model, plugin = nn.Linear(5, outputs), EWCPlugin(likelihood=likelihood, estimator=Empirical())
    strategy = strategy_of(Naive, model, [plugin])
    losses = {"mse": nn.MSELoss(), "bce": nn.BCEWithLogitsLoss()}
    strategy._criterion, start = losses[criterion], weights(model)
    with pytest.raises(ValueError, match=f"of task 1 .* a try with .*: Batch 0: {message}"):
        strategy.train(benchmark.train_stream[0])
    torch.testing.assert_close(weights(model), start, rtol=0, atol=0)


class Noisy(torch.utils.data.Dataset):
    """Every reading draws from the generators of Python, NumPy and torch."""

    def __len__(self):
        return 48

    def __getitem__(self, n):
        x, y = blobs()
        noise = random.random() + np.random.rand() + torch.rand(())
        return x[n] + 0.01 * float(noise), int(y[n])


def test_the_try_before_the_first_task_changes_nothing(monkeypatch):
    found = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr(EWCPlugin, "check_task", lambda *_, **__: None)
        RNGManager.set_random_seeds(7)
        attribute = DataAttribute(blobs()[1].tolist(), "targets")
        data = AvalancheDataset([Noisy()], data_attributes=[attribute])
        benchmark = benchmark_from_datasets(train=[data], test=[data])
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        plugin = EWCPlugin()
        strategy_of(Naive, model, [plugin]).train(benchmark.train_stream[0])
        drawn = {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(())}
        found.append(model.state_dict() | plugin.fisher.diagonal() | drawn)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class InMemory(Naive):
    """Loads the experience's data in its own way, and counts its mini-batches."""

    loaded = 0

    def make_eval_dataloader(self, **_):
        def load():
            for part in zip(*(t.split(10) for t in blobs()), strict=True):
                InMemory.loaded += 1
                yield list(part)

        self.dataloader = load()


def test_strategies_that_load_data_in_their_own_way(monkeypatch):
    monkeypatch.setattr(InMemory, "loaded", 0)
    plugin, experience = EWCPlugin(), domain_incremental().train_stream[0]
    strategy = strategy_of(InMemory, mlp(), [plugin])
    strategy.train(experience)
    close(diagonal(plugin), diagonal_by_definition(strategy.model, blobs()[0]))
    assert InMemory.loaded == 3 + 5  # of three looks only the first mini-batch is loaded
    with pytest.raises(ValueError, match=r"max_examples must be None with InMemory.*, got 20"):
        strategy_of(InMemory, mlp(), [EWCPlugin(max_examples=20)]).train(experience)
