"""How the jobs of a sweep are chosen and started, where Hydra's own ways do not suffice."""
