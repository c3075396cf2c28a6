"""Data-parallel sums: every process adds up its shard, and all get the whole."""

from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from ewc.fisher.structures.structure import Accumulator

_DIGIT = 2**20
"""Counts travel with the sums as two digits that single precision holds exactly."""


def rank_in(group: ProcessGroup | None) -> int:
    """This process's number in the group, 0 without one."""
    return 0 if group is None else distributed.get_rank(group)


def anywhere(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether a flag is set in some process of the group."""
    if group is None:
        return flag
    flags: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(flags, flag, group=group)
    return any(flags)


def summed_over(total: Accumulator[Any], num_examples: int, group: ProcessGroup) -> int:
    """Add the sums of all processes into ``total``, in one all-reduce.

    Args:
        total: this process's sums, changed in place.
        num_examples: this process's examples.
        group: the processes.

    Returns:
        The examples of all processes.

    Raises:
        ValueError: the processes have different sums to add, as when one of them has no
            data at all.
    """
    total.join(group)
    sums = total.sums()
    kinds = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in sums.items()}
    everybody: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everybody, (kinds, num_examples), group=group)
    if any(others != kinds or examples == 0 for others, examples in everybody):
        raise ValueError(
            "The processes of the group have different layers to add up: every shard needs "
            "an example, and the models must be alike."
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
    """Where tensors must be for the group to exchange them."""
    return torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")
