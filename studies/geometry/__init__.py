"""Information geometry."""
