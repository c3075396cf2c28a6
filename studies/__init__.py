"""What theory says about the Fisher information, measured: ``python -m studies``."""
