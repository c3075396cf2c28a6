"""The Fisher information of parametric families."""
