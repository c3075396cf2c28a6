"""The state a network is in while its Fisher information is taken."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers and random states as before afterwards.

    Raises:
        ValueError: a BatchNorm layer without running statistics makes examples depend on
            each other, so that no example has a Fisher information of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name or type(module).__name__} normalises by the batch even in evaluation "
                "mode: BatchNorm needs track_running_stats=True for a Fisher information."
            )
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, copy in buffers:
                    if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                        buffer.copy_(copy)
                    module._buffers[name] = buffer


@contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """Attention and recurrence as operations of their own, not as one fused kernel.

    A fused kernel hides the uses of weights inside, or has no derivative for several
    vectors at once.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            with warnings.catch_warnings():
                # torch speaks of Intel GPUs when the flag is touched at all.
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield
