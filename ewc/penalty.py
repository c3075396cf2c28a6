r"""The Elastic Weight Consolidation penalty, as a module added to any loss.

After each task the posterior of the parameters is approximated by a normal distribution
(Laplace).  While task :math:`T` with :math:`N` examples is learnt, the negative log-posterior per
example of that task is the loss plus

.. math:: \tfrac12 \lambda \sum_{t < T} \frac{N_t}{N}
          (\theta - \theta_t^*)^\top F_t (\theta - \theta_t^*)

(Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3).  The loss must be a mean over examples.
Then :math:`\lambda = 1` is the Bayes value, whatever the sizes of tasks and batches.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc.checks import (
    check_count,
    check_instance,
    check_model,
    check_not_negative,
    check_positive_share,
    check_share,
    reason_of,
)
from ewc.consolidation import pacing
from ewc.consolidation.combination import Consolidation, Online, Separate, check_consolidation
from ewc.consolidation.implicit_step import implicit_step
from ewc.consolidation.matching import fitted, precision_of, with_task
from ewc.consolidation.pacing import ScaledTerms
from ewc.consolidation.quadratic import (
    Quadratic,
    QuadraticForm,
    gradient_kept_by,
    value_and_gradient,
)
from ewc.consolidation.stiffness import Stiffness, stiffness
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters
from ewc.tensor_file import Content, joined, read, separated, write

ZERO_TRACE = 1e-30
"""The trace of a precision that counts as 0: probabilities of 0 are rounded up to 1e-38."""

ZERO = (
    "The Fisher information is zero everywhere, so the penalty does not hold this task: the "
    "predictions are certain (a saturated network), the units are dead, or the layers that matter "
    "are frozen."
)

_CONTENT = Content("EWC penalty", "EWCPenalty.save", "Save the penalty again.")


class EWCPenalty(nn.Module):
    r""":math:`\frac12 \lambda \sum_t \frac{N_t}{N} (\theta - a_t)^\top F_t (\theta - a_t)`.

    :math:`F_t` is the mean Fisher information of task :math:`t`, :math:`N_t` its number of
    examples and :math:`a_t` the parameters after it (Kirkpatrick et al. 2017, equation 3).

    Use it as ``loss = criterion(model(x), y) + penalty(model)``.  Parameters are matched by
    name.  New parameters are free, and so are new rows of a parameter, as of a classifier that
    met new classes.

    Args:
        strength: :math:`\lambda`; 1 is the Bayes value.
        consolidation: how the quadratics of several tasks are combined, :class:`Separate` or
            :class:`Online`.
        shrinkage: the fraction of the information that is spread over a layer's units
            (:meth:`ewc.FisherMatrix.shrunk`).  Units that no example of the old tasks excites are
            then not free.  0 leaves the Fisher matrix as it is.
        eigenvector_share: average fraction of the eigenvectors of Kronecker matrices used per
            call with gradients; stiff ones are used more often (:mod:`ewc.consolidation.pacing`).
            The value is then an estimate.  At fixed parameters its mean over
            ``ewc.consolidation.pacing.PERIOD`` calls is exact.  1 uses all eigenvectors, for
            several times the cost of a training step, as :meth:`implicit_step` always does.
            On an accelerator every call uses all, which is faster there.

    Attributes:
        keeps_gradient: whether calls keep their gradient, for measurements.
        last_gradient: the gradient of the last call by parameter, as the backward pass adds it;
            ``None`` unless it is kept.
        num_examples: :math:`N`, the size of the task in training.  ``None`` for the size of the
            last consolidated task, so that tasks of equal size have weight 1.

    Raises:
        ValueError: the strength is negative or not finite, the shrinkage is not in [0, 1], or the
            share is not in (0, 1].
        TypeError: the consolidation has another type.
    """

    def __init__(
        self,
        strength: float = 1.0,
        consolidation: Consolidation = Separate(),
        *,
        shrinkage: float = 0.0,
        eigenvector_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.eigenvector_share = eigenvector_share
        self.strength = strength
        self.consolidation = consolidation
        self.num_examples = None
        self.keeps_gradient = False
        self.last_gradient: Parameters | None = None
        self.terms: list[Quadratic] = []
        self._last_num_examples = 0
        self._attached = True
        self._scaled: ScaledTerms | None = None
        self._step = 0

    @property
    def strength(self) -> float:
        r""":math:`\lambda`, a finite number, 0 or above."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_not_negative(value, "strength")
        self._strength = float(value)

    @property
    def consolidation(self) -> Consolidation:
        """How tasks that are consolidated from now on are combined with the old ones."""
        return self._consolidation

    @consolidation.setter
    def consolidation(self, value: Consolidation) -> None:
        check_consolidation(value)
        self._consolidation = value

    @property
    def shrinkage(self) -> float:
        r""":math:`\alpha` for tasks that are consolidated from now on, in [0, 1]."""
        return self._shrinkage

    @shrinkage.setter
    def shrinkage(self, value: float) -> None:
        check_share(value, "shrinkage")
        self._shrinkage = float(value)

    @property
    def eigenvector_share(self) -> float:
        """Average fraction of the eigenvectors of Kronecker matrices used per step, in (0, 1]."""
        return self._eigenvector_share

    @eigenvector_share.setter
    def eigenvector_share(self, value: float) -> None:
        check_positive_share(value, "eigenvector_share")
        self._eigenvector_share = float(value)

    @property
    def num_examples(self) -> int | None:
        """:math:`N`, the size of the task in training, 1 or more; ``None`` for that of the last."""
        return self._num_examples

    @num_examples.setter
    def num_examples(self, value: int | None) -> None:
        check_count(value, "num_examples", optional=True)
        self._num_examples = None if value is None else int(value)

    def consolidate(
        self, fisher: FisherMatrix, model: nn.Module, *, num_examples: int | None = None
    ) -> None:
        r"""Add a task: its Fisher information, with the model's parameters as anchor.

        After an error the penalty is unchanged.

        Args:
            fisher: the mean Fisher information of the task at the model's parameters.
            model: the model after the task.
            num_examples: :math:`N_t`, the size of the task, for a matrix from a sample of its
                examples; ``None`` for the number of examples of the matrix.

        Warns:
            UserWarning: the matrix is zero everywhere, so the penalty does not hold the task.

        Raises:
            ValueError: the names or shapes of ``fisher`` do not fit the model, it has impossible
                entries (:meth:`FisherMatrix.check_entries`), or the number of examples is not
                a whole number, 1 or more.
            TypeError: the structure cannot be shrunk, or an argument has another type.
            FloatingPointError: an entry is not finite, or overflows times the number of examples.
        """
        check_instance(fisher, FisherMatrix, "fisher", "a FisherMatrix")
        check_model(model)
        fisher = fisher.with_num_examples(
            fisher.num_examples if num_examples is None else num_examples
        )
        precision = precision_of(fisher, model).shrunk(self.shrinkage)
        if float(precision.trace()) < ZERO_TRACE:
            warnings.warn(ZERO, stacklevel=2)
        self.terms = with_task(self.terms, precision, model, self.consolidation)
        self._last_num_examples = fisher.num_examples

    def forward(self, model: nn.Module) -> Tensor:
        """The penalty at the model's present parameters, a scalar in nats per example.

        Raises:
            ValueError: a parameter of the penalty is gone from the model, or its shape changed in
                another way than by new rows.
            TypeError: ``model`` is not a module.
        """
        check_model(model)
        self.last_gradient = None
        if not self.terms:
            return next(model.parameters(), torch.zeros(())).new_zeros(())
        parameters = self._fit(model)
        terms = self._scaled_terms().terms
        if self._is_paced(terms[0]):
            terms = self._scaled_terms().paced(self.eigenvector_share).at(self._step)
            self._step += 1
        value: Tensor = QuadraticForm.apply(terms, list(parameters), *parameters.values())
        if self.keeps_gradient and value.grad_fn is not None:
            self.last_gradient = gradient_kept_by(value, list(parameters))
        return value

    @torch.no_grad()
    def predicted_rise(self, model: nn.Module) -> float:
        r"""The predicted rise of the mean loss over the old tasks' examples.

        .. math:: r(\theta) = \frac{1}{\sum_t N_t} \sum_t \frac{N_t}{2}
                  (\theta - \theta_t)^\top F_t (\theta - \theta_t)

        It needs no old data, and does not depend on the strength.  It predicts the cost of a move
        before the move, or measures the effect of a task.  Online quadratics measure the rise from
        the last task's parameters, separate ones each from the parameters of its task.  The rise
        over one task is then a difference of two values.

        Args:
            model: the network after the move.

        Returns:
            The rise in nats per example, 0 before any task.

        Raises:
            ValueError: as in :meth:`forward`.
        """
        check_model(model)
        if not self.terms:
            return 0.0
        value, _ = value_and_gradient(self.terms, self._fit(model))
        return float(value) / self.remembered_examples

    @property
    def remembered_examples(self) -> int:
        r""":math:`\sum_t N_t`, the number of examples of all consolidated tasks."""
        return sum(term.precision.num_examples for term in self.terms)

    def implicit_step(self, model: nn.Module, optimizer: Optimizer, num_steps: int = 1) -> None:
        """Move the model by an implicit step of the penalty for the last steps of an optimizer.

        Use it instead of the penalty in the loss.  It is stable for any strength, and cheaper when
        called every few steps.  See :mod:`ewc.consolidation.implicit_step`.

        Args:
            model: the model, changed in place.
            optimizer: the optimizer that has taken the steps, on the loss alone.
            num_steps: the number of steps since the last call.

        Raises:
            ValueError: as in :meth:`forward`, or ``num_steps`` is below 1.
        """
        check_model(model)
        check_count(num_steps, "num_steps")
        if self.terms:
            parameters = self._fit(model)
            implicit_step(self._scaled_terms().terms, parameters, optimizer, num_steps)

    @torch.no_grad()
    def stiffness(self, model: nn.Module, optimizer: Optimizer) -> Stiffness | None:
        """How stiff the penalty in the loss is for plain gradient descent.

        See :mod:`ewc.consolidation.stiffness`.

        Args:
            model: the network.
            optimizer: the optimizer of its parameters.

        Returns:
            The stiffness; ``None`` before any task, and for an optimizer without a known limit.

        Raises:
            ValueError: as in :meth:`forward`.
        """
        check_model(model)
        if not self.terms:
            return None
        parameters = self._fit(model)
        return stiffness(self.terms, self._scale, parameters, optimizer)

    @torch.no_grad()
    def pull(self, model: nn.Module) -> float | None:
        r"""The penalty's gradient relative to that of the last step, as a ratio of norms.

        .. math:: \frac{|\sum_t \lambda \tfrac{N_t}{N} F_t (\theta - a_t)|}{|g|}

        The gradient :math:`g` is what the last backward pass left in ``.grad``.

        Args:
            model: the network.

        Returns:
            The ratio; ``None`` before any task, and where no parameter of the penalty has a
            gradient other than 0.

        Raises:
            ValueError: as in :meth:`forward`.
        """
        check_model(model)
        if not self.terms:
            return None
        parameters = self._fit(model)
        last = [p.grad for p in parameters.values() if p.grad is not None]
        total = float(torch.nn.utils.get_total_norm(last)) if last else 0.0
        _, gradient = value_and_gradient(self._scaled_terms().terms, parameters)
        return float(torch.nn.utils.get_total_norm(gradient)) / total if total else None

    @property
    def precision_trace(self) -> float:
        """The trace of the penalty's summed precision, 0 before any task."""
        return float(sum(float(term.precision.trace()) for term in self.terms))

    def extra_repr(self) -> str:
        """The options, for printing."""
        options = ("strength", "consolidation", "shrinkage", "eigenvector_share")
        return ", ".join(f"{name}={getattr(self, name)}" for name in options)

    # --- moving and saving ------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state to ``path`` in the safetensors format (no pickle).

        The file has a checksum.  It is written completely or not at all.

        Raises:
            OSError: the file cannot be written; an existing file is then unchanged.
        """
        tensors, outline = separated(self.get_extra_state())
        write(path, tensors, {"penalty": outline})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "EWCPenalty":
        """The penalty that :meth:`save` wrote, on the CPU until it meets its model.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds no penalty, or is damaged.
        """
        tensors, about = read(path, _CONTENT)
        penalty = EWCPenalty()
        try:
            penalty.set_extra_state(joined(tensors, about["penalty"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} holds no EWC penalty ({reason_of(error)})."
            ) from error
        return penalty

    def get_extra_state(self) -> dict[str, Any]:
        """The whole state as tensors and plain values, for ``state_dict()``."""
        online = self.consolidation if isinstance(self.consolidation, Online) else None
        return {
            "strength": self.strength,
            "shrinkage": self.shrinkage,
            "eigenvector_share": self.eigenvector_share,
            "step": self._step,
            "online": None if online is None else asdict(online),
            "num_examples": self.num_examples,
            "last_num_examples": self._last_num_examples,
            "terms": [term.state() for term in self.terms],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`; called by ``load_state_dict``.

        Raises:
            ValueError: it is not the state of a penalty; the penalty is then unchanged.
        """
        try:
            online = state["online"]
            loaded = EWCPenalty(
                state["strength"],
                Separate() if online is None else Online(**online),
                shrinkage=state["shrinkage"],
                eigenvector_share=state["eigenvector_share"],
            )
            loaded.num_examples = state["num_examples"]
            loaded._step = state["step"]
            loaded._last_num_examples = state["last_num_examples"]
            loaded.terms = [Quadratic.from_state(term) for term in state["terms"]]
            check_count(loaded._step, "step", least=0)
            check_count(
                loaded._last_num_examples, "last_num_examples", least=min(1, len(loaded.terms))
            )
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"The state is not that of an EWCPenalty ({reason_of(error)}): nothing was loaded."
            ) from error
        # Nothing below can fail, so the state is loaded completely or not at all.
        for name in ("strength", "consolidation", "shrinkage", "eigenvector_share"):
            setattr(self, name, getattr(loaded, name))
        self.num_examples = loaded.num_examples
        self.terms = loaded.terms
        self._step = loaded._step
        self._last_num_examples = loaded._last_num_examples
        self._attached = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the terms too, for ``.to()``, ``.double()`` and so on."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.terms = [term.mapped(fn) for term in self.terms]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without what is computed again."""
        return {**self.__dict__, "_scaled": None, "last_gradient": None}

    # --- matching the model -----------------------------------------------------------

    def _fit(self, model: nn.Module) -> Parameters:
        """The model's parameters in the terms, after growing the terms to their shapes."""
        if not self._attached:  # a matrix-free Fisher was loaded without its network
            self.terms = [
                replace(term, precision=term.precision.attached(model)) for term in self.terms
            ]
            self._attached = True
        self.terms, parameters = fitted(self.terms, model)
        return parameters

    def _is_paced(self, term: Quadratic) -> bool:
        """Whether a step uses a share of the eigenvectors."""
        return self.eigenvector_share < 1 and torch.is_grad_enabled() and pacing.pays(term.place[0])

    def _scaled_terms(self) -> ScaledTerms:
        """The terms in the units of the loss, computed once per task as every step uses them."""
        if self._scaled is None or (self._scaled.scale, self._scaled.of) != (
            self._scale,
            self.terms,
        ):
            self._scaled = ScaledTerms(self._scale, self.terms)
        return self._scaled

    @property
    def _scale(self) -> float:
        """The strength per example of the task in training."""
        return self.strength / (self.num_examples or self._last_num_examples)
