"""How the training of a task comes to rest: by its learning rate, or by a mean."""

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel


class CosineAnnealing(SupervisedPlugin):
    r"""The learning rate falls to 0 over every task, as half a cosine.

    Step ``k`` of the ``n`` steps of a task has :math:`\eta (1 + \cos(\pi k / n)) / 2`
    (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, with a restart a task).  The
    parameters then come to rest in the mode of the posterior, around which the Laplace
    approximation is taken; a constant rate leaves them astray by the noise of the batches.
    """

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start from the optimizer's own learning rate."""
        for group in strategy.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        self._schedule = CosineAnnealingLR(strategy.optimizer, len(strategy.dataloader))

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """The learning rate of the next step."""
        self._schedule.step()


class TailAverage(SupervisedPlugin):
    r"""The network takes the mean of its parameters over the last iterations of every task.

    At a constant learning rate the parameters wander around the mode of the posterior, about
    which the Laplace approximation is taken; their mean is close to it (Polyak & Juditsky
    1992, doi:10.1137/0330046; over the last iterations only, Jain et al. 2018,
    arXiv:1610.03774).  The optimizer goes on with the state it has.

    It belongs before the plugins that look at a task's final parameters.

    Args:
        share: of a task's iterations the last so many are averaged, one at least.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Begin a mean."""
        iterations = len(strategy.dataloader)
        self._before = iterations - max(1, round(self.share * iterations))
        self._mean = AveragedModel(strategy.model)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Add the parameters, if the task is near its end."""
        # The clock is the last plugin: this iteration is not in its count yet.
        if strategy.clock.train_exp_iterations >= self._before:
            self._mean.update_parameters(strategy.model)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Give the network the mean."""
        strategy.model.load_state_dict(self._mean.module.state_dict())
