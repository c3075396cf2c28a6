"""Networks, data and surroundings in which a careless Fisher matrix would be silently wrong."""

import logging

import pytest
import reference
import torch
from networks import Derivative, LiesToVmap, Opaque, TiedWeights, TwoHeads, slow_way
from torch import nn
from torch.nn import functional

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Exact,
    FisherMatrix,
    Implicit,
    Kronecker,
    LowRank,
    fisher_information,
)
from ewc.fisher import data_pass, sampled_fisher, sampling
from ewc.parameters import flatten

pytestmark = slow_way

EXACT = {"rtol": 1e-10, "atol": 1e-12}
STRUCTURES = [
    Diagonal(),
    BlockDiagonal(),
    Kronecker(),
    EigenvalueCorrected(),
    Dense(),
    LowRank(),
    Implicit(),
]
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)


class SumOverTime(Body):
    """Rows go time first; how many there are depends on the batch."""

    def forward(self, x, lengths):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).sum((0, 2)))


class LastToken(Body):
    """Only one row of an example has a gradient; which one depends on the data."""

    def forward(self, x, lengths):
        hidden = torch.tanh(self.inner(x.transpose(0, 1)[:, :, 0]))
        return self.head(hidden[lengths - 1, torch.arange(len(lengths))])


class MaskedToken(Body):
    """The same by a product with zeros and ones: nothing in the graph says so."""

    def forward(self, x, lengths):
        hidden = torch.tanh(self.inner(x.transpose(0, 1)[:, :, 0]))
        mask = torch.arange(len(hidden))[:, None] == lengths - 1
        return self.head((hidden * mask[:, :, None]).sum(0))


class Sorted(Body):
    """Rows in an order that the data decide; in the first batch it is the examples' own."""

    def forward(self, x, lengths):
        order = x[:, 0, 0, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order, 0, 0]))[order.argsort()])


class Unpadded(Body):
    """As many rows as there are tokens; in the first batch as many for every example."""

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        hidden = x.new_zeros(*x.shape[:2], 4)
        hidden[mask] = torch.tanh(self.inner(x[mask][:, 0]))
        return self.head(hidden.sum(1))


class Swaps(torch.autograd.Function):
    """Sorts rows by their first entry, behind autograd's back."""

    @staticmethod
    def forward(ctx, x):
        ctx.order = x[:, 0].argsort()
        return x[ctx.order]

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.order.argsort()]


class SortedByFunction(Body):
    def forward(self, x, lengths):
        order = x[:, 0, 0, 0].argsort().argsort()
        return self.head(torch.tanh(self.inner(Swaps.apply(x[:, 0, 0]))))[order]


@pytest.mark.parametrize(
    "build", [SumOverTime, LastToken, MaskedToken, Sorted, Unpadded, SortedByFunction]
)
def test_what_one_batch_shows_is_not_taken_for_granted(build):
    torch.manual_seed(0)
    model = build().double()
    data, examples = [], []
    for length, lengths in [(2, [2, 2]), (4, [1, 3]), (8, [1, 8]), (8, [3, 2]), (2, [1, 1])]:
        x = torch.randn(2, length, 3, 3, dtype=torch.float64)
        if not data:
            x = x[x[:, 0, 0, 0].argsort()]
        data.append(({"x": x, "lengths": torch.tensor(lengths)}, torch.zeros(2, dtype=torch.long)))
        examples += zip(x, torch.tensor(lengths), strict=True)
    expected = reference.categorical_fisher(model, examples)
    # What comes first decides what is remembered.
    for order in (data, data[::-1], [data[2], *data[:2], *data[3:]]):
        found = fisher_information(model, order, structure=Dense())
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


