"""Every verb of every structure against the dense matrix, and saving."""

import pytest
import torch
from torch import nn

from ewc import (
    BlockDiagonal,
    Dense,
    DenseFisher,
    Diagonal,
    DiagonalFisher,
    EigenvalueCorrected,
    FisherMatrix,
    Gaussian,
    Implicit,
    Kronecker,
    LowRank,
    fisher_information,
)
from ewc.fisher import ImplicitFisher
from ewc.matrices import BlockDiagonalFisher, nearest_kronecker
from ewc.parameters import flatten, unflatten

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def model_and_data():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(9, 3, dtype=torch.float64)
    return model, [(x, torch.randint(3, (9,)))]


def computed(structure):
    return lambda: fisher_information(*model_and_data(), structure=structure)


def of_many_kinds(structure):
    """A grouped convolution, a norm, an embedding and a frozen bias in one network."""

    def make():
        model = ManyKinds().double()
        x = torch.randn(9, 8, dtype=torch.float64)
        data = [(x, torch.randint(3, (9,)))]
        return fisher_information(model, data, structure=structure)

    return make


class ManyKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(14, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        found = self.norm(self.convolution(x.unflatten(1, (2, 4)))).tanh().flatten(1)
        words = self.embedding((x[:, 0] > 0).long())
        return self.head(torch.cat([found, words], 1))


def mixed_sum():
    model, data = model_and_data()
    one = fisher_information(model, data)
    return one + fisher_information(model, data, structure=Dense())


def kronecker_sum():
    model, data = model_and_data()
    one = fisher_information(model, data, structure=Kronecker())
    other = [(2 + x.sin(), y) for x, y in data]
    return one + fisher_information(model, other, structure=Kronecker())


PLAIN = {
    "diagonal": computed(Diagonal()),
    "block_diagonal": computed(BlockDiagonal()),
    "kronecker": computed(Kronecker()),
    "eigenvalue_corrected": computed(EigenvalueCorrected()),
    "low_rank": computed(LowRank(rank=5)),
    "dense": computed(Dense()),
    "implicit": computed(Implicit()),
    "mixed_sum": mixed_sum,
    "kronecker_sum": kronecker_sum,
}
MANY = {
    "many_block_diagonal": of_many_kinds(BlockDiagonal()),
    "many_kronecker": of_many_kinds(Kronecker()),
    "many_eigenvalue_corrected": of_many_kinds(EigenvalueCorrected()),
    "many_low_rank": of_many_kinds(LowRank(rank=5)),
    "many_implicit": of_many_kinds(Implicit()),
}


@pytest.fixture(params=PLAIN | MANY)
def fisher(request):
    return (PLAIN | MANY)[request.param]()


@pytest.fixture(params=PLAIN)
def plain_fisher(request):
    return PLAIN[request.param]()


def vector(fisher):
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in fisher.shapes.items()}


