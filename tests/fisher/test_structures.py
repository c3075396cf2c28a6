"""Every structure, estimator, likelihood and layer against brute force from the definition."""

from functools import cache

import pytest
import reference
import torch
from networks import LAYERS, Sequential2d, slow_way
from torch import nn
from torch.nn import functional

from ewc import (
    Bernoulli,
    BlockDiagonal,
    Categorical,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    Empirical,
    Exact,
    FisherMatrix,
    Gaussian,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
    Poisson,
    fisher_information,
)
from ewc.fisher import ImplicitFisher
from ewc.matrices import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.parameters import flatten, unflatten

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LIKELIHOODS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(0.7),
    "poisson": Poisson(),
}
NUM_EXAMPLES = 5


@cache
def case(layer, likelihood):
    """A network, inputs, targets, all in double precision; the batch norms have seen data."""
    torch.manual_seed(1)
    model = LAYERS[layer]().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5)
    x = torch.randn(NUM_EXAMPLES, 12, dtype=torch.float64)
    model(3 * x + 1)
    model.eval()
    targets = {
        "categorical": torch.tensor([0, 2, 1, 1, 0]),
        "bernoulli": torch.randint(2, (NUM_EXAMPLES, 3)),
        "gaussian": torch.randn(NUM_EXAMPLES, 3, dtype=torch.float64),
        "poisson": torch.randint(5, (NUM_EXAMPLES, 3)),
    }
    return model, x, targets[likelihood]


def highest_rate(model, x):
    return int(model(x).exp().max())


@cache
def brute_force(layer, likelihood, estimator):
    """The dense matrix from the definition."""
    model, x, y = case(layer, likelihood)
    examples = [(x_n,) for x_n in x]
    logs = {
        "bernoulli": (reference.log_bernoulli, (0, 1)),
        "poisson": (reference.log_poisson, tuple(range(60 + 3 * highest_rate(model, x)))),
    }
    if estimator == Empirical():
        if likelihood in logs:
            return reference.empirical_by(model, examples, y.double(), logs[likelihood][0])
        return reference.empirical_fisher(
            model, examples, y, 0.7 if likelihood == "gaussian" else None
        )
    if likelihood == "categorical":
        return reference.categorical_fisher(model, examples)
    if likelihood == "gaussian":
        return reference.gaussian_fisher(model, examples, 0.7)
    return reference.fisher_by_moments(model, examples, *logs[likelihood])


def computed(layer, likelihood, estimator, structure):
    model, x, y = case(layer, likelihood)
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    return fisher_information(
        model, data, LIKELIHOODS[likelihood], estimator=estimator, structure=structure
    )


def block_of(dense, shapes, block):
    """The part of a dense matrix that belongs to the parameters of a block."""
    places = unflatten(torch.arange(len(dense)), shapes)
    index = torch.cat([places[name].flatten() for name in block.shapes])
    return dense[index[:, None], index[None, :]]


def check_against_definition(fisher, dense):
    """What the structure keeps of the matrix, computed from the dense one."""
    v = {n: torch.randn(s, dtype=torch.float64) for n, s in fisher.shapes.items()}
    # Of the entries' own size: Poisson rates make some of them very large.
    close = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, float(dense.abs().max()))}
    if isinstance(fisher, DiagonalFisher):
        torch.testing.assert_close(flatten(fisher.diagonal()), dense.diagonal(), **close)
    elif isinstance(fisher, ImplicitFisher):
        torch.testing.assert_close(flatten(fisher.matvec(v)), dense @ flatten(v), **close)
        torch.testing.assert_close(flatten(fisher.diagonal()), dense.diagonal(), **close)
    elif isinstance(fisher, BlockDiagonalFisher):
        for block in fisher.blocks:
            expected = block_of(dense, fisher.shapes, block)
            if isinstance(block, EigenvalueCorrectedProduct):
                check_eigenvalues(block, expected, close)
            elif not isinstance(block, KroneckerProduct):
                torch.testing.assert_close(block.to_dense(), expected, **close)
    else:
        torch.testing.assert_close(fisher.to_dense(), dense, **close)


def check_eigenvalues(block, dense, close):
    """The second moments along orthonormal directions: the diagonal of Q' F Q."""
    size = block.num_parameters
    unit = torch.eye(size, dtype=torch.float64)
    basis = torch.stack(
        [
            flatten(
                block.weights.to_parameters(block.rotated_back(e.reshape(block.spectrum.shape)))
            )
            for e in unit
        ],
        1,
    )
    torch.testing.assert_close(basis.T @ basis, unit, **CLOSE)
    moments = (basis.T @ dense @ basis).diagonal()
    torch.testing.assert_close(block.spectrum.flatten(), moments, **close)


