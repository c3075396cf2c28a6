"""Fisher information against brute force, and what the pass leaves untouched."""

import pytest
import reference
import torch
from conftest import EXACT, MODELS, batches, oracle, targets_for
from networks import (
    BiasOnly,
    Branching,
    CalledTwice,
    ChangesItsGraph,
    Derivative,
    Disturbing,
    FoldedRows,
    LiesToVmap,
    Opaque,
    Sequential2d,
    SlopesPerChannel,
    SortedRows,
    TiedWeights,
    TimeFirst,
    TwoHeads,
    TwoOrders,
    UsedOutside,
    Words,
    WritesIntoItsInput,
    frozen_weight,
    normed,
    slow_way,
)
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ewc import (
    Bernoulli,
    Categorical,
    Dense,
    Diagonal,
    DiagonalFisher,
    Empirical,
    Exact,
    Gaussian,
    MonteCarlo,
    Poisson,
    fisher_information,
)
from ewc.parameters import flatten
from ewc.pullback.arguments import Arguments


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.7)], ids=repr)
@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_dense_and_diagonal_equal_brute_force(network, likelihood, estimator, size):
    model, x, y = network
    y = targets_for(model, x, y, likelihood)
    expected = oracle(model, x, y, likelihood, estimator)
    data = batches(x, y, size)
    dense = fisher_information(model, data, likelihood, estimator=estimator, structure=Dense())
    diagonal = fisher_information(model, data, likelihood, estimator=estimator)
    torch.testing.assert_close(dense.to_dense(), expected, **EXACT)
    torch.testing.assert_close(flatten(diagonal.diagonal()), expected.diagonal(), **EXACT)
    assert dense.num_examples == diagonal.num_examples == 7


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", [Exact(), Empirical()], ids=repr)
def test_single_precision_is_right_to_1e_5(name, estimator):
    build, features = MODELS[name]
    model = build()
    x = torch.randn(7, features)
    y = torch.randint(3, (7,))
    fisher = fisher_information(model, batches(x, y, 4), estimator=estimator)
    model.double()
    expected = oracle(model, x.double(), y, Categorical(), estimator).diagonal()
    found = flatten(fisher.diagonal())
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max())
    )


def test_duplicated_data_give_the_same_mean(network):
    model, x, y = network
    once = fisher_information(model, [(x, y)])
    twice = fisher_information(model, [(x, y), (x, y)])
    torch.testing.assert_close(once.diagonal(), twice.diagonal(), **EXACT)
    torch.testing.assert_close(twice.precision.trace(), 14 * once.trace(), **EXACT)


def test_small_chunks_change_nothing(network):
    model, x, y = network
    whole = fisher_information(model, [(x, y)], structure=Dense())
    diagonal = fisher_information(model, [(x, y)])
    parts = fisher_information(model, [(x, y)], structure=Dense(), memory=1)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), **EXACT)
    found = fisher_information(model, [(x, y)], memory=1)
    torch.testing.assert_close(found.diagonal(), diagonal.diagonal(), **EXACT)


@slow_way
@pytest.mark.parametrize(
    "build",
    [
        Sequential2d,
        TimeFirst,
        FoldedRows,
        CalledTwice,
        TiedWeights,
        UsedOutside,
        Branching,
        Opaque,
        normed,
        frozen_weight,
        Derivative,
        SortedRows,
        TwoOrders,
        WritesIntoItsInput,
        BiasOnly,
        Words,
        SlopesPerChannel,
        LiesToVmap,
    ],
)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_use_of_a_layer_is_right(build, n):
    model = build().double()
    x = torch.randn(n, 6, dtype=torch.float64)
    y = torch.randint(3, (n,))
    # The branch of one of them looks at the whole batch.
    examples = batches(x, y, 1) if build is Branching else [(x, y)]
    expected = oracle(model, x.clone(), y, Categorical(), Exact())
    before = x.clone()
    dense = fisher_information(model, examples, structure=Dense())
    torch.testing.assert_close(dense.to_dense(), expected, **EXACT)
    assert torch.equal(x, before)
    diagonal = fisher_information(model, examples)
    torch.testing.assert_close(flatten(diagonal.diagonal()), expected.diagonal(), **EXACT)


