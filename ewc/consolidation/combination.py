r"""How the quadratics of several tasks are combined: separate or online.

In the Laplace approximation the log-posterior of each task is a quadratic around the parameters
after the task.  These are the two rules that add a new quadratic to the old ones.
"""

from dataclasses import dataclass

import torch

from ewc.checks import check_instance, check_share
from ewc.consolidation.quadratic import Quadratic
from ewc.matrices.diagonal import DiagonalFisher


def completed_square(first: Quadratic, second: Quadratic) -> Quadratic:
    r"""The sum of two diagonal quadratics as one, exactly.

    With :math:`P = p + q` and :math:`m = a + \frac{q}{P} (b - a)`,
    :math:`p (\theta - a)^2 + q (\theta - b)^2 = P (\theta - m)^2 + \frac{pq}{P} (b - a)^2`.
    No large terms cancel.  Both must have the same parameters.
    """
    p, q = first.precision.diagonal(), second.precision.diagonal()
    total, anchor, constant = {}, {}, first.constant + second.constant
    for name in p:
        total[name] = p[name] + q[name]
        share = torch.where(total[name] > 0, q[name] / total[name], 0.0)
        gap = second.anchor[name] - first.anchor[name]
        anchor[name] = first.anchor[name] + share * gap
        constant += 0.5 * float((p[name] * share * gap.square()).sum(dtype=torch.float64))
    examples = first.precision.num_examples + second.precision.num_examples
    return Quadratic(DiagonalFisher(total, examples), anchor, constant)


@dataclass(frozen=True)
class Separate:
    """One quadratic per task, each around the task's anchor (Kirkpatrick et al. 2017).

    Diagonal matrices are summed into one quadratic with the same value and gradient, so time and
    memory do not grow with the number of tasks.  Other structures keep one term per task.
    """

    def consolidated(self, terms: list[Quadratic], new: Quadratic) -> list[Quadratic]:
        """The terms after a task with the quadratic ``new``."""
        diagonal = isinstance(new.precision, DiagonalFisher)
        if terms and diagonal and isinstance(terms[-1].precision, DiagonalFisher):
            return [*terms[:-1], completed_square(terms[-1], new)]
        return [*terms, new]


@dataclass(frozen=True)
class Online:
    r"""One quadratic around the last anchor, :math:`P \leftarrow \gamma P + N_t F_t`.

    The decay multiplies the old sum, and the anchor moves to the latest parameters (Schwarz et al.
    2018, arXiv:1805.06370, section 3).  The sum is one matrix, so time and memory do not grow with
    the number of tasks: diagonal and dense matrices are added exactly, Kronecker and
    eigenvalue-corrected ones are projected (:meth:`ewc.FisherMatrix.nearest`).  Other structures
    keep one term per task.

    Attributes:
        decay: :math:`\gamma`, from 0 (only the last task counts) to 1 (all tasks count fully).

    Raises:
        ValueError: ``decay`` is outside [0, 1].
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the decay."""
        check_share(self.decay, "decay")

    def consolidated(self, terms: list[Quadratic], new: Quadratic) -> list[Quadratic]:
        """The single term after a task with the quadratic ``new``."""
        precision = new.precision
        for old in terms:
            precision = self.decay * old.precision + precision
        return [Quadratic(precision.nearest(), new.anchor)]


Consolidation = Separate | Online


def check_consolidation(value: Consolidation) -> None:
    """Check that an argument is a consolidation.

    Raises:
        TypeError: it is not a :class:`Separate` or :class:`Online`.
    """
    allowed = "an instance of Separate or Online such as Separate()"
    check_instance(value, Separate | Online, "consolidation", allowed)
