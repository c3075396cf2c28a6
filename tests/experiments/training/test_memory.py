"""The largest amount of memory of a run."""

import sys

import pytest
import torch

from experiments.training.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts a new peak")
def test_a_peak_does_not_count_what_came_before():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    large = torch.ones(50 * 2**20)
    assert peak_memory(CPU) > before + 150 * 2**20
    del large
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before + 100 * 2**20