STRUCTURES = {
    "diagonal": Diagonal(),
    "block_diagonal": BlockDiagonal(),
    "kronecker": Kronecker(),
    "eigenvalue_corrected": EigenvalueCorrected(),
    "low_rank": LowRank(rank=400),
    "dense": Dense(),
    "implicit": Implicit(),
}


@slow_way
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    "estimator", [Exact(), pytest.param(Empirical(), marks=pytest.mark.slow)], ids=repr
)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_equals_brute_force(structure, estimator, likelihood, layer):
    dense = brute_force(layer, likelihood, estimator)
    fisher = computed(layer, likelihood, estimator, STRUCTURES[structure])
    assert fisher.num_examples == NUM_EXAMPLES
    check_against_definition(fisher, dense)


@pytest.mark.parametrize(
    ("layer", "likelihood"),
    [
        pytest.param(layer, likelihood, marks=() if quick else pytest.mark.slow)
        for layer in ("linear", "conv2d", "embedding", "lstm")
        for likelihood in LIKELIHOODS
        for quick in [(layer, likelihood) == ("linear", "categorical")]
    ],
)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_monte_carlo_is_unbiased_in_every_structure(structure, likelihood, layer):
    kind = STRUCTURES[structure]
    exact = computed(layer, likelihood, Exact(), kind)
    # The eigenvectors follow the samples: the trace is unbiased, single entries are not.
    measure = (
        (lambda f: f.trace()[None])
        if structure == "eigenvalue_corrected"
        else (lambda f: flatten(f.diagonal()))
    )
    seeds = range(40)
    found = torch.stack(
        [measure(computed(layer, likelihood, MonteCarlo(4, seed), kind)) for seed in seeds]
    )
    error = found.std(0) / len(seeds) ** 0.5
    moving = error > 1e-12
    z = ((found.mean(0) - measure(exact)) / error)[moving]
    torch.testing.assert_close(found.mean(0)[~moving], measure(exact)[~moving], **CLOSE)
    # The largest of at most 400 dependent t-values, and their mean square.
    assert float(z.abs().max()) < 5
    assert float(z.square().mean()) < 4


def rows(_module):
    return lambda a, g: (a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1]))


def one_hot(module):
    """The padding is no input: its row never moves."""

    def positions(a, g):
        used = (a != module.padding_idx)[:, None].to(g)
        return functional.one_hot(a, module.num_embeddings) * used, g * used

    return positions


def patches(module):
    """What every kernel entry sees, by kernels of one entry; groups one after the other."""
    inputs, *kernel = module.weight.shape[1:]
    size = inputs * torch.Size(kernel).numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, inputs, *kernel)
    unit = unit.repeat(module.groups, *[1] * (1 + len(kernel)))

    def positions(a, g):
        return module._conv_forward(a[None], unit, None)[0].flatten(1).T, g.flatten(1).T

    return positions


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(
    ("layer", "find", "positions"),
    [
        ("linear", lambda m: m[0], rows),
        ("sequence", lambda m: m.layer, rows),
        ("conv2d", lambda m: m[1], patches),
        ("conv2d_same", lambda m: m[1], patches),
        ("conv1d", lambda m: m[1], patches),
        ("conv1d_outputs", lambda m: m[1], patches),
        ("wide_conv1d", lambda m: m.layer, patches),
        ("wide_conv2d", lambda m: m.layer, patches),
        ("embedding", lambda m: m.layer, one_hot),
    ],
)
def test_kronecker_factors_equal_brute_force(layer, find, positions, reduce):
    model, x, _ = case(layer, "categorical")
    module = find(model)
    a, g = reference.kronecker_factors(
        model, module, [(x_n,) for x_n in x], positions(module), reduce and layer != "embedding"
    )
    fisher = computed(layer, "categorical", Exact(), Kronecker(reduce=reduce))
    check_kronecker_block(fisher, model, module, a, g)


