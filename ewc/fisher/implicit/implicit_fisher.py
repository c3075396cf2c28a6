"""The Fisher information without a matrix: products through the network itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from ewc.checks import check_count, check_not_negative, reason_of
from ewc.fisher.faults import check_finite
from ewc.fisher.implicit.network_product import NetworkProduct
from ewc.fisher.implicit.pieces import Piece, described, from_description
from ewc.fisher.network_state import copied, plain_operations
from ewc.fisher.structures.diagonal import DiagonalAccumulator
from ewc.linalg.krylov import (
    Estimate,
    conjugate_gradients,
    hutchinson_trace,
    lanczos_quadrature,
)
from ewc.matrices.matrix import FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    flatten,
    grown_shapes,
    padded,
    shapes_of,
    size_of,
    unflatten,
)
from ewc.wrappers import unwrapped


class ImplicitFisher(FisherMatrix):
    r"""The matrix as :math:`v \mapsto \frac1N \sum_n J_n^\top \sum_k s_{kn} (s_{kn}^\top J_n v)`.

    It stores a copy of the network, the inputs and the score vectors (``N k c`` numbers).
    Every product takes one forward derivative in direction ``v`` and one backward pass over
    all data.  There is no approximation, and the memory suffices for the largest networks.

    ``solve`` uses conjugate gradients.  ``diagonal`` and ``trace`` are exact, by one pass
    with all score vectors.  ``logdet`` is a stochastic estimate, with the standard error of
    :meth:`logdet_estimate`.  ``eigenvalues`` need the dense matrix.  Saving writes the
    parameters and the data.  Loading needs the network: ``FisherMatrix.load(path, model)``.

    Args:
        products: the products with a copy of the network; ``None`` until :meth:`attached`.
        weights: the parameters and buffers of the network.
        pieces: the data.
        network_shapes: the parameters of the network that the products are over.
        shapes: the parameters of the matrix: those of the network, possibly with more rows,
            and parameters that the outputs do not depend on.
        num_examples: the number of examples in all processes.
        factor: a factor of the mean.
        group: the processes that have the data.
    """

    def __init__(
        self,
        products: NetworkProduct | None,
        weights: Parameters,
        pieces: Sequence[Piece],
        *,
        network_shapes: Shapes,
        shapes: Shapes,
        num_examples: int,
        factor: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> None:
        self._products = products
        self.weights = weights
        self.pieces = list(pieces)
        self.network_shapes = dict(network_shapes)
        self.shapes = dict(shapes)
        self.num_examples = num_examples
        self.factor = factor
        self.group = group

    # --- products -----------------------------------------------------------------------

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The product, by a forward derivative in direction ``v`` and a backward pass.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
            FloatingPointError: a derivative of the network is not finite.
            RuntimeError: the matrix was loaded without its network.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        products = self.products
        with plain_operations(products.model):
            total = {
                name: torch.zeros(shape, dtype=self.dtype, device=self.device)
                for name, shape in self.network_shapes.items()
            }
            direction = self._of_network(v)
            for piece in self.pieces:
                for name, tensor in products.product(piece, direction).items():
                    total[name] += tensor
        if self.group is not None:
            flat = flatten(total)
            distributed.all_reduce(flat, group=self.group)
            total = unflatten(flat, self.network_shapes)
        scale = self.factor / self.num_examples
        return padded({name: scale * tensor for name, tensor in total.items()}, self.shapes)

    def quadratic_form(self, v: Mapping[str, Tensor]) -> Tensor:
        r"""The scalar :math:`v^\top F v`, by a forward derivative in direction ``v``.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
            FloatingPointError: a derivative of the network is not finite.
            RuntimeError: the matrix was loaded without its network.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        products = self.products
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        with plain_operations(products.model):
            for piece in self.pieces:
                total += products.along(piece, self._of_network(v)).square().sum()
        if self.group is not None:
            distributed.all_reduce(total, group=self.group)
        return self.factor / self.num_examples * total

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(F + \delta I) u = v`, by conjugate gradients.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: it does not converge, because the damping is too small.
        """
        check_not_negative(damping, "damping")
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return conjugate_gradients(self.matvec, self.diagonal(), v, damping)

    def diagonal(self) -> Parameters:
        """The exact diagonal, by parameter: one pass with all score vectors.

        Raises:
            FloatingPointError: an entry is not finite.
            RuntimeError: the matrix was loaded without its network.
        """
        products = self.products
        with plain_operations(products.model), torch.no_grad():
            total = DiagonalAccumulator(products.parameters)
            for piece in self.pieces:
                for pullbacks in products.pullbacks(piece):
                    for pullback in pullbacks:
                        pullback.add_squares(total.total)
        check_finite(total.total)
        flat = flatten(total.total)
        if self.group is not None:
            distributed.all_reduce(flat, group=self.group)
        scale = self.factor / self.num_examples
        return padded(unflatten(scale * flat, self.network_shapes), self.shapes)

    # --- estimates ----------------------------------------------------------------------

    def trace_estimate(self, num_samples: int = 30, seed: int = 0) -> Estimate:
        r"""The trace by :math:`E[z^\top F z]` over random signs, with its standard error.

        Cheaper than the exact :meth:`trace` if there are more score vectors than samples.
        """
        return hutchinson_trace(self._flat_product, self._like, num_samples, seed)

    def logdet_estimate(self, damping: float, num_samples: int = 30, seed: int = 0) -> Estimate:
        r""":math:`\log \det (F + \delta I)` by Lanczos quadrature, with its standard error.

        Raises:
            ValueError: ``damping`` is not a finite number above 0.
        """
        if damping == 0:
            raise ValueError(
                "damping is 0: a log-determinant is estimated only for a damping above 0."
            )
        check_not_negative(damping, "damping")
        # Relative to the damping, the function is 0 at the many zero eigenvalues.
        relative = lanczos_quadrature(
            self._flat_product,
            lambda values: (values / damping).log1p(),
            self._like,
            num_samples,
            seed,
        )
        constant = self.num_parameters * float(torch.tensor(damping, dtype=torch.float64).log())
        return Estimate(relative.value + constant, relative.standard_error)

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\log \det (F + \delta I)`, the value of :meth:`logdet_estimate`.

        Without damping it is computed from the dense matrix.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        if damping == 0:
            return super().logdet(damping)
        value = self.logdet_estimate(damping).value
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def _of_network(self, v: Mapping[str, Tensor]) -> Parameters:
        """A copy of the entries of a vector that belong to the network's parameters."""
        return {
            name: v[name][: shape[0]].clone() if shape else v[name].clone()
            for name, shape in self.network_shapes.items()
        }

    def _flat_product(self, vector: Tensor) -> Tensor:
        return flatten(self.matvec(unflatten(vector, self.shapes)))

    @property
    def _like(self) -> Tensor:
        return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)

    # --- copies ---------------------------------------------------------------------------

    @property
    def products(self) -> NetworkProduct:
        """The products with the network.

        Raises:
            RuntimeError: the matrix was loaded without its network.
        """
        if self._products is None:
            raise RuntimeError(
                "The matrix-free Fisher was loaded without its network: pass it to "
                "FisherMatrix.load(path, model) or attached(model)."
            )
        return self._products

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the products: single precision at least."""
        return accumulation_dtype(self.weights[next(iter(self.network_shapes))].dtype)

    @property
    def device(self) -> torch.device:
        return self.weights[next(iter(self.network_shapes))].device

    def attached(self, model: nn.Module) -> "ImplicitFisher":
        """The matrix with a copy of a network, which gets the stored parameters.

        Raises:
            ValueError: the network has other parameters, or one without derivatives.
        """
        try:
            with unwrapped(model) as bare:
                for name, parameter in bare.named_parameters():
                    if not parameter.is_floating_point():
                        raise ValueError(
                            f"Parameter {name!r} is {parameter.dtype}: a matrix-free Fisher matrix "
                            "takes derivatives, which need floating-point parameters."
                        )
                network = copied(bare, self.weights)
        except RuntimeError as error:
            raise ValueError(
                f"{type(model).__name__} does not fit the saved Fisher matrix ({reason_of(error)})."
            ) from error
        return self._with(products=NetworkProduct(network, list(self.network_shapes)))

    def __repr__(self) -> str:
        """The base's, but without the trace if there is no network."""
        if self._products is not None:
            return super().__repr__()
        return f"ImplicitFisher(parameters={self.num_parameters}, without its network)"

    def scaled(self, factor: float) -> "ImplicitFisher":
        return self._with(factor=factor * self.factor)

    def with_num_examples(self, num_examples: int) -> "ImplicitFisher":
        check_count(num_examples, "num_examples")
        factor = self.factor * int(num_examples) / self.num_examples
        return self._with(num_examples=int(num_examples), factor=factor)

    def embedded(self, shapes: Shapes) -> "ImplicitFisher":
        return self._with(shapes=shapes)

    def mapped(self, function: Any) -> "ImplicitFisher":
        """The matrix with ``function`` applied to its parameters and data."""
        result = self._with(
            products=None,
            weights={name: function(tensor) for name, tensor in self.weights.items()},
            pieces=[
                Piece(piece.arguments.map(function), function(piece.scores))
                for piece in self.pieces
            ],
        )
        return result if self._products is None else result.attached(self._products.model)

    def _with(self, **changes: Any) -> "ImplicitFisher":
        now: dict[str, Any] = {
            "products": self._products,
            "weights": self.weights,
            "pieces": self.pieces,
            "network_shapes": self.network_shapes,
            "shapes": self.shapes,
            "num_examples": self.num_examples,
            "factor": self.factor,
            "group": self.group,
        }
        return ImplicitFisher(**(now | changes))

    def check_entries(self) -> None:
        # Only the diagonal: a network may have infinite buffers, such as masks.  Without the
        # network there are no entries yet.
        if self._products is not None:
            self._check_diagonal()

    def description(self) -> State:
        """The :meth:`state` and the name of the structure.

        Raises:
            ValueError: the data are distributed over several processes.
            TypeError: the matrix is that of a loss function, which a file cannot hold.
        """
        if self.group is not None:
            raise ValueError(
                "A matrix-free Fisher of a process group cannot be saved, because every process "
                "has only its shard of the data: group must be None in fisher_information."
            )
        return super().description()

    def state(self) -> State:
        """The network's parameters and buffers, and the data."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        data, calls = described(self.pieces)
        return tensors | data, {
            "own": {name: list(shape) for name, shape in self.network_shapes.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "num_examples": self.num_examples,
            "factor": self.factor,
            "calls": calls,
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of these parameters and data, without a network.

        Raises:
            ValueError: the tensors and the description do not fit together.
        """
        prefix = "weights/"
        weights = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        network_shapes, shapes = (
            {name: size_of(shape) for name, shape in about[key].items()}
            for key in ("own", "shapes")
        )
        stored = shapes_of({name: weights[name] for name in network_shapes})
        check_same_shapes(stored, network_shapes, "The network")
        check_same_shapes(grown_shapes(network_shapes, shapes), shapes, "The set of parameters")
        check_count(about["num_examples"], "num_examples")
        check_not_negative(about["factor"], "factor")
        return cls(
            None,
            weights,
            from_description(tensors, about["calls"]),
            network_shapes=network_shapes,
            shapes=shapes,
            num_examples=about["num_examples"],
            factor=about["factor"],
        )
