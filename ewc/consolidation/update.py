"""How the penalty moves the parameters: as a term of the loss, or by implicit steps."""

from dataclasses import dataclass

from ewc.checks import check_count, check_instance, check_positive_share


@dataclass(frozen=True)
class InLoss:
    """The penalty is added to the loss of every training step.

    Attributes:
        eigenvector_share: average fraction of the eigenvectors of Kronecker matrices used per
            step; stiff ones are used more often (:mod:`ewc.consolidation.pacing`).  1 uses all,
            for several times the cost of a training step.  Accelerators always use all.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """

    eigenvector_share: float = 1.0

    def __post_init__(self) -> None:
        """Check the share."""
        check_positive_share(self.eigenvector_share, "eigenvector_share")


@dataclass(frozen=True)
class ImplicitSteps:
    """The penalty takes an implicit step after a fixed number of training steps.

    It is stable for any strength and learning rate.  Where a product with the matrix costs more
    than a training step, it is cheaper by the factor ``every``.  See
    :mod:`ewc.consolidation.implicit_step`.

    Attributes:
        every: the training steps from one implicit step to the next.

    Raises:
        ValueError: ``every`` is not a whole number, 1 or more.
    """

    every: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        check_count(self.every, "every")


Update = InLoss | ImplicitSteps


def check_update(value: Update) -> None:
    """Check that an argument is an update.

    Raises:
        TypeError: it is not an :class:`InLoss` or :class:`ImplicitSteps`.
    """
    allowed = "an instance of InLoss or ImplicitSteps such as InLoss()"
    check_instance(value, InLoss | ImplicitSteps, "update", allowed)