def test_every_batch_may_have_a_graph_of_its_own():
    model = ChangesItsGraph().double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, 1, 1, -1, -1, -1, 1, 1, 1, -1, -1, -1])
    expected = oracle(model, x, y, Categorical(), Exact())
    fisher = fisher_information(model, batches(x, y, 3), structure=Dense())
    torch.testing.assert_close(fisher.to_dense(), expected, **EXACT)


def test_reentrant_checkpoints_are_refused_not_skipped():
    model = CalledTwice()
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x.requires_grad_(), use_reentrant=True)
    x, y = torch.randn(3, 6), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fisher_information(model, [(x, y)])
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    found = fisher_information(model, [(x, y)]).diagonal()
    model.forward = forward
    torch.testing.assert_close(found, fisher_information(model, [(x, y)]).diagonal())


def test_unused_parameters_have_zero_information():
    model = CalledTwice().double()
    model.unused = nn.Linear(2, 2).double()
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    fisher = fisher_information(model, [(x, y)])
    assert float(fisher.diagonal()["unused.weight"].abs().max()) == 0.0
    assert list(fisher.diagonal()) == [name for name, _ in model.named_parameters()]


@slow_way
@pytest.mark.parametrize("tasks", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_task_labels_pick_the_head(tasks):
    model = TwoHeads().double()
    x, task = torch.randn(4, 6, dtype=torch.float64), torch.tensor(tasks)
    y = torch.tensor([0, 2, 1, 1])
    examples = [(x_n, t_n) for x_n, t_n in zip(x, task, strict=True)]
    expected = reference.categorical_fisher(model, examples)
    fisher = fisher_information(model, [(x, y, task)], structure=Dense())
    torch.testing.assert_close(fisher.to_dense(), expected, **EXACT)


def test_task_labels_are_dropped_for_a_model_without_tasks():
    model = CalledTwice().double()
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    with_task = fisher_information(model, [(x, y, torch.ones(3, dtype=torch.long))])
    torch.testing.assert_close(with_task.diagonal(), fisher_information(model, [(x, y)]).diagonal())


def test_saturated_outputs_keep_their_digits():
    model = nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[30.0], [0.0], [-5.0]]))
    x, y = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    expected = oracle(model, x.double(), y, Categorical(), Exact()).diagonal()
    found = fisher_information(model.float(), [(x, y)]).diagonal()["weight"]
    # 1 - p is 9e-14 here: in single precision it would be 0.
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_pass_leaves_the_model_as_it_was(fails):
    model = Disturbing(fails)
    model.norm.eval()  # a mode of its own, as for a frozen layer
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=1, shuffle=True
    )
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            fisher_information(model, loader)
    else:
        with torch.no_grad():
            fisher_information(model, loader)
    assert model.training
    assert model.linear.training
    assert not model.norm.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.linear._forward_hooks


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        ([(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))], "data is empty"),
        ([torch.zeros(2, 6)], "Batch 0 is a Tensor"),
        ([(torch.zeros(2, 6), torch.zeros(3, dtype=torch.long))], "must be equal"),
        ([(torch.zeros(2, 6), torch.zeros(3, 3))], "must be equal"),
    ],
)
def test_wrong_data_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fisher_information(CalledTwice(), data)


