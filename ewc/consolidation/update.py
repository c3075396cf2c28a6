"""How the penalty moves the parameters: as part of the loss, or by steps of its own."""

from dataclasses import dataclass

from ewc.checks import check_count, check_instance, check_positive_share


@dataclass(frozen=True)
class InLoss:
    """The penalty is added to the loss of every training step.

    Attributes:
        eigenvector_share: of Kronecker matrices, the average fraction of the eigenvectors used
            per step, the stiff ones more often (:mod:`ewc.consolidation.pacing`); 1 takes all, for
            several times the cost of a training step.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """

    eigenvector_share: float = 1.0

    def __post_init__(self) -> None:
        """Check the share."""
        check_positive_share(self.eigenvector_share, "eigenvector_share")


@dataclass(frozen=True)
class Implicit:
    """The penalty takes an implicit step after so many training steps.

    See :mod:`ewc.consolidation.implicit_step`.

    It is stable for any strength and learning rate.  Where a product with the matrix costs more
    than a training step, it is cheaper by the number of steps.

    Attributes:
        every: the training steps from one implicit step to the next.

    Raises:
        ValueError: it is not a whole number, 1 or more.
    """

    every: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        check_count(self.every, "every")


Update = InLoss | Implicit


def check_update(value: Update) -> None:
    """Check that an update is one.

    Raises:
        TypeError: it is something else.
    """
    allowed = "an instance of InLoss or Implicit such as InLoss()"
    check_instance(value, InLoss | Implicit, "update", allowed)
