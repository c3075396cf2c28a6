r"""Natural gradient descent (Amari 1998), with a Fisher matrix of any structure."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc.checks import check_instance, check_not_negative, check_positive, check_share, is_number
from ewc.fisher.estimators import Estimator, Exact, check_estimator, check_no_loss
from ewc.fisher.implicit.implicit import Implicit
from ewc.fisher.information import fisher_information
from ewc.fisher.structures.kronecker import Kronecker
from ewc.fisher.structures.structure import Structure, check_structure
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.matrices.matrix import DampedInverse, FisherMatrix
from ewc.parameters import Parameters, accumulation_dtype, dot, trainable_parameters
from ewc.wrappers import named_parameters

DAMPING_FACTOR = 1.5
"""The factor by which :meth:`NaturalGradient.adapt_damping` changes the damping."""


class NaturalGradient(Optimizer):
    r"""Steps along :math:`-(F + \delta I)^{-1} \nabla L`: steepest descent in the KL divergence.

    Among all moves that change the model's distribution by as many nats, the natural gradient
    lowers the loss most.  To first order its path does not depend on the parametrisation of the
    model (Amari 1998, "Natural gradient works efficiently in learning").  With a Kronecker
    structure this is K-FAC (Martens & Grosse 2015, arXiv:1503.05671), with an
    eigenvalue-corrected one EKFAC (George et al. 2018, arXiv:1806.03884), and with a dense one
    the exact method.  The damping is added to :math:`F`, not to its factors.

    A step has the direction :math:`d = -(F + \delta I)^{-1} (\nabla L + w \theta)`, momentum
    :math:`\mu` and learning rate :math:`\eta`:

    .. math:: u \leftarrow \mu u + d, \qquad \theta \leftarrow \theta + \eta\, c\, u, \qquad
              c = \min\big(1, \sqrt{2 \kappa / (\eta^2 u^\top F u)}\big)

    The trust region ``max_kl``, :math:`\kappa`, bounds the change of the model's predictions by
    a step: :math:`\tfrac12 \eta^2 c^2 u^\top F u \le \kappa` nats per example.

    The loss must be the mean over examples of the negative log-likelihood, as ``cross_entropy``
    is for :class:`Categorical`.  A step with ``lr=1`` is then a Newton step.
    :meth:`update_fisher` takes the Fisher information anew, as often as you call it::

        optimizer = NaturalGradient(model, lr=0.1, momentum=0.7, damping=0.03, tolerance=0.1)
        for step, (x, y) in enumerate(batches):
            if step % 20 == 0:
                optimizer.update_fisher([(x, y)])
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            careful = step < 20 or step % 4 == 0
            optimizer.step(batch=(x[:500], y[:500]) if careful else None)

    ``param_groups[0]`` holds ``lr``, ``momentum``, ``weight_decay``, ``damping``, ``max_kl``
    and ``longest``, the bound from the last ``step(batch=...)``.  Schedulers of the learning
    rate work as usual, and the damping may be set there at any time.

    Args:
        model: the network.  A step moves the parameters that require a gradient, and did so at
            the last :meth:`update_fisher`.  A parameter frozen in between stays; a dense block
            around it is right again after the next :meth:`update_fisher`.
        likelihood: what the outputs mean.
        lr: :math:`\eta`.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`w`, the gradient of :math:`\tfrac w2 |\theta|^2`.
        damping: :math:`\delta`, or a schedule from the number of the step, from 0 on, to it.
        max_kl: :math:`\kappa` in nats per example; ``None`` for no trust region.
        decay: the weight of the running mean of Fisher matrices at each :meth:`update_fisher`;
            0 keeps the last matrix only.  A mean of Kronecker matrices is projected to one
            (:func:`~ewc.matrices.nearest_kronecker`), a mean of eigenvalue-corrected ones to the
            eigenvectors of the last.
        tolerance: the relative error of :math:`v^\top (F + \delta I)^{-1} v` for every ``v``.
            With 0.1 eigenvalues below a tenth of the damping count as 0, and a step with a
            Kronecker structure costs a tenth of one with 0 (the eigenvectors of K-FAC in wide
            layers a half).
        estimator: how the expectation over targets is taken.
        structure: what is kept of the matrix.

    Raises:
        ValueError: an option is outside its range, or the model has no trainable parameter.
        TypeError: the model, the likelihood, the estimator or the structure has another type.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood = Categorical(),
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float | Callable[[int], float] = 1e-2,
        max_kl: float | None = None,
        decay: float = 0.0,
        tolerance: float = 0.0,
        estimator: Estimator = Exact(),
        structure: Structure[Any] = Kronecker(),
    ) -> None:
        schedule = damping if callable(damping) else None
        first = damping(0) if callable(damping) else damping
        check_instance(model, nn.Module, "model", "the network itself, not its parameters")
        check_likelihood(likelihood)
        check_estimator(estimator)
        check_structure(structure)
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("damping", first)):
            check_not_negative(value, name)
        if not (is_number(momentum) and 0 <= momentum < 1):
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}.")
        check_positive(max_kl, "max_kl", optional=True)
        check_share(decay, "decay")
        check_not_negative(tolerance, "tolerance")
        self.model = model
        self.likelihood = likelihood
        self.estimator = estimator
        self.structure = structure
        self.decay = decay
        self.schedule = schedule
        self.fisher: FisherMatrix | None = None
        self.tolerance = tolerance
        self._last: _Step | None = None
        self._known_inverse: tuple[FisherMatrix, float, DampedInverse] | None = None
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": first,
            "max_kl": max_kl,
            "longest": math.inf,
            "num_steps": 0,
        }
        trainable_parameters(model)  # there must be one
        # The frozen too: they may be trained later, and their gradients must be cleared then.
        super().__init__(model.parameters(), options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that the model has gained to the one group.

        :meth:`update_fisher` does so by itself.

        Raises:
            ValueError: a parameter is not one of the model, or the group has options.
        """
        if not self.param_groups:
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        parameters = [given] if isinstance(given, Tensor) else list(given)
        known = set(self.model.parameters())
        if param_group.keys() != {"params"} or not known.issuperset(parameters):
            raise ValueError(
                "NaturalGradient has one group of parameters, those of its model: "
                "param_group must hold 'params' of that model and no other option."
            )
        self._adopt(parameters)

    def _adopt(self, parameters: Iterable[Tensor]) -> None:
        known = set(self.param_groups[0]["params"])
        self.param_groups[0]["params"] += [p for p in parameters if p not in known]

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer, with the running Fisher matrix and the last step.

        It holds tensors and plain values, which ``torch.load`` takes with ``weights_only=True``.
        """
        fisher = None
        if self.fisher is not None:
            tensors, about = self.fisher.description()
            fisher = {"tensors": tensors, "about": about}
        last = None if self._last is None else self._last._asdict()
        extra = {"fisher": fisher, "last": last}
        return {**super().state_dict(), "natural_gradient": extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as the optimizer that made this state.

        Raises:
            ValueError: the state does not fit; the optimizer is then unchanged.
        """
        # States of earlier versions have no Fisher matrix: update_fisher must make one.
        extra = state_dict.get("natural_gradient", {"fisher": None, "last": None})
        device = next(self.model.parameters()).device
        fisher, last = None, None
        if extra["fisher"] is not None:
            fisher = FisherMatrix.from_description(
                extra["fisher"]["tensors"], extra["fisher"]["about"]
            )
            fisher = fisher.to(device).attached(self.model)
        if extra["last"] is not None:
            moved = {
                key: {name: tensor.to(device) for name, tensor in extra["last"][key].items()}
                for key in ("gradient", "move")
            }
            last = _Step(**{**extra["last"], **moved})
        super().load_state_dict(state_dict)
        _restore_types(self, state_dict)
        self.fisher, self._last = fisher, last

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but the inverse, which is made again."""
        return {**self.__dict__, "_known_inverse": None}

    @torch.no_grad()
    def update_fisher(self, data: Iterable[Any]) -> None:
        """Add the Fisher information at the present parameters to the running mean.

        Args:
            data: batches, as for :func:`~ewc.fisher_information`.  More batches mean less noise.

        Raises:
            TypeError: there is a ``decay``, and a mean of two such matrices has another structure.
            ValueError: ``data`` is empty.
        """
        self._adopt(self.model.parameters())
        fresh = fisher_information(
            self.model,
            data,
            self.likelihood,
            estimator=self.estimator,
            structure=self.structure,
        )
        if self.fisher is None or self.decay == 0:
            self.fisher = fresh
            return
        mean = (self.decay * self.fisher + (1 - self.decay) * fresh).nearest()
        if len(mean.terms) > 1:
            raise TypeError(
                f"decay must be 0 with {type(fresh).__name__}, got {self.decay}: a running mean "
                "needs a diagonal, Kronecker, eigenvalue-corrected or dense structure."
            )
        self.fisher = mean

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, batch: Any = None) -> Any:
        r"""Take one step.

        A structure holds the information of single layers, from some steps ago.  Along the
        step's direction it is easily five times too small.  With a ``batch`` the step ends at
        the minimum of the quadratic model along it at the latest,
        :math:`\eta \, c \le - \nabla L^\top u / u^\top (F + \delta I) u`, with the exact
        Fisher information of these examples (Martens & Grosse 2015, section 6.4).  The bound
        holds until the next step with a batch.  A batch in each of the first twenty steps, and
        in some later ones, keeps training stable.

        Args:
            closure: computes the loss and its gradients, and returns the loss.
            batch: some hundred examples of the present batch, as for
                :func:`~ewc.fisher_information`; ``None`` keeps the bound.

        Raises:
            RuntimeError: :meth:`update_fisher` was not called before.
            ValueError: there is a batch, but the estimator has a loss in place of the likelihood.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        if batch is not None:
            check_no_loss(self.estimator, "step(batch=...)")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fisher is None:
            raise RuntimeError(
                "The Fisher information is not known yet: call update_fisher before the first step."
            )
        options = self.param_groups[0]
        if self.schedule is not None:
            options["damping"] = self.schedule(options["num_steps"])
        named = named_parameters(self.model)
        here = {name: p for name, p in named if name in self.fisher.shapes}
        # What was frozen since the last update_fisher is in the matrix, but stays.
        free = {name: p for name, p in here.items() if p.requires_grad}
        if not free:
            return loss
        gradient = _gradient(here, options["weight_decay"])
        direction = self._inverse(options["damping"])(gradient)
        move = {name: torch.zeros_like(tensor) for name, tensor in direction.items()}
        move |= self._with_momentum(free, direction, options["momentum"])
        if batch is not None:
            ridge = options["damping"] + options["weight_decay"]
            self._bound(batch, free, gradient, move, ridge)
        length = min(options["lr"], options["longest"])
        if options["max_kl"] is not None:
            curvature = float(self.fisher.quadratic_form(move))
            if length**2 * curvature > 2 * options["max_kl"]:
                length = math.sqrt(2 * options["max_kl"] / curvature)
        for name, parameter in free.items():
            parameter.sub_(move[name].to(parameter.dtype), alpha=length)
        self._last = _Step(gradient, move, length, options["damping"])
        options["num_steps"] += 1
        return loss

    def adapt_damping(self, change: float) -> float:
        r"""Change the damping according to the quadratic model of the last step.

        This is the Levenberg-Marquardt rule (Martens & Grosse 2015, section 6.5).  For the move
        :math:`\Delta` the model forecasts :math:`M = \nabla L^\top \Delta + \tfrac12
        \Delta^\top (F + \delta I) \Delta`.  The damping grows if the loss changed by less than a
        quarter of :math:`M`, and shrinks if it changed by more than three quarters.

        Args:
            change: the change of the loss over the last step, on the same batch, in nats per
                example; a decrease is negative.

        Returns:
            The ratio of the change to the forecast, 1 if the model is exact.

        Raises:
            RuntimeError: there was no step yet, or the damping follows a schedule.
            ValueError: the change is not finite.
        """
        if not is_number(change):
            raise ValueError(f"change must be a finite number, got {change!r}.")
        if self.schedule is not None:
            raise RuntimeError("The damping follows a schedule: do not call adapt_damping.")
        if self._last is None or self.fisher is None:
            raise RuntimeError("There was no step yet: call step before adapt_damping.")
        last = self._last
        bend = self.fisher.quadratic_form(last.move) + last.damping * dot(last.move, last.move)
        slope = dot(last.gradient, last.move)
        forecast = float(0.5 * last.length**2 * bend - last.length * slope)
        ratio = change / forecast if forecast else 1.0
        if ratio < 0.25:
            self.param_groups[0]["damping"] *= DAMPING_FACTOR
        elif ratio > 0.75:
            self.param_groups[0]["damping"] /= DAMPING_FACTOR
        return ratio

    def _inverse(self, damping: float) -> DampedInverse:
        """The damped inverse, made anew if the matrix or the damping has changed."""
        assert self.fisher is not None
        known = self._known_inverse
        if known is None or known[0] is not self.fisher or known[1] != damping:
            inverse = self.fisher.damped_inverse(damping, self.tolerance)
            self._known_inverse = known = self.fisher, damping, inverse
        return known[2]

    def _bound(
        self,
        batch: Any,
        free: Mapping[str, nn.Parameter],
        gradient: Parameters,
        move: Parameters,
        ridge: float,
    ) -> None:
        """Bound the length of a step by the curvature, F plus a ridge, along it."""
        exact = fisher_information(
            self.model,
            [batch],
            self.likelihood,
            structure=Implicit(),
            parameters=list(free.values()),
        )
        moved = {name: move[name] for name in exact.shapes}
        bend = float(exact.quadratic_form(moved)) + ridge * float(dot(move, move))
        slope = float(dot(gradient, move))
        # Momentum may lead uphill on this batch: that says nothing of the length.
        if slope > 0 and bend > 0:
            self.param_groups[0]["longest"] = slope / bend

    def _with_momentum(
        self, here: Mapping[str, nn.Parameter], direction: Parameters, mass: float
    ) -> Parameters:
        """The direction of some parameters, with momentum."""
        if mass == 0:
            return {name: direction[name] for name in here}
        move: Parameters = {}
        for name, parameter in here.items():
            velocity = self.state[parameter].get("momentum_buffer")
            if velocity is None:
                velocity = torch.zeros_like(direction[name])
            self.state[parameter]["momentum_buffer"] = move[name] = velocity.mul_(mass).add_(
                direction[name]
            )
        return move


class _Step(NamedTuple):
    """The last step: the gradient before it, the move, its length and the damping."""

    gradient: Parameters
    move: Parameters
    length: float
    damping: float


def _restore_types(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give an optimizer copies of its tensors in the types in which they were saved.

    ``torch`` casts them to the types of the parameters, which rounds moments that are held in
    single precision for parameters in half precision.
    """
    saved, present = (
        chain.from_iterable(group["params"] for group in groups)
        for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    for number, parameter in zip(saved, present, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def _gradient(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> Parameters:
    """The gradients of the loss plus weight decay; 0 for a parameter without one.

    A frozen parameter counts as one without, even if it has an old gradient.
    """
    gradients: Parameters = {}
    for name, parameter in parameters.items():
        free = parameter.requires_grad
        grad = parameter.grad if free else None
        grad = torch.zeros_like(parameter) if grad is None else grad
        grad = grad.detach().to(accumulation_dtype(grad.dtype))
        gradients[name] = grad.add(parameter, alpha=weight_decay) if free and weight_decay else grad
    return gradients