@pytest.mark.parametrize(
    ("targets", "likelihood", "message"),
    [
        (torch.tensor([0, 3]), Categorical(), "Batch 0: Label 3 is outside .* 0 to 2"),
        (torch.tensor([-1, 0]), Categorical(), "Batch 0: Label -1 is outside"),
        (torch.zeros(2, 3), Categorical(), "Batch 0: Soft labels must be probabilities"),
        (torch.tensor([0, 1]), Gaussian(), r"Batch 0: .* the outputs\' shape \[2, 3\], got \[2\]"),
    ],
)
def test_only_targets_that_are_used_must_fit_the_likelihood(targets, likelihood, message):
    model = CalledTwice().double()
    x, y = torch.randn(2, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    fitting = targets_for(model, x, y, likelihood)
    for estimator in (Exact(), Exact(0.01), MonteCarlo(3)):
        found, expected = (
            fisher_information(model, [(x, t)], likelihood, estimator=estimator).diagonal()
            for t in (targets, fitting)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        fisher_information(model, [(x, targets)], likelihood, estimator=Empirical())


def test_wrong_models_are_named():
    x, y = torch.randn(2, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no trainable parameter"):
        fisher_information(CalledTwice().requires_grad_(False), [(x, y)])
    coupled = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="track_running_stats=True"):
        fisher_information(coupled, [(x, y)])
    with pytest.raises(ValueError, match=r"integers of shape"):
        fisher_information(nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), [(x, y)])
    squeezed = nn.Sequential(nn.Linear(6, 3))
    squeezed.register_forward_hook(lambda _module, _args, output: output.squeeze())
    with pytest.raises(ValueError, match=r"shape \[3\] for 1 example: .* for a single example too"):
        fisher_information(squeezed, [(x, y)])
    with pytest.raises(TypeError, match="estimator must be an Estimator instance such as"):
        fisher_information(CalledTwice(), [(x, y)], estimator=Empirical)
    nan, targets = x * torch.nan, torch.randn(2, 3)
    said = r"^Batch 1: the scores .* are not finite: x is not finite in the data\.$"
    with pytest.raises(FloatingPointError, match=said):
        fisher_information(CalledTwice(), [(x, y), (nan, y)])
    with pytest.raises(FloatingPointError, match=said):
        fisher_information(CalledTwice(), [(x, targets), (nan, targets)], Gaussian())
    huge = nn.Linear(10_000, 1_000)
    with pytest.raises(ValueError, match=r"over \d+ parameters takes \d+ GB, more than there is"):
        fisher_information(huge, [(torch.randn(1, 10_000), y[:1])], structure=Dense())
    with pytest.raises(ValueError, match=r"num_samples must be a whole number, 1 or more, got 2.5"):
        MonteCarlo(2.5)
    with pytest.raises(ValueError, match=r"\(x, y\), but TwoHeads.forward also needs .task_labels"):
        fisher_information(TwoHeads(), [(x, y)])


class Named(nn.Module):
    """Takes two inputs by name, and one more if there is one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, tokens, mask, scale=None):
        return self.linear(tokens * mask)


class Returned(nn.Module):
    """What a function makes of a layer's outputs."""

    def __init__(self, function, outputs=3):
        super().__init__()
        self.linear, self.function = nn.Linear(6, outputs), function

    def forward(self, x):
        return self.function(self.linear(x))


X, LABELS = torch.linspace(-1, 1, 42).reshape(7, 6), torch.arange(7) % 3
TARGETS = {
    "one_hot": (3, Categorical(), functional.one_hot(LABELS), r"shape \[7, 3\]; .* y.argmax\(1\)"),
    "float_labels": (3, Categorical(), LABELS / 1.0, r"float32 of shape \[7\]; .* y.long\(\)"),
    "column": (3, Categorical(), LABELS[:, None], r"shape \[7, 1\]; .* y\[:, 0\].long\(\)"),
    "one_logit": (1, Categorical(), LABELS % 2, r"Label 1 .* Bernoulli\(\) and y\[:, None\]"),
    "gaussian": (1, Gaussian(), LABELS / 1.0, r"shape \[7, 1\], got \[7\]; give y\[:, None\]"),
    "bernoulli": (1, Bernoulli(), LABELS % 2, r"shape \[7, 1\], got \[7\]; give y\[:, None\]"),
    "poisson": (1, Poisson(), LABELS, r"shape \[7, 1\], got \[7\]; give y\[:, None\]"),
    "gaussian_width": (3, Gaussian(), X, r"the outputs\' shape \[7, 3\], got \[7, 6\]"),
    "two_is_no_truth": (1, Bernoulli(), LABELS[:, None], "Bernoulli .* must be 0 or 1, got 2"),
    "half_a_count": (1, Poisson(), LABELS[:, None] / 2, "must be whole numbers from 0 on, got 0.5"),
    "no_end": (
        1,
        Poisson(),
        LABELS[:, None] / 0.0,
        "must be whole numbers from 0 on, got (nan|inf)",
    ),
}


@pytest.mark.filterwarnings("ignore:Outputs of shape .* have one class")
@pytest.mark.parametrize("memory", [10, 2**30])
@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_are_those_of_the_users_batch(case, memory):
    outputs, likelihood, y, message = TARGETS[case]
    fits = (X, LABELS * 0 if isinstance(likelihood, Categorical) else torch.zeros(7, outputs))
    for data, index in (([(X, y)], 0), ([fits, (X, y)], 1)):
        with pytest.raises(ValueError, match=f"^Batch {index}: .*{message}"):
            fisher_information(
                nn.Linear(6, outputs), data, likelihood, estimator=Empirical(), memory=memory
            )


@pytest.mark.parametrize("memory", [10, 2**30])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Returned(lambda f: f.argmax(1)), "outputs of type torch.int64: it must return"),
        (Returned(lambda f: f.T), r"shape \[3, 7\] for 7 examples"),
        (Returned(torch.Tensor.sum), r"shape \[\] for 7 examples"),
        (Returned(torch.Tensor.squeeze), r"\[3\] for 1 example: .* for a single example too"),
    ],
)
def test_outputs_that_do_not_fit_are_those_for_the_users_batch(model, message, memory):
    with pytest.raises(ValueError, match=f"^Batch 0: the model returned .*{message}"):
        fisher_information(model, [(X, LABELS)], memory=memory)


