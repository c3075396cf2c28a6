"""What Hydra finds of this project: plugins must lie in the namespace ``hydra_plugins``."""
