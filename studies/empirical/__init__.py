"""The empirical Fisher."""