def test_an_error_of_the_model_is_that_of_the_users_batch():
    data = [(X, LABELS), (torch.zeros(5, 4), LABELS[:5])]
    with pytest.raises(RuntimeError, match=r"\(5x4 and 6x3\)") as raised:
        fisher_information(nn.Linear(6, 3), data)
    assert raised.value.__notes__ == ["The model was called with batch 1: x of shape [5, 4]."]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            {"tokens": X, "mask": X, "kinds": X},
            "has the unknown input 'kinds': Named.forward takes",
        ),
        ({"tokens": X, "mask": X, "scales": X}, ".* takes 'tokens', 'mask', 'scale'"),
        ({"tokens": X, "scale": X}, "lacks 'mask': Named.forward takes 'tokens', 'mask'"),
        ({"tokens": X, "mask": None}, r".* \(dict, Tensor\), whose x\['mask'\] is a NoneType"),
        ({"tokens": X, "mask": X[:4]}, r".* x\['mask'\] of shape \[4, 6\], y of shape \[7\]"),
        ({}, r"is a tuple \(dict, Tensor\): data must be batches"),
        (X, r"is \(x, y\), but Named.forward also needs 'mask'"),
        ([X, 1], r"is a tuple \(list, Tensor\): data must be batches"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, message):
    good = ({"tokens": X, "mask": X}, LABELS)
    with pytest.raises(ValueError, match=f"^Batch 1 {message}"):
        fisher_information(Named(), [good, (x, LABELS)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, LABELS), r"Batch 0 is a Tensor: .*; a single batch goes into a list, \[\(x, y\)\]"),
        ([{"x": X, "labels": LABELS}], "Batch 0 has the unknown input 'x': .* takes 'input'\\.$"),
        (list(zip(X, LABELS, strict=True)), r"x of shape \[6\], y of shape \[\]: .* a DataLoader"),
    ],
)
def test_data_that_are_no_batches_are_named_with_the_way_out(data, message):
    with pytest.raises(ValueError, match=message):
        fisher_information(nn.Linear(6, 3), data)


