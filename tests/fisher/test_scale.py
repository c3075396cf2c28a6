"""Which parameters, how much memory, how many processes, and how little is enough."""

import os
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from conftest import EXACT
from networks import LAYERS, Head, slow_way
from torch import nn

from ewc import (
    Categorical,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Exact,
    Gaussian,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
    fisher_information,
)
from ewc.fisher import data_pass, sampled_fisher
from ewc.parameters import flatten


def body_and_head():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))


@pytest.mark.parametrize(
    ("choose", "names"),
    [
        (lambda _: ["2.weight"], ["2.weight"]),
        (lambda _: ["0.*"], ["0.weight", "0.bias"]),
        (lambda _: "*.bias", ["0.bias", "2.bias"]),
        (lambda m: [m[2]], ["2.weight", "2.bias"]),
        (lambda m: [m[2].bias, "0.bias"], ["0.bias", "2.bias"]),
    ],
)
@pytest.mark.parametrize("structure", [Dense(), Diagonal(), Kronecker(), Implicit(), LowRank()])
def test_the_matrix_of_some_parameters_is_a_part_of_the_whole(choose, names, structure):
    model, x, y = body_and_head()
    whole = fisher_information(model, [(x, y)], structure=Dense())
    part = fisher_information(model, [(x, y)], structure=structure, parameters=choose(model))
    assert list(part.shapes) == names
    expected = whole.diagonal()
    if structure != Kronecker():
        torch.testing.assert_close(part.diagonal(), {n: expected[n] for n in names}, **EXACT)
    if structure == Dense():
        v = {n: torch.randn(s, dtype=torch.float64) for n, s in part.shapes.items()}
        zeros = {n: torch.zeros(s, dtype=torch.float64) for n, s in whole.shapes.items()}
        torch.testing.assert_close(part.quadratic_form(v), whole.quadratic_form(zeros | v), **EXACT)


def test_choices_that_choose_nothing_are_named():
    model, x, y = body_and_head()
    with pytest.raises(ValueError, match=r"'1\.\*' selects none of .* .0.weight, 0.bias"):
        fisher_information(model, [(x, y)], parameters=["1.*"])
    with pytest.raises(ValueError, match="The Tanh selects none"):
        fisher_information(model, [(x, y)], parameters=[model[1]])
    with pytest.raises(TypeError, match="names, patterns, modules or parameters, got 3"):
        fisher_information(model, [(x, y)], parameters=[3])


