"""The application: continual-learning experiments, configured by Hydra."""
