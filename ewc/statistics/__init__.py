"""What a Fisher matrix says of a model: functions of a :class:`~ewc.FisherMatrix`."""

from ewc.statistics.approximation import (
    error_by_layer,
    relative_error,
    share_between_layers,
)
from ewc.statistics.asymptotics import (
    ChiSquaredTest,
    confidence_intervals,
    likelihood_ratio_test,
    robust_covariance,
    score_test,
    standard_errors,
    wald_test,
)
from ewc.statistics.bounds import cramer_rao_bound
from ewc.statistics.curvature import (
    DivergenceProfile,
    divergence_profile,
    network_formulations,
)
from ewc.statistics.families.expectation import Density, expectation
from ewc.statistics.families.geodesic import Geodesic, geodesic, geodesic_distance
from ewc.statistics.families.metric import fisher_metric
from ewc.statistics.families.parametric import (
    Formulations,
    formulations,
    parametric_fisher,
    sampled_parametric_fisher,
)
from ewc.statistics.geometry import fisher_rao_distance, path_length
from ewc.statistics.influence import (
    influence,
    loss_gradient,
    parameters_without,
    self_influence,
)
from ewc.statistics.model_selection import (
    aic,
    bic,
    effective_parameters,
    laplace_log_evidence,
    tic,
)
from ewc.statistics.overlap import fisher_overlap, fisher_overlap_by_layer
from ewc.statistics.spectrum import (
    SpectralDensity,
    effective_dimension,
    effective_dimension_estimate,
    largest_eigenvalue,
    leading_eigenvector,
    spectral_density,
)

__all__ = [
    "ChiSquaredTest",
    "Density",
    "DivergenceProfile",
    "Formulations",
    "Geodesic",
    "SpectralDensity",
    "aic",
    "bic",
    "confidence_intervals",
    "cramer_rao_bound",
    "divergence_profile",
    "effective_dimension",
    "effective_dimension_estimate",
    "effective_parameters",
    "error_by_layer",
    "expectation",
    "fisher_metric",
    "fisher_overlap",
    "fisher_overlap_by_layer",
    "fisher_rao_distance",
    "formulations",
    "geodesic",
    "geodesic_distance",
    "influence",
    "laplace_log_evidence",
    "largest_eigenvalue",
    "leading_eigenvector",
    "likelihood_ratio_test",
    "loss_gradient",
    "network_formulations",
    "parameters_without",
    "parametric_fisher",
    "path_length",
    "relative_error",
    "robust_covariance",
    "sampled_parametric_fisher",
    "score_test",
    "self_influence",
    "share_between_layers",
    "spectral_density",
    "standard_errors",
    "tic",
    "wald_test",
]
