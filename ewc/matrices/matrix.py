r"""The operations of a Fisher matrix, whatever its structure.

A structure defines ``matvec`` and what is saved of it.  Every other operation has a slow, correct
default here, built from the definition.  A structure overrides those it can do faster.
"""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ewc.checks import check_count, check_not_negative, check_share, reason_of, shown
from ewc.linalg.krylov import (
    conjugate_gradients,
    largest_eigenvalue,
    scaled_largest_eigenvalue,
)
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    difference,
    dot,
    flatten,
    shapes_of,
    unflatten,
)
from ewc.tensor_file import Content, read, write

ROUNDING = 0.02
"""Size of what counts as rounding.

It is a fraction of the Frobenius norm for negative eigenvalues, and of the largest entry for the
difference of an entry from its mirror image."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""A matrix as tensors by name, and a description that JSON can hold."""

_CONTENT = Content("Fisher matrix", "FisherMatrix.save", "Compute and save the matrix again.")


class DampedInverse(ABC):
    r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, at one ``F`` and one damping."""

    @abstractmethod
    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        """The solution for one right-hand side.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """

    def rows(self, v: Tensor, shapes: Shapes) -> Tensor:
        """The solutions for many flat right-hand sides, ``[n, p]``.

        Args:
            v: the vectors, ``[n, p]``, in the flat order.
            shapes: the parameters by name, in the flat order.
        """
        return torch.stack([flatten(self(unflatten(row, shapes))) for row in v])


class InputFactor(Protocol):
    r"""A layer's :math:`G \otimes A` whose products can be restricted to eigenvectors of ``A``."""

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the entries."""

    @property
    def num_inputs(self) -> int:
        """``i``, the size of ``A``."""

    @property
    def input_eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues of ``A``, ascending, ``[i]``, and its eigenvectors, ``[i, i]``."""

    def product_along(self, v: Mapping[str, Tensor], values: Tensor, vectors: Tensor) -> Parameters:
        r"""The product with :math:`\sum_j a_j u_j u_j^\top` in the place of ``A``.

        Args:
            v: the vector.
            values: the :math:`a_j`, ``[k]``.
            vectors: the :math:`u_j` as rows, ``[k, i]``.
        """


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

    @abstractmethod
    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The product :math:`F v`.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """

    @abstractmethod
    def scaled(self, factor: float) -> "FisherMatrix":
        """The matrix :math:`c F`, with the same ``num_examples``; the factor is not checked."""

    @abstractmethod
    def embedded(self, shapes: Shapes) -> "FisherMatrix":
        """The same matrix over more parameters: zero for new names and new last rows."""

    @abstractmethod
    def state(self) -> State:
        """What :meth:`from_state` needs to build the matrix again."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix whose :meth:`state` this is."""

    # --- operations with a slow, correct default -------------------------------------

    def quadratic_form(self, v: Mapping[str, Tensor]) -> Tensor:
        r"""The scalar :math:`v^\top F v`: for a small step ``v``, twice the KL in nats."""
        return dot(v, self.matvec(v))

    def form_and_product(self, here: Parameters, anchor: Parameters) -> tuple[Tensor, Parameters]:
        r"""The form :math:`d^\top F d` and the product :math:`F d` at :math:`d = \theta - a`.

        Args:
            here: :math:`\theta`, with the names and shapes of the matrix, in any types.
            anchor: :math:`a`.
        """
        step = difference(here, anchor, self.dtype)
        product = self.matvec(step)
        return dot(step, product), product

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

        The default takes one :meth:`solve` per vector.

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
            vector = {name: tensor[row] for name, tensor in rows.items()}
            forms.append(dot(vector, self.solve(vector, damping)))
        return torch.stack(forms)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, for many vectors.

        It computes once what :meth:`solve` computes for every vector.

        Args:
            damping: :math:`\delta`.
            tolerance: the largest relative error of :math:`v^\top (F + \delta I)^{-1} v` for
                any ``v``.  Some structures are faster with a tolerance above 0.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        check_not_negative(damping, "damping")
        check_not_negative(tolerance, "tolerance")
        return SolveEachTime(self, damping)

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

    def largest_eigenvalue(self, steps: Mapping[str, float] | None = None) -> float:
        r"""The largest eigenvalue of :math:`H^{1/2} F H^{1/2}`, or slightly less.

        Block-diagonal matrices have a closed form.  The others take a power iteration
        (:func:`ewc.linalg.krylov.largest_eigenvalue`).

        Args:
            steps: the step sizes :math:`H` by parameter, 0 or above; ``None`` for 1.
        """
        sizes = {name: 1.0 if steps is None else steps[name] for name in self.shapes}
        if len(set(sizes.values())) == 1:
            size = next(iter(sizes.values()))
            return size * self._largest_eigenvalue() if size else 0.0
        return scaled_largest_eigenvalue(self.matvec, sizes, self._empty_vector())

    def _largest_eigenvalue(self) -> float:
        """The largest eigenvalue of the matrix itself."""
        return largest_eigenvalue(self.matvec, self._empty_vector())

    def _empty_vector(self) -> Parameters:
        """Empty tensors in the shapes, the type and on the device of a vector."""
        return {
            name: torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }

    def __add__(self, other: "FisherMatrix") -> "FisherMatrix":
        r"""The exact sum of two matrices over the same parameters.

        ``num_examples`` add up.  With the summed ``N``, ``(A.precision + B.precision) * (1 / N)``
        is the mean over both sets of examples.  Two losses on the same examples must not count
        them twice: see :meth:`plus_on_same_examples`.
        """
        return SumFisher([self, other])

    def plus_on_same_examples(self, other: "FisherMatrix") -> "FisherMatrix":
        r"""The exact sum of two matrices of the same examples, which count once.

        This is the information of two losses on the same :math:`N` examples.  Where targets are
        independent given the inputs, log-likelihoods add up, and so do their means over the
        examples.  ``A + B`` is the same matrix for :math:`2 N` examples.

        Raises:
            ValueError: the numbers of examples or the parameters differ.
        """
        if self.num_examples != other.num_examples:
            raise ValueError(
                "Both matrices must be of the same examples, got matrices of "
                f"{self.num_examples} and {other.num_examples} examples: + adds matrices of "
                "different examples."
            )
        return (self + other).with_num_examples(self.num_examples)

    def __mul__(self, factor: float) -> "FisherMatrix":
        """The matrix :math:`c F`, with the same ``num_examples``.

        Raises:
            ValueError: the factor is negative or not finite.
        """
        check_not_negative(factor, "factor")
        return self.scaled(factor)

    __rmul__ = __mul__

    def __radd__(self, nothing: int) -> "FisherMatrix":
        """The matrix itself for ``0 + F``, with which ``sum(matrices)`` starts."""
        return self if nothing == 0 else NotImplemented

    def check_entries(self) -> None:
        """Check that the matrix is finite, symmetric and positive semi-definite, up to rounding.

        No entry of the diagonal may be negative.  In a dense matrix or a Kronecker factor no entry
        may differ from its mirror image by more than :data:`ROUNDING` times the largest one.  No
        eigenvalue may be below minus :data:`ROUNDING` times its Frobenius norm.  Half and TF32
        precision leave that much.

        Raises:
            FloatingPointError: an entry is not finite.
            ValueError: an entry of the diagonal is negative or, beyond rounding, an eigenvalue is,
                or the matrix is not symmetric.
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
        """Check that matrices ``[..., d, d]`` are symmetric and semi-definite, up to rounding."""
        matrices = matrices.to(accumulation_dtype(matrices.dtype))
        # Divided by the largest entry: the squares in the norm must not overflow.
        largest = matrices.abs().amax((-2, -1), keepdim=True)
        room = matrices / torch.where(largest > 0, largest, 1.0)
        if bool(((room - room.mT) > ROUNDING).any()):
            raise ValueError(
                f"The Fisher information of {', '.join(self.shapes)} is not symmetric: a Fisher "
                "matrix is."
            )
        # The form is that of the symmetric part, and Cholesky reads one triangle only.
        room = (room + room.mT) / 2
        norm = torch.linalg.matrix_norm(room)[..., None]
        room.diagonal(dim1=-2, dim2=-1).add_(torch.where(norm > 0, ROUNDING * norm, 1.0))
        if bool(torch.linalg.cholesky_ex(room).info.any()):
            raise ValueError(
                f"The Fisher information of {', '.join(self.shapes)} has a negative eigenvalue: "
                "a Fisher matrix has none."
            )

    def shrunk(self, amount: float) -> "FisherMatrix":
        r"""The matrix with a fraction of its information spread over the units of each layer.

        The Fisher information of a unit that no example excites is zero, and EWC leaves such a
        unit free.  Shrinkage gives every output unit a fraction of the layer's average,

        .. math:: F \leftarrow (1 - \alpha) F
                  + \alpha \, \tfrac1O I_O \otimes \operatorname{tr}_O F ,

        with the partial trace over the ``O`` output units.  The trace stays.  For a Kronecker
        product :math:`G \otimes A` this is the linear shrinkage of a covariance matrix,
        :math:`G \leftarrow (1 - \alpha) G + \alpha \frac{\operatorname{tr} G}{O} I` (Ledoit
        and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4).

        A diagonal matrix takes the first dimension of every parameter as its output units.  This
        is right for linear layers and for convolutions without groups.  Embeddings, transposed
        and grouped convolutions need a Kronecker matrix, which knows its layers.  Blocks without
        units (scales and shifts of normalisations) stay as they are.

        Args:
            amount: :math:`\alpha`, from 0 (no change) to 1 (all units of a layer alike).

        Raises:
            ValueError: ``amount`` is outside [0, 1].
            TypeError: this kind of matrix does not know the units of layers.
        """
        check_share(amount, "shrinkage")
        return self._shrunk(amount) if amount else self

    @property
    def has_units(self) -> bool:
        """Whether the matrix knows the output units of layers; see :meth:`shrunk`."""
        return False

    def _shrunk(self, amount: float) -> "FisherMatrix":
        """The matrix after :meth:`shrunk`, for an amount above 0."""
        raise TypeError(
            "shrinkage needs a diagonal, Kronecker or eigenvalue-corrected Fisher matrix, "
            f"not a {type(self).__name__}."
        )

    def nearest(self) -> "FisherMatrix":
        """The nearest matrix of the same structure, where a sum was kept term by term.

        A sum of Kronecker matrices becomes one Kronecker matrix
        (:func:`~ewc.matrices.nearest_kronecker`).  A sum of eigenvalue-corrected matrices becomes
        one with the eigenvectors of the last term.  Every other matrix stays as it is.
        """
        return self

    def resolvent(self, v: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]) -> Parameters:
        r"""The solution of :math:`(I + H F) u = v`, with the step size of every entry in ``H``.

        A diagonal matrix uses one step size per entry.  Other matrices have a closed form only
        where :math:`H` is a number.  Each of their blocks uses the mean of its step sizes,
        weighted with the squared gradients.

        Args:
            v: the vector.
            steps: the step sizes by parameter, 0 or above; 0 for a name that is missing.
        """
        size = _mean_step([steps[name] for name in v if name in steps])
        if size == 0:
            return dict(v)
        return self.solve({name: tensor / size for name, tensor in v.items()}, 1 / size)

    def matvec_with(
        self,
        v: Mapping[str, Tensor],
        product: "Callable[[FisherMatrix, Parameters], Parameters]",
    ) -> Parameters:
        """The product :math:`F v`, by ``product`` for every block and every term of a sum."""
        return product(self, dict(v))

    def input_factor(self) -> "InputFactor | None":
        """The matrix as a product with a second Kronecker factor; ``None`` without one."""
        return None

    # --- what all structures share ----------------------------------------------------

    @property
    def terms(self) -> "Sequence[FisherMatrix]":
        """The terms of a lazy sum; of any other matrix the matrix itself."""
        return [self]

    @property
    def precision(self) -> "FisherMatrix":
        """``N F``: the information of all examples, the precision of the Laplace posterior."""
        return self.scaled(float(self.num_examples))

    def with_num_examples(self, num_examples: int) -> Self:
        """The same mean, as the information of another number of examples.

        Use it for a matrix from a sample of a data set.  Its mean estimates the mean over the
        data set; its :attr:`precision` is that of the sample only.

        Args:
            num_examples: the size of the data set, 1 or more.

        Raises:
            ValueError: ``num_examples`` is not a whole number, 1 or more.
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
        """The matrix with the network that a matrix-free one needs for its products."""
        return self

    def description(self) -> State:
        """What :meth:`state` returns, with the name of the structure."""
        tensors, about = self.state()
        return tensors, {"structure": type(self).__name__, **about}

    @staticmethod
    def from_description(tensors: dict[str, Tensor], about: dict[str, Any]) -> "FisherMatrix":
        """The matrix, of any structure, whose :meth:`description` this is.

        Raises:
            ValueError: no structure has this name, or an entry is missing, has another type or
                does not fit the others.
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
                f"The description is not that of a Fisher matrix ({reason_of(error)})."
            ) from error
        return fisher

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to ``path`` in the safetensors format (no pickle).

        The file has a checksum.  It is written completely or not at all.

        Raises:
            OSError: the file cannot be written; an existing file is then unchanged.
        """
        write(path, *self.description())

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> "FisherMatrix":
        """The matrix that :meth:`save` wrote, on the CPU, with the same structure.

        Args:
            path: the file.
            model: for a matrix-free matrix, a network of the same architecture.  A copy of it
                gets the parameters in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no Fisher matrix, is damaged, or has no checksum (files of
                earlier versions have none); or the network does not fit.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no Fisher matrix at {os.fspath(path)!r}.")
        tensors, about = read(path, _CONTENT)
        try:
            fisher = FisherMatrix.from_description(tensors, about)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} holds no Fisher matrix: {error}") from error
        return fisher if model is None else fisher.attached(model)

    def __repr__(self) -> str:
        """One line with the structure, the size and the trace."""
        return (
            f"{type(self).__name__}(parameters={self.num_parameters}, "
            f"tensors={len(self.shapes)}, num_examples={self.num_examples}, "
            f"trace={float(self.trace()):.6g})"
        )

    def _checked_rows(self, v: Mapping[str, Tensor]) -> Parameters:
        """Many vectors ``[n, ...]`` in the flat order."""
        row_shapes = {name: tensor.shape[1:] for name, tensor in v.items()}
        check_same_shapes(row_shapes, self.shapes, "A row of the vectors")
        return {name: v[name] for name in self.shapes}

    def _damped(self, damping: float) -> Tensor:
        check_not_negative(damping, "damping")
        dense = self.to_dense()
        dense.diagonal().add_(damping)
        return dense


def structure_named(name: str) -> type[FisherMatrix]:
    """The class of Fisher matrix with this name; subclasses defined by users count too.

    Raises:
        ValueError: no class has this name.
    """
    known = _subclasses(FisherMatrix)
    for structure in known:
        if structure.__name__ == name:
            return structure
    names = ", ".join(structure.__name__ for structure in known)
    raise ValueError(f"The class of a Fisher matrix must be one of {names}, got {shown(name)}.")


def _subclasses(structure: Any) -> list[type[FisherMatrix]]:
    direct: list[type[FisherMatrix]] = structure.__subclasses__()
    return [*direct, *(below for child in direct for below in _subclasses(child))]


class SolveEachTime(DampedInverse):
    """The damped inverse that calls the matrix's ``solve`` for every vector.

    Args:
        fisher: the matrix.
        damping: what is added to its diagonal.
    """

    def __init__(self, fisher: "FisherMatrix", damping: float) -> None:
        self.fisher = fisher
        self.damping = damping

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        return self.fisher.solve(v, self.damping)


DENSE_LIMIT = 4096
"""Largest number of parameters for which a matrix without a closed form is made dense."""


class SumFisher(FisherMatrix):
    r"""The exact sum :math:`\sum_t F_t` of matrices of any structures.

    ``matvec``, ``diagonal`` and ``trace`` cost the sum of the terms' costs.  ``solve`` uses
    conjugate gradients where the matrix is large.  The other operations use the dense matrix.

    Args:
        terms: matrices over the same parameters; a sum among them counts as its terms.
        num_examples: the examples behind the mean; ``None`` for those of all terms together.

    Raises:
        ValueError: the parameters of the terms differ.
    """

    def __init__(self, terms: Sequence[FisherMatrix], num_examples: int | None = None) -> None:
        self._terms = [summand for term in terms for summand in term.terms]
        self.shapes = self.terms[0].shapes
        for term in self.terms[1:]:
            check_same_shapes(term.shapes, self.shapes, "The other Fisher matrix")
        together = sum(term.num_examples for term in terms)
        self.num_examples = together if num_examples is None else num_examples

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        total = self.terms[0].matvec(v)
        for term in self.terms[1:]:
            product = term.matvec(v)
            total = {name: tensor + product[name] for name, tensor in total.items()}
        return total

    @property
    def terms(self) -> Sequence[FisherMatrix]:
        return self._terms

    def to_dense(self) -> Tensor:
        order = self.shapes
        dense = [term.embedded(order).to_dense() for term in self.terms]
        return sum(dense[1:], start=dense[0])

    def diagonal(self) -> Parameters:
        diagonals = [term.diagonal() for term in self.terms]
        return {
            name: sum((d[name] for d in diagonals[1:]), start=diagonals[0][name])
            for name in self.shapes
        }

    def scaled(self, factor: float) -> "SumFisher":
        return SumFisher([term.scaled(factor) for term in self.terms], self.num_examples)

    def embedded(self, shapes: Shapes) -> "SumFisher":
        return SumFisher([term.embedded(shapes) for term in self.terms], self.num_examples)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "SumFisher":
        # Term by term: matrix-free ones keep their network.
        return SumFisher([term.mapped(function) for term in self.terms], self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    @property
    def has_units(self) -> bool:
        return all(term.has_units for term in self.terms)

    def _shrunk(self, amount: float) -> "SumFisher":
        return SumFisher([term.shrunk(amount) for term in self.terms], self.num_examples)

    def matvec_with(
        self,
        v: Mapping[str, Tensor],
        product: Callable[[FisherMatrix, Parameters], Parameters],
    ) -> Parameters:
        products = [term.matvec_with(v, product) for term in self.terms]
        return {n: sum((p[n] for p in products[1:]), start=products[0][n]) for n in self.shapes}

    def check_entries(self) -> None:
        for term in self.terms:
            term.check_entries()

    def attached(self, model: nn.Module) -> "SumFisher":
        return SumFisher([term.attached(model) for term in self.terms], self.num_examples)

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(\sum_t F_t + \delta I) u = v`.

        By the dense matrix up to :data:`DENSE_LIMIT` parameters.  Above by conjugate gradients,
        up to the rounding of single or double precision.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        if self.num_parameters <= DENSE_LIMIT:
            return super().solve(v, damping)
        check_not_negative(damping, "damping")
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return conjugate_gradients(self.matvec, self.diagonal(), v, damping)

    def state(self) -> State:
        tensors, about = combined_states(self.terms)
        return tensors, {"terms": about, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        return cls(split_states(tensors, about["terms"]), about["num_examples"])


def _mean_step(sizes: Sequence[Tensor | float]) -> float:
    """The mean of step sizes, weighted with the squared gradients.

    Adam's step sizes are proportional to the inverse root mean square :math:`r` of the gradient.
    The mean weighted with :math:`r^2` is then the sum of :math:`r` over the sum of :math:`r^2`.
    """
    tensors = [size for size in sizes if isinstance(size, Tensor)]
    if not tensors:
        return float(sizes[0]) if sizes else 0.0
    inverse = torch.cat([size.flatten() for size in tensors]).reciprocal()
    return float(inverse.sum() / inverse.square().sum())


def combined_states(matrices: Sequence[FisherMatrix]) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors of several matrices, numbered, and their descriptions."""
    tensors, about = {}, []
    for index, matrix in enumerate(matrices):
        inner, description = matrix.description()
        tensors.update({f"{index}/{key}": value for key, value in inner.items()})
        about.append(description)
    return tensors, about


def split_states(tensors: Mapping[str, Tensor], about: Sequence[Any]) -> list[FisherMatrix]:
    """The inverse of :func:`combined_states`."""
    matrices = []
    for index, description in enumerate(about):
        prefix = f"{index}/"
        inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        matrices.append(FisherMatrix.from_description(inner, description))
    return matrices