def check_kronecker_block(fisher, model, module, a, g):
    """A layer's block against its factors, groups one after the other along the rows."""
    name = next(n for n, p in model.named_parameters() if p is module.weight)
    (block,) = (b for b in fisher.blocks if name in b.shapes)
    assert isinstance(block, KroneckerProduct)
    groups = getattr(module, "groups", 1)
    bias = int(getattr(module, "bias", None) is not None)
    v = {n: torch.randn(s, dtype=torch.float64) for n, s in block.shapes.items()}
    matrix = block.weights.to_matrix(v)
    # Of all groups together the factors' diagonal blocks are the groups' own.
    inputs, outputs = (len(a) - bias) // groups, len(g) // groups
    products = []
    for group in range(groups):
        columns = [*range(group * inputs, (group + 1) * inputs), *[len(a) - 1] * bias]
        rows_of = slice(group * outputs, (group + 1) * outputs)
        products.append(g[rows_of, rows_of] @ matrix[group] @ a[columns][:, columns])
    expected = block.weights.to_parameters(torch.stack(products))
    torch.testing.assert_close(block.matvec(v), expected, **CLOSE)


CONVOLUTIONS = {
    # A kernel none or some of whose entries touch the map, in every number of dimensions.
    "beyond_1d": (nn.Conv1d, (1,), {"kernel_size": 5, "padding": 2}),
    "beyond_2d": (nn.Conv2d, (1, 1), {"kernel_size": 3, "padding": 1}),
    "beyond_3d": (nn.Conv3d, (1, 2, 1), {"kernel_size": 3, "padding": 1}),
    "beside_2d": (nn.Conv2d, (2, 3), {"kernel_size": (3, 4), "padding": 4, "dilation": (1, 2)}),
    "larger_2d": (nn.Conv2d, (2, 1), {"kernel_size": (2, 5), "padding": (0, 2), "groups": 2}),
    "strided_beyond": (nn.Conv2d, (1, 2), {"kernel_size": 3, "padding": 1, "stride": 2}),
    "valid_1d": (nn.Conv1d, (5,), {"kernel_size": 2, "padding": "valid"}),
    "valid_2d": (nn.Conv2d, (3, 4), {"kernel_size": 2, "padding": "valid", "stride": (1, 2)}),
    "valid_3d": (nn.Conv3d, (2, 2, 3), {"kernel_size": 2, "padding": "valid", "groups": 2}),
    "valid_dilated": (nn.Conv2d, (3, 4), {"kernel_size": 2, "padding": "valid", "dilation": 2}),
    "same_1d": (nn.Conv1d, (4,), {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "same_2d": (nn.Conv2d, (2, 3), {"kernel_size": (2, 3), "padding": "same", "bias": False}),
    "same_3d": (nn.Conv3d, (1, 2, 2), {"kernel_size": (3, 2, 1), "padding": "same"}),
    "reflect": (nn.Conv2d, (3, 3), {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    "replicate": (
        nn.Conv3d,
        (1, 2, 1),
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    ),
    "circular": (
        nn.Conv1d,
        (4,),
        {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "groups": 2},
    ),
    "depthwise": (nn.Conv2d, (2, 2), {"kernel_size": 3, "padding": 2, "groups": 16}),
}
TRANSPOSED = {
    "transposed_1d": (nn.ConvTranspose1d, (1,), {"kernel_size": 3, "padding": 1}),
    "transposed_2d": (
        nn.ConvTranspose2d,
        (2, 1),
        {"kernel_size": (2, 3), "stride": 2, "groups": 2, "output_padding": 1},
    ),
    "transposed_3d": (
        nn.ConvTranspose3d,
        (1, 1, 2),
        {"kernel_size": 2, "stride": (1, 2, 1), "dilation": 2, "padding": 1},
    ),
}


def convolutional(kind, sizes, options, classes=3):
    """16 channels, so that they go by lags and shifts, and 5 examples."""
    torch.manual_seed(0)
    layer = kind(16, 16, **options)
    features = layer(torch.zeros(1, 16, *sizes)).numel()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, classes)).double()
    x = torch.randn(NUM_EXAMPLES, 16, *sizes, dtype=torch.float64)
    return model, x, torch.zeros(NUM_EXAMPLES, dtype=torch.long)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("classes", [2, 4])  # of one score vector, and of several
@pytest.mark.parametrize("name", CONVOLUTIONS | TRANSPOSED)
def test_convolutions_of_every_geometry_equal_brute_force(name, classes):
    model, x, y = convolutional(*(CONVOLUTIONS | TRANSPOSED)[name], classes)
    expected = reference.categorical_fisher(model, [(x_n,) for x_n in x], torch.square)
    found = fisher_information(model, [(x, y)])
    torch.testing.assert_close(flatten(found.diagonal()), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kronecker_factors_of_every_geometry_equal_brute_force(name):
    model, x, y = convolutional(*CONVOLUTIONS[name])
    examples = [(x_n,) for x_n in x]
    a, g = reference.kronecker_factors(model, model[0], examples, patches(model[0]))
    fisher = fisher_information(model, [(x, y)], structure=Kronecker())
    check_kronecker_block(fisher, model, model[0], a, g)


@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
def test_kronecker_is_exact_for_deep_linear_networks(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    blocks = fisher_information(model, [(x, y)], Gaussian(0.5), structure=BlockDiagonal())
    found = fisher_information(model, [(x, y)], Gaussian(0.5), structure=structure)
    torch.testing.assert_close(found.to_dense(), blocks.to_dense(), **CLOSE)
    # ... and not with a nonlinearity, where inputs and gradients depend on each other.
    bent = nn.Sequential(model[0], nn.Tanh(), model[1], nn.Tanh(), model[2])
    blocks = fisher_information(bent, [(x, y)], Gaussian(0.5), structure=BlockDiagonal())
    found = fisher_information(bent, [(x, y)], Gaussian(0.5), structure=structure)
    gap = (found.to_dense() - blocks.to_dense()).norm() / blocks.to_dense().norm()
    assert 0.001 < float(gap) < 0.8


@pytest.mark.parametrize("structure", [Kronecker(), EigenvalueCorrected()])
def test_kronecker_is_exact_for_one_example(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.randn(1, 5, dtype=torch.float64), torch.tensor([1]))]
    blocks = fisher_information(model, data, structure=BlockDiagonal())
    found = fisher_information(model, data, structure=structure)
    torch.testing.assert_close(found.to_dense(), blocks.to_dense(), **CLOSE)


@pytest.mark.parametrize("reduce", [False, True])
def test_reduce_is_exact_for_a_linear_network_that_averages(reduce):
    torch.manual_seed(0)
    model = Sequential2d().double()
    model.forward = lambda x: model.head(model.inner(x.unflatten(1, (2, 3))).mean(1))
    data = [(torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))]
    kind = Kronecker(reduce=reduce)
    found = fisher_information(model, data, Gaussian(), structure=kind).to_dense()
    blocks = fisher_information(model, data, Gaussian(), structure=BlockDiagonal()).to_dense()
    gap = float((found - blocks).norm() / blocks.norm())
    assert gap < 1e-12 if reduce else gap > 0.01


@pytest.mark.parametrize("reduce", [False, True])
def test_the_corrected_eigenvectors_are_those_of_the_chosen_form(reduce):
    of_factors, corrected = (
        computed("sequence", "categorical", Exact(), kind(reduce=reduce))
        for kind in (Kronecker, EigenvalueCorrected)
    )
    for product, block in zip(of_factors.blocks, corrected.blocks, strict=True):
        rotated = block.inputs.transpose(1, 2) @ product.inputs @ block.inputs
        torch.testing.assert_close(
            rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), **CLOSE
        )


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_low_rank_keeps_the_diagonal_and_never_exceeds_the_matrix(rank):
    dense = brute_force("linear", "categorical", Exact())
    fisher = computed("linear", "categorical", Exact(), LowRank(rank=rank))
    assert fisher.values.shape == (rank,)
    torch.testing.assert_close(flatten(fisher.diagonal()), dense.diagonal(), **CLOSE)
    low = (fisher.vectors * fisher.values) @ fisher.vectors.T
    assert float(torch.linalg.eigvalsh(dense - low).min()) > -1e-9
    # The best approximation of the rank, up to what ten random directions more leave.
    best = torch.linalg.eigvalsh(dense)[:-rank].clamp_min(0).sum()
    assert float((dense - low).trace()) < 1.5 * float(best) + 1e-9


def test_structures_with_options_name_their_mistakes():
    model, x, y = case("linear", "categorical")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        Kronecker(rank=3)
    with pytest.raises(ValueError, match="rank must be a whole number, 1 or more, got 0"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="list_iterator, which can be read once"):
        fisher_information(model, iter([(x, y)]), structure=EigenvalueCorrected())
    with pytest.raises(TypeError, match="structure must be a Structure instance"):
        fisher_information(model, [(x, y)], structure=KroneckerProduct)


def test_layers_without_a_kronecker_form_have_their_exact_block():
    fisher = computed("layer_norm", "categorical", Exact(), Kronecker())
    assert repr(fisher).endswith("exact blocks: layer.weight, layer.bias)")
    (block,) = (b for b in fisher.blocks if "layer.weight" in b.shapes)
    assert isinstance(block, DenseFisher)
    assert isinstance(fisher, FisherMatrix)
    assert "exact" not in repr(computed("linear", "categorical", Exact(), Kronecker()))
