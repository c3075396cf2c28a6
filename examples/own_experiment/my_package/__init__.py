"""A network, data and a strategy of one's own: docs/own_experiment.md."""
