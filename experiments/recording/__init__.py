"""What a run writes while it goes on: records, checkpoints, results, and who owns its folder."""
