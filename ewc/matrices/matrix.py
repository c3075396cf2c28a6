r"""The verbs of a Fisher matrix, whatever its structure.

A structure supplies ``matvec``, its pieces for saving, and an accumulator.  Every other
verb has a slow, correct default here, built from the definition; a structure overrides
those it can do faster.
"""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import isabstract, signature
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ewc.checks import check_count, check_not_negative, shown
from ewc.matrices.damped_inverse import DampedInverse, Solving
from ewc.matrices.matrix_file import read, write
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    dot,
    flatten,
    shapes_of,
    unflatten,
)
from ewc.pullback.accumulator import Accumulator, Configured

ROUNDING = 0.02
"""Negative eigenvalues that may be of rounding, as a share of a matrix's Frobenius norm."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""A matrix as tensors by name, and a description that JSON can hold."""


class FisherMatrix(ABC):
    r"""The mean Fisher information per example, :math:`F = \frac1N \sum_n F_n`, at one theta.

    Vectors (``v``, ``diagonal()``) are :data:`~ewc.parameters.Parameters`; ``p`` is the
    number of scalar parameters.  All units are nats per squared unit of the parameters.

    Attributes:
        shapes: the parameters by name, in the flat order.
        num_examples: :math:`N`, the examples behind the mean.
        made_by_pass: whether a pass over data can be asked for this structure.
    """

    made_by_pass: ClassVar[bool] = True
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
        summed ``N`` is the mean over both sets of examples.  For two losses on the same
        examples, which must not count twice, see :meth:`plus_on_same_examples`.
        """
        from ewc.matrices.sum import SumFisher  # a sum is a structure: it builds on this class

        return SumFisher([self, other])

    def plus_on_same_examples(self, other: "FisherMatrix") -> "FisherMatrix":
        r"""The exact sum of two matrices of the same examples, which count once.

        The information of two losses on the same :math:`N` examples: where targets are
        independent given the inputs, log-likelihoods add up, and so do their means over the
        examples.  ``A + B`` is the same matrix for :math:`2 N` examples.

        Raises:
            ValueError: the numbers of examples or the parameters differ.
        """
        if self.num_examples != other.num_examples:
            raise ValueError(
                f"The matrices are of {self.num_examples} and {other.num_examples} examples: "
                "those of the same examples have as many; + adds matrices of different ones."
            )
        return (self + other).with_num_examples(self.num_examples)

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

    def check_entries(self) -> None:
        """Check that the matrix can be a Fisher matrix: finite, and without a negative square.

        The diagonal must not be negative anywhere.  Dense matrices and Kronecker factors must
        have no eigenvalue below minus :data:`ROUNDING` times their Frobenius norm; smaller
        ones may be the rounding of half or TF32 precision, and are let pass.

        Raises:
            FloatingPointError: an entry is not finite.
            ValueError: an entry of the diagonal or, beyond rounding, an eigenvalue is negative.
        """
        self._check_diagonal()
        self._check_finite()

    def _check_diagonal(self) -> None:
        for name, entries in self.diagonal().items():
            if not bool(entries.isfinite().all()):
                raise FloatingPointError(f"The Fisher information of {name!r} is not finite.")
            self._check_not_negative(entries, "entry on its diagonal", name)

    def _check_finite(self) -> None:
        for tensor in self.state()[0].values():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise FloatingPointError(
                    f"The Fisher information of {', '.join(self.shapes)} is not finite."
                )

    def _check_not_negative(
        self, values: Tensor, what: str, name: str | None = None, slack: float = 0.0
    ) -> None:
        """Check that no value is below ``-slack``."""
        least = float(values.min()) if values.numel() else 0.0
        if least < -slack:
            where = ", ".join(self.shapes) if name is None else repr(name)
            raise ValueError(
                f"The Fisher information of {where} has a negative {what} ({least:.3g}): a "
                "Fisher matrix has none."
            )

    def _check_semidefinite(self, matrices: Tensor) -> None:
        """Check that matrices ``[..., d, d]`` have no negative eigenvalue beyond rounding."""
        matrices = matrices.to(accumulation_dtype(matrices.dtype))
        # Of a common size: the squares in the norm must not overflow.
        largest = matrices.abs().amax((-2, -1), keepdim=True)
        room = matrices / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.matrix_norm(room)[..., None]
        room.diagonal(dim1=-2, dim2=-1).add_(torch.where(norm > 0, ROUNDING * norm, 1.0))
        if bool(torch.linalg.cholesky_ex(room).info.any()):
            raise ValueError(
                f"The Fisher information of {', '.join(self.shapes)} has a negative eigenvalue: "
                "a Fisher matrix has none."
            )

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
            ValueError: nothing is described so: there is no structure of that name, or what
                it is made of is missing, of another type, or does not fit together.
        """
        try:
            fisher = structure_named(about["structure"]).from_state(tensors, about)
            check_count(fisher.num_examples, "num_examples", least=0)
            if not fisher.dtype.is_floating_point:
                raise TypeError(f"entries of {fisher.dtype}")  # noqa: TRY301
        # No parameters end in a StopIteration, a deep nest of sums in a RecursionError.
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            StopIteration,
            TypeError,
        ) as error:
            raise ValueError(
                f"This describes no Fisher matrix ({type(error).__name__}: {error})."
            ) from error
        return fisher

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to ``path`` in the safetensors format (no pickle).

        The file carries a checksum, and is written whole or not at all.

        Raises:
            OSError: the file cannot be written; one that was there before still is.
        """
        write(path, *self.description())

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> "FisherMatrix":
        """The matrix that :meth:`save` wrote, on the CPU, with its own structure.

        Args:
            path: the file.
            model: a network of the kind the matrix was made of, for a matrix-free one: a
                copy of it takes the parameters in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no Fisher matrix, was damaged since it was saved, or has
                no checksum, as those of earlier versions; the network does not fit.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no Fisher matrix at {os.fspath(path)!r}.")
        tensors, about = read(path)
        try:
            fisher = FisherMatrix.from_description(tensors, about)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} holds no Fisher matrix: {error}") from error
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


Structure = type[FisherMatrix] | Configured[Any]
"""What a pass over data may be asked for: a structure, or one with options."""


def check_structure(structure: Structure) -> None:
    """Check that a pass over data can make this structure.

    Raises:
        TypeError: it is something else than a structure, or one that no pass makes.
    """
    kind = structure.structure if isinstance(structure, Configured) else structure
    if not (isinstance(kind, type) and issubclass(kind, FisherMatrix)) or isabstract(kind):
        raise TypeError(
            "structure must be a FisherMatrix class such as DiagonalFisher, or one with options "
            f"such as LowRankFisher.configured(rank=50), got {shown(structure)}."
        )
    if not kind.made_by_pass:
        raise TypeError(
            f"structure must be one that a pass over data makes, such as DiagonalFisher: a "
            f"{kind.__name__} is made of other matrices."
        )


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