def test_every_verb_agrees_with_the_dense_matrix(fisher):
    matrix, v = fisher.to_dense(), vector(fisher)
    flat, damping = flatten(v), 0.3
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    close = lambda found, expected: torch.testing.assert_close(found, expected, **CLOSE)  # noqa: E731
    close(matrix, matrix.T)
    close(flatten(fisher.matvec(v)), matrix @ flat)
    close(fisher.quadratic_form(v), flat @ matrix @ flat)
    close(flatten(fisher.diagonal()), matrix.diagonal())
    close(fisher.trace(), matrix.trace())
    close(flatten(fisher.solve(v, damping)), torch.linalg.solve(damped, flat))
    inverse = fisher.damped_inverse(damping)
    for _ in range(2):  # it serves many vectors
        close(flatten(inverse(v)), torch.linalg.solve(damped, flat))
    shuffled = dict(reversed(v.items()))
    close(inverse(shuffled), unflatten(torch.linalg.solve(damped, flat), fisher.shapes))
    close(flatten(fisher.inverse_diagonal(damping)), torch.linalg.inv(damped).diagonal())
    many = [vector(fisher) for _ in range(3)]
    rows = torch.stack([flatten(one) for one in many])
    together = {name: torch.stack([one[name] for one in many]) for name in reversed(fisher.shapes)}
    close(inverse.rows(rows, fisher.shapes), rows @ torch.linalg.inv(damped))
    expected = (rows @ torch.linalg.inv(damped) * rows).sum(1)
    close(fisher.inverse_quadratic_forms(together, damping), expected)
    expected = torch.linalg.slogdet(damped).logabsdet
    if isinstance(fisher, ImplicitFisher):
        found = fisher.logdet_estimate(damping)
        assert abs(found.value - float(expected)) < 4 * found.standard_error
        assert 0 < found.standard_error < 2
        assert fisher.logdet(damping) == found.value
    else:
        close(fisher.logdet(damping), expected)
    close(fisher.eigenvalues(), torch.linalg.eigvalsh(matrix))
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert 0.9 * largest < fisher.largest_eigenvalue() < largest * (1 + 1e-9)
    close((fisher + fisher).to_dense(), 2 * matrix)
    close((0.5 * fisher).to_dense(), 0.5 * matrix)
    close((0.5 * fisher).quadratic_form(v), 0.5 * flat @ matrix @ flat)
    close(fisher.precision.to_dense(), fisher.num_examples * matrix)
    assert (fisher + fisher).num_examples == 2 * fisher.num_examples


def test_fast_verbs_agree_with_the_slow_defaults(fisher):
    v = vector(fisher)
    for verb in ("diagonal", "to_dense", "trace", "eigenvalues"):
        slow = getattr(FisherMatrix, verb)(fisher)
        torch.testing.assert_close(getattr(fisher, verb)(), slow, **CLOSE)
    torch.testing.assert_close(fisher.solve(v, 0.1), FisherMatrix.solve(fisher, v, 0.1), **CLOSE)
    if not isinstance(fisher, ImplicitFisher):  # whose own is an estimate
        slow = FisherMatrix.logdet(fisher, 0.1)
        torch.testing.assert_close(fisher.logdet(0.1), slow, **CLOSE)


def test_saved_matrices_come_back_the_same(fisher, tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = FisherMatrix.load(path)
    if isinstance(fisher, ImplicitFisher):
        with pytest.raises(RuntimeError, match="loaded without its network"):
            loaded.trace()
        loaded = FisherMatrix.load(path, fisher.products.model)
    assert type(loaded) is type(fisher)
    assert loaded.num_examples == fisher.num_examples
    assert list(loaded.shapes.items()) == list(fisher.shapes.items())
    torch.testing.assert_close(loaded.state()[0], fisher.state()[0], rtol=0, atol=0)
    torch.testing.assert_close(loaded.to_dense(), fisher.to_dense(), **CLOSE)


def test_embedding_adds_zeros_only(plain_fisher):
    fisher = plain_fisher
    shapes = {"first": torch.Size([2])} | dict(fisher.shapes)
    shapes["2.weight"], shapes["2.bias"] = torch.Size([5, 4]), torch.Size([5])
    larger = fisher.embedded(shapes)
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    old = {name: v[name][: shape[0]] for name, shape in fisher.shapes.items()}
    torch.testing.assert_close(larger.quadratic_form(v), fisher.quadratic_form(old), **CLOSE)
    torch.testing.assert_close(larger.trace(), fisher.trace(), **CLOSE)


def test_conversion_keeps_the_structure(fisher):
    single = fisher.to(dtype=torch.float32)
    assert type(single) is type(fisher)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), fisher.to_dense(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "implicit"])
