"""From the scores of the outputs back to the parameters."""
