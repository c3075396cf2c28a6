"""The state of a network while its Fisher information is computed."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ewc.parameters import Parameters

KEPT = 2**25 - 2**16
"""The largest block whose pages glibc reuses, after such a block was freed once.

Before that, large tensors get new pages from the system every time, which the system must
clear.  On two cores this takes a quarter of the time of a convolutional network's Fisher
matrix.
"""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers, weights and random states are restored.

    Weights are restored because an embedding with ``max_norm`` writes into its weight.

    Raises:
        ValueError: a BatchNorm layer has no running statistics, so that examples depend on
            each other.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name or type(module).__name__} normalises by the batch even in evaluation "
                "mode: BatchNorm must have track_running_stats=True."
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
    """Whether a buffer is unchanged; sparse ones are compared by their dense parts."""
    if buffer.layout == torch.strided:
        return torch.equal(buffer, was)
    return all(map(torch.equal, dense_parts(buffer), dense_parts(was)))


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a tensor consists of: itself, or the indices and values."""
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
        weights: parameters and buffers of the copy, in place of the network's.

    Raises:
        RuntimeError: the weights do not fit the network.
    """
    # Tensors that hooks compute from parameters (weight normalisation) are no leaves and
    # cannot be copied.  The hooks compute them again.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    with torch.no_grad():  # else a compiled module's copy would be computed from its original
        duplicate = copy.deepcopy(model, computed).eval()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in duplicate.named_parameters():
        parameter.requires_grad_(trainable[name])
    if weights is not None:
        # A tied weight is one parameter with several names, and must stay one.
        tied: dict[int, nn.Parameter] = {}
        values: dict[str, Tensor] = dict(weights)
        for name, old in duplicate.named_parameters(remove_duplicate=False):
            if name in weights:
                new = nn.Parameter(weights[name], requires_grad=old.requires_grad)
                values[name] = tied.setdefault(id(old), new)
        duplicate.load_state_dict(values, assign=True)
    return duplicate


@contextmanager
def plain_operations(model: nn.Module, *, full_precision: bool = False) -> Iterator[None]:
    """Attention and recurrence without fused kernels, in the precision of the parameters.

    A fused kernel hides the uses of weights, or has no derivative for several vectors at
    once.  Autocast around the caller is disabled, because it would round the sums.  Autocast
    inside the network's ``forward`` remains.

    Args:
        model: the network.
        full_precision: whether products and convolutions in single precision are not rounded
            to TF32 or bfloat16.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with suppress(RuntimeError):  # where memory is scarce
        torch.empty(KEPT, dtype=torch.uint8)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        for kind in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            with warnings.catch_warnings():
                # torch warns about Intel GPUs whenever this flag is set.
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if full_precision:
            # After the flags of cuDNN, which allow TF32.
            stack.enter_context(single_precision())
        yield


@contextmanager
def single_precision() -> Iterator[None]:
    """Products and convolutions of float32 in float32; afterwards every setting is as before."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before
        return
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    settings = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = "none"  # follows the setting for all operations
            if place.fp32_precision != setting:
                place.fp32_precision = setting