@slow_way
@pytest.mark.parametrize(
    "layer", ["linear", "conv2d", "embedding", "transformer", "lstm", "no_rule"]
)
@pytest.mark.parametrize("memory", [1, 5_000, 100_000])
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EigenvalueCorrected(), LowRank()])
def test_the_memory_cap_changes_no_number(layer, memory, structure):
    torch.manual_seed(0)
    model = LAYERS[layer]().double()
    data = [(torch.randn(9, 12, dtype=torch.float64), torch.randint(3, (9,)))]
    whole = fisher_information(model, data, structure=structure)
    capped = fisher_information(model, data, structure=structure, memory=memory)
    v = {n: torch.randn(s, dtype=torch.float64) for n, s in whole.shapes.items()}
    torch.testing.assert_close(capped.matvec(v), whole.matvec(v), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(capped.diagonal(), whole.diagonal(), **EXACT)


@pytest.mark.slow
def test_the_memory_cap_holds():
    """Of a convolutional network on 512 images, measured in a process of its own."""
    script = textwrap.dedent("""
        import resource, sys
        import torch
        from torch import nn
        from ewc import fisher_information
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
                              nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                              nn.Flatten(), nn.Linear(32 * 256, 10))
        x, y = torch.randn(512, 3, 16, 16), torch.zeros(512, dtype=torch.long)
        fisher_information(model, [(x[:1], y[:1])])  # what torch itself loads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fisher_information(model, [(x, y)], memory=int(sys.argv[1]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    peak = {
        memory: int(
            subprocess.run(
                [sys.executable, "-c", script, str(memory)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        * 1024
        for memory in (50_000_000, 800_000_000)
    }
    # The allocator keeps some pages that were given back.
    assert peak[50_000_000] < 1.5 * 50_000_000
    assert peak[800_000_000] < 1.2 * 800_000_000


def peak_above(setup, call):
    """Bytes that a call takes above what was taken before, in a process of its own."""
    script = f"""
import resource, torch
from torch import nn
import ewc
torch.set_num_threads(1)
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


@pytest.mark.slow
def test_a_low_rank_matrix_takes_the_memory_it_says():
    setup = """
model = nn.Sequential(nn.Linear(1000, 2000), nn.Tanh(), nn.Linear(2000, 10))
data = [(torch.randn(32, 1000), torch.randint(10, (32,)))]
options = {"memory": 2**26, "estimator": ewc.MonteCarlo(1)}
ewc.fisher_information(model, data, **options)"""
    call = "ewc.fisher_information(model, data, structure=ewc.LowRank(), **options)"
    size = 4 * (1001 * 2000 + 2001 * 10)
    assert peak_above(setup, call) < (20 + 13) * size + 2**26


@pytest.mark.parametrize("estimator", [Exact(), Exact(0.01)], ids=repr)
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=repr)
def test_thousands_of_outputs_are_refused_where_they_do_not_fit(likelihood, estimator):
    model, x = nn.Linear(8, 3000), torch.randn(4, 8)
    y = torch.zeros(4, dtype=torch.long) if likelihood == Categorical() else torch.zeros(4, 3000)
    with pytest.raises(ValueError, match=r"of 3000 outputs .* memory is 32 MiB: take MonteCarlo"):
        fisher_information(model, [(x, y)], likelihood, estimator=estimator, memory=2**25)
    fisher = fisher_information(model, [(x, y)], likelihood, estimator=MonteCarlo(2), memory=2**25)
    assert float(fisher.trace()) > 0


@pytest.mark.slow
def test_a_thousand_outputs_stay_inside_the_memory_cap():
    setup = """
model, data = nn.Linear(8, 1000), [(torch.randn(4, 8), torch.randint(1000, (4,)))]
ewc.fisher_information(nn.Linear(8, 4), [(data[0][0], torch.randint(4, (4,)))])"""
    call = "ewc.fisher_information(model, data, memory=2**25)"
    assert peak_above(setup, call) < 2**25


def test_memory_must_be_positive():
    model, x, y = body_and_head()
    with pytest.raises(
        ValueError, match="memory must be a whole number of bytes above 0, or None, got 0"
    ):
        fisher_information(model, [(x, y)], memory=0)


def test_memory_is_half_a_gibibyte_by_default():
    model, x, y = body_and_head()
    default = fisher_information(model, [(x, y)], memory=None).diagonal()
    given = fisher_information(model, [(x, y)], memory=2**29).diagonal()
    assert all(torch.equal(given[name], tensor) for name, tensor in default.items())


def confident():
    """A network that is sure of most of its 60 examples, in small groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    with torch.no_grad():
        model[2].weight.mul_(40)
    return model, torch.randn(60, 6, dtype=torch.float64), torch.randint(10, (60,))


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_tolerance_keeps_what_it_guarantees(tolerance, monkeypatch):
    model, x, y = confident()
    monkeypatch.setattr(data_pass, "SORTED_AT_ONCE", 10)
    exact = fisher_information(model, [(x, y)], structure=Dense()).to_dense()
    found = fisher_information(
        model, [(x, y)], estimator=Exact(tolerance), structure=Dense()
    ).to_dense()
    missing = exact - found
    assert float(torch.linalg.eigvalsh(missing).min()) > -1e-12
    bound = 0.0
    for x_n in x:
        p = model(x_n).detach().softmax(0)
        jacobian = torch.func.jacrev(
            lambda p, x_n=x_n: torch.func.functional_call(model, p, (x_n,))
        )(dict(model.named_parameters()))
        rows = torch.cat([j.detach().flatten(1) for j in jacobian.values()], 1)
        bound += float(torch.linalg.matrix_norm(rows.detach(), 2) ** 2 * (1 - p.square().sum()))
    assert 0 < float(missing.trace()) <= tolerance * bound / len(x)


def test_tolerance_saves_vectors_and_needs_no_batch_size(monkeypatch):
    model, x, y = confident()
    outputs = model(x).detach()
    needed = Exact(0.01).vectors_needed(Categorical(), outputs)
    assert float(needed.double().mean()) < 4
    one = fisher_information(model, [(x, y)], estimator=Exact(0.01)).diagonal()
    batches = list(zip(x.split(7), y.split(7), strict=True))
    other = fisher_information(model, batches, estimator=Exact(0.01)).diagonal()
    torch.testing.assert_close(one, other, **EXACT)
    counted = []
    monkeypatch.setattr(data_pass, "SORTED_AT_ONCE", 10)
    original = Exact.score_vectors

    def counting(self, *args):
        scores = original(self, *args)
        counted.append(scores.shape[0] * scores.shape[1])
        return scores

    monkeypatch.setattr(Exact, "score_vectors", counting)
    fisher_information(model, [(x, y)], estimator=Exact(0.01))
    assert sum(counted) < 5 * len(x)  # 9 without a tolerance
    with pytest.raises(ValueError, match=r"tolerance must lie in \[0, 1\), got 1"):
        Exact(1)


def test_a_thousand_classes_by_sampling_with_an_error_bar():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1000)).double()
    data = [(torch.randn(20, 5, dtype=torch.float64), torch.randint(1000, (20,)))]
    exact = float(fisher_information(model, data).trace())
    found = [sampled_fisher(model, data, num_samples=10, seed=100 * i) for i in range(20)]
    z = torch.tensor([(e.value - exact) / e.standard_error for _, e in found])
    assert float(z.abs().max()) < 6
    assert 0.3 < float(z.square().mean()) < 3
    fisher, estimate = found[0]
    assert float(fisher.trace()) == pytest.approx(estimate.value)
    assert fisher.num_examples == 20
    assert 0 < estimate.standard_error < 0.2 * estimate.value
    with pytest.raises(ValueError, match="num_samples must be a whole number, 2 or more, got 1"):
        sampled_fisher(model, data, num_samples=1)
    with pytest.raises(ValueError, match="list_iterator, which can be read once"):
        sampled_fisher(model, iter(data))


class ByName(nn.Module):
    """Takes its inputs by name, as language models do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens, mask, scale=None):
        hidden = self.embedding(tokens).tanh() * mask[..., None]
        return self.head(hidden.sum(1)) * (1.0 if scale is None else scale)


