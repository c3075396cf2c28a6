"""Two kinds of machine: the host, where data are at hand, and accelerators, which run behind it."""

import torch

HOST = "cpu"
"""The type of device whose values Python reads at no cost."""


def on_accelerator(device: torch.device) -> bool:
    """Whether operations on a device are launched by the host and run later.

    Their number then decides, and reading a value waits for all of them.
    """
    return device.type != HOST
