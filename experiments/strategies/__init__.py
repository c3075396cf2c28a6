"""What is done against forgetting."""
