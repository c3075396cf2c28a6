"""What runs and sweeps leave: results, tables, pictures and W&B."""
