"""Fisher matrices: algebra only, without a network or data."""