def test_matrices_stay_on_the_device_they_were_moved_to(name):
    """No entry is left behind, and none is made elsewhere: the device ``meta`` mixes with none."""
    fisher = PLAIN[name]()
    away, shapes = fisher.to("meta"), {"first": torch.Size([2]), **fisher.shapes}
    moved = {
        "itself": away,
        "scaled": away.scaled(2.0),
        "embedded": away.embedded(shapes),
        "shrunk": away.shrunk(0.5) if away.has_units else away,
    }
    for what, matrix in moved.items():
        assert type(matrix) is type(fisher), what
        assert matrix.device.type == "meta", what
        places = {(t.device.type, t.dtype) for t in matrix.state()[0].values()}
        assert places == {("meta", torch.float64)}, what
    v = {name: tensor.to("meta") for name, tensor in vector(fisher).items()}
    for found in (away.matvec(v), away.diagonal(), away.embedded(shapes).diagonal()):
        assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert away.to_dense().device.type == away.trace().device.type == "meta"


def test_the_sum_of_a_list_is_that_of_its_matrices(plain_fisher):
    """``sum`` starts with 0, which is the only number that can be added."""
    fisher = plain_fisher
    total = sum([fisher, 2 * fisher, fisher])
    torch.testing.assert_close(total.to_dense(), 4 * fisher.to_dense(), **CLOSE)
    assert total.num_examples == 3 * fisher.num_examples
    assert sum([fisher]) is fisher
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = 1 + fisher


def implicit_sum():
    model, data = model_and_data()
    one = fisher_information(model, data, structure=Implicit())
    other = [(x.sin(), y) for x, y in data]
    return one + 2.0 * fisher_information(model, other, structure=Implicit())


def implicit_blocks():
    """Matrix-free blocks, one of them a sum."""
    model, data = model_and_data()
    blocks = [
        fisher_information(model, data, structure=Implicit(), parameters=[f"{layer}.*"])
        for layer in (0, 2)
    ]
    blocks[1] = blocks[1] + blocks[1]
    shapes = {name: shape for block in blocks for name, shape in block.shapes.items()}
    return BlockDiagonalFisher(blocks, shapes, 9)


NESTED = {
    "implicit_sum": implicit_sum,
    "implicit_blocks": implicit_blocks,
    "sum_of_sums": lambda: (implicit_sum() + mixed_sum()) + kronecker_sum(),
    "sum_of_blocks": lambda: implicit_blocks() + mixed_sum().precision,
}


def test_products_of_some_parameters_are_no_functions_of_the_others():
    """They are numbers: no graph of the whole network hangs on them."""
    model, data = model_and_data()
    fisher = fisher_information(model, data, structure=Implicit(), parameters=["2.*"])
    v = vector(fisher)
    assert not any(tensor.requires_grad for tensor in fisher.matvec(v).values())
    assert not fisher.quadratic_form(v).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    dense = fisher_information(model, data, structure=Dense(), parameters=["2.*"])
    torch.testing.assert_close(fisher.to_dense(), dense.to_dense(), **CLOSE)


@pytest.mark.parametrize("name", NESTED)
def test_sums_and_blocks_keep_the_networks_of_what_is_inside(name, tmp_path):
    fisher = NESTED[name]()
    dense, v = fisher.to_dense(), vector(fisher)
    single = fisher.to(dtype=torch.float32)
    assert type(single) is type(fisher)
    assert single.num_examples == fisher.num_examples
    assert (single.dtype, single.device) == (torch.float32, fisher.device)
    torch.testing.assert_close(single.to_dense().double(), dense, rtol=1e-5, atol=1e-6)
    same = fisher.mapped(torch.clone)
    torch.testing.assert_close(same.to_dense(), dense, **CLOSE)
    torch.testing.assert_close((3 * fisher).to_dense(), 3 * dense, **CLOSE)
    torch.testing.assert_close((fisher + 2 * same).to_dense(), 3 * dense, **CLOSE)
    torch.testing.assert_close(flatten(fisher.matvec(v)), dense @ flatten(v), **CLOSE)
    larger = fisher.embedded(dict(fisher.shapes) | {"last": torch.Size([2])})
    torch.testing.assert_close(larger.trace(), dense.trace(), **CLOSE)
    fisher.save(tmp_path / "fisher")
    loaded = FisherMatrix.load(tmp_path / "fisher", model_and_data()[0])
    assert loaded.num_examples == fisher.num_examples
    torch.testing.assert_close(loaded.to_dense(), dense, **CLOSE)


