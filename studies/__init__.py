"""The claims about the statistics, measured: ``python -m studies row=<topic>|all``."""
