r"""The metrics of a run, from the matrix :math:`R` of accuracies.

Row ``i`` is measured after training on task ``i``; column ``j`` is the test accuracy on
task ``j``, from 0 to 1.
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    r""":math:`\frac1T \sum_j R_{Tj}`: the mean over all tasks seen so far, after the last."""
    return average_accuracies(matrix)[-1]


def average_accuracies(matrix: Matrix) -> list[float]:
    r""":math:`\frac{1}{i} \sum_{j \le i} R_{ij}` after every task: over those seen so far."""
    return [sum(row[: i + 1]) / (i + 1) for i, row in enumerate(matrix)]


def forgetting(matrix: Matrix) -> float:
    r""":math:`\frac{1}{T-1} \sum_{j<T} (\max_{j \le i<T} R_{ij} - R_{Tj})` (Chaudhry et al. 2018).

    0 before there are two tasks.
    """
    last = len(matrix) - 1
    drops = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


def backward_transfer(matrix: Matrix) -> float:
    r""":math:`\frac{1}{T-1} \sum_{j<T} (R_{Tj} - R_{jj})` (Lopez-Paz and Ranzato 2017).

    0 before there are two tasks.
    """
    last = len(matrix) - 1
    gains = [matrix[last][j] - matrix[j][j] for j in range(last)]
    return sum(gains) / len(gains) if gains else 0.0
