"""Sums of squares of vectors that are sums of outer products, without storing the vectors."""

import torch
from torch import Tensor

TILE = 2**18
"""Entries of a product that stay in a core's cache until they are squared or summed."""

SQUARE_COST = 40
"""The cost of squaring and adding one entry, in multiplications of a matrix product."""


def sum_of_squares(gradient: Tensor) -> Tensor:
    r""":math:`\sum_k g_k^2` of ``[k, ...]``, shape ``[...]``."""
    # Vector by vector, because the squares of all vectors would be as large as the gradient.
    # Allocating that memory costs more than the arithmetic.
    total = gradient[0].square()
    for vector in gradient[1:]:
        total.addcmul_(vector, vector)
    return total


def add_outer_squares(a: Tensor, g: Tensor, total: Tensor) -> None:
    r"""Add :math:`\sum_{n,k} (\sum_t g_t a_t^\top)^2`, entry by entry.

    For one position it is :math:`(\sum_k g_k^2)^\top (a^2)`, a single product.  For more
    positions there are two algorithms; the one with fewer operations is used.  The first sums
    over pairs of positions, :math:`\sum_{t, t'} (\sum_k g_{kt} g_{kt'})^\top (a_t a_{t'})`.
    Its number of products does not grow with ``k``.  The second computes the vectors and
    squares them while they are in the cache.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``, changed in place.
    """
    if by_pairs(g.shape[0], a.shape[2]):
        add_squares_by_pairs(a, g, total)
    else:
        add_squares_by_vectors(a, g, total)


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


def add_squares_by_vectors(a: Tensor, g: Tensor, total: Tensor) -> None:
    r"""Add :math:`\sum_{n,k} (\sum_t g_t a_t^\top)^2` vector by vector, in tiles.

    Args:
        a: ``[n, g, t, i]``.
        g: ``[k, n, g, t, o]``.
        total: ``[g, o, i]``.
    """
    k, n, groups, positions, outputs = g.shape
    rows = g.permute(1, 2, 0, 4, 3).reshape(n, groups, k * outputs, positions)
    width = max(1, min(a.shape[3], TILE // outputs))
    at_once = max(1, TILE // (k * outputs * width))
    for group in range(groups):
        for start in range(0, a.shape[3], width):
            columns = slice(start, start + width)
            target = total[group, :, columns]
            for first in range(0, n, at_once):
                examples = slice(first, first + at_once)
                if k * outputs * width <= TILE:
                    vectors = rows[examples, group] @ a[examples, group, :, columns]
                    vectors = vectors.reshape(-1, outputs, vectors.shape[-1])
                    target += vectors.square_().sum(0)
                    continue
                for vector in torch.split(rows[first, group], outputs):
                    entries = vector @ a[first, group, :, columns]
                    target.addcmul_(entries, entries)
