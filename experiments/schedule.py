"""How the learning rate changes while a task is learnt."""

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch.optim.lr_scheduler import CosineAnnealingLR


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