class WholeDict(ByName):
    """Takes one dict."""

    def forward(self, batch):
        return super().forward(batch["tokens"], batch["mask"])


class DictWithoutRule(WholeDict):
    """Goes through the fallback."""

    def __init__(self):
        super().__init__()
        self.slope = nn.PReLU(4)

    def forward(self, batch):
        hidden = self.slope(self.embedding(batch["tokens"]).transpose(1, 2)).sum(2)
        return self.head(hidden)


@slow_way
@pytest.mark.parametrize("build", [ByName, WholeDict, DictWithoutRule])
@pytest.mark.parametrize("structure", [Dense(), Implicit()])
def test_dicts_of_inputs(build, structure, tmp_path):
    model = build().double()
    tokens, mask = torch.randint(5, (6, 3)), (torch.rand(6, 3) > 0.3).double()
    y = torch.randint(3, (6,))
    plain = lambda t, m: model(t, m) if build is ByName else model({"tokens": t, "mask": m})  # noqa: E731
    wrapped = Head(nn.Identity(), plain, 1)
    wrapped.forward = plain
    expected = reference.categorical_fisher(
        _Parameters(model, plain), list(zip(tokens, mask, strict=True))
    )
    data = [({"tokens": tokens[i:j], "mask": mask[i:j]}, y[i:j]) for i, j in ((0, 4), (4, 6))]
    fisher = fisher_information(model, data, structure=structure)
    torch.testing.assert_close(fisher.to_dense(), expected, **EXACT)
    fisher.save(tmp_path / "fisher")
    loaded = type(fisher).load(tmp_path / "fisher", model)
    torch.testing.assert_close(loaded.to_dense(), expected, **EXACT)


