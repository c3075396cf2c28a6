"""What the optimizers of this library share when a ``state_dict`` is loaded."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in the order in which a ``state_dict`` numbers them."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def restore_types(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give an optimizer copies of its tensors in the types in which they were saved.

    ``torch`` casts them to the types of the parameters, which rounds moments that are held in
    single precision for parameters in half precision.

    Args:
        optimizer: which has loaded the state.
        state_dict: the state.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for number, parameter in zip(saved, parameters_of(optimizer), strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
