"""The topics: each is a package of this name with a module ``study``."""

from pathlib import Path

STUDIES = Path(__file__).parent
"""The folder with the topics."""

TOPICS = {
    "parametric": "What does one draw say about the parameters of its distribution?",
    "formulations": "When is the variance of the score equal to the expected curvature?",
    "curvature": "How fast does the log-likelihood fall around the model?",
    "cramer_rao": "How small can the variance of an estimator be?",
    "asymptotics": "Are standard errors, intervals and tests right?",
    "kfac": "How close is K-FAC to the exact matrix?",
    "empirical": "What goes wrong when the observed labels replace the model's?",
    "natural_gradient": "Does natural gradient descent need fewer steps, and less time?",
    "geometry": "How far apart are two distributions, and which step is steepest?",
    "influence": "What did one training example do to the fit?",
    "model_selection": "Does the evidence choose the right model?",
    "spectrum": "How many directions of a large network does the data determine?",
    "forgetting": "Does the penalty predict how much a network forgets?",
}
"""The question of every study."""