class _Parameters(nn.Module):
    """A function of a network's, with its parameters."""

    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def test_dicts_of_unequal_lengths_are_named():
    data = [({"tokens": torch.zeros(3, 2), "mask": torch.zeros(2, 2)}, torch.zeros(3))]
    with pytest.raises(ValueError, match=r"Batch 0 has x\['tokens'\] of shape .* must be equal"):
        fisher_information(ByName(), data)
    with pytest.raises(ValueError, match="x also a dict or list of tensors"):
        fisher_information(ByName(), [({"tokens": "words"}, torch.zeros(3))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), LowRank()])
def test_every_floating_point_type(dtype, structure):
    torch.manual_seed(0)
    model = LAYERS["linear"]()
    x, y = torch.randn(40, 12), torch.randint(3, (40,))
    expected = fisher_information(model.double(), [(x.double(), y)], structure=structure)
    model.to(dtype)
    found = fisher_information(model, [(x.to(dtype), y)], structure=structure)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    rtol = {torch.bfloat16: 0.05, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(found.trace().double(), expected.trace(), rtol=rtol, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Implicit()])
def test_a_cuda_device_gives_the_same(layer, structure):
    torch.manual_seed(0)
    model = LAYERS[layer]().double()
    data = [(torch.randn(9, 12, dtype=torch.float64), torch.randint(3, (9,)))]
    expected = fisher_information(model, data, structure=structure).diagonal()
    found = fisher_information(model.cuda(), data, structure=structure).to("cpu").diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


WORKER = """
import os, sys
import torch
from torch import distributed, nn
from ewc import *
from ewc.parameters import flatten
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4),
                      nn.Flatten(), nn.Linear(8, 3)).double()
x, y = torch.randn(11, 6, dtype=torch.float64), torch.randint(3, (11,))
shards = [slice(0, 8), slice(8, 11)]  # of unequal size
mine = [(x[shards[rank]], y[shards[rank]])]
v = None
for structure in (Diagonal(), BlockDiagonal(), Kronecker(),
                  EigenvalueCorrected(), Dense(), LowRank(), Implicit()):
    found = fisher_information(model, mine, structure=structure, group=distributed.group.WORLD)
    expected = fisher_information(model, [(x, y)], structure=structure)
    assert found.num_examples == 11
    v = v or {n: torch.randn(s, dtype=torch.float64) for n, s in found.shapes.items()}
    torch.testing.assert_close(found.matvec(v), expected.matvec(v), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-11)
try:
    found.save("never")
except ValueError as error:
    assert "every process has only its shard of the data" in str(error), error
else:
    raise SystemExit("half of the data were saved")
assert not os.path.exists("never")
class Heads(nn.Module):  # every process sees another head
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    def forward(self, x, task):
        return self.heads[int(task[0])](x)
heads = Heads()
by_task = [(x[:8], y[:8], torch.zeros(8)), (x[8:], y[8:], torch.ones(3))]
for structure in (Kronecker(), EigenvalueCorrected()):
    found = fisher_information(heads, [by_task[rank]], structure=structure,
                               group=distributed.group.WORLD)
    expected = fisher_information(heads, by_task, structure=structure)
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-11)
traces = [fisher_information(model, [(x, y)], estimator=MonteCarlo(1)).trace()]
joint = fisher_information(model, [(x, y)], estimator=MonteCarlo(1), group=distributed.group.WORLD)
assert joint.num_examples == 22 and abs(joint.trace() - traces[0]) > 1e-6  # other draws
try:
    fisher_information(model, mine if rank else [], structure=Kronecker(),
                       group=distributed.group.WORLD)
except ValueError as error:
    assert "every shard needs an example" in str(error), error
else:
    raise SystemExit("an empty shard went unnoticed")
print(f"rank {rank} agrees", flush=True)
os._exit(0)  # the end of gloo's own threads aborts the process now and then
"""


@pytest.mark.slow
def test_processes_with_unequal_shards_get_the_single_process_answer(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--standalone", str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 agrees" in done.stdout
    assert "rank 1 agrees" in done.stdout


def test_monte_carlo_seeds_are_the_same_for_any_memory():
    model, x, y = body_and_head()
    one = fisher_information(model, [(x, y)], estimator=MonteCarlo(3, seed=1))
    other = fisher_information(model, [(x, y)], estimator=MonteCarlo(3, seed=1), memory=1)
    torch.testing.assert_close(flatten(one.diagonal()), flatten(other.diagonal()), **EXACT)