class CastAround(nn.Module):
    """Computes in another type than the parameters', and than the outputs'."""

    def __init__(self, parameters, inside, outside):
        super().__init__()
        self.first = nn.Linear(4, 5).to(parameters)
        self.last = nn.Linear(5, 3).to(parameters)
        self.types = inside, outside

    def forward(self, x):
        inside, outside = self.types
        x = x.to(inside)
        for layer in (self.first, self.last):
            x = functional.linear(x, layer.weight.to(inside), layer.bias.to(inside)).tanh()
        return x.to(outside)


@every_structure
@pytest.mark.parametrize(
    ("types", "tolerance"),
    [
        ((torch.float64, torch.float32, torch.float32), 1e-5),
        ((torch.float32, torch.float64, torch.float64), 1e-5),
        ((torch.float32, torch.float32, torch.float64), 1e-5),
        ((torch.bfloat16, torch.bfloat16, torch.float32), 0.05),
        ((torch.float32, torch.bfloat16, torch.float32), 0.05),
    ],
)
def test_types_may_change_inside_a_network(structure, types, tolerance):
    torch.manual_seed(0)
    model = CastAround(*types)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    wide = CastAround(*[torch.float64] * 3)
    wide.load_state_dict(model.state_dict())
    fisher = fisher_information(model, [(x, y)], structure=structure)
    expected = fisher_information(wide, [(x.double(), y)], structure=structure)
    v = {n: torch.randn(s, dtype=torch.float64) for n, s in fisher.shapes.items()}
    narrow = {n: t.to(fisher.dtype) for n, t in v.items()}
    for verb in ("matvec", "quadratic_form"):
        found, right = getattr(fisher, verb)(narrow), getattr(expected, verb)(v)
        if isinstance(found, dict):
            found, right = flatten(found), flatten(right)
        assert float((found - right).norm()) <= tolerance * float(right.norm())
    assert float(fisher.trace()) == pytest.approx(float(expected.trace()), rel=tolerance)
    solved = flatten(fisher.solve(narrow, 0.1)).double()
    right = flatten(expected.solve(v, 0.1))
    assert float((solved - right).norm()) <= 2 * tolerance * float(right.norm())
    assert fisher.eigenvalues().shape == (fisher.num_parameters,)


@every_structure
def test_surroundings_change_nothing(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = fisher_information(model, [(x, y)], structure=structure)
    v = {n: torch.randn(s) for n, s in expected.shapes.items()}
    product = expected.matvec(v)
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_information(model, [(x, y)], structure=structure)
    torch.testing.assert_close(found.matvec(v), product)
    with torch.inference_mode():
        data = [(x + 0, y + 0)]
        inside = fisher_information(model, data, structure=structure)
        torch.testing.assert_close(inside.matvec({n: t + 0 for n, t in v.items()}), product)
        torch.testing.assert_close(inside.diagonal(), expected.diagonal())
    torch.testing.assert_close(inside.matvec(v), product)
    torch.testing.assert_close(
        fisher_information(model, data, structure=structure).matvec(v), product
    )


@every_structure
def test_vectors_go_by_name_not_by_order(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))]
    one = fisher_information(model, data, structure=structure)
    v = {n: torch.randn(s, dtype=torch.float64) for n, s in one.shapes.items()}
    turned = dict(reversed(v.items()))
    for fisher in (one, sum([one, one])):
        for verb, options in (("matvec", ()), ("quadratic_form", ()), ("solve", (0.1,))):
            found, same = (getattr(fisher, verb)(u, *options) for u in (v, turned))
            if isinstance(found, dict):
                assert found.keys() == same.keys()
            torch.testing.assert_close(found, same, rtol=1e-8, atol=1e-10)
        with pytest.raises(ValueError, match=r"lacks parameter '0\.weight'"):
            fisher.solve({n: t for n, t in v.items() if n != "0.weight"}, 0.1)
    before = float(one.trace())
    for entries in one.diagonal().values():
        entries.zero_()
    assert float(one.trace()) == before


