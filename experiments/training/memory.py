"""The largest amount of memory that a run has used, and what a strategy keeps."""

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, so that a job of a sweep does not count the largest one before it.

    Without Linux the peak of a process on a CPU has no start but the process's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The peak in bytes: of the tensors on CUDA, else of the process since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def kept_bytes(state: Any) -> int:
    """The bytes of the tensors in a state of nested mappings and sequences."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(kept_bytes, state.values()))
    if isinstance(state, Sequence) and not isinstance(state, str):
        return sum(map(kept_bytes, state))
    return 0
