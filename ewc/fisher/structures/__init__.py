"""What of the Fisher matrix to keep: the requests, and what is summed up for each."""
