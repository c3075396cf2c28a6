"""How the training of a task ends: with a small learning rate, or with averaged parameters."""

from collections.abc import Mapping
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel


class CosineAnnealing(SupervisedPlugin):
    r"""The learning rate falls to 0 over every task, as half a cosine.

    Step ``k`` of the ``n`` steps of a task has :math:`\eta (1 + \cos(\pi k / n)) / 2`
    (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, with one restart per task).  The
    parameters then converge to the mode of the posterior, around which the Laplace approximation is
    taken.  At a constant rate the noise of the batches keeps them away from it.
    """

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start from the optimizer's initial learning rate."""
        for group in strategy.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        self._schedule = CosineAnnealingLR(strategy.optimizer, len(strategy.dataloader))

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Set the learning rate of the next step."""
        self._schedule.step()

    def state(self) -> dict[str, Any]:
        """The place in the schedule; the optimizer's state has the rate."""
        numbers = (int, float, list)
        state = self._schedule.state_dict()
        return {key: value for key, value in state.items() if isinstance(value, numbers)}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self._schedule.load_state_dict(dict(state))


class TailAverage(SupervisedPlugin):
    r"""The network gets the mean of its parameters over the last iterations of every task.

    At a constant learning rate the parameters move around the mode of the posterior, about which
    the Laplace approximation is taken.  Their mean is close to it (Polyak & Juditsky 1992,
    doi:10.1137/0330046; over the last iterations only, Jain et al. 2018, arXiv:1610.03774).  The
    state of the optimizer does not change.

    It must come before the plugins that use a task's final parameters.

    Args:
        share: the last fraction of a task's iterations that is averaged, at least one iteration.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start a mean."""
        iterations = len(strategy.dataloader)
        self._before = iterations - max(1, round(self.share * iterations))
        self._mean = AveragedModel(strategy.model)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Add the parameters to the mean in the last iterations of the task."""
        # The clock is the last plugin: it has not yet counted this iteration.
        if strategy.clock.train_exp_iterations >= self._before:
            self._mean.update_parameters(strategy.model)

    def state(self) -> dict[str, Any]:
        """The mean so far."""
        return {"mean": self._mean.state_dict()}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self._mean.load_state_dict(state["mean"])

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Set the parameters to the mean."""
        strategy.model.load_state_dict(self._mean.module.state_dict())
