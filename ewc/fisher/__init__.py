r"""Fisher information matrices of neural networks.

**The matrix.**  A network maps an input :math:`x` to outputs
:math:`f = f_\theta(x) \in R^C`.  A likelihood :math:`p(y \mid f)` gives the outputs their
meaning.  Let :math:`J_n = \partial f(x_n) / \partial \theta` be the Jacobian of example
:math:`n` and :math:`s(y) = \partial \log p(y \mid f) / \partial f` the score.  Every
matrix of this package has the form

.. math:: F = \frac1N \sum_n J_n^\top \Big( \sum_k s_{kn} s_{kn}^\top \Big) J_n ,

the *mean over examples* of pulled-back outer products.  The information of a whole data
set, :math:`N F`, is ``fisher.precision``.

**Two choices.**  An *estimator* chooses the vectors :math:`s_{kn}`: an exact factor of
:math:`E_y[s s^\top]`, scores of sampled targets, or the score of the observed one.  A
*structure* chooses the part of the sum to keep: the diagonal, Kronecker factors, the dense
matrix, and so on.  The two choices are independent.

**Speed.**  The uses of the parameters are read from the autograd graph.  The vectors are
pulled back to the *results of these operations*, never to the weights.  For a linear map with
inputs :math:`a` and output gradients :math:`g` at one position, the diagonal is
:math:`(\sum_k g_k^2)^\top (a^2)`.  This is one matrix product, and no gradient of a single
example is stored.  With ``C`` classes the exact matrix needs :math:`C - 1` vectors.

**Modules.**

- :mod:`~ewc.fisher.information`: the loop over the data.
- :mod:`~ewc.fisher.data_pass`: the data in chunks, with their score vectors.
- :mod:`~ewc.fisher.estimators`: the score vectors, exact, drawn or observed.
- :mod:`~ewc.fisher.structures`: the structures, and their sums over the data.
- :mod:`~ewc.fisher.implicit`: products with a matrix that is never made.
- :mod:`~ewc.fisher.sampling`: Monte Carlo matrices with a standard error.
- :mod:`~ewc.fisher.distributed`: sums over processes.
- :mod:`~ewc.fisher.network_state`: evaluation mode, and all as it was afterwards.
- :mod:`~ewc.fisher.faults`: the messages for values that are not finite.
- :mod:`~ewc.fisher.recognition`: a list of what the pass recognises in a network.

:mod:`ewc.pullback` goes through the network.
"""

from ewc.fisher.estimators import Empirical, Estimator, Exact, MonteCarlo
from ewc.fisher.implicit.implicit import Implicit
from ewc.fisher.implicit.implicit_fisher import ImplicitFisher
from ewc.fisher.information import fisher_information
from ewc.fisher.recognition import recognised
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
    "recognised",
    "sampled_fisher",
]
