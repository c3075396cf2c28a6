r"""A budget for forgetting: the strength as a Lagrange multiplier."""

import math

from ewc.checks import check_positive

SMOOTHING = 0.9
"""What a step leaves of the running mean of the rise, for penalties that take a share of the
eigenvectors a step are estimates."""

LIMIT = 1.0
r"""The most that a step follows of :math:`|\log(r / b)|`: a task starts with a rise of 0."""


class ForgettingBudget:
    r"""The strength at which a task costs the old ones, by the penalty's forecast, so much.

    Learning a task within a budget :math:`b` is :math:`\min_\theta L(\theta)` under
    :math:`r(\theta) \le b`, with the forecast :math:`r` of
    :meth:`~ewc.penalty.EWCPenalty.predicted_rise`.  The strength is the constraint's
    multiplier, in units of its own, and is found while the task is learnt: after every step

    .. math:: \log \lambda_k = \log \lambda_0 + \eta \sum_{j \le k} e_j + e_k, \qquad
              e_k = \mathrm{clip}\big(\log (\bar r_k / b), -1, 1\big)

    with the running mean :math:`\bar r` of the forecast.  Where the strength is at rest the
    forecast is at the budget; where a task can be learnt for less, the strength falls.  The
    sum alone, the gradient of the dual problem, swings about the budget, as the parameters
    follow the strength late, and is caught wherever an annealed learning rate leaves off; the
    last term damps it (Stooke, Achiam & Abbeel 2020, arXiv:2007.03964, section 4).

    Args:
        nats: :math:`b`, nats an example of the old tasks, for every new task.
        rate: :math:`\eta`; the strength follows over some :math:`1 / \eta` steps.

    Attributes:
        factor: the strength, as a multiple of what it was at the start of the task.

    Raises:
        ValueError: the budget or the rate is not above 0.
    """

    def __init__(self, nats: float, rate: float = 0.05) -> None:
        for name, value in (("budget", nats), ("rate", rate)):
            check_positive(value, name)
        self.nats = nats
        self.rate = rate
        self.start()

    def start(self) -> None:
        """Begin a task."""
        self.factor = 1.0
        self._sum = 0.0
        self._mean = 0.0
        self._weight = 0.0

    def follow(self, rise: float) -> None:
        """Change the factor by the forecast after a step.

        Args:
            rise: the forecast since the start of the task, nats an example.

        Raises:
            FloatingPointError: the forecast is not finite; the factor is as it was.
        """
        if not math.isfinite(rise):
            raise FloatingPointError(f"The forecast of forgetting became {rise} nats.")
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * rise
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        ratio = self._mean / self._weight / self.nats
        error = min(math.log(ratio), LIMIT) if ratio > math.exp(-LIMIT) else -LIMIT
        self._sum += self.rate * error
        self.factor = math.exp(self._sum + error)
