r"""How the quadratics of several tasks are put together: separate or online.

The log-posterior of each task is, in the Laplace approximation, a quadratic around the
parameters found for it; these are the two rules by which a new one joins the old.
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
    """One quadratic a task, each around its own anchor (Kirkpatrick et al. 2017).

    Diagonal matrices are summed into one quadratic, with the same value and gradient, so
    time and memory do not grow with the number of tasks; other structures keep a term a
    task.
    """

    def consolidated(self, terms: list[Quadratic], new: Quadratic) -> list[Quadratic]:
        """The terms after a task whose own term is ``new``."""
        diagonal = isinstance(new.precision, DiagonalFisher)
        if terms and diagonal and isinstance(terms[-1].precision, DiagonalFisher):
            return [*terms[:-1], completed_square(terms[-1], new)]
        return [*terms, new]


@dataclass(frozen=True)
class Online:
    r"""One quadratic around the last anchor, :math:`P \leftarrow \gamma P + N_t F_t`.

    Schwarz et al. 2018, arXiv:1805.06370, section 3: the decay multiplies the old sum and
    the anchor moves to the latest parameters.  A sum of Kronecker matrices is projected to
    the nearest Kronecker matrix, so that time and memory do not grow with the tasks
    (:func:`~ewc.matrices.nearest_kronecker.nearest_kronecker`); of other structures without a
    sum of their own kind all terms are kept.

    Attributes:
        decay: :math:`\gamma`, from 0 (only the last task counts) to 1 (all count fully).

    Raises:
        ValueError: ``decay`` is outside [0, 1].
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the decay."""
        check_share(self.decay, "decay")

    def consolidated(self, terms: list[Quadratic], new: Quadratic) -> list[Quadratic]:
        """The one term after a task whose own term is ``new``."""
        precision = new.precision
        for old in terms:
            precision = self.decay * old.precision + precision
        return [Quadratic(precision.nearest(), new.anchor)]


Consolidation = Separate | Online


def check_consolidation(value: Consolidation) -> None:
    """Check that a consolidation is one.

    Raises:
        TypeError: it is something else.
    """
    allowed = "an instance of Separate or Online such as Separate()"
    check_instance(value, Separate | Online, "consolidation", allowed)
