r"""The quadratic form of a diagonal matrix around a point, and its product, in one sweep.

The sweep must read three tensors and write one.  What else it writes stays in the cache on a host.
On an accelerator the number of launches decides, so every operation there takes all tensors.
"""

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for
from ewc.parameters import Parameters, difference


def weighted_square(
    here: Parameters, anchor: Parameters, weights: Parameters
) -> tuple[Tensor, Parameters]:
    r"""The sum :math:`\sum_p w_p d_p^2` and the products :math:`w_p d_p` at :math:`d = \theta - a`.

    Differences are taken in the wider type of the two, and the rest in that of the weights.

    Args:
        here: :math:`\theta`.
        anchor: :math:`a`.
        weights: :math:`w`, 0 or above, all of one type; their names are used.
    """
    device = next(iter(weights.values())).device
    here, anchor = ({n: tensors[n] for n in weights} for tensors in (here, anchor))
    swept = sizes_for(device).swept
    if swept is None:
        return _in_lists(here, anchor, weights)
    return _in_tiles(here, anchor, weights, swept * torch.get_num_threads())


def _in_lists(
    here: Parameters, anchor: Parameters, weights: Parameters
) -> tuple[Tensor, Parameters]:
    dtype = next(iter(weights.values())).dtype
    steps = list(difference(here, anchor, dtype).values())
    products = torch._foreach_mul(list(weights.values()), steps)
    torch._foreach_mul_(steps, products)
    # No operation sums a list.  No entry is negative, so the sum is the 1-norm.
    total = torch.stack(torch._foreach_norm(steps, 1)).sum()
    return total, dict(zip(weights, products, strict=True))


def _in_tiles(
    here: Parameters, anchor: Parameters, weights: Parameters, tile: int
) -> tuple[Tensor, Parameters]:
    like = next(iter(weights.values()))
    longest = max(tensor.numel() for tensor in weights.values())
    step = like.new_empty(min(tile, longest))
    products = {name: like.new_empty(tensor.shape) for name, tensor in weights.items()}
    squares = []
    for name in weights:
        tensors = (here[name], anchor[name], weights[name], products[name])
        tiles = (torch.split(tensor.reshape(-1), tile) for tensor in tensors)
        for theta, a, weight, product in zip(*tiles, strict=True):
            short = step[: len(product)]
            torch.sub(theta, a, out=short)
            torch.mul(weight, short, out=product)
            squares.append(torch.dot(short, product))
    return torch.stack(squares).sum(), products
