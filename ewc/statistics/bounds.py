r"""The Cramer-Rao bound: no estimator from ``N`` examples has a smaller variance."""

from collections.abc import Callable

import torch
from torch import Tensor

from ewc.checks import check_count
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, flatten, shapes_of, unflatten

Function = Callable[[Parameters], Tensor]
"""From parameters by name to a tensor."""


def cramer_rao_bound(
    fisher: FisherMatrix,
    num_examples: int,
    *,
    parameters: Parameters | None = None,
    function: Function | None = None,
    bias: Function | None = None,
) -> Tensor:
    r"""The smallest covariance :math:`J (N F)^{-1} J^\top` of an estimator of :math:`g(\theta)`.

    The estimator has the mean :math:`g(\theta) + b(\theta)`, and
    :math:`J = \partial (g + b) / \partial \theta`.  Its covariance minus the bound is positive
    semi-definite (Cramer 1946, section 32; Rao 1945; Lehmann & Casella 1998, theorem 2.6.6).
    With :math:`g` the identity and no bias the bound is :math:`F^{-1} / N`.  The maximum
    likelihood estimate reaches it as ``N`` grows (for functions by the delta method).

    Args:
        fisher: the information :math:`F` of one example.
        num_examples: ``N``, the independent examples of the estimator.
        parameters: :math:`\theta`, needed with a function or a bias.
        function: ``g``, to a tensor of ``m`` entries; ``None`` for all parameters, in the
            flat order.
        bias: ``b``, to a tensor of as many entries; ``None`` for an unbiased estimator.

    Returns:
        The bound, ``[m, m]``, in squared units of ``g``.

    Raises:
        ValueError: ``num_examples`` is below 1, the parameters are missing or not those of
            ``fisher``, or function and bias differ in their number of entries.
        torch.linalg.LinAlgError: the information is singular: the examples say nothing about
            some direction.
    """
    check_count(num_examples, "num_examples")
    size = fisher.num_parameters
    jacobian = torch.eye(size, dtype=fisher.dtype, device=fisher.device)
    if function is not None or bias is not None:
        if parameters is None:
            raise ValueError("parameters must be given with a function or a bias, got None.")
        if function is not None:
            jacobian = jacobian_of(function, parameters, fisher)
        shift = None if bias is None else jacobian_of(bias, parameters, fisher)
        if shift is not None and shift.shape != jacobian.shape:
            raise ValueError(
                f"bias must have as many entries as function, {len(jacobian)}, got {len(shift)}."
            )
        jacobian = jacobian if shift is None else jacobian + shift
    solved = [fisher.solve(unflatten(row, fisher.shapes), damping=0.0) for row in jacobian]
    columns = torch.stack(
        [flatten({name: v[name] for name in fisher.shapes}) for v in solved], dim=1
    )
    bound = jacobian @ columns / num_examples
    return (bound + bound.mT) / 2


def jacobian_of(function: Function, parameters: Parameters, fisher: FisherMatrix) -> Tensor:
    """The derivatives of a function's entries, in the flat order of the matrix, ``[m, p]``.

    Raises:
        ValueError: the parameters are not those of ``fisher``.
    """
    check_same_shapes(shapes_of(parameters), fisher.shapes, "The set of parameters")
    here = {name: parameters[name].detach().to(fisher.dtype) for name in fisher.shapes}
    derivatives = torch.func.jacrev(lambda p: function(p).reshape(-1))(here)
    rows = [derivatives[n].reshape(derivatives[n].shape[0], -1) for n in fisher.shapes]
    return torch.cat(rows, dim=1)
