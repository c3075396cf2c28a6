"""The forecast of forgetting."""
