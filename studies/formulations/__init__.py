"""The two formulations of the Fisher information."""