@pytest.mark.parametrize("build", [Opaque, Derivative, LiesToVmap])
def test_products_without_a_matrix_of_any_network(build, caplog):
    torch.manual_seed(0)
    model = build().double()
    width = next(p.shape[1] for p in model.parameters() if p.dim() == 2)
    data = [(torch.randn(5, width, dtype=torch.float64), torch.zeros(5, dtype=torch.long))]
    expected = fisher_information(model, data, structure=Dense()).to_dense()
    with caplog.at_level(logging.INFO):
        fisher = fisher_information(model, data, structure=Implicit())
        v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in fisher.shapes.items()}
        flat = torch.cat([tensor.flatten() for tensor in v.values()])
        form = fisher.quadratic_form(v)  # before a product has found how
        found = fisher.to_dense()
    torch.testing.assert_close(form, flat @ expected @ flat, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_matrix_free_copies_keep_ties_factors_and_hooks(tmp_path):
    torch.manual_seed(0)
    tied = TiedWeights().double()
    hooked = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(hooked[0])
    for model in (tied, hooked):
        width = next(p.shape[1] for p in model.parameters() if p.dim() == 2 and p.shape[1] > 1)
        x = torch.randn(5, width, dtype=torch.float64)
        model(x)
        data = [(x, torch.zeros(5, dtype=torch.long))]
        expected = 3.0 * fisher_information(model, data, structure=Dense()).to_dense()
        fisher = 3.0 * fisher_information(model, data, structure=Implicit())
        fisher.save(tmp_path / "fisher")
        bare = FisherMatrix.load(tmp_path / "fisher")
        assert repr(bare).endswith("without its network)")
        for copy in (fisher, bare.attached(model), fisher.to(dtype=torch.float64)):
            torch.testing.assert_close(copy.to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Outputs of shape .* have one class")
@every_structure
def test_nothing_to_learn_is_a_matrix_of_zeros(structure):
    data = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    fisher = fisher_information(nn.Linear(4, 1), data, structure=structure)
    assert float(fisher.trace()) == 0.0
    v = {n: torch.ones(s) for n, s in fisher.shapes.items()}
    torch.testing.assert_close(fisher.solve(v, 0.5), {n: 2.0 * t for n, t in v.items()})


def test_memory_is_shared_out_anew_for_every_shape(monkeypatch):
    torch.manual_seed(0)
    sizes = {}

    class Watched(data_pass.Tape):
        def __init__(self, model, parameters, arguments, outputs, memory):
            super().__init__(model, parameters, arguments, outputs, memory)
            (x,) = arguments.tensors()
            sizes[x.shape[1]] = max(sizes.get(x.shape[1], 0), x.shape[0])

    monkeypatch.setattr(data_pass, "Tape", Watched)
    layer = nn.Linear(3, 8)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(1, 1), nn.Linear(8, 8))
    model.forward = lambda x: model[1](layer(x)).mean(1)
    data = [
        (torch.randn(400, length, 3), torch.zeros(400, dtype=torch.long)) for length in (4, 256)
    ]
    fisher_information(model, data, memory=2_000_000)
    assert sizes[256] * 16 < sizes[4]


def test_a_derivative_that_does_not_exist_is_named():
    model = nn.Linear(3, 2)
    model.forward = lambda x: (model.weight @ x.T).T.square().sqrt()
    data = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(FloatingPointError, match="The Fisher information of weight is not finite"):
        fisher_information(model, data)


def test_sampled_matrices_know_their_examples_and_draw_apart(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(torch.randn(10, 4), torch.zeros(10, dtype=torch.long))]
    fisher, _ = sampled_fisher(model, data, num_samples=4, structure=LowRank())
    fisher.save(tmp_path / "fisher")
    for copy in (fisher, 2.0 * fisher, FisherMatrix.load(tmp_path / "fisher")):
        assert copy.num_examples == 10
    # Seeds next to each other share no draw.
    draws = []
    kind = sampling.MonteCarlo
    monkeypatch.setattr(sampling, "MonteCarlo", lambda *a: draws.append(a[1]) or kind(*a))
    for seed in range(5):
        sampled_fisher(model, data, num_samples=10, seed=seed)
    assert len(set(draws)) == 50


class Shift(nn.Module):
    """Outputs that are moved by the parameters: the Jacobian is the identity."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(10, dtype=torch.float64))

    def forward(self, x):
        return x + self.by


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_tolerance_bounds_the_share_of_every_example(tolerance):
    torch.manual_seed(0)
    missing = []
    for x in 3 * torch.randn(40, 1, 10, dtype=torch.float64):
        data = [(x, torch.tensor([0]))]
        exact = fisher_information(Shift(), data).trace()
        found = fisher_information(Shift(), data, estimator=Exact(tolerance)).trace()
        missing.append(float(1 - found / exact))
    assert max(missing) <= tolerance
    assert max(missing) > 0.5 * tolerance  # and it is made use of


def test_kronecker_factors_over_batches_of_different_lengths():
    torch.manual_seed(0)
    model = SumOverTime().double()
    batches = [
        (
            {"x": torch.randn(2, t, 3, 3, dtype=torch.float64), "lengths": torch.tensor([1, 1])},
            torch.zeros(2, dtype=torch.long),
        )
        for t in (2, 5)
    ]
    both, *single = (
        fisher_information(model, data, structure=Kronecker())
        for data in (batches, batches[:1], batches[1:])
    )
    for block, first, second in zip(both.blocks, *(s.blocks for s in single), strict=True):
        torch.testing.assert_close(block.inputs, (first.inputs + second.inputs) / 2, **EXACT)
        torch.testing.assert_close(block.outputs, (first.outputs + second.outputs) / 2, **EXACT)


def test_a_layer_that_some_examples_skip():
    torch.manual_seed(0)
    model = TwoHeads().double()
    width = next(p.shape[1] for p in model.parameters() if p.dim() == 2)
    data = [
        (
            torch.randn(n, width, dtype=torch.float64),
            torch.zeros(n, dtype=torch.long),
            torch.full((n,), t),
        )
        for n, t in ((2, 0), (6, 1))
    ]
    fisher = fisher_information(model, data, structure=Kronecker())
    shares = {
        name: float(block.inputs[0, -1, -1]) for block in fisher.blocks for name in block.shapes
    }
    heads = sorted(share for name, share in shares.items() if "head" in name and "bias" in name)
    assert heads == pytest.approx([0.25, 0.75])


class AnyArguments(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.layer(x) * scale[:, None]


def test_wrappers_pass_on_what_a_batch_has():
    torch.manual_seed(0)
    model, y = Scaled(), torch.zeros(5, dtype=torch.long)
    x, scale = torch.randn(5, 4), torch.rand(5)
    expected = fisher_information(model, [(x, y, scale)]).diagonal()
    for batch in ((x, y, scale), ({"x": x, "scale": scale}, y)):
        found = fisher_information(AnyArguments(model), [batch]).diagonal()
        torch.testing.assert_close(list(found.values()), list(expected.values()))


def test_mistakes_in_the_arguments_are_named():
    tied = TiedWeights()
    width = next(p.shape[1] for p in tied.parameters() if p.dim() == 2)
    data = [(torch.randn(5, width), torch.zeros(5, dtype=torch.long))]
    names = [n for n, _ in tied.named_parameters(remove_duplicate=False)]
    second = next(n for n in names if n not in dict(tied.named_parameters()))
    (only,) = fisher_information(tied, data, parameters=[second]).shapes
    assert tied.get_parameter(only) is tied.get_parameter(second)
    with pytest.raises(ValueError, match="must name at least one parameter"):
        fisher_information(tied, data, parameters=[])
    with pytest.raises(TypeError, match=r"structure must be a Structure instance .* got 'diagon"):
        fisher_information(tied, data, structure="diagonal")
    for memory in (1e6, "1"):
        with pytest.raises(
            ValueError, match="memory must be a whole number of bytes above 0, or None, got"
        ):
            fisher_information(tied, data, memory=memory)
    with pytest.raises(ValueError, match=r"Batch 0 is a tuple \(ndarray, Tensor\): data must"):
        fisher_information(tied, [(data[0][0].numpy(), data[0][1])])


@pytest.fixture
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- operations that a network may use inside ---------------------------------------------


class Experts(nn.Module):
    """Every expert is called, on no rows if need be."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 5), nn.ModuleList(nn.Linear(6, 3) for _ in range(5))

    def forward(self, x):
        p, out = self.gate(x).softmax(1), x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(p.argmax(1) == i)
            out = out.index_add(0, rows, expert(x[rows]) * p[rows, i, None])
        return out


class Energy(nn.Module):
    """Derivatives that torch.func takes inside of the forward pass."""

    def __init__(self, derivative):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.derivative = derivative

    def forward(self, x):
        return self.derivative(lambda z: self.energy(z)[..., 0], x)[:, :3]


def slopes(function, x):
    return torch.func.vmap(torch.func.grad(function))(x)


def forward_slopes(function, x):
    return torch.func.vmap(torch.func.jacfwd(function))(x)


def along_axes(function, x):
    pushed = [torch.func.jvp(function, (x,), (axis.expand_as(x),))[1] for axis in torch.eye(6)[:3]]
    return torch.stack(pushed, 1)


class SparseMixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("mixing", ((torch.rand(6, 6) > 0.5) * 1.0).to_sparse())

    def forward(self, x):
        return self.head(torch.sparse.mm(self.mixing, self.inner(x).tanh().T).T)


class SparseWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

    def forward(self, x):
        weight = self.weight * (self.weight.detach() > 0)
        return self.head(torch.sparse.mm(weight.to_sparse(), x.T).T.tanh())


class Compiled(nn.Module):
    """Scripted and traced modules inside of an ordinary one."""

    def __init__(self):
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)))
        self.traced = torch.jit.trace(nn.Linear(5, 4), torch.randn(2, 5))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.traced(self.scripted(x).tanh()).tanh())


