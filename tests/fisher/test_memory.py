"""Memory that is exhausted in a pass: smaller chunks and the same matrix, or one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ewc import fisher_information
from ewc.fisher.data_pass import Needs
from ewc.linalg.devices import ACCELERATOR, PROCESSOR, out_of_memory

STARVED = """
import json, resource, sys, warnings
import torch
from torch import nn
from ewc import *

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
model = model.append(nn.Linear(300, 10)).double()
x, y = torch.randn(400, 200).double(), torch.randint(10, (400,))
data = [(x[:100], y[:100]), (x[100:], y[100:])]
direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}


def taken(data, memory):
    return fisher_information(
        model, data, estimator=estimator, structure=structure, memory=memory
    )


def room(mebibytes):
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


structure, estimator = eval(sys.argv[1]), eval(sys.argv[2])
expected = taken(data, 2**22).matvec(direction)
for mebibytes in map(int, sys.argv[3].split(",")):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = iter(data) if len(sys.argv) > 4 else data
        room(mebibytes)
        try:
            fisher, message = taken(batches, 2**31), ""
        except Exception as error:
            fisher, message = None, f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    error = None
    if fisher is not None:
        product = fisher.matvec(direction)
        error = max(float((product[n] - e).norm() / e.norm()) for n, e in expected.items())
    print(json.dumps([error, message, [str(w.message) for w in caught]]))
"""


SIZES = "3,4,5,10,15,20,30,45,300"
"""MiB that a pass may take."""


def starved(*arguments):
    """The error of the matrix, or a message, and the warnings, with more and more memory."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process is limited on Linux only")
    command = [sys.executable, "-c", STARVED, *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [
        ("Diagonal()", "MonteCarlo(3, 1)", "10,15,300"),
        pytest.param(("Diagonal()", "Exact()", SIZES), marks=pytest.mark.slow),
        pytest.param(("Kronecker()", "Exact()", SIZES), marks=pytest.mark.slow),
        pytest.param(("Kronecker()", "MonteCarlo(3, 1)", SIZES), marks=pytest.mark.slow),
        pytest.param(("EigenvalueCorrected()", "Exact(0.05)", SIZES), marks=pytest.mark.slow),
        pytest.param(("LowRank(5)", "Exact()", SIZES), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_matrix_is_the_same_where_memory_is_scarce(arguments):
    outcomes = starved(*arguments)
    assert outcomes[-1][0] is not None
    for error, message, warned in outcomes:
        if error is None:
            assert message.startswith("MemoryError: ")
            assert "does not fit into memory" in message or "do not fit into memory" in message
        else:
            assert error < 1e-12
            assert len(warned) <= 1
            assert all("began again with smaller chunks: memory=" in text for text in warned)
    assert any(warned and error is not None for error, _, warned in outcomes)


@pytest.mark.slow
def test_data_that_can_be_read_once_begins_again_in_its_first_batch_only():
    outcomes = starved("Diagonal()", "Exact()", SIZES, "iterator")
    for error, message, _ in outcomes:
        assert error is None or error < 1e-12
        assert error is not None or "can be read once: data must be a list" in message


class Hungry(nn.Module):
    """A network that has no room for more examples than it is given."""

    def __init__(self, room):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.room = room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layer(x)


def test_a_network_without_room_for_its_outputs_is_named():
    data = [(torch.randn(20, 3), torch.zeros(20, dtype=torch.long))]
    with pytest.raises(MemoryError, match=r"Batch 0: the network's outputs alone .* 2.00 GiB\)"):
        fisher_information(Hungry(0), data)


def test_chunks_shrink_to_the_room_of_a_network():
    model = Hungry(8)
    data = [(torch.randn(20, 3), torch.zeros(20, dtype=torch.long)) for _ in range(3)]
    with pytest.warns(UserWarning, match="Memory was exhausted") as caught:
        fisher = fisher_information(model, data)
    memory = int(str(caught[0].message).partition("memory=")[2].split()[0])
    model.room = 20
    torch.testing.assert_close(
        fisher.diagonal(), fisher_information(model, data, memory=memory).diagonal()
    )
    model.room = 8
    fisher_information(model, data, memory=memory)  # without a warning


@pytest.mark.parametrize("sizes", [PROCESSOR, ACCELERATOR])
def test_less_memory_ends_with_one_example_and_one_vector(sizes):
    needs = Needs(saved=10_000, vectors=9, vector=50_000, gradient=20_000, sizes=sizes)
    fitting = [needs.fitting(2**power) for power in range(40, -1, -1)]
    assert fitting == sorted(fitting, reverse=True)
    assert fitting[-1] == (1, 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("HIP out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_recognised(error, expected):
    assert out_of_memory(error) is expected


def test_an_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
