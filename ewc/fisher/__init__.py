r"""Fisher information matrices of neural networks.

**What is computed.**  A network maps an input :math:`x` to outputs
:math:`f = f_\theta(x) \in R^C`; a likelihood :math:`p(y \mid f)` says what the outputs
mean.  Let :math:`J_n = \partial f(x_n) / \partial \theta` be the Jacobian of example
:math:`n` and :math:`s(y) = \partial \log p(y \mid f) / \partial f` the score.  Every
matrix of this package has the form

.. math:: F = \frac1N \sum_n J_n^\top \Big( \sum_k s_{kn} s_{kn}^\top \Big) J_n ,

the *mean over examples* of pulled-back outer products.  The information of a whole data
set, :math:`N F`, is always written out: ``fisher.precision``.

**Two choices.**  An *estimator* chooses the vectors :math:`s_{kn}`: an exact factor of
:math:`E_y[s s^\top]`, scores of sampled targets, or the score of the observed one.  A
*structure* chooses what of the sum is kept: the diagonal, Kronecker factors, the dense
matrix, and so on.  The two do not know of each other.

**How it is fast.**  The uses of the parameters are read from the autograd graph, and the
vectors are pulled back to the *results of these operations*, never to the weights.  For a
linear map with inputs :math:`a` and output gradients :math:`g` at one position the diagonal
is :math:`(\sum_k g_k^2)^\top (a^2)`: one matrix product, with no gradient of a single
example ever stored.  With ``C`` classes the exact matrix needs :math:`C - 1` vectors.

**Where things are.**  :mod:`~ewc.fisher.information` checks the arguments, and
:mod:`~ewc.fisher.data_pass` loops over the data.  For each batch :mod:`~ewc.pullback.tape` runs one
forward pass.  It finds the uses of the parameters with :mod:`~ewc.pullback.graph`, and the rules in
:mod:`ewc.pullback.rules` pull the vectors back to them.  :mod:`~ewc.pullback.pullback` hands the
vectors of each layer to the accumulator of a structure in :mod:`ewc.fisher.structures`.
"""

from ewc.fisher.estimators import Empirical, Estimator, Exact, MonteCarlo
from ewc.fisher.implicit.implicit import Implicit
from ewc.fisher.implicit.implicit_fisher import ImplicitFisher
from ewc.fisher.information import fisher_information
from ewc.fisher.sampling import sampled_fisher
from ewc.fisher.structures.block_diagonal import BlockDiagonal
from ewc.fisher.structures.dense import Dense
from ewc.fisher.structures.diagonal import Diagonal
from ewc.fisher.structures.eigenvalue_corrected import EigenvalueCorrected
from ewc.fisher.structures.kronecker import Kronecker
from ewc.fisher.structures.low_rank import LowRank
from ewc.fisher.structures.structure import Structure

__all__ = [
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "EigenvalueCorrected",
    "Empirical",
    "Estimator",
    "Exact",
    "Implicit",
    "ImplicitFisher",
    "Kronecker",
    "LowRank",
    "MonteCarlo",
    "Structure",
    "fisher_information",
    "sampled_fisher",
]
