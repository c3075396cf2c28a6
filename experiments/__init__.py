"""The application: continual-learning experiments, configured by Hydra."""

import warnings

# Said by avalanche-lib 0.6.0 on import and on use, and of no concern here: the quadratic
# program solvers serve strategies that are not used, and the metrics are our own.
warnings.filterwarnings("ignore", message="no QP solver")
warnings.filterwarnings("ignore", message="No loggers specified")