def test_two_losses_on_the_same_examples_count_them_once(fisher):
    both = fisher.plus_on_same_examples(0.5 * fisher)
    torch.testing.assert_close(both.to_dense(), 1.5 * fisher.to_dense(), **CLOSE)
    assert both.num_examples == fisher.num_examples
    expected = 1.5 * fisher.num_examples * fisher.to_dense()
    torch.testing.assert_close(both.precision.to_dense(), expected, **CLOSE)
    again = both.plus_on_same_examples(fisher)
    assert again.num_examples == fisher.num_examples
    torch.testing.assert_close(again.to_dense(), 2.5 * fisher.to_dense(), **CLOSE)
    with pytest.raises(ValueError, match=f"got matrices of {fisher.num_examples} and .* examples:"):
        fisher.plus_on_same_examples(fisher + fisher)


def test_two_losses_are_one_of_the_sum_of_their_log_likelihoods():
    """Class and value of the same examples, by two heads of one network, from the definition."""
    model = nn.Linear(3, 5).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    data = [(x, torch.zeros(7, dtype=torch.long))]
    values = [(x, torch.zeros(7, 2, dtype=torch.float64))]

    class Part(nn.Module):
        def __init__(self, columns):
            super().__init__()
            self.model, self.columns = model, columns

        def forward(self, x):
            return self.model(x)[:, self.columns]

    classes = fisher_information(Part(slice(3)), data, structure=Dense())
    numbers = fisher_information(Part(slice(3, 5)), values, Gaussian(0.5), structure=Dense())
    both = classes.plus_on_same_examples(numbers)
    expected = torch.zeros(20, 20, dtype=torch.float64)
    for example in x:
        p = model(example)[:3].softmax(0).detach()
        outputs = torch.block_diag(torch.diag(p) - torch.outer(p, p), torch.eye(2) / 0.5)
        jacobian = torch.block_diag(*[example[None]] * 5)
        jacobian = torch.cat([jacobian, torch.eye(5, dtype=torch.float64)], 1)
        expected += jacobian.T @ outputs @ jacobian / 7
    torch.testing.assert_close(both.to_dense(), expected, **CLOSE)
    assert both.num_examples == 7


@pytest.mark.parametrize("size", [1, 400])
def test_another_number_of_examples_leaves_the_mean(fisher, size):
    other = fisher.with_num_examples(size)
    assert other.num_examples == size
    assert type(other) is type(fisher)
    torch.testing.assert_close(other.to_dense(), fisher.to_dense(), **CLOSE)
    torch.testing.assert_close(other.precision.to_dense(), size * fisher.to_dense(), **CLOSE)
    torch.testing.assert_close(other.trace(), fisher.trace(), **CLOSE)
    assert fisher.num_examples != size


def test_flat_order_is_the_order_of_the_parameters():
    model, data = model_and_data()
    fisher = fisher_information(model, data, structure=Dense())
    expected = unflatten(fisher.to_dense().diagonal(), fisher.shapes)
    assert list(fisher.shapes) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(fisher_information(model, data).diagonal(), expected, **CLOSE)


