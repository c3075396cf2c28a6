r"""The verbs of a Fisher matrix, whatever its structure.

A structure supplies ``matvec``, its pieces for saving, and an accumulator.  Every other
verb has a slow, correct default here, built from the definition; a structure overrides
those it can do faster.
"""

import copy
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ewc.checks import check_count, check_not_negative
from ewc.fisher.accumulator import Accumulator, Configured
from ewc.fisher.damped_inverse import DampedInverse, Solving
from ewc.parameters import (
    Parameters,
    Shapes,
    check_same_shapes,
    dot,
    flatten,
    shapes_of,
    unflatten,
)

State = tuple[dict[str, Tensor], dict[str, Any]]
"""A matrix as tensors by name, and a description that JSON can hold."""


class FisherMatrix(ABC):
    r"""The mean Fisher information per example, :math:`F = \frac1N \sum_n F_n`, at one theta.

    Vectors (``v``, ``diagonal()``) are :data:`~ewc.parameters.Parameters`; ``p`` is the
    number of scalar parameters.  All units are nats per squared unit of the parameters.

    Attributes:
        shapes: the parameters by name, in the flat order.
        num_examples: :math:`N`, the examples behind the mean.
    """

    shapes: Shapes
    num_examples: int

    @classmethod
    @abstractmethod
    def accumulator(cls, parameters: Parameters) -> Accumulator:
        """An empty sum over these parameters, for the pass over the data."""

    @classmethod
    def configured(cls, **options: Any) -> Configured[Self]:
        """The structure with options, as ``fisher_information`` takes it.

        Raises:
            TypeError: the structure has no such option.
        """
        known = list(signature(cls.accumulator).parameters)[1:]
        if unknown := options.keys() - set(known):
            raise TypeError(
                f"{cls.__name__} has no option {min(unknown)!r}: "
                f"it has {', '.join(known) or 'none'}."
            )
        return Configured(cls, options)

    @abstractmethod
    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The product :math:`F v`."""

    @abstractmethod
    def scaled(self, factor: float) -> "FisherMatrix":
        """The matrix :math:`c F`, with the same ``num_examples``; see ``*``."""

    @abstractmethod
    def embedded(self, shapes: Shapes) -> "FisherMatrix":
        """The same matrix over more parameters: zero for new names and new last rows."""

    @abstractmethod
    def state(self) -> State:
        """Everything needed to build the matrix again; see :meth:`from_state`."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix described by what :meth:`state` returned."""

    # --- verbs with a slow, correct default ------------------------------------------

    def quadratic_form(self, v: Mapping[str, Tensor]) -> Tensor:
        r"""The scalar :math:`v^\top F v`: for a small step ``v``, twice the KL in nats."""
        return dot(v, self.matvec(v))

    def to_dense(self) -> Tensor:
        """The matrix itself, shape ``[p, p]``, in the flat order."""
        identity = torch.eye(self.num_parameters, dtype=self.dtype, device=self.device)
        return torch.stack([flatten(self.matvec(unflatten(e, self.shapes))) for e in identity])

    def diagonal(self) -> Parameters:
        """The diagonal, by parameter."""
        return unflatten(self.to_dense().diagonal(), self.shapes)

    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar."""
        return flatten(self.diagonal()).sum()

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(F + \delta I) u = v`, ``damping`` being :math:`\delta`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        factor = torch.linalg.cholesky(self._damped(damping))
        flat = flatten({name: v[name] for name in self.shapes})
        return unflatten(torch.cholesky_solve(flat[:, None], factor)[:, 0], self.shapes)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        r"""The scalars :math:`v_n^\top (F + \delta I)^{-1} v_n` of many vectors, ``[n]``.

        One :meth:`solve` a vector here; all at once where a structure can.

        Args:
            v: the vectors, ``[n, ...]`` by parameter.
            damping: :math:`\delta`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        rows = self._checked_rows(v)
        forms = []
        for row in range(len(next(iter(rows.values())))):
            one = {name: tensor[row] for name, tensor in rows.items()}
            forms.append(dot(one, self.solve(one, damping)))
        return torch.stack(forms)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, for many vectors.

        It keeps what :meth:`solve` would find again for each of them.

        Args:
            damping: :math:`\delta`.
            tolerance: the relative error that :math:`v^\top (F + \delta I)^{-1} v` may have at
                any ``v``, where a structure is faster for it.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        check_not_negative(damping, "damping")
        check_not_negative(tolerance, "tolerance")
        return Solving(self, damping)

    def inverse_diagonal(self, damping: float) -> Parameters:
        r"""The diagonal of :math:`(F + \delta I)^{-1}`, by parameter.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._damped(damping)))
        return unflatten(inverse.diagonal(), self.shapes)

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\log \det (F + \delta I)`, a scalar; ``-inf`` where it is singular.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        logdet: Tensor = torch.linalg.slogdet(self._damped(damping)).logabsdet
        return logdet

    def eigenvalues(self) -> Tensor:
        """All ``p`` eigenvalues in ascending order, shape ``[p]``."""
        values: Tensor = torch.linalg.eigvalsh(self.to_dense())
        return values

    def __add__(self, other: "FisherMatrix") -> "FisherMatrix":
        r"""The exact sum of two matrices over the same parameters.

        ``num_examples`` add up, so ``(A.precision + B.precision) * (1 / N)`` with the
        summed ``N`` is the mean over both sets of examples.
        """
        from ewc.fisher.sum import SumFisher  # a sum is a structure: it builds on this class

        return SumFisher([self, other])

    def __mul__(self, factor: float) -> "FisherMatrix":
        """The matrix :math:`c F`, with the same ``num_examples``.

        Raises:
            ValueError: the factor is negative or not finite (the result would be no
                Fisher matrix).
        """
        check_not_negative(factor, "factor")
        return self.scaled(factor)

    __rmul__ = __mul__

    def __radd__(self, nothing: int) -> "FisherMatrix":
        """The matrix itself behind ``0``, with which ``sum(matrices)`` starts."""
        return self if nothing == 0 else NotImplemented

    # --- what all structures share ----------------------------------------------------

    @property
    def precision(self) -> "FisherMatrix":
        """``N F``: the information of the whole data set, a Laplace posterior's precision."""
        return self.scaled(float(self.num_examples))

    def with_num_examples(self, num_examples: int) -> Self:
        """The same mean, as the information of another number of examples.

        For a matrix that was taken from a sample of a data set: its mean is the data set's
        up to the noise of the sample, its :attr:`precision` is not.

        Args:
            num_examples: the size of the data set, 1 or more.

        Raises:
            ValueError: it is not a whole number, 1 or more.
        """
        check_count(num_examples, "num_examples")
        result = copy.copy(self)
        result.num_examples = int(num_examples)
        return result

    @property
    def num_parameters(self) -> int:
        """``p``, the number of scalar parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the entries."""
        return next(iter(self.state()[0].values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(iter(self.state()[0].values())).device

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The matrix with ``function`` applied to every tensor it holds."""
        tensors, about = self.state()
        return self.from_state({key: function(value) for key, value in tensors.items()}, about)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The matrix on another device or in another floating-point type."""
        return self.mapped(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        )

    def attached(self, model: nn.Module) -> "FisherMatrix":
        """The matrix with the network that a matrix-free one needs to take products."""
        return self

    def description(self) -> State:
        """What :meth:`state` returns, and the name of the structure with it."""
        tensors, about = self.state()
        return tensors, {"structure": type(self).__name__, **about}

    @staticmethod
    def from_description(tensors: dict[str, Tensor], about: dict[str, Any]) -> "FisherMatrix":
        """The matrix, of whatever structure, that :meth:`description` described.

        Raises:
            ValueError: there is no structure of that name.
        """
        return structure_named(about["structure"]).from_state(tensors, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to ``path`` in the safetensors format (no pickle)."""
        tensors, about = self.description()
        copies = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
        save_file(copies, os.fspath(path), metadata={"ewc": json.dumps(about)})

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> "FisherMatrix":
        """The matrix that :meth:`save` wrote, on the CPU, with its own structure.

        Args:
            path: the file.
            model: a network of the kind the matrix was made of, for a matrix-free one: a
                copy of it takes the parameters in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no Fisher matrix.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no Fisher matrix at {os.fspath(path)!r}.")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["ewc"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (KeyError, SafetensorError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} holds no Fisher matrix: only files written by "
                "FisherMatrix.save can be loaded."
            ) from error
        fisher = FisherMatrix.from_description(tensors, about)
        return fisher if model is None else fisher.attached(model)

    def __repr__(self) -> str:
        """One line with the structure, its size and its trace."""
        return (
            f"{type(self).__name__}(parameters={self.num_parameters}, "
            f"tensors={len(self.shapes)}, num_examples={self.num_examples}, "
            f"trace={float(self.trace()):.6g})"
        )

    def _checked_rows(self, v: Mapping[str, Tensor]) -> Parameters:
        """Many vectors ``[n, ...]`` in the flat order."""
        found = {name: tensor.shape[1:] for name, tensor in v.items()}
        check_same_shapes(found, self.shapes, "A row of the vectors")
        return {name: v[name] for name in self.shapes}

    def _damped(self, damping: float) -> Tensor:
        check_not_negative(damping, "damping")
        dense = self.to_dense()
        dense.diagonal().add_(damping)
        return dense


def structure_named(name: str) -> type[FisherMatrix]:
    """The structure whose class has this name, the users' own included.

    Raises:
        ValueError: there is none.
    """
    known = _subclasses(FisherMatrix)
    for structure in known:
        if structure.__name__ == name:
            return structure
    names = ", ".join(structure.__name__ for structure in known)
    raise ValueError(f"Unknown Fisher structure {name!r}: known are {names}.")


def _subclasses(structure: Any) -> list[type[FisherMatrix]]:
    direct: list[type[FisherMatrix]] = structure.__subclasses__()
    return [*direct, *(below for child in direct for below in _subclasses(child))]
