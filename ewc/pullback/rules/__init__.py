"""The rules: the gradients of the parameters of each kind of operation."""