class ComplexInside(nn.Module):
    """Real parameters in complex arithmetic."""

    def __init__(self):
        super().__init__()
        self.parts, self.inner = nn.Parameter(torch.randn(6, 4, 2)), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        kind = torch.promote_types(x.dtype, torch.complex64)
        h = x.to(kind) @ torch.view_as_complex(self.parts)
        cast = nn.functional.linear(1j * x, self.inner.weight.to(kind), self.inner.bias.to(kind))
        return self.head((h * cast).abs())


@pytest.mark.usefixtures("_in_double")
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Sparse CSR")
@pytest.mark.parametrize("structure", [Diagonal(), Dense(), Implicit()], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        Experts,
        *(lambda d=d: Energy(d) for d in (slopes, forward_slopes, along_axes)),
        *(SparseMixing, SparseWeight, Compiled, ComplexInside),
    ],
)
def test_any_operation_of_torch_may_be_inside(build, structure):
    torch.manual_seed(0)
    model, x = build(), torch.randn(7, 6)
    expected = reference.categorical_fisher(model, [(row,) for row in x])
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(4)]
    found = fisher_information(model, batches, structure=structure)
    torch.testing.assert_close(flatten(found.diagonal()), expected.diagonal(), **EXACT)
    if structure == Dense():
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


def test_complex_parameters_are_refused_or_left_out():
    model = nn.Sequential(nn.Linear(4, 3))
    model.phase = nn.Parameter(torch.randn(2, dtype=torch.cfloat))
    data = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"'phase' must be real, got .*complex64.*view_as_comp"):
        fisher_information(model, data)
    assert fisher_information(model, data, parameters=["0.*"]).shapes.keys() == {
        "0.weight",
        "0.bias",
    }


