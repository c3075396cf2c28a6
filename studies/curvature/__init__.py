"""The expected curvature of the log-likelihood."""
