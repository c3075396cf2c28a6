"""Data-parallel sums: every process sums its shard, and all processes get the total."""

from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from ewc.fisher.structures.structure import Accumulator

_DIGIT = 2**20
"""Counts are sent with the sums as two digits that single precision represents exactly."""


def rank_in(group: ProcessGroup | None) -> int:
    """The rank of this process in the group; 0 without a group."""
    return 0 if group is None else distributed.get_rank(group)


def anywhere(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether a flag is set in any process of the group."""
    if group is None:
        return flag
    flags: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(flags, flag, group=group)
    return any(flags)


def summed_over(total: Accumulator[Any], num_examples: int, group: ProcessGroup) -> int:
    """Add the sums of all processes into ``total``, in one all-reduce.

    Args:
        total: the sums of this process, changed in place.
        num_examples: the number of examples of this process.
        group: the processes.

    Returns:
        The number of examples of all processes.

    Raises:
        ValueError: the processes have different sums, or one of them has no data.
    """
    total.join(group)
    sums = total.sums()
    kinds = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in sums.items()}
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, (kinds, num_examples), group=group)
    if any(remote != kinds or examples == 0 for remote, examples in gathered):
        raise ValueError(
            "The processes of the group have different sums: every shard needs an example, "
            "and all models must have the same parameters."
        )
    tensors = [sums[name] for name in sorted(sums)]
    device = tensors[0].device if tensors else group_device(group)
    dtype = tensors[0].dtype if tensors else torch.float64
    count = torch.tensor(divmod(num_examples, _DIGIT), dtype=dtype, device=device)
    flat = torch.cat([count, *(tensor.reshape(-1).to(dtype) for tensor in tensors)])
    distributed.all_reduce(flat, group=group)
    start = 2
    for tensor in tensors:
        end = start + tensor.numel()
        tensor.copy_(flat[start:end].reshape(tensor.shape))
        start = end
    return int(flat[0]) * _DIGIT + int(flat[1])


def group_device(group: ProcessGroup) -> torch.device:
    """The device on which the group exchanges tensors."""
    return torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")
