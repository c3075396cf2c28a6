"""The state a network is in while its Fisher information is taken."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ewc.parameters import Parameters

KEPT = 2**25 - 2**16
"""The largest block whose pages glibc reuses, once it has seen one such given back.

Until then large tensors get fresh pages from the system every time, which the system must
clear: on two cores a quarter of the time of a convolutional network's Fisher matrix.
"""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers, parameters and random states as before afterwards.

    An embedding with ``max_norm`` writes into its weight whenever it is called.

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
    written = [
        (module.weight, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
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
                for module, name, buffer, was in buffers:
                    if buffer is not None and was is not None and not _same(buffer, was):
                        buffer.copy_(was)
                    module._buffers[name] = buffer
                for weight, was in written:
                    if not torch.equal(weight, was):
                        weight.copy_(was)


def _same(buffer: Tensor, was: Tensor) -> bool:
    """Whether a buffer is as it was; sparse ones have no comparison of their own."""
    if buffer.layout == torch.strided:
        return torch.equal(buffer, was)
    return all(map(torch.equal, dense_parts(buffer), dense_parts(was)))


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors in memory that a tensor consists of: itself, or a sparse one's parts."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def copied(model: nn.Module, weights: Parameters | None = None) -> nn.Module:
    """A copy of a network in evaluation mode.

    Args:
        model: the network.
        weights: the parameters and buffers that the copy has instead of the network's own.

    Raises:
        RuntimeError: the weights are not those of such a network.
    """
    # What hooks compute from parameters (weight normalisation) is no leaf and cannot be
    # copied; they compute it anew.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    with torch.no_grad():  # else a compiled module's copy would be computed from its original
        own = copy.deepcopy(model, computed).eval()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(trainable[name])
    if weights is not None:
        # A tied weight is one parameter under several names, and stays one.
        tied: dict[int, nn.Parameter] = {}
        values: dict[str, Tensor] = dict(weights)
        for name, old in own.named_parameters(remove_duplicate=False):
            if name in weights:
                new = nn.Parameter(weights[name], requires_grad=old.requires_grad)
                values[name] = tied.setdefault(id(old), new)
        own.load_state_dict(values, assign=True)
    return own


@contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """Attention and recurrence as operations of their own, in the parameters' own precision.

    A fused kernel hides the uses of weights inside, or has no derivative for several
    vectors at once.  Autocast around the caller would round the sums; one in the network's
    own ``forward`` holds.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    torch.empty(KEPT, dtype=torch.uint8)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        for kind in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            with warnings.catch_warnings():
                # torch speaks of Intel GPUs when the flag is touched at all.
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield
