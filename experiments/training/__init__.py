"""How a network is trained on a task: batches, schedules and what watches them."""
