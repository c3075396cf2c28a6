"""Every verb of every structure against the dense matrix, and saving."""

import pytest
import torch
from torch import nn

from ewc import DenseFisher, DiagonalFisher, FisherMatrix, fisher_information
from ewc.fisher import SumFisher
from ewc.parameters import flatten, unflatten

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def model_and_data():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(9, 3, dtype=torch.float64)
    return model, [(x, torch.randint(3, (9,)))]


def diagonal():
    return fisher_information(*model_and_data())


def dense():
    return fisher_information(*model_and_data(), structure=DenseFisher)


def mixed_sum():
    model, data = model_and_data()
    one = fisher_information(model, data)
    return one + fisher_information(model, data, structure=DenseFisher)


@pytest.fixture(params=[diagonal, dense, mixed_sum])
def fisher(request):
    return request.param()


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
    close(fisher.logdet(damping), torch.linalg.slogdet(damped).logabsdet)
    close(fisher.eigenvalues(), torch.linalg.eigvalsh(matrix))
    close((fisher + fisher).to_dense(), 2 * matrix)
    close((0.5 * fisher).to_dense(), 0.5 * matrix)
    close(fisher.precision.to_dense(), fisher.num_examples * matrix)
    assert (fisher + fisher).num_examples == 2 * fisher.num_examples


def test_fast_verbs_agree_with_the_slow_defaults(fisher):
    v = vector(fisher)
    for verb in ("diagonal", "to_dense", "trace", "eigenvalues"):
        slow = getattr(FisherMatrix, verb)(fisher)
        torch.testing.assert_close(getattr(fisher, verb)(), slow, **CLOSE)
    torch.testing.assert_close(fisher.solve(v, 0.1), FisherMatrix.solve(fisher, v, 0.1), **CLOSE)
    torch.testing.assert_close(fisher.logdet(0.1), FisherMatrix.logdet(fisher, 0.1), **CLOSE)


def test_saved_matrices_come_back_the_same(fisher, tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = FisherMatrix.load(path)
    assert type(loaded) is type(fisher)
    assert loaded.num_examples == fisher.num_examples
    assert list(loaded.shapes.items()) == list(fisher.shapes.items())
    torch.testing.assert_close(loaded.to_dense(), fisher.to_dense(), rtol=0, atol=0)


def test_embedding_adds_zeros_only(fisher):
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


def test_flat_order_is_the_order_of_the_parameters():
    model, data = model_and_data()
    fisher = fisher_information(model, data, structure=DenseFisher)
    expected = unflatten(fisher.to_dense().diagonal(), fisher.shapes)
    assert list(fisher.shapes) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(fisher_information(model, data).diagonal(), expected, **CLOSE)


def test_vectors_that_do_not_fit_are_named(fisher):
    v = vector(fisher)
    with pytest.raises(ValueError, match=r"lacks parameter '2.bias'"):
        fisher.matvec({name: tensor for name, tensor in v.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"has shape \[1\] for parameter '2.bias'"):
        fisher.matvec(v | {"2.bias": torch.zeros(1, dtype=torch.float64)})


def test_mistakes_are_named(tmp_path):
    model, data = model_and_data()
    fisher = fisher_information(model, data)
    with pytest.raises(ValueError, match="damping is -1"):
        fisher.solve(vector(fisher), -1)
    with pytest.raises(ValueError, match="factor is nan"):
        _ = float("nan") * fisher
    with pytest.raises(torch.linalg.LinAlgError, match=r"is 0 in parameter '0.weight'"):
        DiagonalFisher({"0.weight": torch.zeros(2)}, 1).solve({"0.weight": torch.ones(2)}, 0.0)
    with pytest.raises(ValueError, match=r"lacks parameter '0.bias'"):
        _ = fisher + fisher_information(nn.Linear(3, 3).double(), data)
    with pytest.raises(ValueError, match=r"shape \[2, 3\]"):
        DenseFisher(torch.zeros(2, 3), {"a": torch.Size([2])}, 1)
    with pytest.raises(TypeError, match="add matrices with"):
        fisher_information(model, data, structure=SumFisher)
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