def test_arguments_in_place_of_inputs_say_how_the_model_is_called():
    model, mask = Named(), (X > 0).float()
    expected = reference.categorical_fisher(model, list(zip(X, mask, strict=True)))
    for arguments in (Arguments((X, mask)), Arguments((X,), {"mask": mask})):
        batches = [(arguments[:4], LABELS[:4]), (arguments[4:], LABELS[4:])]
        found = fisher_information(model, batches, structure=Dense()).to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class Optional(Returned):
    """Takes task labels where there are some."""

    def forward(self, x, task_labels=0):
        return self.linear(x * (1 + task_labels))


def test_an_optional_second_argument_may_be_left_out():
    model = Optional(None)
    expected = reference.categorical_fisher(model.linear, [(x,) for x in X])
    found = fisher_information(model, [(X, LABELS)], structure=Dense()).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_half_precision_sums_do_not_stall():
    model = nn.Linear(4, 3)
    x, y = torch.rand(20_000, 4), torch.zeros(20_000, dtype=torch.long)
    expected = fisher_information(model, batches(x, y, 1000)).trace()
    found = fisher_information(model.bfloat16(), batches(x.bfloat16(), y, 8)).trace()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_autocast_keeps_the_single_precision_of_the_sums():
    model = MODELS["mlp"][0]()
    x, y = torch.randn(50, 6), torch.zeros(50, dtype=torch.long)
    expected = fisher_information(model, [(x, y)]).trace()
    with torch.autocast("cpu", torch.bfloat16):
        for structure in (Diagonal(), Dense()):
            found = fisher_information(model, [(x, y)], structure=structure).trace()
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0)


@pytest.mark.slow
def test_many_outputs_take_bounded_memory():
    """A thousand classes: the score vectors of 512 examples at once would be 2 GB."""
    resource = pytest.importorskip("resource")
    model = nn.Linear(5, 1000)
    x, y = torch.randn(512, 5), torch.zeros(512, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fisher_information(model, [(x, y)])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1.5e6  # kilobytes


@pytest.mark.filterwarnings("ignore:Outputs of shape .* have one class")
def test_one_output_has_no_class_to_learn_about():
    model = nn.Linear(3, 1)
    fisher = fisher_information(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert fisher.trace().item() == 0.0


def test_real_digits_of_mnist(mnist):
    images, labels = mnist
    model = nn.Sequential(nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10)).double()
    x, y = images[:12].double(), labels[:12]
    expected = reference.categorical_fisher(model, [(x_n,) for x_n in x], torch.square)
    fisher = fisher_information(model, batches(x, y, 5))
    torch.testing.assert_close(flatten(fisher.diagonal()), expected, **EXACT)
    assert isinstance(fisher, DiagonalFisher)


def infinite_weight(model):
    nn.init.constant_(model[0].weight, torch.inf)


def undefined_statistics(model):
    model[1].train()(torch.full((2, 4), torch.nan))


def undefined_output(model):
    model[2].register_forward_hook(lambda _module, _args, output: output - output.exp() / 0)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            infinite_weight,
            "the parameter '0.weight' is not finite, as after training",
        ),
        (undefined_statistics, "the buffer '1.running_mean' is NaN, as running statistics are "),
        (undefined_output, "although the parameters and the inputs are finite: an intermediate "),
    ],
)
def test_outputs_that_are_not_finite_are_explained(damage, said):
    """The network comes first: outputs of a diverged one are not finite for any input."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    damage(model)
    x, y = torch.randn(2, 6), torch.zeros(2, dtype=torch.long)

    def losses(net, batch):
        return functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    scores = "scores of the model's outputs are"
    for estimator, what in ((Exact(), scores), (Empirical(loss=losses), "loss of an example is")):
        with pytest.raises(FloatingPointError, match=f"^Batch 0: the {what} not finite.* {said}"):
            fisher_information(model, [(x, y)], estimator=estimator)
    if damage is not undefined_output:
        with pytest.raises(FloatingPointError, match=said):
            fisher_information(model, [(x * torch.nan, y)])
