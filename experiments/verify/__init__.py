"""The claims about the statistics, measured: ``python -m experiments.verify row=<topic>|all``."""
