r"""Other measures of how much a parameter matters, for penalties of EWC's form.

Synaptic Intelligence, Memory Aware Synapses and plain L2 have EWC's quadratic penalty with
another diagonal in place of the Fisher information, so they share its plugin.  Avalanche's
own plugins differ from the papers: ``SynapticIntelligencePlugin`` cuts every importance at
0.001, ``MASPlugin`` takes gradients of batch means where the paper has single examples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc import DiagonalFisher, Empirical, Likelihood, Online
from ewc.fisher.diagonal import DiagonalSum
from ewc.fisher.outer import OuterProducts
from ewc.fisher.pullback import Chunk, Pullback, slices
from ewc.parameters import Parameters
from ewc.plugin import EWCPlugin


@dataclass(frozen=True)
class SquaredNorm(Likelihood):
    r"""Scores that are the gradient of :math:`|f(x)|^2`, whatever the target.

    With :class:`~ewc.Empirical` the pulled-back vectors are then the gradients of the
    squared output norm, which Memory Aware Synapses asks for.
    """

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The vector :math:`2 f`."""
        return 2 * outputs

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Any target will do: it is not looked at."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared norm itself."""
        return outputs.square().sum(1)

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")


class AbsoluteGradients(DiagonalFisher):
    r"""The mean of :math:`|v_n|`, entry by entry, over single examples (Aljundi et al. 2018)."""

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "AbsoluteSum":
        """An empty sum."""
        return AbsoluteSum(parameters)


class AbsoluteSum(DiagonalSum):
    r"""The running :math:`\sum_{n,k} |v_{kn}|`."""

    def add(self, chunk: Chunk) -> None:
        """Add the absolute values of one chunk."""
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                _add_absolute(pullback, self.total)


def _add_absolute(pullback: Pullback, total: Parameters) -> None:
    for part in slices(pullback.num_examples, pullback.bytes_per_example(), pullback.memory):
        if isinstance(pullback, OuterProducts) and pullback.positions == 1:
            # Of one outer product the absolute values are the product of those.
            a, g = (tensor.abs() for tensor in pullback.factors(part))
            matrix = torch.einsum("kngto,ngti->goi", g, a)
            total[pullback.weight] += pullback.layout.to_parameter(matrix)
            if pullback.bias is not None:
                total[pullback.bias] += g.sum((0, 1, 3)).flatten()
            continue
        for name, vectors in pullback.per_example(part).items():
            total[name] += vectors.abs().sum((0, 1))


@dataclass(frozen=True)
class BatchMeans(Empirical):
    """Observed labels, whose gradients are averaged over a batch before they are squared."""


class BatchMeanGradients(DiagonalFisher):
    r"""The mean over batches of the squared mean gradient, :math:`(\frac1B \sum_n v_n)^2`.

    What Avalanche's ``EWCPlugin`` and many others take for the empirical Fisher; it shrinks
    like :math:`1/B`.  To be used with :class:`~ewc.Empirical`.  A batch is one of the pass
    over the data (``training.eval_batch_size``), or a part of one that had to be cut to fit
    into memory.
    """

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "BatchMeanSum":
        """An empty sum."""
        return BatchMeanSum(parameters)


class BatchMeanSum(DiagonalSum):
    r"""The running :math:`\sum_b B_b (\frac{1}{B_b} \sum_{n \in b} v_n)^2`."""

    def add(self, chunk: Chunk) -> None:
        """Add the squared mean gradient of one batch, which a chunk is."""
        gradient = {name: torch.zeros_like(total)[None] for name, total in self.total.items()}
        vectors, examples = chunk.scores.shape[:2]
        ones = chunk.scores.new_ones(vectors, examples, 1)
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                pullback.add_combinations(ones, gradient)
        for name, total in self.total.items():
            total.addcmul_(gradient[name][0], gradient[name][0], value=1 / examples)


class UnitImportance(DiagonalFisher):
    """Every parameter matters alike: the L2 penalty around the last parameters."""

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "Ones":
        """Nothing to add up."""
        return Ones(parameters)


class Ones(DiagonalSum):
    """One for every example."""

    def add(self, chunk: Chunk) -> None:
        """Add one for every example."""
        for total in self.total.values():
            total.add_(chunk.scores.shape[1])


class SynapticIntelligencePlugin(EWCPlugin):
    r"""Importance from the path of the training itself (Zenke et al. 2017, arXiv:1703.04200).

    :math:`\Omega = \sum_t \max(0, \omega_t) / (\Delta_t^2 + \xi)` with
    :math:`\omega_t = -\sum_\tau g_\tau \cdot (\theta_{\tau+1} - \theta_\tau)` along task ``t``,
    ``g`` being the gradient of the whole loss as in van de Ven's code.  The penalty
    :math:`\lambda / 2 \cdot \Omega (\theta - a)^2` does not depend on how many examples a
    task has; the paper's ``c`` is half this strength.

    Args:
        strength: :math:`\lambda`.
        damping: :math:`\xi`.
    """

    def __init__(self, strength: float, damping: float = 0.1) -> None:
        super().__init__(strength, consolidation=Online())
        self.damping = damping
        self._path: Parameters = {}
        self._before: Parameters = {}
        self._start: Parameters = {}

    def before_training_exp(self, strategy: Any, **options: Any) -> None:
        """Begin a new path."""
        super().before_training_exp(strategy, **options)
        self.penalty.num_examples = 1
        self._start = _copies(strategy.model)
        self._path = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}

    def check_task(self, strategy: Any, **options: Any) -> None:
        """Nothing can fail after training: there is no pass over the data."""

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Remember where the step starts."""
        self._before = _copies(strategy.model)

    def after_update(self, strategy: Any, **_: Any) -> None:
        """Add what the step gained."""
        for name, parameter in strategy.model.named_parameters():
            if parameter.grad is not None and name in self._path:
                step = parameter.detach() - self._before[name]
                self._path[name].addcmul_(parameter.grad, step, value=-1.0)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Turn the path into importance and remember the task."""
        moved = {n: p - self._start[n] for n, p in _copies(strategy.model).items()}
        importance = {
            name: path.clamp_min(0) / (moved[name].square() + self.damping)
            for name, path in self._path.items()
        }
        # One example a task: all tasks weigh alike, whatever their size.
        self.fisher = DiagonalFisher(importance, num_examples=1)
        self.penalty.consolidate(self.fisher, strategy.model)


def _copies(model: torch.nn.Module) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def memory_aware_synapses(strength: float) -> EWCPlugin:
    r"""The penalty :math:`\lambda / 2 \cdot \sum_t \Omega_t (\theta - a)^2` of Aljundi et al. 2018.

    :math:`\Omega_t = \frac1N \sum_n |\partial |f(x_n)|^2 / \partial \theta|`
    (arXiv:1711.09601, equation 3), over single examples.

    Args:
        strength: :math:`\lambda`.
    """
    return EWCPlugin(
        strength,
        likelihood=SquaredNorm(),
        estimator=Empirical(),
        structure=AbsoluteGradients,
        consolidation=Online(),
    )


def l2(strength: float) -> EWCPlugin:
    r"""The penalty :math:`\lambda / 2 \cdot |\theta - a|^2` around the last parameters.

    Args:
        strength: :math:`\lambda`.
    """
    return EWCPlugin(strength, structure=UnitImportance, consolidation=Online(decay=0.0))