class LogCumSum(Body):
    """A derivative whose own derivative torch takes to be infinite times zero."""

    def forward(self, x):
        return self.head(self.inner(x.sum(1)).logcumsumexp(1))


class Counted(nn.Module):
    """An embedding whose gradient is divided by how often a batch uses a word."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(4, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.words((3 * x[:, :, 0]).long().abs() % 4).tanh().sum(1))


AWKWARD_PRODUCTS = {
    "logcumsumexp": LogCumSum,
    "scale_grad_by_freq": lambda: Counted(scale_grad_by_freq=True),
    "max_norm": lambda: Counted(max_norm=0.5),
}


@pytest.mark.parametrize("name", AWKWARD_PRODUCTS)
@pytest.mark.parametrize("structure", [Dense(), LowRank(rank=60), Implicit()], ids=str)
def test_an_example_has_in_its_batch_what_it_has_alone(structure, name, tmp_path):
    torch.manual_seed(0)
    model = AWKWARD_PRODUCTS[name]().double()
    x, y = torch.randn(7, 5, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = [
        fisher_information(
            model, list(zip(x.split(s), y.split(s), strict=True)), structure=structure
        )
        for s in (7, 3)
    ]
    for parameter, was in zip(model.parameters(), before.values(), strict=True):
        assert torch.equal(parameter, was)
    expected = reference.categorical_fisher(model, [(x_n,) for x_n in x])
    for fisher in found:
        torch.testing.assert_close(fisher.to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("fails", [False, True])
def test_the_pass_leaves_renormalised_embeddings_as_they_were(kind, fails):
    torch.manual_seed(0)
    words, head = kind(4, 4, max_norm=0.5), nn.Linear(4, 3)
    before = words.weight.detach().clone()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = words, head

        def forward(self, x):
            hidden = self.words(x)
            if fails:
                raise RuntimeError("broken on purpose")
            return self.head(hidden.reshape(len(x), -1, 4).sum(1))

    data = [(torch.randint(4, (5, 3)), torch.zeros(5, dtype=torch.long))]
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            fisher_information(Model(), data)
    else:
        fisher_information(Model(), data)
    assert torch.equal(words.weight, before)
    words(data[0][0])
    assert not torch.equal(words.weight, before)  # as a call of its own does


class Without(nn.Module):
    """A network that keeps no derivative."""

    def __init__(self, guard, detached=False):
        super().__init__()
        self.guard, self.detached, self.layer = guard, detached, nn.Linear(4, 3)

    def forward(self, x):
        with self.guard():
            outputs = self.layer(x)
        return outputs.detach() if self.detached else outputs


@every_structure
@pytest.mark.parametrize(
    "build",
    [
        lambda: Without(torch.no_grad),
        lambda: Without(torch.inference_mode),
        lambda: Without(torch.enable_grad, detached=True),
    ],
    ids=["no_grad", "inference_mode", "detached"],
)
def test_a_network_without_derivatives_is_refused(structure, build):
    data = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"depend on none of the parameters \(layer.weight, layer"):
        fisher_information(build(), data, structure=structure)


def test_chosen_parameters_without_a_part_are_refused_and_others_are_zero():
    torch.manual_seed(0)
    model = TwoHeads().double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    first, second = ((x, y, torch.full((4,), task)) for task in (0, 1))
    with pytest.raises(ValueError, match=r"depend on none of the parameters \(heads.1.weight"):
        fisher_information(model, [first], parameters=["heads.1.*"])
    assert float(fisher_information(model, [first]).diagonal()["heads.1.bias"].sum()) == 0
    # Of some batches only: the mean is over all.
    whole = fisher_information(model, [second], parameters=["heads.1.*"]).trace()
    half = fisher_information(model, [first, second], parameters=["heads.1.*"]).trace()
    torch.testing.assert_close(half, whole / 2)