def test_vectors_that_do_not_fit_are_named(fisher):
    v = vector(fisher)
    last = list(v)[-1]
    with pytest.raises(ValueError, match=f"lacks parameter '{last}'"):
        fisher.matvec({name: tensor for name, tensor in v.items() if name != last})
    with pytest.raises(ValueError, match=rf"has shape \[1\] for parameter '{last}'"):
        fisher.matvec(v | {last: torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(ValueError, match="A row of the vectors has shape"):
        fisher.inverse_quadratic_forms(v, 0.1)


def test_mistakes_are_named(tmp_path):
    model, data = model_and_data()
    fisher = fisher_information(model, data)
    with pytest.raises(ValueError, match=r"damping must .*, got -1"):
        fisher.solve(vector(fisher), -1)
    with pytest.raises(ValueError, match=r"factor must .*, got nan"):
        _ = float("nan") * fisher
    with pytest.raises(torch.linalg.LinAlgError, match=r"above 0, .* is 0 in parameter '0.weight'"):
        DiagonalFisher({"0.weight": torch.zeros(2)}, 1).solve({"0.weight": torch.ones(2)}, 0.0)
    for structure in (Diagonal(), Kronecker(), Dense()):
        zero = 0 * fisher_information(model, data, structure=structure)
        rows = {name: torch.ones(2, *shape).double() for name, shape in zero.shapes.items()}
        with pytest.raises(torch.linalg.LinAlgError):
            zero.inverse_quadratic_forms(rows, 0.0)
        with pytest.raises(ValueError, match=r"damping must .*, got -1"):
            zero.inverse_quadratic_forms(rows, -1)
    with pytest.raises(ValueError, match=r"lacks parameter '0.bias'"):
        _ = fisher + fisher_information(nn.Linear(3, 3).double(), data)
    with pytest.raises(ValueError, match=r"got \[2, 3\]"):
        DenseFisher(torch.zeros(2, 3), {"a": torch.Size([2])}, 1)
    with pytest.raises(FileNotFoundError, match="no Fisher matrix at"):
        FisherMatrix.load(tmp_path / "missing")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no Fisher matrix"):
        FisherMatrix.load(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="holds no Fisher matrix"):
        FisherMatrix.load(tmp_path / "text")
    assert "DiagonalFisher(parameters=31, tensors=4, num_examples=9, trace=" in repr(fisher)


def test_a_sum_of_kronecker_matrices_is_exact_and_lazy():
    model, data = model_and_data()
    one = fisher_information(model, data, structure=Kronecker())
    other = fisher_information(model, [(x + 1, y) for x, y in data], structure=Kronecker())
    total = one + 2.0 * other
    torch.testing.assert_close(total.to_dense(), one.to_dense() + 2 * other.to_dense(), **CLOSE)
    assert sum(tensor.numel() for tensor in total.state()[0].values()) == 2 * sum(
        tensor.numel() for tensor in one.state()[0].values()
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_nearest_kronecker_is_the_leading_singular_pair(count):
    model, data = model_and_data()
    terms = [
        fisher_information(model, [(x.sin() + i, y) for x, y in data], structure=Kronecker())
        for i in range(count)
    ]
    total = terms[0]
    for factor, term in enumerate(terms[1:], start=2):
        total = total + factor * term
    nearest, error = nearest_kronecker(total)
    squared = 0.0
    for found, block in zip(nearest.blocks, total.blocks, strict=True):
        # Van Loan & Pitsianis: the sum rearranged has rank one exactly if it is a product.
        rearranged = sum(torch.outer(t.outputs.flatten(), t.inputs.flatten()) for t in block.terms)
        left, values, right = torch.linalg.svd(rearranged)
        best = values[0] * torch.outer(left[:, 0], right[0])
        close = torch.outer(found.outputs.flatten(), found.inputs.flatten())
        torch.testing.assert_close(close, best, **CLOSE)
        squared += float(values[1:].square().sum())
        assert float(found.eigenvalues().min()) > -1e-10
    norm = float(total.to_dense().norm())
    assert error == pytest.approx(squared**0.5 / norm, rel=1e-6)
    assert error == pytest.approx(float((nearest.to_dense() - total.to_dense()).norm()) / norm)
    assert nearest.num_examples == total.num_examples
    again, nothing = nearest_kronecker(nearest)
    torch.testing.assert_close(again.to_dense(), nearest.to_dense(), **CLOSE)
    assert nothing < 1e-6


def test_nearest_kronecker_takes_sums_of_kronecker_matrices_only():
    model, data = model_and_data()
    dense = fisher_information(model, data, structure=Dense())
    kronecker = fisher_information(model, data, structure=Kronecker())
    with pytest.raises(ValueError, match="sum of Kronecker matrices over the same layers, got a D"):
        nearest_kronecker(dense)
    corrected = fisher_information(model, data, structure=EigenvalueCorrected())
    with pytest.raises(ValueError, match=r"sum of Kronecker products .* for 0.weight, 0.bias"):
        nearest_kronecker(kronecker + corrected)


def test_nearest_eigenvalue_corrected_matrix_keeps_the_diagonal_there_and_exact_blocks():
    first, second = (MANY["many_eigenvalue_corrected"]() for _ in range(2))
    found = (0.3 * first + second).nearest()
    mean = 0.3 * first.to_dense() + second.to_dense()
    # Along the eigenvectors of every layer, which are products of those of its two factors.
    basis = torch.zeros_like(mean)
    start, position = {}, 0
    for name, shape in second.shapes.items():
        start[name], position = position, position + shape.numel()
    for block in second.blocks:
        places = [start[n] + torch.arange(s.numel()) for n, s in block.shapes.items()]
        places = torch.cat(places)
        if isinstance(block, DenseFisher | DiagonalFisher):
            basis[places, places] = 1.0
            continue
        for index in range(block.spectrum.numel()):
            unit = torch.zeros(block.spectrum.numel(), dtype=torch.float64)
            unit[index] = 1.0
            vector = block.rotated_back(unit.reshape(block.spectrum.shape))
            basis[places, places[index]] = flatten(block.weights.to_parameters(vector))
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(mean)).to(mean), **CLOSE)
    here, there = basis.T @ found.to_dense() @ basis, basis.T @ mean @ basis
    torch.testing.assert_close(here.diagonal(), there.diagonal(), **CLOSE)
    exact = slice(start["norm.weight"], start["norm.weight"] + 8)
    torch.testing.assert_close(found.to_dense()[exact, exact], mean[exact, exact], **CLOSE)
    assert found.num_examples == 18


def test_sums_of_unlike_matrices_are_nearest_to_themselves():
    model, data = model_and_data()
    corrected = fisher_information(model, data, structure=EigenvalueCorrected())
    kronecker = fisher_information(model, data, structure=Kronecker())
    for fisher in (fisher_information(model, data), corrected, kronecker + corrected):
        torch.testing.assert_close(fisher.nearest().to_dense(), fisher.to_dense(), **CLOSE)


def test_large_sums_are_solved_by_conjugate_gradients(monkeypatch):
    fisher = kronecker_sum()
    v = vector(fisher)
    expected = fisher.solve(v, 0.05)
    monkeypatch.setattr("ewc.matrices.matrix.DENSE_LIMIT", 1)
    torch.testing.assert_close(fisher.solve(v, 0.05), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge with damping 0"):
        (mixed_sum() * 0.0).solve(vector(fisher), 0.0)


@pytest.mark.slow
def test_implicit_estimates_carry_honest_error_bars():
    fisher = PLAIN["implicit"]()
    dense = fisher.to_dense()
    damped = dense + 0.3 * torch.eye(len(dense), dtype=dense.dtype)
    for exact, estimate in (
        (dense.trace(), fisher.trace_estimate),
        (
            torch.linalg.slogdet(damped).logabsdet,
            lambda n, seed: fisher.logdet_estimate(0.3, n, seed),
        ),
    ):
        found = [estimate(10, seed=seed) for seed in range(40)]
        z = torch.tensor([(e.value - float(exact)) / e.standard_error for e in found])
        # 40 Student values of 9 degrees of freedom, of variance 9 / 7.
        assert float(z.abs().max()) < 6
        assert 0.4 < float(z.square().mean()) < 3
    with pytest.raises(ValueError, match="damping is 0: a log-determinant is estimated"):
        fisher.logdet_estimate(0.0)
    with pytest.raises(ValueError, match="Sequential does not fit the saved Fisher matrix"):
        fisher.attached(nn.Sequential(nn.Linear(2, 2)))
