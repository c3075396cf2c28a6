r"""The metrics of a run, from the matrix :math:`R` of accuracies.

Row ``i`` is measured after training on task ``i``; column ``j`` is the test accuracy on
task ``j``, from 0 to 1.
"""

from collections.abc import Mapping, Sequence

Matrix = Sequence[Sequence[float]]

STANDARD_ERRORS = 3.0
"""How far above chance an accuracy must be to count as learnt."""

LEARNT_SHARE = 1 / 3
"""The share of the first task's accuracy above chance that a learnt task reaches at least."""


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


def intransigence(matrix: Matrix, reference: Matrix) -> float:
    r""":math:`\frac1T \sum_j (A_{jj} - R_{jj})`: the accuracy that a method costs new tasks.

    The reference :math:`A` is the matrix of a run that may learn freely, by Chaudhry et al. 2018
    (arXiv:1801.10112) one that trains on all tasks so far together.  It is negative where a task
    is learnt better than by the reference.
    """
    costs = [row[j] - matrix[j][j] for j, row in enumerate(reference)]
    return sum(costs) / len(costs)


def forward_transfer(matrix: Matrix, initial: Sequence[float]) -> float | None:
    r""":math:`\frac{1}{T-1} \sum_{j>1} (R_{j-1,j} - b_j)` (Lopez-Paz and Ranzato 2017).

    The accuracies :math:`b` are those of the untrained network.  ``None`` before there are two
    tasks.
    """
    gains = [matrix[j - 1][j] - initial[j] for j in range(1, len(matrix))]
    return sum(gains) / len(gains) if gains else None


def unlearnt(matrix: Matrix, guessing: Sequence[Mapping[str, float]]) -> list[int]:
    """The tasks that training has left unlearnt, counted from 0.

    The accuracy on such a task is at chance after its training, or less than
    :data:`LEARNT_SHARE` as far above chance as that on the first task was.

    Args:
        matrix: the accuracies, one row for each task learnt.
        guessing: for each task the ``accuracy`` of guessing the most frequent class, and its
            standard ``error`` over the test examples.
    """
    gains = [row[j] - guessing[j]["accuracy"] for j, row in enumerate(matrix)]
    least = [max(STANDARD_ERRORS * g["error"], LEARNT_SHARE * gains[0]) for g in guessing]
    return [j for j, gain in enumerate(gains) if not gain > least[j]]
