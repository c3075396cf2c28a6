"""Sums of squares of vectors that are sums of outer products, without storing the vectors."""

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for
from ewc.linalg.tiles import DEFAULT_MEMORY, part

SQUARE_COST = 40
"""The cost of squaring and adding one entry, in multiplications of a matrix product."""


def sum_of_squares(gradient: Tensor) -> Tensor:
    r""":math:`\sum_k g_k^2` of ``[k, ...]``, shape ``[...]``."""
    if sizes_for(gradient.device).whole:
        return gradient[0].square() if len(gradient) == 1 else gradient.square().sum(0)
    # Vector by vector, because the squares of all vectors would be as large as the gradient.
    # Allocating that memory costs more than the arithmetic.
    total = gradient[0].square()
    for vector in gradient[1:]:
        total.addcmul_(vector, vector)
    return total


def add_squares(vectors: Tensor, total: Tensor) -> None:
    r"""Add :math:`\sum_{k,n} v_{kn}^2`, entry by entry.

    Args:
        vectors: ``[k, n, ...]``.
        total: ``[...]``, changed in place.
    """
    if sizes_for(total.device).whole:
        # One pass over the vectors, where squares and their sum would take three.
        norms = torch.linalg.vector_norm(vectors, dim=(0, 1))
        total.addcmul_(norms, norms)
    else:
        total += vectors.flatten(0, 1).square().sum(0)


def add_outer_squares(a: Tensor, g: Tensor, total: Tensor, memory: int = DEFAULT_MEMORY) -> None:
    r"""Add :math:`\sum_{n,k} (\sum_t g_t a_t^\top)^2`, entry by entry.

    For one position it is :math:`(\sum_k g_k^2)^\top (a^2)`, a single product.  For more
    positions there are two algorithms; the one with fewer operations is used.  The first sums
    over pairs of positions, :math:`\sum_{t, t'} (\sum_k g_{kt} g_{kt'})^\top (a_t a_{t'})`.
    Its number of products does not grow with ``k``.  The second computes the vectors and
    squares them in tiles.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``, changed in place.
        memory: bytes that intermediate results may take.
    """
    if not by_pairs(g.shape[0], a.shape[2]):
        add_squares_by_vectors(a, g, total, memory)
    elif sizes_for(a.device).whole:
        add_squares_by_all_pairs(a, g, total, memory)
    else:
        add_squares_by_pairs(a, g, total)


def by_pairs(vectors: int, positions: int) -> bool:
    """Whether the sum over pairs of positions takes fewer operations than the vectors."""
    return positions * (positions + 1) // 2 <= vectors * (positions + SQUARE_COST)


def add_squares_by_pairs(a: Tensor, g: Tensor, total: Tensor) -> None:
    r"""Add :math:`\sum_{n,k} (\sum_t g_t a_t^\top)^2` as a sum over pairs of positions.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``.
    """
    positions = a.shape[2]
    for distance in range(positions):
        left, right = slice(0, positions - distance), slice(distance, positions)
        if distance == 0:
            outputs, inputs = sum_of_squares(g), a.square()
        else:
            outputs = g[0, :, :, left] * g[0, :, :, right]
            for vector in g[1:]:
                outputs.addcmul_(vector[:, :, left], vector[:, :, right])
            inputs = a[:, :, left] * a[:, :, right]
        weight = 1.0 if distance == 0 else 2.0  # t < t' and t > t'
        for group, target in enumerate(total):
            rows, columns = outputs[:, group].flatten(0, 1), inputs[:, group].flatten(0, 1)
            target.addmm_(rows.T, columns, alpha=weight)


def add_squares_by_all_pairs(a: Tensor, g: Tensor, total: Tensor, memory: int) -> None:
    """As :func:`add_squares_by_pairs`, all pairs in one product.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``.
        memory: bytes that intermediate results may take.
    """
    k, n, groups, positions, outputs = g.shape
    if positions == 1:
        squares = sum_of_squares(g)[:, :, 0]
        total.baddbmm_(squares.permute(1, 2, 0), a.square()[:, :, 0].transpose(0, 1))
        return
    left, right = torch.triu_indices(positions, positions, device=a.device).unbind()
    pairs = len(left)
    entries = groups * pairs * (3 * a.shape[3] + 3 * k * outputs)
    at_once = max(1, memory // (entries * a.element_size()))
    # Pairs of different positions count twice.
    weight = (left != right).to(a.dtype).add_(1)[:, None]
    for first in range(0, n, at_once):
        examples = slice(first, first + at_once)
        inputs, gradients = part(a, examples), part(g, examples, 1)
        inputs = inputs[:, :, left] * (weight * inputs[:, :, right])
        gradients = gradients[:, :, :, left] * gradients[:, :, :, right]
        gradients = gradients[0] if k == 1 else gradients.sum(0)
        total.baddbmm_(
            gradients.transpose(0, 1).flatten(1, 2).transpose(1, 2),
            inputs.transpose(0, 1).flatten(1, 2),
        )


def add_squares_by_vectors(
    a: Tensor, g: Tensor, total: Tensor, memory: int = DEFAULT_MEMORY
) -> None:
    r"""Add :math:`\sum_{n,k} (\sum_t g_t a_t^\top)^2` vector by vector, in tiles.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``.
        memory: bytes that the vectors of a tile may take.
    """
    k, n, groups, positions, outputs = g.shape
    inputs = a.shape[3]
    sizes = sizes_for(a.device)
    tile = sizes.entries_in(memory, a.dtype)
    rows = g.permute(1, 2, 0, 4, 3).reshape(n, groups, k * outputs, positions)
    if sizes.whole and groups * k * outputs * inputs <= tile:
        at_once = max(1, tile // (groups * k * outputs * inputs))
        for first in range(0, n, at_once):
            examples = slice(first, first + at_once)
            left, right = part(rows, examples).flatten(0, 1), part(a, examples).flatten(0, 1)
            vectors = torch.bmm(left, right).view(-1, groups, k, outputs, inputs)
            add_squares(vectors.permute(0, 2, 1, 3, 4), total)
        return
    width = max(1, min(inputs, tile // outputs))
    at_once = max(1, tile // (k * outputs * width))
    for group in range(groups):
        for start in range(0, inputs, width):
            columns = slice(start, start + width)
            target = total[group, :, columns]
            for first in range(0, n, at_once):
                examples = slice(first, first + at_once)
                if k * outputs * width <= tile:
                    vectors = rows[examples, group] @ a[examples, group, :, columns]
                    vectors = vectors.reshape(-1, outputs, vectors.shape[-1])
                    target += vectors.square_().sum(0)
                    continue
                for vector in torch.split(rows[first, group], outputs):
                    entries = vector @ a[first, group, :, columns]
                    target.addcmul_(entries, entries)
