"""What the Fisher information says of a model: thin users of a :class:`~ewc.FisherMatrix`."""

from ewc.statistics.bounds import cramer_rao_bound
from ewc.statistics.expectation import Density, expectation
from ewc.statistics.overlap import fisher_overlap, fisher_overlap_by_layer
from ewc.statistics.parametric import (
    Formulations,
    formulations,
    parametric_fisher,
    sampled_parametric_fisher,
)

__all__ = [
    "Density",
    "Formulations",
    "cramer_rao_bound",
    "expectation",
    "fisher_overlap",
    "fisher_overlap_by_layer",
    "formulations",
    "parametric_fisher",
    "sampled_parametric_fisher",
]
